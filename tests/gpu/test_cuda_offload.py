"""Layers on a GPU over host memory: what is copied, what is cut, and what is waited for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cuda_layer import HEADS, KV_HEADS, PAGE, PAGES, SIZE, Layer
from gpu_cases import HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import fill, make_pool
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse import cuda_offload
from vllm_sparse.cpu_offload import Pool, kv_spec, pinned
from vllm_sparse.cpu_offload.layout import Layout
from vllm_sparse.cpu_offload.mirror import HostKV
from vllm_sparse.cpu_offload.step import Step
from vllm_sparse.cuda_metadata import SparseCudaMetadataBuilder
from vllm_sparse.kernels.paged_cache import gather_keys, halves
from vllm_sparse.offload import Batch, OffloadedLayer
from vllm_sparse.staging import Rows, Staging, runs
from vllm_sparse.transfers import Transfers

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(HAS_GPU, reason="stands in for a GPU; here is one")


@given(st.lists(st.integers(0, 9), max_size=12))
def test_runs_are_the_pages_in_few_copies(pages):
    found = list(runs(pages))
    assert [page + i for _, page, count in found for i in range(count)] == pages
    assert [at for at, _, _ in found] == [
        sum(c for _, _, c in found[:i]) for i in range(len(found))
    ]
    assert len(found) == sum(b != a + 1 for a, b in zip([-9, *pages], pages, strict=False))


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("first, new", [(0, 5), (31, 1), (32, 40), (50, 30), (80, 16)])
def test_staged_rows_are_the_hosts_and_the_new_ones(first, new, sketched):
    layout = Layout(3, KV_HEADS, SIZE, torch.float16, page_rows=32, sketched=sketched)
    staging = Staging(layout, 96, torch.float16, CPU)
    for room in staging._rooms:
        room.bytes.fill_(0xFF)  # NaN
    part = torch.randint(0, 60, (7, layout.part_bytes), dtype=torch.uint8)
    pages = [5, 2, 3]
    key, value = torch.randn(2, new, KV_HEADS, SIZE).half()
    cache = staging.take(Rows("a", part, pages, first), key, value)
    staging.wait()
    length = first + new
    old = layout.rows(part)[pages].transpose(1, 2).flatten(0, 1)[:first]  # [first, Hkv, 2, D]
    for got, name, fresh in zip(halves(cache, SIZE), (0, 1), (key, value), strict=True):
        rows = gather_keys(got, staging.block_table[0], length)
        assert torch.equal(rows.transpose(0, 1), torch.cat([old[:, :, name], fresh]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("first, new", [(0, 5), (31, 1), (32, 40), (50, 30)])
def test_int8_rows_are_unpacked(first, new, dtype):
    layout = Layout(3, KV_HEADS, SIZE, torch.int8, page_rows=32, sketched=True)
    staging = Staging(layout, 96, dtype, CPU)
    for room in staging._rooms:
        room.bytes.fill_(0xFF)  # scales that are NaN
    part = torch.randint(0, 256, (7, layout.part_bytes), dtype=torch.uint8)
    layout.scales(part).copy_(torch.rand(7, KV_HEADS, 32, 2))
    pages = [5, 2, 3]
    key, value = torch.randn(2, new, KV_HEADS, SIZE).to(dtype)
    names = ["a", "b"]
    for name in names:  # the second came ahead
        cache = staging.take(Rows(name, part, pages, first), key, value)
        staging.ahead(Rows("b", part, pages, first))
        meant = (layout.rows(part).float() * layout.scales(part)[..., None])[pages]
        old = meant.transpose(1, 2).flatten(0, 1)[:first].to(dtype)  # [first, Hkv, 2, D]
        for got, which, fresh in zip(halves(cache, SIZE), (0, 1), (key, value), strict=True):
            rows = gather_keys(got, staging.block_table[0], first + new)
            assert torch.equal(rows.transpose(0, 1), torch.cat([old[:, :, which], fresh]))


def test_rooms_take_turns_and_what_was_copied_ahead_is_not_copied_again():
    layout = Layout(1, KV_HEADS, SIZE, torch.float16, page_rows=32)
    staging = Staging(layout, 64, torch.float16, CPU)
    part = torch.zeros(2, layout.part_bytes, dtype=torch.uint8)
    none = torch.empty(0, KV_HEADS, SIZE).half()

    def take(name, fill, ahead=None):
        layout.rows(part).fill_(fill)
        cache = staging.take(Rows(name, part, [0, 1], 40), none, none)
        if ahead is not None:
            layout.rows(part).fill_(ahead)
            staging.ahead(Rows(name + 1, part, [0, 1], 40))
        return cache

    one = take(1, 1.0, ahead=2.0)
    two = take(2, 9.0)  # came ahead
    assert (one == 1).all() and (two == 2).all()
    three = take(3, 3.0, ahead=7.0)
    five = take(5, 5.0)  # another one came ahead
    assert (three == 3).all() and (five == 5).all()
    assert one.data_ptr() == three.data_ptr() != two.data_ptr() == five.data_ptr()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_layer_of_a_prompt_is_copied_once_whatever_group_it_is_of(groups, monkeypatch):
    """A layer that stays on the device puts the others into groups of their own."""
    pool = make_pool(layers=4, kv_heads=2, max_tokens=1024)
    slot = fill(pool, "r", 512)
    staging = Staging(pool.layout, 1024, torch.float32, CPU)
    copied = []
    copy = staging._fill
    monkeypatch.setattr(
        staging, "_fill", lambda room, rows: copied.append(rows.name[1]) or copy(room, rows)
    )
    host = SimpleNamespace(pool=pool, slots={"r": [slot]})
    segment = SimpleNamespace(first=0, seq_lens=[600], query_lens=[88])
    new = torch.zeros(88, 2, pool.layout.head_size)
    for step in (1, 2):
        host.step = Step(number=step)
        batches = [Batch(["r"]) for _ in range(groups)]
        for number in range(4):
            made = object.__new__(cuda_offload.CudaOffloadedLayer)
            made.host, made.place = host, SimpleNamespace(store=0, layer=number)
            following = made._following([segment])
            staging.take(made._host_rows(batches[number % groups], segment, number), new, new)
            for after in following:
                staging.ahead(made._host_rows(batches[number % groups], *after))
    assert copied == [0, 1, 2, 3] * 2
    pool.shutdown()


def test_a_buffer_is_kept_until_it_is_too_small():
    transfers = Transfers(CPU)
    small = transfers.fetch("key", torch.arange(6.0).view(2, 3))
    transfers.launched()
    transfers.wait()
    assert torch.equal(small, torch.arange(6.0).view(2, 3))
    assert transfers.buffer("key", (5,), torch.float16).data_ptr() == small.data_ptr()
    assert transfers.buffer("value", (5,), torch.float16).data_ptr() != small.data_ptr()
    large = transfers.buffer("key", (3000,), torch.float32)
    assert large.is_contiguous() and large.data_ptr() != small.data_ptr()


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=5), page=st.sampled_from([16, 32]),
    window=st.integers(16, 200), sink=st.integers(0, 70),
)  # fmt: skip
def test_device_and_host_have_each_row_of_a_decode_once(lengths, page, window, sink):
    layer = object.__new__(OffloadedLayer)
    layer.window, layer.sink, layer.place = window, sink, SimpleNamespace(store=0)
    names = [str(i) for i in range(len(lengths) + 1)]
    layer.host = SimpleNamespace(slots={name: [int(name) + 10] for name in names})
    # Block b of sequence i is 1000 i + b.
    blocks = -(-max(lengths) // page)
    table = torch.arange(blocks)[None] + 1000 * torch.arange(1, len(names))[:, None]
    near = layer.near(Batch(names), 1, lengths, table.int(), page)
    sinks = -(-sink // page)
    far = {} if near.far is None else dict(zip(near.far.rows.tolist(), range(99), strict=False))
    for i, length in enumerate(lengths):
        rows = near.block_table[i].repeat_interleave(page).sub(1000 * (i + 1)) * page
        rows = (rows + torch.arange(page).repeat(near.block_table.shape[1])).tolist()
        seen = rows[: int(near.seq_lens[i])]
        if i in far:
            at = far[i]
            assert near.far.slots[at] == 10 + i + 1
            first, last = near.far.first[at], near.far.last[at]
            assert first == sinks * page and last <= length - window
            seen = [*seen, *range(first, last)]
        assert sorted(seen) == list(range(length))


@pytest.fixture
def layer(llama, monkeypatch):
    monkeypatch.setattr(cuda_offload, "settle", lambda impl, device: None)

    def make(**more):
        given = {"decode": "exact", "window": 64, "sink": 16, "break_even": 200, "coverage": 1.0}
        return Layer(llama, monkeypatch, **(given | more))

    return make


def offloading(made: Layer) -> SparseCudaMetadataBuilder:
    """The builder of layers whose middle is freed."""
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float16
    )
    spec = kv_spec.offloaded(spec, window=64, sink=16)
    name = made.layer.layer_name
    return SparseCudaMetadataBuilder(spec, [name], made.config, CPU)


@needs_no_gpu
def test_steps_are_cut_where_rows_are_gone_from_the_device(layer, monkeypatch):
    made = layer()
    whole, cut = made.builder, offloading(made)
    built = {}

    def build(builder):
        made.builder = builder
        monkeypatch.setattr(made.impl, "forward", lambda *a: None)
        *_, metadata = made.step([(300, 1), (0, 70), (90, 10), (120, 90), (150, 20)])
        return metadata

    for name, builder in (("whole", whole), ("cut", cut)):
        built[name] = build(builder)
        sequences = built[name].sequences
        assert sequences.starts == [0, 1, 71, 81, 171, 191]
        table = torch.arange(PAGES).view(5, PAGES // 5)
        ends = [300, 69, 99, 209, 169]
        assert sequences.tails == [int(table[i, end // PAGE]) for i, end in enumerate(ends)]
    kinds = [(s.first, len(s.seq_lens), s.decodes, s.sparse, s.far) for s in built["cut"].segments]
    # With 90 rows computed, those from row 16 to 26 are in the sink's last block or after it.
    assert kinds == [
        (0, 1, True, False, False), (1, 2, False, False, False), (3, 1, False, True, True),
        (4, 1, False, False, True),
    ]  # fmt: skip
    assert not any(s.far for s in built["whole"].segments)


@needs_no_gpu
def test_nothing_of_it_is_captured(layer, llama):
    made = layer()
    support = SparseCudaMetadataBuilder.get_cudagraph_support
    assert support(made.config, None) == AttentionCGSupport.NEVER
    made.config.additional_config = {"sparse": {}}
    assert support(made.config, None) == AttentionCGSupport.UNIFORM_BATCH


@needs_no_gpu
def test_trial_runs_give_zeros(layer, monkeypatch):
    made = layer()
    host = SimpleNamespace(places={0: SimpleNamespace(store=0, layer=0)}, step=None, lost=None)
    query = torch.randn(3, HEADS, SIZE).half()
    metadata = SimpleNamespace(segments=[], decodes=False)

    def forward():
        out = torch.full_like(query, torch.nan)
        return made.impl.forward(made.layer, query, query, query, made.cache, metadata, out)

    assert not forward().any()  # before the stores are there
    assert made.impl.offload is None
    for name, found in (("is_made", True), ("host", host), ("kv_cache_group", 0)):
        monkeypatch.setattr(
            cuda_offload.connector, name, lambda *a, found=found: found, raising=False
        )
    assert not forward().any()  # and before the first step
    assert host.settle == made.impl.staging.wait


def test_fp8_caches_are_refused_by_name(llama, monkeypatch):
    with pytest.raises(ValueError, match="this cache is FP8; give --kv-cache-dtype bfloat16"):
        Layer(llama, monkeypatch, kv_cache_dtype="fp8", decode="exact")


class Runtime:
    def __init__(self, code: int) -> None:
        self.code, self.held = code, {}

    def cudaHostRegister(self, address, nbytes, flags):  # CUDA's name
        if self.code == 0:
            self.held[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address):
        del self.held[address]


def pool(**more) -> Pool:
    shape = {"layers": 1, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": SIZE}
    return Pool(
        **shape, dtype=torch.float16, host_bytes=1 << 20, max_requests=2, max_tokens=256, **more
    )


def test_rows_are_page_locked_until_the_store_is_closed(monkeypatch):
    runtime = Runtime(0)
    monkeypatch.setattr(pinned.torch.cuda, "cudart", lambda: runtime)
    made = pool(pinned=True)
    ((address, nbytes),) = runtime.held.items()
    part = made.part(0)
    assert made.store.pinned
    assert address <= part.data_ptr() and part.data_ptr() + part.numel() <= address + nbytes
    del part
    made.shutdown()
    assert not runtime.held
    unpinned = pool()
    assert not runtime.held
    unpinned.shutdown()


def test_what_cannot_be_page_locked_is_said_and_serves(monkeypatch, caplog):
    runtime = Runtime(2)
    monkeypatch.setattr(pinned.torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinned.torch, "zeros", lambda *a, **k: torch.empty(0))
    made = pool(pinned=True)
    monkeypatch.undo()
    assert "is not page-locked (cudaHostRegister says 2" in caplog.text
    assert not made.store.pinned
    slot = made.open("a")
    rows = torch.randn(3, KV_HEADS, SIZE).half()
    made.append(slot, 0, rows, -rows)
    assert torch.equal(made.read(slot, 0, 0, 3)[0], rows)
    made.shutdown()


def test_pages_change_hands_when_nothing_reads_them():
    """A request's end gives its pages to others: no copy to the device may be on its way then."""
    made = pool()
    host = HostKV([0], [], made, None)
    seen = []
    host.settle = lambda: seen.append(made.capacity().free_pages)
    slot = made.open("a")
    host.slots["a"] = [slot]
    made.append(slot, 0, *torch.randn(2, 3, KV_HEADS, SIZE).half())
    taken = made.capacity().free_pages
    host.begin(Step(closed=["a"]))
    assert seen == [taken] and made.capacity().free_pages == taken + 1
    made.shutdown()
