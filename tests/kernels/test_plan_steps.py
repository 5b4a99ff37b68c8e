"""The small steps of planning: native and reference, against their meaning written apart."""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from isas import implementations

from vllm_sparse.kernels import cpu, plan_steps, reference
from vllm_sparse.kernels.block_indices import BLOCK

# One implementation of all of them.
steps = implementations(reference, plan_steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 111, 2000])
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_block_means(steps, n, dtype, head_size):
    case = make_case(
        [min(n, 1)], [n], kv_heads=3, heads=3, head_size=head_size, dtype=dtype,
        layout="token-major" if n % 2 else "head-major",
    )  # fmt: skip
    heads = torch.tensor([2, 0])
    means = steps.block_means(case.k_cache, case.block_table[0], n, heads)
    assert means.shape == (2, -(-n // BLOCK), head_size) and means.dtype == torch.float32
    page = case.k_cache.shape[2]
    for block in range(means.shape[1]):
        key = torch.arange(block * BLOCK, min((block + 1) * BLOCK, n))
        rows = case.k_cache[case.block_table[0][key // page].long(), :, key % page]
        wanted = rows.double().mean(0)[heads]
        torch.testing.assert_close(means[:, block].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 63, 64, 65, 191, 256])
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_tile_means(steps, rows, dtype, head_size):
    # A view, as the queries are one of queries, keys and values.
    whole = torch.randn(rows + 2, 7, head_size + 16).to(dtype)
    q, heads = whole[1 : rows + 1, 2:, 16:], torch.tensor([4, 1, 2])
    whole[0], whole[-1], whole[:, :2] = torch.nan, torch.nan, torch.nan
    means = steps.tile_means(q, heads)
    assert means.shape == (3, -(-rows // 64), head_size) and means.dtype == torch.float32
    for tile in range(means.shape[1]):
        wanted = q[tile * 64 : tile * 64 + 64, heads].double().mean(0)
        torch.testing.assert_close(means[:, tile].double(), wanted, rtol=1e-5, atol=1e-6)


def test_block_means_of_what_is_not_finite(steps):
    case = make_case([1], [200], heads=2, kv_heads=1)
    case.k_cache[case.block_table[0][4], 0, 3, 5] = torch.nan  # key 67
    means = steps.block_means(case.k_cache, case.block_table[0], 200, torch.tensor([0]))
    assert means.isnan().nonzero().tolist() == [[0, 1, 5]]


@pytest.mark.parametrize("blocks", [1, 2, 63, 64, 300])
@pytest.mark.parametrize("power", [0.0, 1.0, 30.0, 3000.0])
def test_heaviest(steps, blocks, power):
    generator = torch.Generator().manual_seed(blocks)
    mass = torch.rand(3, 17, blocks, generator=generator).pow(power)
    mass /= mass.sum(-1, keepdim=True).clamp(min=1e-30)
    need = torch.rand(3, 17, generator=generator) * 1.1 - 0.05
    need[0, 0], need[1, 1], need[2, 2] = 0.0, 99.0, -1.0
    chosen = steps.heaviest(mass, need)
    assert chosen.dtype == torch.bool and chosen.shape == mass.shape
    held = (mass * chosen).sum(-1)
    reached = (held >= need - 1e-5) | chosen.all(-1)
    assert reached[need > 0].all() and not chosen[need <= 0].any()
    # What is taken is heavier than what is left, but for one level: 1/16 of an octave.
    least = mass.masked_fill(~chosen, torch.inf).amin(-1)
    left = mass.masked_fill(chosen, 0.0).amax(-1)
    assert (left <= least)[need > 0].all()
    assert torch.equal(chosen, reference.heaviest(mass, need))


def test_heaviest_is_safe_with_any_numbers(steps):
    mass = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1e-45, 1.0])
    mass = mass.repeat(2, 3, 5)
    assert steps.heaviest(mass, torch.full((2, 3), 0.5)).shape == mass.shape
    assert not steps.heaviest(mass, torch.full((2, 3), torch.nan)).any()
    strided = torch.rand(4, 6, 10).transpose(0, 1)
    need = torch.full((6, 4), 0.7)
    assert torch.equal(steps.heaviest(strided, need), steps.heaviest(strided.contiguous(), need))
    assert steps.heaviest(torch.zeros(0, 3, 8), torch.zeros(0, 3)).shape == (0, 3, 8)
    negative = steps.heaviest(torch.tensor([[[-1.0, 2.0]]]), torch.tensor([[1.0]]))
    assert negative.tolist() == [[[False, True]]]


@pytest.mark.parametrize("width", [None, 0, 1, 40])
@pytest.mark.parametrize("rows, n", [(1, 1), (63, 63), (64, 65), (111, 2000), (130, 1000)])
def test_index_lists(steps, rows, n, width):
    generator = torch.Generator().manual_seed(n)
    tiles, heads, blocks = -(-rows // 64), 3, -(-n // BLOCK)
    mask = torch.rand(tiles, heads, blocks, generator=generator) < 0.3
    last_key = (n - rows + (torch.arange(tiles) + 1) * 64).clamp(max=n) - 1
    columns = None
    if width is not None:
        columns = torch.randint(-5, n, (tiles, heads, width), generator=generator)
        columns = columns.sort(-1).values.to(torch.int32)
    got = steps.index_lists(mask, columns, last_key)
    assert got.num_heads == heads and got.tile_offsets.tolist() == [0, tiles]
    for x in (got.block_offsets, got.blocks, got.column_offsets, got.columns):
        assert x.dtype == torch.int32
    for tile in range(tiles):
        for head in range(heads):
            row, last = tile * heads + head, int(last_key[tile])
            wanted = [b for b in range(blocks) if mask[tile, head, b] and b * BLOCK <= last]
            assert got.blocks[slice(*got.block_offsets[row : row + 2])].tolist() == wanted
            single = [] if columns is None else columns[tile, head].tolist()
            single = [c for c in single if 0 <= c <= last and not mask[tile, head, c // BLOCK]]
            assert got.columns[slice(*got.column_offsets[row : row + 2])].tolist() == single
    assert len(got.blocks) == got.block_offsets[-1] and len(got.columns) == got.column_offsets[-1]


def test_index_lists_of_a_mask_that_is_a_view(steps):
    mask = (torch.rand(4, 6, 20) < 0.5).transpose(0, 1)[:5]
    columns = torch.arange(0, 90, 30, dtype=torch.int32).expand(5, 4, 3)
    last_key = torch.full((5,), 1279)
    got = steps.index_lists(mask, columns, last_key)
    same = steps.index_lists(mask.contiguous(), columns.contiguous(), last_key)
    assert torch.equal(got.blocks, same.blocks) and torch.equal(got.columns, same.columns)


def test_arguments_that_do_not_fit():
    if cpu.native_error():
        pytest.skip("the reference takes what torch takes")
    with pytest.raises(ValueError, match="need: got"):
        plan_steps.heaviest(torch.rand(2, 3, 4), torch.rand(3, 2))
    with pytest.raises(ValueError, match="columns, last_key: got"):
        plan_steps.index_lists(torch.ones(2, 3, 4, dtype=torch.bool), None, torch.zeros(3))
    with pytest.raises(ValueError, match="columns, mask: got"):
        plan_steps.index_lists(
            torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1).long(), torch.zeros(1)
        )
    with pytest.raises(ValueError, match=r"q: got torch\.float64"):
        plan_steps.tile_means(torch.zeros(3, 2, 64).double(), torch.zeros(1).long())
    with pytest.raises(ValueError, match="q: got head size 24"):
        plan_steps.tile_means(torch.zeros(3, 2, 24), torch.zeros(1).long())
    with pytest.raises(ValueError, match="pages of 24"):
        plan_steps.block_means(torch.zeros(1, 1, 24, 64), torch.zeros(1).int(), 9, torch.zeros(1))
