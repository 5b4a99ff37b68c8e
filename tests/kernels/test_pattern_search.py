"""The searches of planning: native and reference, against what they promise, written apart."""

from __future__ import annotations

import pytest
import torch
from sampled_mass import Sampled

from vllm_sparse.kernels import cpu, pattern_reference, pattern_search
from vllm_sparse.kernels.block_indices import BLOCK
from vllm_sparse.kernels.pattern_reference import COLUMN_COST, thresholds


@pytest.fixture(params=["reference", "native"])
def search(request):
    """One implementation of all of them."""
    if request.param == "native" and cpu.native_error():
        pytest.skip("no native extension")
    return pattern_reference if request.param == "reference" else pattern_search


SHAPES = [(2, 0), (9, 0), (8, 640), (5, 100), (33, 64)]
POWERS = [1.0, 8.0, 60.0]


@pytest.mark.parametrize("tiles, start", SHAPES)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("coverage", [0.3, 0.8, 0.95])
def test_window(search, tiles, start, power, coverage):
    case = Sampled(tiles, start, power=power)
    cost, offset = search.cheapest_window(case.sampled, torch.full((3,), coverage))
    assert cost.dtype == torch.float32 and offset.dtype == torch.int64
    block = torch.arange(case.blocks).repeat_interleave(BLOCK)
    for head in range(3):

        def read(until: int):
            last = case.sampled.last_block[:, None]
            near = (block <= last) & (block >= last - until)
            return [near[t, : case.keys] | case.base(t) for t in range(tiles)]

        wanted = int(offset[head])
        if cost[head].isinf():
            assert case.covered(head, read(case.blocks)) < coverage + 1e-6
            continue
        assert case.covered(head, read(wanted)) >= coverage - 1e-6
        assert wanted == 0 or case.covered(head, read(wanted - 1)) < coverage + 1e-6
        # The window's blocks, the one before a tile's last at least, and block 0.
        whole = [min(int(last), max(wanted, 1) + 1) + 1 for last in case.sampled.last_block[:-1]]
        assert cost[head] == pytest.approx(64 * sum(whole) / (tiles - 1), rel=1e-5)


@pytest.mark.parametrize("tiles, start", SHAPES)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("rows", [2, 17, 32])
def test_columns(search, tiles, start, power, rows):
    case = Sampled(tiles, start, power=power, rows=rows)
    coverage = torch.tensor([0.3, 0.8, 0.95])
    cost, diagonals, taken = search.cheapest_columns(
        case.sampled,
        coverage,
        case.columns,
        case.column_mass,
        start,
        torch.ones(3, dtype=torch.bool),
    )
    assert diagonals.dtype == taken.dtype == torch.bool
    for head in range(3):
        if cost[head].isinf():
            assert not diagonals[head].any() and not taken[head].any()
            continue
        # What was bought costs what is said, and its buyers cover about what they were asked for:
        # the budget was judged crosswise, so all rows together do better than either half.
        paid = float(case.sampled.base_cost)
        paid += float(case.sampled.offset_cost[diagonals[head]].sum())
        tile = ((case.columns[head] - start) // BLOCK).clamp(min=0)
        seen = (tiles - 1 - tile).clamp(min=0).float() / (tiles - 1)
        paid += COLUMN_COST * float(seen[taken[head]].sum())
        assert cost[head] == pytest.approx(paid, rel=1e-5)
        # The best buys come first: nothing that was left is a better one than what was taken.
        assert not diagonals[head, :2].any()
        worth = case.column_mass[head].sum(0) - case.column_mass[head].amax(0)
        value = torch.where(seen > 0, worth / (COLUMN_COST * seen), 0.0)
        if taken[head].any() and not taken[head].all():
            assert value[taken[head]].min() >= value[~taken[head]].max() - 1e-6
        assert (value[taken[head]] > 0).all()


def test_columns_that_all_rows_like_are_taken_and_those_of_single_rows_are_not(search):
    case = Sampled(9, 0, rows=32, power=1.0)
    blocks = torch.zeros(1, 32, case.blocks)
    last = case.sampled.last_block[case.sampled.row_tile]
    blocks[0, torch.arange(32), last] = 0.5
    columns = torch.tensor([[70, 71, 130]])
    mass = torch.zeros(1, 32, 3)
    outside = last >= 3  # rows whose base does not hold block 1
    mass[0, :, 0] = 0.5 * outside
    mass[0, 5, 1] = 0.4
    blocks[0, :, 1] += 0.5 * outside
    blocks[0, ~outside, 0] += 0.5
    sampled = case.sampled._replace(blocks=blocks)
    cost, _, taken = search.cheapest_columns(
        sampled, torch.tensor([0.9]), columns, mass, 0, torch.ones(1, dtype=torch.bool)
    )
    assert taken.tolist() == [[True, False, False]]
    assert cost[0] <= sampled.base_cost + BLOCK  # the least of the budgets, diagonals with it


@pytest.mark.parametrize("tiles, start", SHAPES)
@pytest.mark.parametrize("power", POWERS)
def test_threshold(search, tiles, start, power):
    case = Sampled(tiles, start, power=power, rows=20)
    rng = torch.Generator().manual_seed(1)
    block = torch.arange(case.blocks)
    future = block > case.sampled.last_block[:, None]
    score = 6 * torch.rand(3, tiles, case.blocks, generator=rng)
    score.masked_fill_(future, torch.nan)  # what is in the future does not count
    coverage = torch.tensor([0.3, 0.8, 0.95])
    cost, chosen = search.cheapest_threshold(case.sampled, coverage, score)
    edges = thresholds()

    def read(head: int, level: int) -> list[torch.Tensor]:
        best = score[head].masked_fill(future, -torch.inf).amax(-1, keepdim=True)
        near = (best - score[head] <= edges[level]) & ~future
        keys = near.repeat_interleave(BLOCK, 1)[:, : case.keys]
        return [keys[t] | case.base(t) for t in range(tiles)]

    for head in range(3):
        assert not chosen[head][future].any()
        got = [m.repeat_interleave(BLOCK)[: case.keys] for m in chosen[head]]
        assert all((got[t] & case.base(t)).sum() == case.base(t).sum() for t in range(tiles))
        levels = [case.covered(head, read(head, level)) for level in range(len(edges))]
        found = [level for level, covers in enumerate(levels) if covers >= coverage[head] - 1e-6]
        if cost[head].isinf():
            assert all(covers < coverage[head] + 1e-6 for covers in levels)
            continue
        assert all(torch.equal(a, b) for a, b in zip(got, read(head, found[0]), strict=True))
        whole = chosen[head, :-1].sum() * BLOCK / (tiles - 1)
        assert cost[head] == pytest.approx(float(whole), rel=1e-5)


def test_threshold_reads_what_it_cannot_judge(search):
    case = Sampled(9, 0, power=1.0)
    score = torch.zeros(3, 9, 9)
    score[0, :, 2] = torch.inf
    score[1, :, 2] = torch.nan
    score[2, :, 2] = -torch.inf
    cost, chosen = search.cheapest_threshold(case.sampled, torch.full((3,), 0.1), score)
    assert cost.isfinite().all()
    assert chosen[0, 2:, 2].all() and not chosen[0, 8, 3]
    assert not chosen[2, 8, 2] and chosen[2, 8, 3:].all()


@pytest.mark.parametrize("tiles, start", SHAPES)
@pytest.mark.parametrize("power", [0.0, 1.0, 8.0])
def test_least_keys(search, tiles, start, power):
    """Never more than the fewest keys that do."""
    case = Sampled(tiles, start, power=power)
    coverage = torch.tensor([0.3, 0.8, 0.95])
    padded = torch.nn.functional.pad(case.mass, (0, case.blocks * BLOCK - case.keys))
    squares = padded.unflatten(-1, (-1, BLOCK)).square().sum(-1)
    least = search.least_keys(case.sampled, coverage, squares)
    assert least.dtype == torch.float32 and least.shape == (3,)
    for head in range(3):
        fewest = bound = 0.0
        for s, tile in enumerate(case.sampled.row_tile.tolist()):
            base = case.base(tile)
            need = float(coverage[head]) - float(case.mass[head, s, base].sum())
            mass = case.mass[head, s, ~base].sort(descending=True).values.double()
            fewest += 0 if need <= 0 else int((mass.cumsum(0) < need - 1e-6).sum()) + 1
            squared = float(mass.square().sum())
            bound += max(need, 0.0) ** 2 / squared if squared else 0.0
        assert least[head] <= fewest + 1e-3
        assert least[head] == pytest.approx(bound, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("width", [0, 1, 40])
def test_sort_columns(search, width):
    rng = torch.Generator().manual_seed(width)
    columns = torch.stack([torch.randperm(100, generator=rng)[:width] for _ in range(4)])
    keep = torch.rand(4, width, generator=rng) < 0.5
    keep[1], keep[2] = False, width > 1
    got = search.sort_columns(columns, keep)
    assert got.dtype == torch.int32 and got.shape == (4, int(keep.sum(1).max()) if width else 0)
    for head in range(4):
        wanted = sorted(columns[head][keep[head]].tolist())
        assert got[head].tolist() == wanted + [-1] * (got.shape[1] - len(wanted))
    assert search.sort_columns(columns[:0], keep[:0]).shape == (0, 0)
    assert not search.sort_columns(columns, torch.zeros_like(keep)).numel()


@pytest.mark.parametrize("rows, width", [(1, 0), (7, 1), (64, 40), (64, 100)])
@pytest.mark.parametrize("power", [0.0, 1.0, 20.0, 1000.0])
@pytest.mark.parametrize("coverage", [0.5, 0.95, 1.0])
def test_union(search, rows, width, power, coverage):
    rng = torch.Generator().manual_seed(rows)
    mass = torch.rand(2, rows, 20 * BLOCK, generator=rng).pow(power)
    mass /= mass.sum(-1, keepdim=True)
    base = torch.zeros(20, dtype=torch.bool)
    base[[0, 18, 19]] = True
    outside = mass * ~base.repeat_interleave(BLOCK)
    columns = outside.amax(1).topk(width).indices
    column_mass = outside.gather(2, columns[:, None].expand(-1, rows, -1))
    blocks = mass.unflatten(2, (-1, BLOCK)).sum(-1)
    counts = sorted({0, min(width, 32), width})
    where = (blocks, base, columns, column_mass, torch.full((2,), coverage))
    chosen, single = search.cheapest_union(*where, tuple(counts))
    tried = [search.cheapest_union(*where, (count,)) for count in counts]
    for head in range(2):
        assert chosen[head][base].all()
        keys = chosen[head].repeat_interleave(BLOCK)
        mine = columns[head][single[head]]
        assert not keys[mine].any()
        keys[mine] = True
        assert mass[head][:, keys].sum(-1).min() >= coverage - 1e-5
        costs = [float(b[head].sum() * BLOCK + c[head].sum() * COLUMN_COST) for b, c in tried]
        best = costs.index(min(costs))
        assert torch.equal(chosen[head], tried[best][0][head])
        assert torch.equal(single[head], tried[best][1][head])


@pytest.mark.parametrize("seed", range(20))
def test_native_is_the_reference(seed):
    if cpu.native_error():
        pytest.skip("no native extension")
    tiles, start = [(2, 0), (17, 0), (8, 1000), (30, 30)][seed % 4]
    case = Sampled(
        tiles, start, heads=4, rows=16 + seed % 3, power=2.0 ** (seed % 7), width=50, seed=seed
    )
    coverage = torch.tensor([0.2, 0.6, 0.9, 0.97])
    columns = (
        case.columns,
        case.column_mass,
        start,
        torch.tensor([True, True, seed % 2 == 0, True]),
    )
    score = torch.randn(4, tiles, case.blocks, generator=torch.Generator().manual_seed(seed))
    base = case.sampled.base[-1]
    for name, more in (
        ("cheapest_window", (coverage,)),
        ("cheapest_columns", (coverage, *columns)),
        ("cheapest_threshold", (coverage, score)),
    ):
        got = getattr(pattern_search, name)(case.sampled, *more)
        wanted = getattr(pattern_reference, name)(case.sampled, *more)
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-3)
        for a, b in zip(got[1:], wanted[1:], strict=True):
            assert torch.equal(a, b), name
    union = (case.sampled.blocks, base, *columns[:2], coverage, (0, 32, 50))
    squares = case.sampled.blocks.square() / 64
    torch.testing.assert_close(
        pattern_search.least_keys(case.sampled, coverage, squares),
        pattern_reference.least_keys(case.sampled, coverage, squares),
        rtol=1e-4,  # of two sums that nearly cancel, in different orders
        atol=1e-3,
    )
    for a, b in zip(
        pattern_search.cheapest_union(*union), pattern_reference.cheapest_union(*union), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_not_finite_is_no_candidate(search, threads):
    case = Sampled(9, 0, heads=2)
    case.sampled.blocks[0, 3] = torch.nan
    case.column_mass[0, 3] = torch.nan
    coverage, both = torch.full((2,), 0.5), torch.ones(2, dtype=torch.bool)
    cpu.set_threads(threads)
    try:
        costs = [
            search.cheapest_window(case.sampled, coverage)[0],
            search.cheapest_columns(
                case.sampled, coverage, case.columns, case.column_mass, 0, both
            )[0],
            search.cheapest_threshold(case.sampled, coverage, torch.zeros(2, 9, 9))[0],
        ]
    finally:
        cpu.set_threads(1)
    for cost in costs:
        assert cost[0].isinf()
    assert costs[0][1].isfinite()


def test_no_heads_and_strided_arguments(search):
    case = Sampled(9, 0)
    none = case.sampled._replace(blocks=case.sampled.blocks[:0])
    coverage, wanted = torch.full((3,), 0.7), torch.ones(3, dtype=torch.bool)
    assert search.cheapest_window(none, coverage[:0])[0].shape == (0,)
    got = search.cheapest_columns(
        none, coverage[:0], case.columns[:0], case.column_mass[:0], 0, wanted[:0]
    )
    assert got[1].shape == (0, 9) and got[2].shape == (0, 40)
    blocks = case.sampled.blocks.transpose(0, 1).contiguous().transpose(0, 1)
    mass = case.column_mass.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(
        search.cheapest_columns(case.sampled, coverage, case.columns, case.column_mass, 0, wanted),
        search.cheapest_columns(
            case.sampled._replace(blocks=blocks), coverage, case.columns, mass, 0, wanted
        ),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_arguments_that_do_not_fit():
    if cpu.native_error():
        pytest.skip("the reference takes what torch takes")
    case = Sampled(9, 0)
    coverage = torch.full((3,), 0.7)
    with pytest.raises(ValueError, match=r"coverage: got \(2,\)"):
        pattern_search.cheapest_window(case.sampled, coverage[:2])
    with pytest.raises(ValueError, match=r"row_tile: got \(16,\) torch\.int32"):
        wrong = case.sampled._replace(row_tile=case.sampled.row_tile.int())
        pattern_search.cheapest_window(wrong, coverage)
    with pytest.raises(ValueError, match="last_block: got 1 tiles"):
        wrong = case.sampled._replace(last_block=case.sampled.last_block[:1])
        pattern_search.cheapest_window(wrong, coverage)
    with pytest.raises(ValueError, match="score: got"):
        pattern_search.cheapest_threshold(case.sampled, coverage, torch.zeros(3, 9, 8))
    with pytest.raises(ValueError, match="column_mass: got"):
        pattern_search.cheapest_columns(
            case.sampled, coverage, case.columns, case.column_mass[:2], 0, coverage > 0
        )
    with pytest.raises(ValueError, match=r"counts: got \(41,\)"):
        pattern_search.cheapest_union(
            case.sampled.blocks, case.sampled.base[0], case.columns, case.column_mass, coverage,
            (41,),
        )  # fmt: skip
