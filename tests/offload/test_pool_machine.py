"""Any order of opening, appending, sharing, truncating and closing, against lists of rows."""

from __future__ import annotations

import torch
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pools import ask, exact, make_pool, queries

from vllm_sparse.cpu_offload import StoreFull

PAGE, LAYERS, MOST = 16, 2, 160


class PoolMachine(RuleBasedStateMachine):
    """A request is known by the seeds of its rows, which no other row has unless it is shared."""

    @initialize(dtype=strategies.sampled_from([torch.float32, torch.bfloat16]))
    def start(self, dtype):
        self.pool = make_pool(
            page_rows=PAGE, max_tokens=MOST, kv_dtype=dtype, host_bytes=14 * 2 * 2 * PAGE * 2 * 64
            * dtype.itemsize, max_requests=3,
        )  # fmt: skip
        self.rows: dict[int, list[list[int]]] = {}  # slot -> layer -> seeds of its rows
        self.next = 0

    def teardown(self):
        self.pool.shutdown()

    def row(self, seed: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * LAYERS + layer)
        k, v = torch.randn(2, 2, 64, generator=generator).to(self.pool.layout.dtype).float()
        return k, v

    def whole(self, seeds: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self.row(seed, layer) for seed in seeds]
        k = torch.stack([k for k, _ in pairs]) if pairs else torch.zeros(0, 2, 64)
        return k, torch.stack([v for _, v in pairs]) if pairs else k

    def key(self, seeds: list[int]) -> tuple[int, ...]:
        return tuple(seeds)

    @rule()
    def open(self):
        if len(self.rows) == 3:
            try:
                self.pool.open("one more")
                raise AssertionError("a fourth request was opened")
            except StoreFull:
                return
        self.rows[self.pool.open("a")] = [[] for _ in range(LAYERS)]

    @precondition(lambda self: self.rows)
    @rule(data=strategies.data(), count=strategies.integers(0, 40))
    def append(self, data, count):
        slot = data.draw(strategies.sampled_from(sorted(self.rows)))
        seeds = self.rows[slot]
        start = min(map(len, seeds))
        count = min(count, MOST - start)
        new = list(range(self.next, self.next + count))
        self.next += count
        after = seeds[0][:start] + new
        keys = [
            self.key(after[: (n + 1) * PAGE])
            for n in range(start // PAGE, len(after) // PAGE)
        ]  # fmt: skip
        try:
            self.pool.reserve(slot, len(after))
        except StoreFull:
            return
        for layer in range(LAYERS):
            self.pool.append(slot, layer, *self.whole(new, layer), keys=keys)
            seeds[layer] = list(after)

    @precondition(lambda self: self.rows)
    @rule(data=strategies.data())
    def share(self, data):
        empty = [s for s, seeds in self.rows.items() if not seeds[0]]
        full = [s for s, seeds in self.rows.items() if len(seeds[0]) >= PAGE]
        if not empty or not full or len(self.pool.store.of(empty[0]).pages):
            return
        seeds = self.rows[data.draw(strategies.sampled_from(full))][0]
        keys = [self.key(seeds[: n * PAGE]) for n in range(1, len(seeds) // PAGE + 1)]
        found = self.pool.share(empty[0], keys)
        assert found % PAGE == 0 and found <= len(seeds)
        self.rows[empty[0]] = [seeds[:found] for _ in range(LAYERS)]

    @precondition(lambda self: self.rows)
    @rule(data=strategies.data(), rows=strategies.integers(0, MOST))
    def truncate(self, data, rows):
        slot = data.draw(strategies.sampled_from(sorted(self.rows)))
        try:
            self.pool.truncate(slot, rows)
        except StoreFull:
            return
        self.rows[slot] = [seeds[:rows] for seeds in self.rows[slot]]

    @precondition(lambda self: self.rows)
    @rule(data=strategies.data())
    def close(self, data):
        slot = data.draw(strategies.sampled_from(sorted(self.rows)))
        self.pool.close_request(slot)
        del self.rows[slot]

    @precondition(lambda self: self.rows)
    @rule(data=strategies.data())
    def attend(self, data):
        slots = sorted(self.rows)
        lengths = [len(self.rows[s][0]) for s in slots]
        first = [data.draw(strategies.integers(0, n)) for n in lengths]
        last = [data.draw(strategies.integers(f, n)) for f, n in zip(first, lengths, strict=True)]
        q = queries(len(slots))
        out, lse = ask(self.pool, 1, q, slots, first, last)
        for b, slot in enumerate(slots):
            k, v = self.whole(self.rows[slot][1][first[b] : last[b]], 1)
            if len(k):
                o, e = exact(q[b], k, v, self.pool.scale)
                torch.testing.assert_close(out[b].double(), o, rtol=2e-2, atol=2e-2)
                torch.testing.assert_close(lse[b].double(), e, rtol=1e-2, atol=1e-2)
            else:
                assert lse[b].isneginf().all()

    @invariant()
    def rows_are_what_was_written(self):
        if not hasattr(self, "rows"):
            return
        pages = self.pool.store.pages
        held = set()
        for slot, seeds in self.rows.items():
            request = self.pool.store.of(slot)
            held.update(request.pages)
            for layer in range(LAYERS):
                assert request.lengths[layer] == len(seeds[layer])
                k, v = self.pool.read(slot, layer, 0, len(seeds[layer]))
                want_k, want_v = self.whole(seeds[layer], layer)
                assert torch.equal(k.float(), want_k) and torch.equal(v.float(), want_v)
        assert pages.count - pages.free == len(held)
        for page in held:
            users = sum(page in self.pool.store.of(s).pages for s in self.rows)
            assert pages._pages[page].references == users


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
