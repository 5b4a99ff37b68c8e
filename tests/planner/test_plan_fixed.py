"""Fixed budgets from a pattern file: what each number selects."""

from __future__ import annotations

import pytest
import torch
from known_heads import SCALE, Heads, exact_mass, paged, selected

from vllm_sparse.kernels import BlockIndices
from vllm_sparse.patterns import ADAPTIVE, HeadPattern
from vllm_sparse.planner import plan_prefill
from vllm_sparse.planner.base import Chunk
from vllm_sparse.planner.vertical_slash import fixed, mask_of_distances

CPU = torch.device("cpu")
SHAPES = [
    pytest.param(rows, n, id=f"Q{rows}-N{n}")
    for rows, n in [(1, 600), (64, 640), (65, 700), (300, 777), (800, 800), (128, 1024)]
]


def plan(queries, keys, rows, patterns, coverage=0.95) -> BlockIndices:
    n = len(queries)
    cache, table = paged(keys)
    return plan_prefill(
        queries[n - rows :], cache, table, torch.tensor([0, rows]), torch.tensor([n]), patterns,
        scale=SCALE, coverage=coverage,
    )  # fmt: skip


def blocks_of(indices: BlockIndices, row: int) -> set[int]:
    first, last = indices.block_offsets[row : row + 2].tolist()
    return set(indices.blocks[first:last].tolist())


def base(start: int, rows: int, tile: int) -> set[int]:
    last = min(start + tile * 64 + 63, start + rows - 1) // 64
    return {0, last, max(last - 1, 0)}


@pytest.mark.parametrize("rows, n", SHAPES)
@pytest.mark.parametrize("sink, window", [(0, 1), (1, 1), (64, 64), (65, 200), (2000, 3000)])
def test_a_shape_reads_the_blocks_of_its_tokens(rows: int, n: int, sink: int, window: int):
    heads = Heads(n)
    pattern = HeadPattern(kind="a_shape", sink=sink, window=window)
    indices = plan(heads.uniform()[:, None], heads.keys[None], rows, [pattern])
    for tile in range(-(-rows // 64)):
        first = n - rows + tile * 64
        last = min(first + 63, n - 1)
        tokens = [t for t in (*range(sink), *range(first - window + 1, last + 1)) if 0 <= t <= last]
        wanted = {t // 64 for t in tokens} | base(n - rows, rows, tile)
        assert blocks_of(indices, tile) == wanted


@pytest.mark.parametrize("rows, n", SHAPES)
def test_distances_become_the_blocks_that_they_touch(rows: int, n: int):
    rng = torch.Generator().manual_seed(rows)
    chosen = torch.rand(3, n, generator=rng) < 4 / n
    mask = mask_of_distances(Chunk(rows, n, CPU), chosen)
    for head in range(3):
        for tile in range(-(-rows // 64)):
            first = n - rows + tile * 64
            tokens = [
                row - distance
                for row in range(first, min(first + 64, n))
                for distance in chosen[head].nonzero()[:, 0].tolist()
            ]
            wanted = {t // 64 for t in tokens if t >= 0} | base(n - rows, rows, tile)
            assert set(mask[tile, head].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize("rows, n", SHAPES)
def test_vertical_slash_takes_the_heaviest_of_the_last_rows(rows: int, n: int):
    rng = torch.Generator().manual_seed(n)
    count = min(rows, 64)
    mass = torch.rand(2, count, n, generator=rng)
    position = torch.arange(n - count, n)
    mass.masked_fill_(torch.arange(n) > position[:, None], 0.0)
    by_distance = torch.zeros(2, n)
    for row, p in enumerate(position.tolist()):
        by_distance[:, : p + 1] += mass[:, row, : p + 1].flip(1)
    vertical, slash = torch.tensor([5, 0]), torch.tensor([3, 9])
    blocks, columns = fixed(Chunk(rows, n, CPU), mass, vertical, slash)
    for head in range(2):
        want = mass[head].sum(0).topk(int(vertical[head])).indices.sort().values.tolist()
        assert [c for c in columns[head].tolist() if c >= 0] == want
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[by_distance[head].topk(int(slash[head])).indices] = True
        assert torch.equal(
            blocks[:, head], mask_of_distances(Chunk(rows, n, CPU), chosen[None])[:, 0]
        )


def test_vertical_slash_finds_the_columns_and_the_slash():
    n, rows = 2048, 512
    heads = Heads(n, columns=20)
    queries = torch.stack([heads.vertical(), heads.slash(777)], 1)
    indices = plan(queries, heads.keys[None], rows, [
        HeadPattern(kind="vertical_slash", vertical=21, slash=1),
        HeadPattern(kind="vertical_slash", vertical=0, slash=1),
    ])  # fmt: skip
    mass = exact_mass(queries[-rows:], heads.keys[None])
    for tile in range(rows // 64):
        for head in range(2):
            keys = selected(indices, tile * 2 + head, n)
            rows_of = slice(tile * 64, tile * 64 + 64)
            assert mass[head, rows_of, keys].sum(-1).min() > 0.95


def test_more_than_there_is_reads_everything():
    n, rows = 700, 200
    heads = Heads(n)
    patterns = [
        HeadPattern(kind="vertical_slash", vertical=5000, slash=5000),
        HeadPattern(kind="block_sparse", blocks=5000),
        HeadPattern(kind="dense"),
        HeadPattern(coverage=1.0),
    ]
    queries = torch.stack([heads.uniform()] * 4, 1)
    indices = plan(queries, heads.keys[None], rows, patterns)
    everything = BlockIndices.everything([rows], [n], 4)
    assert torch.equal(indices.blocks, everything.blocks)
    assert indices.columns.numel() == 0


def test_block_sparse_takes_the_best_pooled_blocks():
    n, rows = 2048, 640
    rng = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(n, 2, 128, generator=rng), torch.randn(1, n, 128, generator=rng)
    patterns = [HeadPattern(kind="block_sparse", blocks=b) for b in (6, 11)]
    indices = plan(queries, keys, rows, patterns)
    score = torch.einsum(
        "thd,bd->htb",
        queries[n - rows :].unflatten(0, (-1, 64)).mean(1),
        keys[0].unflatten(0, (-1, 64)).mean(1),
    )
    for head, count in enumerate((6, 11)):
        for tile in range(rows // 64):
            forced = base(n - rows, rows, tile)
            free = score[head, tile].clone()
            free[list(forced)] = -torch.inf
            free[(n - rows) // 64 + tile + 1 :] = -torch.inf
            best = free.topk(count - len(forced)).indices.tolist()
            assert blocks_of(indices, tile * 2 + head) == forced | set(best)


def test_kinds_mix_among_the_heads_of_a_layer():
    n, rows = 2048, 500
    heads = Heads(n)
    patterns = [
        HeadPattern(kind="a_shape", sink=64, window=128),
        ADAPTIVE,
        HeadPattern(kind="dense"),
        HeadPattern(kind="vertical_slash", vertical=10, slash=10),
        HeadPattern(kind="block_sparse", blocks=5),
        HeadPattern(kind="vertical_slash", coverage=0.9),
    ]
    queries = torch.stack([heads.sink_window() for _ in patterns], 1)
    together = plan(queries, heads.keys[None].repeat(2, 1, 1), rows, patterns)
    for head, pattern in enumerate(patterns):
        alone = plan(queries[:, head : head + 1], heads.keys[None], rows, [pattern])
        for tile in range(-(-rows // 64)):
            row = tile * len(patterns) + head
            assert torch.equal(selected(together, row, n), selected(alone, tile, n))


def test_a_kind_with_a_coverage_is_dense_where_it_cannot_reach_it():
    n, rows = 2048, 512
    heads = Heads(n)
    queries = torch.stack([heads.slash(1500), heads.slash(1500)], 1)
    patterns = [HeadPattern(kind=k, coverage=0.9) for k in ("a_shape", "vertical_slash")]
    indices = plan(queries, heads.keys[None], rows, patterns)
    first = n - rows
    assert len(blocks_of(indices, 0)) == first // 64 + 1
    assert len(blocks_of(indices, 1)) <= 6
