"""Host rows that are int8, as prompts read them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from pools import HEADS, KV_HEADS, SIZE, fill, make_pool, some

from vllm_sparse.cpu_offload.layout import Layout
from vllm_sparse.cpu_offload.mirror import Place
from vllm_sparse.cpu_offload.unpack import unpack
from vllm_sparse.kernels import sparse_prefill
from vllm_sparse.offload import Batch, OffloadedLayer
from vllm_sparse.unpacked import Unpacked

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Segment:
    first: int
    query_lens: list[int]
    sparse: bool
    block_table: torch.Tensor | None = None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_rounded_as_torch_does(isa, dtype):
    layout = Layout(1, kv_heads=3, head_size=80, dtype=torch.int8, page_rows=256)
    part = torch.zeros(3, layout.part_bytes, dtype=torch.uint8)
    layout.rows(part)[:] = torch.arange(-128, 128, dtype=torch.int8)[:, None, None]
    scales = layout.scales(part)
    scales[:] = torch.randn(scales.shape).exp()
    for kv_head, special in enumerate((1e-39, 1e-7, 2.0, 300.0, 3e36, torch.inf, torch.nan)):
        scales[:, kv_head % 3, kv_head::7] = special
    into = torch.empty(2, 3, 256, 2, 80, dtype=dtype)
    unpack(layout, part, [2, 0], into)
    want = (layout.rows(part).float() * scales[..., None])[[2, 0]].to(dtype)
    assert torch.isinf(want).any() and torch.isnan(want).any()
    torch.testing.assert_close(into, want, rtol=0, atol=0, equal_nan=True)
    unpack(layout, part, [], into[:0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_unpacked_in_the_order_that_is_asked_for(dtype):
    pool = make_pool(dtype=dtype, kv_dtype=torch.int8, sampler="vattention")
    slots = [fill(pool, str(n), n, seed=n) for n in (70, 200, 5)]
    pages = [p for slot in reversed(slots) for p in pool.store.of(slot).pages]
    unpacked = Unpacked(dtype)
    for layer in (1, 0):
        k, v = unpacked.fill(pool.layout, pool.part(layer), pages)
        assert k.dtype == v.dtype == dtype and k.shape == (len(pages), KV_HEADS, 64, SIZE)
        at = 0
        for slot, length in zip(reversed(slots), (5, 200, 70), strict=True):
            want = pool.read(slot, layer, 0, length)
            for got, rows in zip((k, v), want, strict=True):
                mine = got[at : at + -(-length // 64)].transpose(1, 2).flatten(0, 1)[:length]
                assert torch.equal(mine, rows.to(dtype))
            at += -(-length // 64)
    pool.shutdown()


def test_memory_is_kept_and_grows():
    pool = make_pool(kv_dtype=torch.int8)
    slot = fill(pool, "a", 300)
    pages, unpacked = pool.store.of(slot).pages, Unpacked(torch.float32)

    def address(count: int) -> int:
        return unpacked.fill(pool.layout, pool.part(0), pages[:count])[0].data_ptr()

    small = address(2)
    assert address(1) == small
    large = address(4)
    assert address(3) == address(1) == large
    pool.shutdown()


@pytest.mark.parametrize("lengths", [[300], [65, 300, 64]])
def test_segments_read_what_the_rows_mean(lengths):
    pool = make_pool(kv_dtype=torch.int8)
    fill(pool, "other", 100, seed=99)
    slots = [fill(pool, str(n), n, seed=n) for n in lengths]
    layer = object.__new__(OffloadedLayer)
    layer.host = SimpleNamespace(
        pool=pool, slots={str(n): [slot] for n, slot in zip(lengths, slots, strict=True)}
    )
    batch, new = Batch([str(n) for n in lengths]), 3
    q = some(new * len(lengths), seed=5, kv_heads=HEADS)[0]
    starts = torch.arange(0, len(q) + 1, new, dtype=torch.int32)
    segment = Segment(0, [new] * len(lengths), sparse=False)
    for number in (0, 1):  # the second finds its table made
        layer.place = Place(0, number)
        over, k, v = layer.segment(batch, segment)
        lens = torch.tensor(lengths, dtype=torch.int32)
        out, _ = sparse_prefill(q, k, v, over.block_table, starts, lens, None, scale=pool.scale)
        for i, (slot, n) in enumerate(zip(slots, lengths, strict=True)):
            kept = pool.read(slot, number, 0, n)
            keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in kept)
            for row in range(new):
                seen = n - new + row + 1
                weight = torch.einsum("hd,nhd->hn", q[i * new + row], keys[:seen]) * pool.scale
                want = torch.einsum("hn,nhd->hd", weight.softmax(-1), values[:seen])
                torch.testing.assert_close(out[i * new + row], want, rtol=1e-4, atol=1e-4)
    assert len(batch.segments) == 1
    pool.shutdown()


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_layers_that_cut_a_step_otherwise_read_their_own_segments(kv_dtype):
    """A short prompt, dense, before a long one: where a layer is always dense they are one."""
    pool = make_pool(kv_dtype=kv_dtype)
    slots = [fill(pool, str(n), n, seed=n) for n in (100, 300)]
    layer = object.__new__(OffloadedLayer)
    layer.host = SimpleNamespace(pool=pool, slots={"a": [slots[0]], "b": [slots[1]]})
    layer.place, batch = Place(0, 0), Batch(["a", "b"])
    for query_lens in ([100], [100, 300], [100]):
        got, keys, _ = layer.segment(batch, Segment(0, query_lens, sparse=False))
        assert got.query_lens == query_lens and len(got.block_table) == len(query_lens)
        for row, slot, length in zip(got.block_table, slots, query_lens, strict=False):
            pages = keys[row[: -(-length // 64)].long()].transpose(1, 2)
            want = pool.read(slot, 0, 0, length)[0].float()
            assert torch.equal(pages.flatten(0, 1)[:length].float(), want)
    pool.shutdown()
