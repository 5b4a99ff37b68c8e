"""The scheduler's books of the host stores: never more than fits, the same keys as the workers'."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_sparse.cpu_offload.ledger import Ledger
from vllm_sparse.cpu_offload.mirror import HostKV
from vllm_sparse.cpu_offload.pool import Pool
from vllm_sparse.cpu_offload.step import Start, Step

ROWS = 16  # of a page
LAYERS = 3


def test_a_request_is_admitted_with_all_that_it_may_need():
    ledger = Ledger(10, ROWS, 8)
    assert ledger.fits(10 * ROWS) and not ledger.fits(10 * ROWS + 1)
    ledger.admit("a", 4 * ROWS)
    assert ledger.pages.free == 10 and ledger.promised == 4  # nothing is written yet
    assert ledger.fits(6 * ROWS) and not ledger.fits(7 * ROWS)
    ledger.append("a", ROWS + 1)
    assert ledger.pages.free == 8 and ledger.promised == 2
    assert ledger.fits(6 * ROWS) and not ledger.fits(7 * ROWS)
    ledger.close("a")
    assert ledger.promised == 0 and ledger.fits(10 * ROWS)


def test_there_are_only_so_many_slots():
    ledger = Ledger(10, ROWS, 2)
    ledger.admit("a", 1)
    ledger.admit("b", 1)
    assert not ledger.fits(1)
    ledger.close("a")
    assert ledger.fits(1)


def test_a_shared_prefix_counts_once():
    ledger = Ledger(4, ROWS, 8)
    ledger.admit("a", 3 * ROWS)
    ledger.append("a", 2 * ROWS)
    ledger.seal("a", 0, ["x", "y"])
    assert ledger.found(["x", "y", "z"]) == 2
    assert not ledger.fits(3 * ROWS)
    assert not ledger.fits(3 * ROWS, ["x"])
    assert ledger.fits(3 * ROWS, ["x", "y"])
    ledger.close("a")
    # Nobody holds them now: whoever takes them over takes two free pages.
    assert ledger.fits(4 * ROWS, ["x", "y"]) and not ledger.fits(5 * ROWS, ["x", "y"])
    ledger.forget()
    assert ledger.found(["x"]) == 0 and ledger.pages.free == 4


def test_asking_whether_it_fits_changes_nothing():
    ledger = Ledger(2, ROWS, 8)
    for name in "ab":
        ledger.admit(name, ROWS)
        ledger.append(name, ROWS)
        ledger.seal(name, 0, [name])
        ledger.close(name)
    ledger.fits(ROWS, ["a"])
    ledger.admit("c", ROWS)
    ledger.append("c", ROWS)  # takes the page that was used least recently
    assert ledger.found(["a"]) == 0 and ledger.found(["b"]) == 1


def pool(layers: int, pages: int) -> Pool:
    shape = {"heads": 1, "kv_heads": 1, "head_size": 16, "dtype": torch.float32}
    return Pool(
        layers=layers, host_bytes=pages * layers * ROWS * 2 * 16 * 4, page_rows=ROWS,
        max_requests=8, max_tokens=1024, **shape,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_books_and_stores_agree_over_random_schedules(seed: int):
    """Arrivals, shared prefixes, preemptions, ends: the store has what the ledger says, and
    `HostKV` checks the number of free pages after each step."""
    rng = random.Random(seed)
    pages = rng.randint(6, 20)
    ledger = Ledger(pages, ROWS, 8)
    host = HostKV([0, 2], [1], pool(2, pages), pool(1, pages))
    texts = {}  # of every request that ever was: what stands at each position
    running: list[str] = []
    preempted: list[str] = []
    closed: list[str] = []
    rows_of = {}

    def key(name: str, page: int) -> tuple:
        return tuple(texts[name][: (page + 1) * ROWS])

    for number in range(60):
        started: list[Start] = []
        for name in list(running):
            if rng.random() < 0.15:
                running.remove(name)
                if rng.random() < 0.5:
                    preempted.append(name)
                else:
                    ledger.close(name)
                    closed.append(name)
        for name in list(preempted):
            if rng.random() < 0.5:
                preempted.remove(name)
                running.append(name)
                kept = ledger.held[name].acknowledged // ROWS * ROWS
                ledger.truncate(name, kept)
                rows_of[name] = kept
                started.append(Start(name, kept, []))
        if rng.random() < 0.6:
            name = f"r{number}"
            donor = rng.choice([*texts, None])
            shared = texts[donor][: rng.randrange(len(texts[donor]))] if donor else []
            texts[name] = shared + [rng.randrange(1 << 30) for _ in range(rng.randint(1, 60))]
            keys = [key(name, i) for i in range((len(texts[name]) - 1) // ROWS)]
            keys = keys[: ledger.found(keys)]
            if ledger.fits(len(texts[name]), keys):
                ledger.admit(name, len(texts[name]), keys)
                rows_of[name] = len(keys) * ROWS
                started.append(Start(name, rows_of[name], keys))
                running.append(name)
        step = Step(closed=closed, started=started)
        closed = []
        for i, name in enumerate(running):
            new = min(rng.choice([1, 1, 5, 40]), len(texts[name]) - rows_of[name])
            if new == 0:
                continue
            step.rows[name] = rows_of[name], new
            step.tails[name] = (100 + i,)
            ledger.append(name, new)
        for name, (before, new) in step.rows.items():
            names = [key(name, i) for i in range(before // ROWS, (before + new) // ROWS)]
            if names:
                step.keys[name] = names
                ledger.seal(name, before // ROWS, names)
        step.free_pages = ledger.pages.free
        host.begin(step)
        order = list(step.rows)
        rng.shuffle(order)  # the worker's batch has an order of its own
        starts = [0]
        values = []
        for name in order:
            before, new = step.rows[name]
            starts.append(starts[-1] + new)
            values += texts[name][before : before + new]
            rows_of[name] = before + new
        tails = [step.tails[name][0] for name in order]
        assert host.requests(0, tails) == order
        for layer in (0, 1, 2):
            k = torch.tensor(values, dtype=torch.float32)[:, None, None].expand(-1, 1, 16) + layer
            host.append(layer, order, starts, k, -k)
        host.check()
        assert host.end() == {n: a + b for n, (a, b) in step.rows.items()}
        for name, count in host.end().items():
            ledger.held[name].acknowledged = count
        # Every row of everyone is what stands there, in every layer.
        for name in running:
            for layer, place in host.places.items():
                slot = host.slots[name][place.store]
                k, v = host.pools[place.store].read(slot, place.layer, 0, rows_of[name])
                want = torch.tensor(texts[name][: rows_of[name]], dtype=torch.float32) + layer
                assert torch.equal(k[:, 0, 0], want)
                assert torch.equal(v[:, 0, 0], -want)


def test_a_fault_of_ours_is_said_and_not_served():
    host = HostKV([0], [], pool(1, 4), None)
    host.begin(Step(started=[Start("a", 0, [])], rows={"a": (0, 2)}, tails={"a": (5,)}))
    rows = torch.zeros(2, 1, 16)
    with pytest.raises(RuntimeError, match=r"gets 1 more, where the scheduler counts 0 and 2"):
        host.append(0, ["a"], [0, 1], rows, rows)
    host.append(0, ["a"], [0, 2], rows, rows)
    with pytest.raises(RuntimeError, match=r"has 2 rows .* counts 0 and 2"):
        host.append(0, ["a"], [0, 2], rows, rows)
    with pytest.raises(RuntimeError, match=r"\[3\] free pages, the scheduler counts 0"):
        host.check()
    with pytest.raises(RuntimeError, match=r"0 rows of a prefix .* counts on 16"):
        host.begin(Step(started=[Start("b", 16, ["x"])]))
