"""Attention over chosen rows against its meaning, for every instruction set."""

from __future__ import annotations

import mmap

import pytest
import torch
from contexts import make_context, queries

from vllm_sparse.cpu_offload import Context, KVStore, native, reference
from vllm_sparse.kernels import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
SHAPES = [(4, 2, 64), (4, 1, 128), (1, 3, 96), (6, 1, 80), (7, 1, 256), (2, 2, 16)]


def check(context, q, rows, log_prob, counts, scale=None):
    """out and lse of every item against fp64 over the rows as they are stored.

    Allowed is twice what torch's own arithmetic in the rows' dtype is off by, and the rounding of
    fp32 sums. int8 rows are exact numbers, judged as fp32; queries may be 16 bits there, which
    moves a logit by half a step of theirs for each unit of the key.
    """
    scale = context.store.head_size**-0.5 if scale is None else scale
    dtype = context.store.dtype
    same = torch.float32 if dtype == torch.int8 else dtype
    out, lse = native.gather(context, q, rows, log_prob, counts, scale=scale)
    for i, head in enumerate(native.kv_heads(q).tolist()):
        chosen = torch.arange(context.length) if rows is None else rows[i, : counts[i]]
        got = out.flatten(0, 2)[i].double(), lse.flatten(0, 2)[i].double()
        if not len(chosen):
            assert (got[0] == 0).all() and (got[1] == -torch.inf).all()
            continue
        k, v = context.rows(head, chosen)
        logs = None if log_prob is None else log_prob[i, : counts[i]]

        queries = q.flatten(0, 2)[i]

        def attend(dtype, queries=queries, k=k, v=v, logs=logs):
            logs = None if logs is None else logs.to(dtype)
            given = (x.to(dtype) for x in (queries, k, v))
            out, lse = reference.gathered_attention(*given, logs, scale)
            return out.double(), lse.double()

        true, plain = attend(torch.float64), attend(same)
        largest = float(v.abs().max())
        logit = float(q.flatten(0, 2)[i].norm(dim=-1).max() * k.norm(dim=-1).max()) * scale
        moved = 2.0**-23 * (8 + logit)
        if dtype == torch.int8:
            step = float(q.abs().max()) / 32512
            moved += step / 2 * float(k.abs().sum(-1).max()) * scale
        allowed = 2 * float((plain[0] - true[0]).abs().max()) + 2 * moved * largest
        assert float((got[0] - true[0]).abs().max()) <= allowed
        allowed = moved + 2.0**-22 * float(true[1].abs().max())
        assert float((got[1] - true[1]).abs().max()) <= allowed


def lists(context, items, count, seed=0, sort=True):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(context.length, (items, count), generator=generator)
    rows = rows.sort(1).values if sort else rows
    log_prob = torch.rand(items, count, generator=generator).log()
    counts = torch.randint(count + 1, (items,), generator=generator)
    counts[0] = count
    return rows, log_prob, counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "group, kv_heads, size", [pytest.param(*s, id="G{}-KV{}-D{}".format(*s)) for s in SHAPES]
)
def test_lists_of_rows(isa, group, kv_heads, size, dtype):
    context = make_context(300, kv_heads=kv_heads, head_size=size, dtype=dtype)
    q = queries(context, tokens=2, group=group)
    items = q.shape[:3].numel()
    for sort in (True, False):  # duplicates are among them
        check(context, q, *lists(context, items, 130, sort=sort))
    check(context, q, None, None, torch.full((items,), context.length))


@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 111, 2000])
def test_every_row(isa, length):
    context = make_context(length, dtype=torch.bfloat16, segment_rows=128)
    q = queries(context)
    check(context, q, None, None, torch.full((2,), length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_and_none(isa, dtype):
    context = make_context(20, dtype=dtype)
    q = queries(context)
    rows = torch.tensor([[7, 0], [0, 0]])
    check(context, q, rows, torch.zeros(2, 2), torch.tensor([1, 0]))
    with make_context(0, dtype=dtype) as empty:
        check(empty, q, None, None, torch.tensor([0, 0]))


@pytest.mark.parametrize("row", [-1, 20, 1 << 40, -(1 << 63)])
def test_rows_outside_the_context_are_refused(isa, row):
    context = make_context(20)
    rows = torch.tensor([[3, 4, 5], [6, row, 7]])
    with pytest.raises(ValueError, match="outside 0 to 19; a sampler must propose rows of the"):
        native.gather(context, queries(context), rows, None, torch.tensor([3, 3]), scale=1.0)
    out, _ = native.gather(context, queries(context), rows, None, torch.tensor([3, 1]), scale=1.0)
    assert out.isfinite().all()


def test_each_query_head_with_rows_of_its_own(isa):
    context = make_context(200, dtype=torch.bfloat16)
    q = queries(context, tokens=2).transpose(2, 3).contiguous()
    check(context, q, *lists(context, q.shape[:3].numel(), 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("size", [1e-33, 1.0, 1e33])
def test_a_tail_beside_a_row_that_outweighs_each_of_it(isa, group, size, dtype):
    if dtype == torch.float16:
        size = min(max(size, 1e-4), 1e4)
    tail, largest = 63, 11.8125  # each of the tail weighs half of 2^-16 of the largest
    context = make_context(tail + 1, kv_heads=1, dtype=dtype, segment_rows=64)
    k, v = torch.zeros(2, tail + 1, 1, 64)
    k[5, :, :] = largest / 64
    v[:] = size
    v[5] = -size
    context.segments[0].length, context.segments[0].sealed = 0, False
    context.append(k, v)
    q = torch.ones(1, 1, 1, group, 64)
    check(context, q, None, None, torch.tensor([tail + 1]), scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "regime", ["huge", "hugely negative", "equal", "one dominates", "denormal"]
)
def test_logits_at_the_edges(isa, regime, dtype):
    context = make_context(150, kv_heads=1, dtype=dtype, segment_rows=256)
    k = torch.randn(150, 1, 64)
    q = torch.ones(1, 1, 1, 2, 64)
    if regime == "huge":
        k = 100 + k
    elif regime == "hugely negative":
        k = -100 + k
    elif regime == "equal":
        k = torch.ones_like(k)
    elif regime == "one dominates":
        k[77] = 60
    else:
        k = k * 1e-39 if dtype in (torch.float32, torch.bfloat16) else k * 1e-7
    context.segments[0].length, context.segments[0].sealed = 0, False
    context.append(k, torch.randn(150, 1, 64))
    check(context, q, None, None, torch.tensor([150]), scale=1.0)
    log_prob = torch.full((1, 150), -80.0)  # weights of e^80
    check(context, q, torch.arange(150)[None], log_prob, torch.tensor([150]), scale=1.0)


def test_queries_that_bfloat16_does_not_hold(isa):
    context = make_context(100, dtype=torch.bfloat16)
    q = torch.randn(1, 2, 1, 4, 64, generator=torch.Generator().manual_seed(3))
    out, _ = native.gather(context, q, None, None, torch.tensor([100, 100]), scale=0.125)
    for head in range(2):
        k, v = context.rows(head, torch.arange(100))
        true, _ = reference.gathered_attention(q[0, head, 0], k, v, None, 0.125)
        torch.testing.assert_close(out[0, head, 0], true, rtol=1e-5, atol=1e-5)


def test_threads_agree():
    context = make_context(5000, dtype=torch.bfloat16, segment_rows=1024)
    q = queries(context)
    counts = torch.tensor([5000, 5000])
    one = native.gather(context, q, None, None, counts, scale=0.125)
    try:
        cpu.set_threads(3)
        many = native.gather(context, q, None, None, counts, scale=0.125)
        check(context, q, None, None, counts)
    finally:
        cpu.set_threads(1)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-3 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_all_rows(isa, dtype):
    context = make_context(150, kv_heads=2, head_size=96, dtype=dtype)
    q = queries(context, tokens=2, group=5)
    got = native.scores(context, q, scale=0.1)
    for i, head in enumerate(native.kv_heads(q).tolist()):
        k, _ = context.rows(head, torch.arange(150))
        true = q.flatten(0, 2)[i] @ k.T * 0.1
        torch.testing.assert_close(got[i], true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_more_rows_than_32_bits_count(isa, dtype):
    """A sparse buffer of 2^31 rows and more: what is not touched takes no memory."""
    if isa == "torch":
        pytest.skip("reads rows as native numbers do; its indices are torch's own")
    size, rows = 16, (1 << 31) + (1 << 17)
    per_segment = 65536 * (2 * size * dtype.itemsize + (8 if dtype == torch.int8 else 0))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, (rows >> 16) * per_segment + 64, flags=flags)
    except OSError:
        pytest.skip("the system does not give so much address space")
    store = KVStore(memory, kv_heads=1, head_size=size, dtype=dtype)
    with Context(store) as context:
        for _ in range(rows >> 16):
            segment = store.open()
            segment.length, segment.sealed = 65536, True
            context.segments.append(segment)
        far = context.segments[-1]
        far.length, far.sealed = 0, False
        k, v = torch.randn(2, 40, 1, size, generator=torch.Generator().manual_seed(0))
        context.append(k, v)
        last = ((rows >> 16) - 1) << 16
        q = queries(context, group=2)
        chosen = torch.tensor([[5, 1 << 30, (1 << 31) - 1, 1 << 31, *range(last, last + 40)]])
        assert int(chosen.max()) > 1 << 31 and context.length == last + 40
        check(context, q, chosen, None, torch.tensor([chosen.shape[1]]))
