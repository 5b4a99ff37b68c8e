"""Any shape, any rows, any numbers: what must hold whatever is asked."""

from __future__ import annotations

import pytest
import torch
from contexts import make_context, queries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_sparse.cpu_offload import LSH, Context, VAttention, attend, native

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
SIZES = st.sampled_from([64, 80, 96, 112, 128, 192, 240, 256])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8])
SAMPLERS = st.sampled_from(["lsh", "vattention", "topk", "uniform", "exact", "lsh each", "v each"])


def sampler_of(name: str, seed: int):
    if name == "lsh each":
        return LSH(shared=False, seed=seed, bits=3, tables=9)
    return VAttention(shared=False, seed=seed) if name == "v each" else name


@SETTINGS
@given(
    size=SIZES, dtype=DTYPES, name=SAMPLERS, kv_heads=st.integers(1, 3), group=st.integers(1, 9),
    tokens=st.integers(1, 3), length=st.integers(0, 200), rows=st.integers(0, 300),
    magnitude=st.sampled_from([0.0, 1e-30, 1.0, 100.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_outputs_are_averages_of_values(
    size, dtype, name, kv_heads, group, tokens, length, rows, magnitude, seed
):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, kv_heads * group, size, generator=g) * magnitude
    k, v = torch.randn(2, length, kv_heads, size, generator=g)
    k = k * magnitude
    out, lse, read = attend(q, k, v, sampler_of(name, seed), rows, seed, dtype=dtype)
    assert out.shape == q.shape and lse.shape == q.shape[:2] and read.shape == (tokens, kv_heads)
    assert out.isfinite().all() and not lse.isnan().any() and not (lse == torch.inf).any()
    assert (out[lse == -torch.inf] == 0).all()
    most = v.abs().max() if length else torch.tensor(0.0)
    assert float(out.abs().max()) <= float(most) * 1.02 + 1e-6  # values are rounded by the dtype
    assert (read >= 0).all() and (read <= length * (1 if "each" not in name else group)).all()
    if name == "exact":
        assert (read == length).all() and (lse.isfinite().all() or not length)


@SETTINGS
@given(
    size=SIZES, dtype=DTYPES, group=st.integers(1, 9), segment_rows=st.sampled_from([16, 64, 256]),
    length=st.integers(1, 200), data=st.data(),
)  # fmt: skip
def test_any_list_of_rows(size, dtype, group, segment_rows, length, data):
    context = make_context(
        length, kv_heads=1, head_size=size, dtype=dtype, segment_rows=segment_rows
    )
    rows = data.draw(st.lists(st.integers(0, length - 1), max_size=150))
    q = queries(context, group=group)
    chosen = torch.tensor([rows], dtype=torch.int64)
    out, lse = native.gather(context, q, chosen, None, torch.tensor([len(rows)]), scale=0.1)
    if not rows:
        assert (out == 0).all() and (lse == -torch.inf).all()
        return
    k, v = context.rows(0, chosen[0])
    logits = (q[0, 0, 0].double() @ k.double().T) * 0.1
    true = logits.softmax(-1) @ v.double()
    assert float((out[0, 0, 0] - true).abs().max()) <= 1e-2 * float(v.abs().max())
    torch.testing.assert_close(lse[0, 0, 0].double(), logits.logsumexp(-1), rtol=1e-3, atol=1e-3)


@SETTINGS
@given(
    steps=st.lists(st.integers(0, 120), min_size=1, max_size=8), kv_heads=st.integers(1, 3),
    segment_rows=st.sampled_from([16, 64, 128]), dtype=DTYPES,
)  # fmt: skip
def test_indexes_that_grow_step_by_step(steps, kv_heads, segment_rows, dtype):
    samplers = LSH(bits=3, tables=9), VAttention(epsilon=0.3)
    store = make_context(
        sum(steps) + 16, kv_heads=kv_heads, dtype=dtype, segment_rows=segment_rows
    ).store
    store = type(store)(
        torch.zeros_like(store.buffer), kv_heads=kv_heads, head_size=64, dtype=dtype,
        segment_rows=segment_rows,
    )  # fmt: skip
    with Context(store, samplers=samplers) as context:
        for step in steps:
            context.append(*torch.randn(2, step, kv_heads, 64))
            q = queries(context, group=2)
            for sampler in samplers:
                got = sampler.propose(context, q, None, scale=0.125)
                for mine, count in zip(got.rows, got.counts.tolist(), strict=True):
                    mine = mine[:count]
                    assert ((mine >= 0) & (mine < context.length)).all()
                    assert (mine.diff() >= 0).all()
                assert got.log_prob[:, : int(got.counts.min())].isfinite().all()


@SETTINGS
@given(
    length=st.integers(1, 60), where=st.integers(0, 10_000), size=SIZES,
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
)  # fmt: skip
def test_a_key_that_is_no_number_is_named(length, where, size, bad):
    k, v = torch.zeros(2, length, 2, size)
    place = where % k.numel()
    k.view(-1)[place] = bad
    row, rest = divmod(place, 2 * size)
    with pytest.raises(ValueError, match=f"k: row {row} of KV head {rest // size} holds {bad}"):
        attend(torch.zeros(2, size), k, v)
