"""The adaptive default on heads of known kinds: what it reads, and what that covers."""

from __future__ import annotations

import math

import pytest
import torch
from known_heads import SCALE, Heads, covered, exact_mass, paged, selected

from vllm_sparse.kernels import BlockIndices
from vllm_sparse.patterns import ADAPTIVE, HeadPattern
from vllm_sparse.planner import adaptive, plan_prefill

COVERAGE = 0.95


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan(
    queries: torch.Tensor,
    keys: torch.Tensor,
    rows: int | None = None,
    *,
    patterns: list[HeadPattern] | None = None,
    coverage: float = COVERAGE,
    page: int = 16,
) -> BlockIndices:
    """Plans the last `rows` of queries [n, H, D] on keys [Hkv, n, D]."""
    n, heads = queries.shape[:2]
    rows = n if rows is None else rows
    cache, table = paged(keys, page)
    return plan_prefill(
        queries[n - rows :],
        cache,
        table,
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([n], dtype=torch.int32),
        patterns or [ADAPTIVE] * heads,
        scale=SCALE,
        coverage=coverage,
    )


def density(indices: BlockIndices, head: int, rows: int, n: int) -> float:
    """Share of the causal keys that one head reads, over all tiles."""
    read = causal = 0
    for tile in range(-(-rows // 64)):
        keys = selected(indices, tile * indices.num_heads + head, n)
        visible = min(n - rows + (tile + 1) * 64, n)
        read += int((keys < visible).sum())
        causal += visible
    return read / causal


def check(
    queries: torch.Tensor, keys: torch.Tensor, rows: int, indices: BlockIndices
) -> torch.Tensor:
    """Asserts what every adaptive plan promises; returns the mass covered in each row [H, rows]."""
    got = covered(indices, exact_mass(queries[-rows:], keys))
    # The last 64 rows: each of them. The others: on average, judged from 32 of them.
    assert got[:, -64:].min() >= COVERAGE - 1e-4
    assert got.mean(1).min() >= COVERAGE - 0.04
    return got


@pytest.mark.parametrize("rows, n", [(4096, 4096), (2048, 8192), (1000, 8111)])
def test_sink_and_window_heads_read_little(rows: int, n: int):
    heads = Heads(n)
    queries = torch.stack([heads.sink_window(0.5), heads.sink_window(0.9)], 1)
    indices = plan(queries, heads.keys[None], rows)
    got = covered(indices, exact_mass(queries[-rows:], heads.keys[None]))
    assert got[:, -64:].min() >= COVERAGE - 1e-4 and got.mean(1).min() > COVERAGE
    for head in range(2):
        assert density(indices, head, rows, n) < 0.1


@pytest.mark.parametrize("distance", [1, 63, 64, 100, 1000])
def test_slash_heads_read_diagonals(distance: int):
    n, rows = 4096, 1500
    heads = Heads(n)
    queries = heads.slash(distance)[:, None]
    indices = plan(queries, heads.keys[None], rows)
    assert check(queries, heads.keys[None], rows, indices)[0].mean() > 0.98
    # Sink, the diagonal and the block before it, and two blocks at the distance (three where the
    # chunk does not begin at a block's edge).
    assert density(indices, 0, rows, n) < 7 * 64 / (n - rows)


def test_vertical_heads_read_columns_and_no_blocks_for_them():
    n, rows = 8192, 2048
    heads = Heads(n, columns=200)
    queries = heads.vertical()[:, None]
    indices = plan(queries, heads.keys[None], rows)
    check(queries, heads.keys[None], rows, indices)
    # 200 columns among 128 blocks lie in nearly every block.
    assert density(indices, 0, rows, n) < 0.08
    columns = indices.columns.long()
    assert len(columns) and (heads.keys[columns, 1] == 1).float().mean() > 0.9


def test_heads_that_attend_their_own_words_are_not_taken_for_columns():
    """Columns that a few sampled rows like say nothing about the others."""
    n, rows = 4096, 1024
    heads = Heads(n, words=300)
    queries = heads.same_word()[:, None]
    indices = plan(queries, heads.keys[None], rows)
    got = check(queries, heads.keys[None], rows, indices)
    assert got.mean() > 0.95


def test_even_attention_is_dense():
    n, rows = 4096, 1024
    heads = Heads(n)
    queries = torch.stack([heads.uniform(), heads.uniform()], 1)
    indices = plan(queries, heads.keys[None], rows)
    everything = BlockIndices.everything([rows], [n], 2)
    assert torch.equal(indices.blocks, everything.blocks)
    assert torch.equal(indices.block_offsets, everything.block_offsets)
    assert indices.columns.numel() == 0


@pytest.mark.parametrize("n", [2048, 4096, 5000])
def test_even_attention_is_found_out_before_a_search(n: int, monkeypatch):
    """A search in vain is 2% of the time to first token at 2K."""
    monkeypatch.setattr(adaptive, "measure", None)
    monkeypatch.setattr(adaptive, "compete", None)
    heads = Heads(n)
    indices = plan(torch.stack([heads.uniform()] * 2, 1), heads.keys[None])
    assert torch.equal(indices.blocks, BlockIndices.everything([n], [n], 2).blocks)


@pytest.mark.parametrize("depth", [0.0, 0.01, 0.37, 0.8, 0.99])
@pytest.mark.parametrize("rows, n", [(1024, 4096), (1000, 4000)])
def test_the_last_rows_find_their_needle(depth: float, rows: int, n: int):
    heads = Heads(n)
    # A word that stands once, or near it.
    counts = heads.words.bincount(minlength=4000)[heads.words]
    needle = round(depth * (n - 100)) + 1
    needle += int((counts[needle : needle + 90] == 1).int().argmax())
    queries = heads.retrieval(needle, rows=20)[:, None]
    indices = plan(queries, heads.keys[None], rows)
    last_tile = -(-rows // 64) - 1
    assert needle in selected(indices, last_tile, n)
    got = check(queries, heads.keys[None], rows, indices)
    assert got[0, -20:].min() > 0.95
    assert density(indices, 0, rows, n) < 0.1


def test_an_averaging_row_is_covered_and_leaves_the_other_tiles_sparse():
    n, rows = 4096, 1024
    heads = Heads(n)
    queries = heads.averaging()[:, None]
    indices = plan(queries, heads.keys[None], rows)
    got = check(queries, heads.keys[None], rows, indices)
    assert got[0, -1] >= COVERAGE
    tiles = rows // 64
    counts = (indices.block_offsets[1:] - indices.block_offsets[:-1]).tolist()
    assert counts[-1] > 0.8 * n / 64
    assert max(counts[: tiles - 1]) <= 4


def test_a_question_across_two_tiles_is_covered_in_both():
    n, rows = 4000, 1000  # the last tile holds 40 rows
    heads = Heads(n)
    queries = heads.averaging(rows=60)[:, None]
    indices = plan(queries, heads.keys[None], rows)
    check(queries, heads.keys[None], rows, indices)


def test_heads_of_several_kinds_and_kv_heads_side_by_side():
    n, rows = 4096, 1100
    a, b = Heads(n, seed=1), Heads(n, seed=2)
    queries = torch.stack(
        [a.sink_window(), a.uniform(), a.slash(77), b.vertical(), b.averaging(), b.same_word()], 1
    )
    keys = torch.stack([a.keys, b.keys])
    together = plan(queries, keys, rows)
    check(queries, keys, rows, together)
    for head in range(6):
        alone = plan(queries[:, head : head + 1], keys[head // 3][None], rows)
        for tile in range(-(-rows // 64)):
            assert torch.equal(selected(together, tile * 6 + head, n), selected(alone, tile, n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    n, rows = 4096, 1024
    heads = Heads(n)
    queries = torch.stack([heads.sink_window(), heads.retrieval(1234), heads.vertical()], 1)
    indices = plan(queries.to(dtype), heads.keys[None].to(dtype), rows)
    check(queries.to(dtype), heads.keys[None].to(dtype), rows, indices)
    assert density(indices, 0, rows, n) < 0.1


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 111, 127, 128, 129, 300])
@pytest.mark.parametrize("n", [513, 640, 2000])
def test_short_chunks(rows: int, n: int):
    if rows > n:
        pytest.skip("a chunk is part of its sequence")
    heads = Heads(n, columns=40)
    queries = torch.stack([heads.sink_window(), heads.vertical(), heads.uniform()], 1)
    indices = plan(queries, heads.keys[None], rows)
    check(queries, heads.keys[None], rows, indices)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 512])
def test_short_sequences_are_read_whole(n: int):
    heads = Heads(n, columns=1)
    indices = plan(heads.uniform()[:, None], heads.keys[None])
    assert torch.equal(indices.blocks, BlockIndices.everything([n], [n], 1).blocks)


def test_every_selection_holds_the_diagonal_and_the_sink():
    n, rows = 4001, 777
    heads = Heads(n)
    queries = torch.stack([heads.sink_window(), heads.slash(500), heads.vertical()], 1)
    indices = plan(queries, heads.keys[None], rows)
    for row in range(indices.block_offsets.numel() - 1):
        first = n - rows + row // 3 * 64
        keys = set(selected(indices, row, n).tolist())
        assert keys >= {0, first, min(first + 63, n - 1)}


def test_a_batch_is_planned_like_its_sequences():
    shapes = [(200, 1500), (64, 64), (1, 900), (700, 700)]
    heads = [Heads(n, seed=i, columns=30) for i, (_, n) in enumerate(shapes)]
    parts, tables, caches, queries = [], [], [], []
    for (rows, n), h in zip(shapes, heads, strict=True):
        q = torch.stack([h.sink_window(), h.vertical()], 1)
        parts.append(plan(q, h.keys[None], rows))
        cache, table = paged(h.keys[None], 16)
        tables.append(table[0] + sum(len(c) for c in caches))
        caches.append(cache)
        queries.append(q[n - rows :])
    width = max(len(t) for t in tables)
    table = torch.stack([torch.nn.functional.pad(t, (0, width - len(t)), value=-1) for t in tables])
    starts = torch.tensor([0, *(rows for rows, _ in shapes)]).cumsum(0).int()
    lens = torch.tensor([n for _, n in shapes], dtype=torch.int32)
    batch = plan_prefill(
        torch.cat(queries), torch.cat(caches), table, starts, lens, [ADAPTIVE] * 2,
        scale=SCALE, coverage=COVERAGE,
    )  # fmt: skip
    alone = BlockIndices.cat(parts)
    for name in ("tile_offsets", "block_offsets", "blocks", "column_offsets", "columns"):
        assert torch.equal(getattr(batch, name), getattr(alone, name)), name
        assert getattr(batch, name).dtype == torch.int32


@pytest.mark.parametrize("where", ["sampled query", "last query", "key", "all"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_read_whole_or_not_at_all(where: str, value: float):
    n, rows = 2048, 1024
    heads = Heads(n)
    queries = torch.stack([heads.sink_window(), heads.retrieval(100)], 1)
    keys = heads.keys[None].clone()
    if where == "sampled query":
        queries[n - rows : n - rows + 512, 0] = value
    elif where == "last query":
        queries[-1, 0] = value
    elif where == "key":
        keys[0, 700, 3] = value
    else:
        queries[:] = value
    indices = plan(queries, keys, rows)
    for row in range(indices.block_offsets.numel() - 1):
        selected(indices, row, n)  # ascending and each once
    if where != "key":
        everything = BlockIndices.everything([rows], [n], 1)
        first = [len(selected(indices, tile * 2, n)) for tile in range(rows // 64)]
        assert first == [len(selected(everything, tile, n)) for tile in range(rows // 64)]


def test_coverage_one_reads_everything_and_more_coverage_reads_more():
    n, rows = 2048, 512
    heads = Heads(n)
    queries = torch.stack([heads.sink_window(), heads.vertical()], 1)
    whole = plan(queries, heads.keys[None], rows, coverage=1.0)
    assert torch.equal(whole.blocks, BlockIndices.everything([rows], [n], 2).blocks)
    read = [
        plan(queries, heads.keys[None], rows, coverage=c).density([rows], [n])
        for c in (0.3, 0.9, 0.99)
    ]
    assert read == sorted(read)


def test_the_same_prompt_is_planned_alike():
    n, rows = 3000, 1000
    heads = Heads(n)
    queries = heads.same_word()[:, None]
    first, second = (plan(queries, heads.keys[None], rows) for _ in range(2))
    assert torch.equal(first.blocks, second.blocks) and torch.equal(first.columns, second.columns)


def test_bad_arguments_are_refused_by_name():
    heads = Heads(100, columns=1)
    with pytest.raises(ValueError, match="patterns: got 2 for 1 heads"):
        plan(heads.uniform()[:, None], heads.keys[None], patterns=[ADAPTIVE] * 2)
    with pytest.raises(ValueError, match=r"coverage: got 1\.5; allowed"):
        plan(heads.uniform()[:, None], heads.keys[None], coverage=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torchs_default_dtype_does_not_matter(dtype: torch.dtype):
    """vLLM sets it to the model's while it loads a model."""
    n, rows = 4096, 1024
    heads = Heads(n, columns=100)
    queries = torch.stack([heads.sink_window(0.5), heads.vertical(), heads.slash(64)], 1)
    queries = torch.cat([queries, torch.randn_like(queries[:, :1])], 1)
    before = torch.get_default_dtype()
    expected = plan(queries, heads.keys[None], rows)
    try:
        torch.set_default_dtype(dtype)
        got = plan(queries, heads.keys[None], rows)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got.blocks, expected.blocks)
    assert torch.equal(got.columns, expected.columns)
