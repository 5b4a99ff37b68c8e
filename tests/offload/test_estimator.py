"""What samples are worth: right on average, and near enough each time."""

from __future__ import annotations

import math

import pytest
import torch
from attention_heads import synthetic_head as head
from contexts import make_context

from vllm_sparse.cpu_offload import LSH, Context, TopK, Uniform, VAttention, attend, gather, native
from vllm_sparse.cpu_offload.vattention import Rest, Summaries


def context_of(k, v, samplers=(), dtype=torch.float32):
    n, heads, size = k.shape
    rows = 1 << (n - 1).bit_length()
    context = make_context(0, kv_heads=heads, head_size=size, dtype=dtype, segment_rows=rows)
    context = Context(context.store, samplers=samplers)
    context.append(k, v)
    return context


def sums(context, q, proposal):
    """(numerator [G, D], denominator [G]) of one item, as estimated, over e^base."""
    count = proposal.counts[0]
    rows = torch.arange(count) if proposal.rows is None else proposal.rows[0, :count]
    k, v = context.rows(0, rows)
    logits = (q.double() @ k.double().T) / math.sqrt(q.shape[1])
    if proposal.log_prob is not None:
        logits = logits - proposal.log_prob[0, :count].double()
    weights = logits.exp()
    return weights @ v.double(), weights.sum(-1)


SAMPLERS = {
    "lsh": (lambda seed: LSH(bits=5, tables=12, seed=seed), None),
    "lsh thinned": (lambda seed: LSH(bits=4, tables=12, seed=seed), 60),
    "lsh each head": (lambda seed: LSH(shared=False, bits=5, tables=12, seed=seed), None),
    "vattention": (lambda seed: VAttention(seed=seed), 160),
    "vattention bound": (lambda seed: VAttention(seed=seed, epsilon=0.4, heavy=0.02), None),
    "uniform": (lambda seed: Uniform(seed=seed), 100),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_numerator_and_denominator_are_right_on_average(name):
    """Means over 600 seeds: each of the 132 numbers within 4.5 of its standard errors."""
    make, rows = SAMPLERS[name]
    seeds = 600
    q, k, v = head("tail", n=1500, d=32)
    q, k = q * 0.7, k * 0.7
    context = context_of(k, v)
    true = sums(context, q, TopK().propose(context, q.view(1, 1, 1, 4, 32), 1500, scale=1.0))
    numerators, denominators = [], []
    for seed in range(seeds):
        sampler = make(seed)
        grouped = q.view(1, 1, 1, 4, 32)
        if not sampler.shared:
            grouped = grouped[..., :1, :]
        proposal = sampler.propose(context, grouped, rows, scale=32**-0.5)
        n, d = sums(context, q if sampler.shared else q[:1], proposal)
        numerators.append(n)
        denominators.append(d)
        context.segments[0].indexes.pop(getattr(sampler, "key", None), None)
    for drawn, want in zip((numerators, denominators), true, strict=True):
        drawn = torch.stack(drawn)
        want = want[: drawn.shape[1]]
        error = drawn.std(0) / math.sqrt(seeds)
        away = (drawn.mean(0) - want) / error.clamp(min=1e-9 * want.abs().max())
        assert float(away.abs().max()) < 4.5


def errors(kind, sampler, rows, seeds, n=16384, d=128, data=0):
    """Relative errors [seeds, G] of outputs, and the most rows that were read."""
    q, k, v = head(kind, n=n, d=d, seed=data)
    context = context_of(k, v)
    exact, _, _ = attend(q, k, v, "exact")
    found, most = [], 0
    for seed in range(seeds):
        made = sampler(seed)
        out, _, read = gather(q, context, made, rows, seed)
        found.append((out - exact).norm(dim=1) / exact.norm(dim=1))
        most = max(most, int(read.max()))
        context.segments[0].indexes.pop(getattr(made, "key", None), None)
    return torch.stack(found), most


@pytest.mark.parametrize("data", [0, 1])
def test_lsh_sees_the_tail_that_top_k_leaves_out(data):
    lsh, read = errors("tail", lambda seed: LSH(seed=seed), None, 6, data=data)
    topk, _ = errors("tail", lambda seed: TopK(), read, 1, data=data)
    assert 0.015 < read / 16384 < 0.025
    assert float(lsh.mean()) <= 0.25 * float(topk.mean())


@pytest.mark.parametrize("kind", ["tail", "flat", "peaked", "needles"])
@pytest.mark.parametrize("epsilon, delta", [(0.1, 0.05), (0.3, 0.2)])
def test_vattention_keeps_its_bound(kind, epsilon, delta):
    """Exceeded no more often than delta, beyond what 40 x 4 draws may show of it by chance."""
    make = lambda seed: VAttention(seed=seed, epsilon=epsilon, delta=delta)  # noqa: E731
    found, read = errors(kind, make, None, 40, n=8192, d=64)
    share = float((found > epsilon).float().mean())
    assert share <= delta
    if kind in ("peaked", "needles"):
        assert read < 8192  # it does not get there by reading everything


def test_vattention_finds_needles_that_an_even_sample_misses():
    found, read = errors("needles", lambda seed: VAttention(seed=seed), 330, 3)
    even, _ = errors("needles", lambda seed: Uniform(seed=seed), 330, 3)
    assert read <= 330 and float(found.max()) < 0.05 < float(even.mean())


def test_a_sample_shared_by_the_group_costs_its_rows_once():
    q, k, v = head("tail", n=8192, d=64)
    exact, _, _ = attend(q, k, v, "exact")
    together, _, read_once = attend(q, k, v, LSH())
    apart, _, read_each = attend(q, k, v, LSH(shared=False))
    assert int(read_each) > 3 * int(read_once)
    for out in (together, apart):
        assert float((out - exact).norm() / exact.norm()) < 0.35


def test_what_a_budget_of_rows_means():
    q, k, v = head("flat", n=1000, d=64)
    for name in ("vattention", "topk", "uniform", "lsh"):
        for rows in (0, 1, 17, 50):
            out, lse, read = attend(q, k, v, name, rows)
            if name not in ("topk", "lsh"):  # which read keys to choose among them
                assert int(read) <= rows
            if rows == 0:
                assert (out == 0).all() and (lse == -torch.inf).all()
    for name in ("vattention", "topk", "uniform"):
        exact, whole = attend(q, k, v, "exact"), attend(q, k, v, name, 5000)
        torch.testing.assert_close(whole[0], exact[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole[1], exact[1], rtol=1e-5, atol=1e-5)


def test_summaries_are_those_of_full_blocks_and_grow_with_the_segment():
    k, v = torch.randn(2, 100, 2, 32, generator=torch.Generator().manual_seed(0))
    whole = context_of(k, v)
    grown = Context(whole.store.__class__(
        torch.zeros(1 << 20, dtype=torch.uint8), kv_heads=2, head_size=32, dtype=torch.float32,
        segment_rows=128,
    ), samplers=[VAttention()])  # fmt: skip
    for step in (slice(0, 7), slice(7, 50), slice(50, 100)):
        grown.append(k[step], v[step])
    for context in (whole, grown):
        found = VAttention().index(context.store, context.segments[0])
        assert isinstance(found, Summaries) and found.bounds.count == 6
        blocks = k[:96].transpose(0, 1).unflatten(1, (6, 16))
        want = torch.cat([blocks.amax(2), blocks.amin(2)], -1)
        got = (found.bounds.rows * found.bounds.scales[..., :1])[:, :6]
        step = want.abs().amax(-1, keepdim=True) / 127
        assert ((got - want).abs() <= step / 2 * 1.0001).all()
        assert VAttention().index_bytes(context) == 2 * 6 * (2 * 32 + 8)


def test_the_rest_is_every_row_outside_the_chosen_blocks():
    chosen = torch.tensor([[0, 3, 4], [1, 2, 7]])
    rest = Rest(chosen, 8 * 16 - 48)
    rows = rest.draw(rest.total, torch.Generator())
    for mine, blocks in zip(rows, chosen, strict=True):
        want = [r for r in range(128) if r // 16 not in blocks.tolist()]
        assert mine.tolist() == want
    assert torch.equal(rest.of(1).draw(rest.total, torch.Generator())[0], rows[1])


@pytest.mark.parametrize(
    "call, match",
    [
        (dict(sampler="best"), "sampler: got 'best'; use one of lsh, vattention, topk"),
        (dict(sampler="topk"), "rows: the sampler 'topk' has no budget of its own"),
        (dict(rows=-1), "rows: got -1; give 0 or more"),
        (dict(q=torch.zeros(3, 32)), r"q: got \(3, 32\); give \[H, 32\] or .* 2 KV heads"),
        (dict(q=torch.full((2, 32), torch.nan)), "q: holds numbers that are not finite"),
        (dict(v=torch.zeros(9, 2, 32)), r"k, v: got \(10, 2, 32\), \(9, 2, 32\)"),
        (dict(k=torch.full((10, 2, 32), torch.nan)), "k: row 0 of KV head 0 holds nan"),
        (dict(dtype=torch.float64), "dtype: got torch.float64"),
    ],
)
def test_calls_that_make_no_sense(call, match):
    given = dict(q=torch.zeros(2, 32), k=torch.zeros(10, 2, 32), v=torch.zeros(10, 2, 32)) | call
    with pytest.raises(ValueError, match=match):
        attend(**given)


@pytest.mark.parametrize("options", [dict(epsilon=0), dict(delta=1.0), dict(heavy=2)])
def test_bounds_that_are_none(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VAttention(**options)


def test_nothing_is_read_where_nothing_is():
    q, empty = torch.randn(4, 32), torch.zeros(0, 2, 32)
    for name in ("lsh", "vattention", "exact"):
        out, lse, read = attend(q, empty, empty, name)
        assert (out == 0).all() and (lse == -torch.inf).all() and read.tolist() == [0, 0]
    assert native.kv_heads(torch.zeros(2, 3, 2, 1, 16)).tolist() == [0, 0, 1, 1, 2, 2] * 2


@pytest.mark.parametrize("rows", [1, 4, 8, 15, 31, 32, 40])
@pytest.mark.parametrize("length", [1000, 1007, 1008])
def test_few_rows_still_stand_for_all(rows, length):
    """Of keys that are alike any sample has the exact sum; the last rows alone would not."""
    k, v = torch.ones(length, 1, 16), torch.randn(length, 1, 16)
    with context_of(k, v) as context:
        q = torch.zeros(1, 1, 1, 4, 16)
        got = VAttention().propose(context, q, rows, scale=1.0)
        _, lse = native.gather(context, q, got.rows, got.log_prob, got.counts, scale=1.0)
    assert int(got.counts) == rows
    torch.testing.assert_close(lse.flatten(), torch.full((4,), math.log(length)))
