"""Hash tables and what they propose, against comparing every code; and how likely that was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_heads import synthetic_head as head
from contexts import make_context, queries

from vllm_sparse.cpu_offload import LSH, Context, attend, hashing, native, reference, samplers
from vllm_sparse.cpu_offload.lsh import FIRM, RECENT

SMALL = LSH(bits=4, tables=12)


def by_comparison(context, q, lsh, item):
    """Rows and ln u of one item, in fp64 from the codes of every key."""
    head = int(native.kv_heads(q)[item])
    direction = reference.mean_direction(q.flatten(0, 2)[item].double())
    directions = lsh.directions(context.store.head_size)
    codes = hashing.hash_vectors(direction.float()[None, None], directions, lsh.bits)[0, :, 0]
    rows, logs, start = [], [], 0
    for segment in context.segments:
        index = lsh.index(context.store, segment)
        hits = reference.lsh_hits(codes, index.codes(head))
        found = (hits >= 2).nonzero()[:, 0] + start
        centred = context.rows(head, found)[0].double() - index.centre[head].double()
        cosine = torch.nn.functional.cosine_similarity(centred, direction[None], dim=-1)
        rows.append(found)
        logs.append(hashing.inclusion_probability(cosine, lsh.bits, lsh.tables).log())
        start += segment.length
    return torch.cat(rows), torch.cat(logs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_proposal_holds_the_rows_with_two_common_buckets(isa, dtype):
    context = make_context(500, head_size=80, dtype=dtype, segment_rows=128)
    q = queries(context, tokens=2)
    got = SMALL.propose(context, q, None, scale=1.0)
    assert (got.counts > 20).all()
    for item, count in enumerate(got.counts.tolist()):
        rows, logs = by_comparison(context, q, SMALL, item)
        assert torch.equal(got.rows[item, :count], rows)
        # Between the steps of the table the logarithm is off by less than a thousandth.
        assert float((got.log_prob[item, :count].double() - logs).abs().max()) < 1e-3


def test_codes_are_the_signs_of_projections():
    directions = hashing.directions(32, 5, 7, 0)
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    codes = hashing.hash_vectors(x, directions, 5)
    for table in range(7):
        for bit in range(5):
            positive = (x.double() @ directions[:, table * 5 + bit].double()) > 0
            assert torch.equal((codes[:, table] >> bit & 1).bool(), positive)


@pytest.mark.parametrize("bits, tables", [(8, 48), (10, 150), (1, 2), (15, 255)])
def test_the_inclusion_probability_is_the_binomial_tail(bits, tables):
    for cosine in (-1.0, -0.7, -0.2, 0.0, 0.3, 0.9, 0.999, 1.0):
        p = (1 - math.acos(cosine) / math.pi) ** bits
        # Summed from the small end, so that nothing cancels.
        tail = [math.comb(tables, j) * p**j * (1 - p) ** (tables - j) for j in range(tables, 1, -1)]
        got = float(hashing.inclusion_probability(torch.tensor(cosine), bits, tables))
        assert got == pytest.approx(math.fsum(tail), rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("bits, tables", [(8, 48), (10, 150), (5, 20)])
def test_the_table_of_logarithms_is_fine_enough(bits, tables):
    table = hashing.log_inclusion_table(bits, tables).double()
    cosine = torch.linspace(-1, 1, 100_003, dtype=torch.float64)
    place = (cosine + 1) * (hashing.INCLUSION_STEPS / 2)
    at = place.long().clamp(max=hashing.INCLUSION_STEPS - 1)
    between = table[at] + (table[at + 1] - table[at]) * (place - at)
    u = hashing.inclusion_probability(cosine, bits, tables)
    assert float((between - u.log())[u > 1e-7].abs().max()) < 1e-3


def test_measured_frequencies_are_those_of_the_formula():
    """Over 2,000 hash functions, each key's frequency is within 5 standard errors of its u."""
    draws, bits, tables = 2000, 4, 10
    k = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    q = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    k[:20] += q  # some near, some far
    k[20:30] -= q
    context = Context(make_context(0, kv_heads=1, head_size=32).store)
    context.append(k[:, None], k[:, None])
    times = torch.zeros(60)
    for seed in range(draws):
        lsh = LSH(bits=bits, tables=tables, seed=seed)
        got = lsh.propose(context, q.view(1, 1, 1, 1, 32), None, scale=1.0)
        times[got.rows[0, : got.counts[0]]] += 1
        context.segments[0].indexes.clear()
    centred = k - k.mean(0)
    u = hashing.inclusion_probability(
        torch.nn.functional.cosine_similarity(centred, q, dim=-1), bits, tables
    )
    spread = (u * (1 - u) / draws).sqrt().clamp(min=1 / draws)
    assert float(u.max()) > 0.8 and float(u.min()) < 0.02
    assert ((times / draws - u).abs() <= 5 * spread).all()


@pytest.mark.parametrize("steps", [[1] * 30, [3000, 1, 1, 70, 1500, 1], [FIRM + RECENT, 5, 1000]])
def test_rows_added_one_by_one_are_found_like_those_added_at_once(steps):
    total = sum(steps)
    k, v = torch.randn(2, total, 2, 32, generator=torch.Generator().manual_seed(0))
    k += 3
    store = make_context(0, head_size=32, segment_rows=8192).store
    context = Context(make_store_like(store, total), samplers=[SMALL])
    done = 0
    for step in steps:
        context.append(k[done : done + step], v[done : done + step])
        done += step
    q = queries(context)
    got = SMALL.propose(context, q, None, scale=1.0)
    index = context.segments[0].indexes[SMALL.key]
    assert index.length == total
    # Where the mean was taken before all rows were there, it is near theirs.
    assert float((index.centre - k.mean(0)).abs().max()) < (2.0 if total < 100 else 0.2)
    centred = k.transpose(0, 1) - index.centre[:, None]
    codes = hashing.hash_vectors(centred, SMALL.directions(32), SMALL.bits)
    for kv_head in range(2):
        assert torch.equal(index.codes(kv_head), codes[kv_head])
    for item, count in enumerate(got.counts.tolist()):
        assert torch.equal(got.rows[item, :count], by_comparison(context, q, SMALL, item)[0])


def make_store_like(store, rows):
    from vllm_sparse.cpu_offload import KVStore, allocate

    size = 1 << max(rows - 1, 15).bit_length()
    nbytes = 2 * size * store.kv_heads * 2 * store.head_size * 4
    return KVStore(
        allocate(nbytes), kv_heads=store.kv_heads, head_size=store.head_size, dtype=torch.float32,
        segment_rows=size,
    )  # fmt: skip


def test_tables_are_sorted_rows_with_offsets():
    ids, offsets = np.zeros((2, 64), np.uint16), np.zeros((2, 5), np.uint32)
    codes = np.array([[3, 0, 3, 1, 0], [2, 2, 2, 2, 2]], np.uint16)
    native.lsh_enter(ids, offsets, codes, 2, 0, 5)
    assert offsets.tolist() == [[0, 2, 3, 3, 5], [0, 0, 0, 5, 5]]
    assert ids[:, :5].tolist() == [[1, 4, 3, 0, 2], [0, 1, 2, 3, 4]]
    native.lsh_enter(ids, offsets, np.array([[1, 3], [0, 2]], np.uint16), 2, 5, 2)
    assert offsets.tolist() == [[0, 2, 4, 4, 7], [0, 1, 1, 7, 7]]
    assert ids[:, :7].tolist() == [[1, 4, 3, 5, 0, 2, 6], [5, 0, 1, 2, 3, 4, 6]]


def test_a_shared_segment_is_indexed_once():
    store = make_context(0, segment_rows=64).store
    k, v = torch.randn(2, 64, 2, 64)
    first = Context(store, samplers=[SMALL])
    first.append(k, v, keys=["a"])
    second = Context(store, keys=["a"])
    assert second.segments[0].indexes[SMALL.key] is first.segments[0].indexes[SMALL.key]


def test_a_budget_thins_the_sample():
    q, k, v = head("flat", n=4000, d=64)
    lsh = LSH(bits=4, tables=12)
    context = make_context(0, kv_heads=1, head_size=64, segment_rows=4096)
    context = Context(make_store_like(context.store, 4096))
    context.append(k, v)
    grouped = q.view(1, 1, 1, 4, 64)
    whole = int(lsh.propose(context, grouped, None, scale=0.125).counts)
    assert int(lsh.propose(context, grouped, whole, scale=0.125).counts) == whole > 400
    few = lsh.propose(context, grouped, 100, scale=0.125)
    assert int(few.counts) == 100 and len(few.rows[0].unique()) == 100
    out, _, read = attend(q, k, v, lsh, rows=100)
    assert read.item() == whole  # all their keys were read to choose among them
    exact = attend(q, k, v, "exact")[0]
    thinned = [attend(q, k, v, lsh, rows=100, seed=s)[0] for s in range(30)]
    mean = torch.stack(thinned).mean(0)
    full = attend(q, k, v, lsh)[0]
    assert float((mean - full).norm() / full.norm()) < 0.05
    assert float((out - exact).norm() / exact.norm()) < 0.5


def test_the_bytes_of_an_index_are_counted():
    _, k, v = head("flat", n=4096, d=64)
    context = make_context(0, kv_heads=1, head_size=64, segment_rows=4096)
    context = Context(make_store_like(context.store, 4096), samplers=[LSH()])
    context.append(k, v)
    expected = 4096 * 46 * 2 + 46 * 257 * 4 + 64 * 4
    assert LSH().index_bytes(context) == expected


@pytest.mark.parametrize("bits, tables", [(0, 10), (16, 10), (8, 1), (8, 256)])
def test_bits_and_tables_that_do_not_fit(bits, tables):
    with pytest.raises(ValueError, match=f"bits, tables: got {bits}, {tables}; give 1 to 15"):
        LSH(bits=bits, tables=tables)


def test_what_is_kept_in_proportion_to_weights():
    weights = torch.tensor([[8.0, 1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    share = samplers.proportional(weights.double().log(), 3)
    assert share[0].tolist() == pytest.approx([1.0, 0.5, 0.5, 0.5, 0.5, 0.0])
    assert share[1].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    # Weights that differ by more than numbers can: the largest are certain, the rest possible.
    share = samplers.proportional(torch.tensor([[0.0, -2000.0, -1.0, -3000.0]]).double(), 2)
    assert share[0, 0] == 1.0 and (share > 0).all() and float(share.sum()) == pytest.approx(2.0)


def test_stratified_draws_cover_the_range_evenly():
    generator = torch.Generator().manual_seed(0)
    drawn = samplers.stratified(20_000, 7, 10, generator)
    assert (drawn.diff(dim=1) >= 0).all()
    share = drawn.flatten().bincount(minlength=10) / 20_000
    assert (share - 0.7).abs().max() < 0.02
    assert torch.equal(samplers.stratified(2, 10, 10, generator)[1], torch.arange(10))
    assert samplers.stratified(3, 0, 10, generator).shape == (3, 0)
