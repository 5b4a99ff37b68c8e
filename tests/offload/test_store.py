"""The store of keys and values: what is found, shared, refused and freed."""

from __future__ import annotations

import pytest
import torch

from vllm_sparse.cpu_offload import LSH, Context, KVStore, StoreFull, VAttention, allocate


def make_store(slots=3, rows=16, dtype=torch.float32, heads=2, size=32) -> KVStore:
    store = KVStore(
        allocate(1 << 20), kv_heads=heads, head_size=size, dtype=dtype, segment_rows=rows
    )
    buffer = allocate(slots * store.segment_bytes + 64)
    return KVStore(buffer, kv_heads=heads, head_size=size, dtype=dtype, segment_rows=rows)


def some(n, seed=0, heads=2, size=32):
    return torch.randn(2, n, heads, size, generator=torch.Generator().manual_seed(seed))


def all_rows(context):
    pairs = [context.rows(h, torch.arange(context.length)) for h in range(context.store.kv_heads)]
    return [torch.stack(x, 1) for x in zip(*pairs, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_rows_come_back_as_the_dtype_holds_them(dtype):
    context = Context(make_store(dtype=dtype))
    k, v = some(40)
    v[3] = 0
    for part in (slice(0, 1), slice(1, 30), slice(30, 30), slice(30, 40)):
        context.append(k[part], v[part])
    assert context.length == 40 and len(context.segments) == 3
    for got, given in zip(all_rows(context), (k, v), strict=True):
        if dtype == torch.int8:
            half_step = given.abs().amax(-1, keepdim=True) / 127 / 2
            assert ((got - given).abs() <= half_step * 1.0001).all()
        else:
            assert torch.equal(got, given.to(dtype).float())


def test_a_buffer_of_the_callers_is_used_where_it_lies():
    memory = bytearray(300_000)
    store = KVStore(memory, kv_heads=1, head_size=32, segment_rows=16)
    before = bytes(memory)
    context = Context(store)
    context.append(*some(5, heads=1))
    assert bytes(memory) != before and store.address % 64 == 0


def test_prefixes_are_shared_by_key_and_never_by_content():
    store = make_store()
    k, v = some(20)
    first = Context(store)
    first.append(k, v, keys=["tenant a, block 0"])
    again = Context(store, keys=["tenant a, block 0", "tenant a, block 1"])
    assert again.length == 16 and again.segments[0] is first.segments[0]
    assert Context(store, keys=["tenant b, block 0"]).length == 0
    again.append(k[16:], v[16:])
    assert again.segments[1] is not first.segments[1]
    assert all(torch.equal(a, b) for a, b in zip(all_rows(first), all_rows(again), strict=True))


def test_a_key_that_is_there_already_wins():
    store = make_store()
    k, v = some(16)
    first, second = Context(store), Context(store)
    first.append(k, v, keys=["x"])
    second.append(k, v, keys=["x"])
    assert second.segments[0] is first.segments[0] and store.free_segments == 2
    assert first.segments[0].references == 2


def test_a_full_store_says_so_and_stores_nothing():
    store = make_store(slots=2)
    context = Context(store)
    context.append(*some(17))
    with pytest.raises(StoreFull, match="all 2 segments of 16 rows are in use"):
        context.append(*some(32))
    assert context.length == 17 and store.free_segments == 0
    context.free()
    assert store.free_segments == 2 and context.length == 0


def test_idle_segments_stay_until_their_slot_is_needed():
    store = make_store(slots=2)
    for key in ("old", "new"):
        with Context(store) as context:
            context.append(*some(16), keys=[key])
    assert store.free_segments == 2
    store.release(store.lookup("old"))  # used again: now the other is the older one
    other = Context(store)
    other.append(*some(1))
    assert store.lookup("new") is None
    kept = Context(store, keys=["old"])
    assert kept.length == 16
    with pytest.raises(StoreFull):
        Context(store).append(*some(1))


def test_a_full_segment_is_immutable_and_a_freed_one_is_gone():
    store = make_store()
    context = Context(store)
    context.append(*some(16))
    segment = context.segments[0]
    with pytest.raises(ValueError, match="has 16 of 16 rows and is sealed; 1 more"):
        store.append(segment, *some(1))
    context.free()
    assert segment.length == 0 and not segment.indexes
    with pytest.raises(ValueError, match="was released before"):
        store.release(segment)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_is_not_finite_is_refused_by_name(which, bad):
    context = Context(make_store(), samplers=[LSH(), VAttention()])
    k, v = some(20)
    {"k": k, "v": v}[which][17, 1, 5] = bad
    with pytest.raises(
        ValueError, match=f"{which}: row 17 of KV head 1 holds {bad} in dimension 5"
    ):
        context.append(k, v)
    assert context.length == 0 and context.store.free_segments == 3


@pytest.mark.parametrize(
    "change, match",
    [
        ({"dtype": torch.float64}, "dtype: got torch.float64; use one of"),
        ({"kv_heads": 0}, "kv_heads, head_size: got 0, 32"),
        ({"head_size": 40}, "multiple of 16"),
        ({"head_size": 512}, "from 16 to 256"),
        ({"segment_rows": 48}, "segment_rows: got 48; give a power of two"),
        ({"segment_rows": 1 << 17}, "to 65536"),
        ({"buffer": allocate(100)}, "100 bytes hold no segment"),
        ({"buffer": bytes(100_000)}, "read-only"),
        ({"buffer": torch.zeros(1000)}, "contiguous uint8"),
    ],
)
def test_arguments_that_make_no_store(change, match):
    given = dict(buffer=allocate(100_000), kv_heads=2, head_size=32, segment_rows=16) | change
    with pytest.raises(ValueError, match=match):
        KVStore(given.pop("buffer"), **given)


@pytest.mark.parametrize(
    "k", [torch.zeros(3, 1, 32), torch.zeros(3, 2, 16), torch.zeros(3, 2, 32, dtype=torch.int64)]
)
def test_rows_that_do_not_fit_the_store(k):
    with pytest.raises(ValueError, match=r"k: got .* give floats of \[3, 2, 32\]"):
        Context(make_store()).append(k, k)


def test_only_whole_named_segments_are_shared():
    store = make_store()
    context = Context(store)
    context.append(*some(5))
    with pytest.raises(ValueError, match="give an unnamed segment a key other than None"):
        store.seal(context.segments[0], None)
    store.seal(context.segments[0], "short")
    with pytest.raises(ValueError, match="'short' has 5 of 16 rows; only full segments"):
        Context(store, keys=["short"])
    assert context.segments[0].references == 1
