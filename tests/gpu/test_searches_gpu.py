"""The searches of planning as Triton kernels, against `pattern_reference`."""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from gpu_cases import FLOAT16, FLOAT32, to_device
from sampled_mass import Sampled

from vllm_sparse.kernels import pattern_reference
from vllm_sparse.kernels.block_indices import BLOCK
from vllm_sparse.kernels.gpu.last_union import LastRows
from vllm_sparse.kernels.gpu.line_sums import line_sums
from vllm_sparse.kernels.gpu.search_columns import search_columns
from vllm_sparse.kernels.gpu.search_threshold import search_threshold
from vllm_sparse.kernels.gpu.search_window import search_window
from vllm_sparse.kernels.gpu.sort_columns import sort_columns
from vllm_sparse.kernels.pattern_reference import SampledMass
from vllm_sparse.planner.scores import Keys

SHAPES = [(2, 0), (17, 0), (8, 1000), (30, 30)]
COVERAGE = torch.tensor([0.2, 0.6, 0.9, 0.97])


def sampled(seed: int, **changes) -> tuple[Sampled, SampledMass, dict]:
    """A case, its mass on the device, and its geometry."""
    tiles, start = SHAPES[seed % 4]
    given = dict(heads=4, rows=16 + seed % 3, power=2.0 ** (seed % 7), width=50, seed=seed)
    case = Sampled(tiles, start, **(given | changes))
    moved = SampledMass(*map(to_device, case.sampled))
    top = int(case.sampled.last_block[0])
    return case, moved, dict(top=top, base_cost=float(case.sampled.base_cost))


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_window_and_heads_without_hope(seed):
    case, mass, geometry = sampled(seed)
    few = case.sampled._replace(
        blocks=case.sampled.blocks[:, :5], row_tile=case.sampled.row_tile[:5]
    )
    squares = few.blocks.square() / 3
    want, offset = pattern_reference.cheapest_window(case.sampled, COVERAGE)
    least = pattern_reference.least_keys(few, COVERAGE, squares)
    limit = float(least.sort().values[1:3].mean())
    got = search_window(
        mass, SampledMass(*map(to_device, few)), to_device(squares), to_device(COVERAGE),
        most_keys=limit, **geometry,
    )  # fmt: skip
    near(got[0], want)
    assert got[1].tolist() == offset.tolist()
    assert got[2].tolist() == (least > limit).int().tolist()


@pytest.mark.parametrize("seed", range(12))
def test_columns(seed):
    rows = {3: 2, 6: 32, 9: 31}.get(seed, 16)
    case, mass, geometry = sampled(seed, rows=rows, width=(50, 1, 120)[seed % 3])
    every = torch.ones(4, dtype=torch.bool)
    where = (case.columns, case.column_mass)
    want, diagonals, taken = pattern_reference.cheapest_columns(
        case.sampled, COVERAGE, *where, case.start, every
    )
    cost, level, best = search_columns(
        mass, to_device(COVERAGE), *map(to_device, where), start=case.start, **geometry
    )
    near(cost, want)
    bought = level[:, 2].cpu() <= best.cpu()[:, None]
    assert torch.equal(bought[:, : case.blocks], diagonals)
    assert torch.equal(bought[:, case.blocks :], taken)


@pytest.mark.parametrize("seed", range(8))
def test_threshold(seed):
    case, mass, geometry = sampled(seed)
    score = torch.randn(4, case.tiles, case.blocks, generator=torch.Generator().manual_seed(seed))
    score[0, :, 1] = torch.nan if seed % 2 else torch.inf
    score[1] = -torch.inf
    want, chosen = pattern_reference.cheapest_threshold(case.sampled, COVERAGE, score)
    cost, best, tops = search_threshold(mass, to_device(COVERAGE), to_device(score), **geometry)
    near(cost, want)
    body = case.tiles - 1
    future = torch.arange(case.blocks) > case.sampled.last_block[:body, None]
    gap = tops.cpu()[..., None] - score.nan_to_num(nan=torch.inf, posinf=torch.inf)[:, :body]
    gap = gap.nan_to_num(nan=0.0, posinf=torch.inf).masked_fill(future, torch.inf)
    limits = torch.cat([pattern_reference.thresholds(), torch.tensor([-1.0])])  # -1: none
    mine = gap <= limits[best.cpu().long()][:, None, None]
    assert torch.equal(mine | case.sampled.base[:body], chosen[:, :body])


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_not_finite_covers_nothing(what):
    case, mass, geometry = sampled(1, power=1.0)
    mass.blocks[0, 3, 1] = what
    coverage = to_device(torch.full((4,), 0.3))
    squares = mass.blocks.square()
    _, _, dense = search_window(mass, mass, squares, coverage, most_keys=1e9, **geometry)
    assert dense.tolist() == [1, 0, 0, 0]
    if what != what:
        column_mass = to_device(case.column_mass.clone())
        column_mass[0, 3] = what
        cost, _, best = search_columns(
            mass, coverage, to_device(case.columns), column_mass, start=case.start, **geometry
        )
        assert cost[0].isinf() and best[0] == -1 and cost[1:].isfinite().all()
        score = to_device(torch.zeros(4, case.tiles, case.blocks))
        cost, best, _ = search_threshold(mass, coverage, score, **geometry)
        assert cost[0].isinf() and best[0] == -1 and cost[1:].isfinite().all()


@pytest.mark.parametrize("width", [0, 1, 40, 300])
def test_sort_columns(width):
    generator = torch.Generator().manual_seed(width)
    columns = torch.stack([torch.randperm(5000, generator=generator)[:width] for _ in range(3)])
    kept, order = sort_columns(to_device(columns))
    assert torch.equal(kept.cpu().long(), columns.sort(1).values)
    assert torch.equal(columns.gather(1, order.cpu().long()), kept.cpu().long())


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("rows, n", [(64, 700), (10, 300), (1, 65), (64, 64), (30, 30), (64, 128)])
def test_line_sums(rows, n, dtype):
    case = make_case([rows], [n], heads=4, kv_heads=2, dtype=dtype)
    index = torch.tensor([1, 2])
    where = map(to_device, (case.q, case.k_cache, case.block_table[0], index))
    columns, distances = line_sums(*where, n, scale=case.scale)
    keys = Keys(case.k_cache, case.block_table[0], n, case.scale)
    for i, head in enumerate(index.tolist()):
        position = torch.arange(n - rows, n)
        mass = keys.attention(case.q[:, head, None], position, head // 2)[:, 0].double()
        by_distance = torch.zeros(n, dtype=torch.float64)
        for row in range(rows):
            last = int(position[row])
            by_distance[: last + 1] += mass[row, : last + 1].flip(0)
        torch.testing.assert_close(columns[i].cpu().double(), mass.sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(distances[i].cpu().double(), by_distance, rtol=1e-4, atol=1e-5)


# The rows of the last tile, alone and with some of the tile before; first chunk and later ones.
# Mass that is even and ever more uneven, few columns, many and none: seconds each, in pairs.
ENDS = [
    (64, 700, 1.0, 40), (64, 700, 1000.0, 300), (1, 129, 1.0, 40), (1, 129, 20.0, 20),
    (1, 129, 1000.0, 300), (1, 129, 8.0, 0), (100, 100, 20.0, 20), (100, 100, 8.0, 0),
    (130, 1000, 1000.0, 300), (130, 1000, 1.0, 40), (192, 2500, 20.0, 20), (192, 2500, 8.0, 0),
]  # fmt: skip


@pytest.mark.parametrize("query_len, seq_len, power, width", ENDS)
def test_last_rows(query_len, seq_len, power, width):
    rows, heads = min(query_len, 64), 2
    width = min(width, seq_len)
    start, first = seq_len - query_len, query_len - rows
    blocks, tiles = -(-seq_len // BLOCK), -(-query_len // BLOCK)
    position = seq_len - rows + torch.arange(rows)
    generator = torch.Generator().manual_seed(seq_len + width)
    mass = torch.rand(heads, rows, blocks * BLOCK, generator=generator).pow(power)
    mass = mass.masked_fill(torch.arange(blocks * BLOCK) > position[:, None], 0.0)
    mass /= mass.sum(-1, keepdim=True)
    row_tile = (first + torch.arange(rows)) // BLOCK
    last_key = (start + (torch.arange(tiles) + 1) * BLOCK).clamp(max=seq_len) - 1
    base = SampledMass(mass[..., :blocks], row_tile, last_key // BLOCK).base
    base &= torch.arange(blocks) <= (last_key // BLOCK)[:, None]
    outside = mass * ~base[row_tile].repeat_interleave(BLOCK, 1)
    columns = outside.amax(1).topk(width).indices
    column_mass = outside.gather(2, columns[:, None].expand(-1, rows, -1))
    block_mass = mass.unflatten(2, (-1, BLOCK)).sum(-1)
    coverage = torch.tensor([0.7, 0.95])

    there = torch.rand(tiles, 5, blocks, generator=generator) < 0.2
    mask, index = to_device(there.clone()), torch.tensor([3, 1])
    ends = LastRows(
        *map(to_device, (block_mass, column_mass)), sort_columns(to_device(columns)),
        to_device(coverage), query_len, seq_len, 32,
    )  # fmt: skip
    assert ends.ends == tiles - first // BLOCK
    choice = torch.ones(heads, dtype=torch.int32)
    position = ends.write(to_device(choice), to_device(index), mask)
    counts = tuple(sorted({0, min(32, width), width}))
    for tile in range(first // BLOCK, tiles):
        mine = row_tile == tile
        want, single = pattern_reference.cheapest_union(
            block_mass[:, mine], base[tile], columns, column_mass[:, mine], coverage, counts
        )
        if tile < tiles - 1:
            want = want | there[tile, index]
        want = want & (torch.arange(blocks) <= last_key[tile] // BLOCK)
        assert torch.equal(mask[tile].cpu()[index], want)
        for head in range(heads):
            got = position[head, tile - first // BLOCK].cpu()
            assert got[got >= 0].tolist() == columns[head][single[head]].sort().values.tolist()
    others = [i for i in range(5) if i not in index]
    assert torch.equal(mask.cpu()[:, others], there[:, others])


def test_last_rows_of_heads_that_read_everything():
    """Those that are said to, and those with mass that is not finite."""
    blocks = torch.rand(3, 30, 9)
    blocks /= blocks.sum(-1, keepdim=True)
    blocks[2, 7, 3] = torch.nan
    columns = torch.arange(70, 80).expand(3, -1)
    column_mass = torch.rand(3, 30, 10) / 500
    column_mass[2, 7] = torch.nan
    mask = to_device(torch.zeros(2, 3, 9, dtype=torch.bool))
    ends = LastRows(
        *map(to_device, (blocks, column_mass)), sort_columns(to_device(columns)),
        to_device(torch.full((3,), 0.1)), 94, 550, 32,
    )  # fmt: skip
    assert ends.bad.cpu().nonzero().tolist() == [[2, 7]]
    choice = to_device(torch.tensor([0, 1, 1], dtype=torch.int32))
    position = ends.write(choice, to_device(torch.arange(3)), mask)
    assert mask[1, 0].all() and mask[1, 2].all() and not mask[1, 1].all()
    assert (position[0] == -1).all() and (position[2] == -1).all()
