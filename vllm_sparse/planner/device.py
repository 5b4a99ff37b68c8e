"""Planning on a GPU: the selection that `plan` makes, and nothing of it on the host.

What the CPU's planner saves by looking only at the heads that still need it would cost a GPU a wait
for the answer each time. Here every step is taken for all heads, and which of the results count is
decided by masks, in Triton kernels of one launch each; fixed budgets are spent by torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from vllm_sparse.kernels import BlockIndices, RowScores, SampledMass
from vllm_sparse.kernels.block_indices import TILE
from vllm_sparse.kernels.gpu.block_means import block_means
from vllm_sparse.kernels.gpu.body_mass import top_block
from vllm_sparse.kernels.gpu.choose_pattern import (
    WINDOW,
    Allowed,
    Found,
    choose_pattern,
    write_body,
)
from vllm_sparse.kernels.gpu.index_lists import index_lists_of, upload
from vllm_sparse.kernels.gpu.last_union import LastRows
from vllm_sparse.kernels.gpu.line_sums import line_sums
from vllm_sparse.kernels.gpu.row_scores import row_scores
from vllm_sparse.kernels.gpu.search_columns import search_columns
from vllm_sparse.kernels.gpu.search_threshold import limits, search_threshold
from vllm_sparse.kernels.gpu.search_window import search_window
from vllm_sparse.kernels.gpu.sort_columns import sort_columns
from vllm_sparse.patterns import HeadPattern

from . import a_shape, adaptive, block_sparse, last_rows, vertical_slash
from .base import MAX_COST, Chunk, chunk_of
from .plan import LAST_ROWS, SHORT_BLOCKS
from .samples import (
    MAX_ROWS,
    MIN_ROWS,
    PROBE_ROWS,
    ROWS_EACH,
    Rows,
    rows_at_end,
    rows_of_body,
)
from .scores import Keys

# Mean keys [Hkv, nb, D] of a sequence's blocks: block table row, length, heads, k_scale -> means.
Means = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor | None], torch.Tensor]
# Columns that heads [h] read in all tiles of a range: int32 or int64 [h, M], -1 for none.
Columns = tuple[torch.Tensor, torch.Tensor]


class DeviceKeys(Keys):
    """Keys whose questions the GPU's kernels answer."""

    means: Means | None = None

    def score(self, queries, positions, heads, **wanted):
        where = (self.cache, self.table, positions, heads, self.length)
        return row_scores(queries, *where, scale=self.scale, k_scale=self.k_scale, **wanted)

    def line_sums(
        self, queries: torch.Tensor, heads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the sequence's last rows [R, H, D]: see `kernels.gpu.line_sums`."""
        where = (self.cache, self.table, heads, self.length)
        return line_sums(queries, *where, scale=self.scale, k_scale=self.k_scale)

    def block_means(self, kv_heads: torch.Tensor) -> torch.Tensor:
        # Of all heads once, as telling which are wanted would take a look at the device.
        return self.all_block_means()[kv_heads]

    def all_block_means(self) -> torch.Tensor:
        """fp32 [Hkv, nb, D]"""
        every = _on_device(tuple(range(self.heads)), torch.int64, self.cache.device)
        if self.means is None:
            return block_means(self.cache, self.table, self.length, every, self.k_scale)
        return self.means(self.table, self.length, every, self.k_scale)


def plan_on_device(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    patterns: Sequence[HeadPattern],
    *,
    scale: float,
    coverage: float,
    means: Means | None = None,
    k_scale: torch.Tensor | None = None,
) -> BlockIndices:
    """See `plan_prefill`, which has the same meaning; the lengths are the host's here.

    Args:
        means: mean keys of blocks where they are kept (`PageSums.means`); None: from the keys.
        k_scale: fp32 [1], a key is what is stored times this; None: 1.
    """
    parts, tiles, begin = [], [], 0
    for s, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        chunk = chunk_of(query_len, seq_len, q.device)
        tiles.append(chunk.tiles)
        if coverage == 1.0 or query_len == 0 or chunk.blocks <= SHORT_BLOCKS:
            every = chunk.causal[:, None].expand(-1, q.shape[1], -1)
            parts.append((every, None, chunk.last_key))
        else:
            keys = DeviceKeys(k_cache, block_table[s], seq_len, scale, k_scale)
            object.__setattr__(keys, "means", means)  # Keys is frozen
            queries = q[begin : begin + query_len]
            parts += _plan_chunk(chunk, queries, keys, tuple(patterns), coverage)
        begin += query_len
    return index_lists_of(parts, tiles)


@functools.lru_cache(maxsize=512)
def _on_device(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A constant of the host; made once, as all layers and steps ask for the same few."""
    return upload(torch.tensor(values, dtype=dtype, device="cpu"), device)


@functools.lru_cache(maxsize=512)
def _request(
    patterns: tuple[HeadPattern, ...], heads: tuple[int, ...], coverage: float, device: torch.device
) -> adaptive.Request:
    request = adaptive.Request.of(
        list(heads), [patterns[i] for i in heads], coverage, torch.device("cpu")
    )
    fields = (request.heads, request.coverage, request.kinds)
    return adaptive.Request(*(upload(x, device) for x in fields))


def _plan_chunk(
    chunk: Chunk,
    queries: torch.Tensor,
    keys: DeviceKeys,
    patterns: tuple[HeadPattern, ...],
    coverage: float,
) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """One sequence's parts for `index_lists_of`: blocks, columns, last keys of ranges of tiles."""
    shape = (chunk.tiles, len(patterns), chunk.blocks)
    blocks = torch.empty(shape, dtype=torch.bool, device=chunk.device)  # each head writes its own
    # The body's tiles, which read the same columns, then those of the chunk's last rows.
    body = max(chunk.query_len - TILE, 0) // TILE
    columns: list[list[Columns]] = [[] for _ in range(chunk.tiles - body + 1)]

    def heads_of(keep: Callable[[HeadPattern], bool]) -> tuple[tuple[int, ...], torch.Tensor]:
        heads = tuple(i for i, p in enumerate(patterns) if keep(p))
        return heads, _on_device(heads, torch.int64, chunk.device)

    def numbers(heads: tuple[int, ...], field: str) -> torch.Tensor:
        values = tuple(getattr(patterns[i], field) for i in heads)
        return _on_device(values, torch.int64, chunk.device)

    def is_dense(p: HeadPattern) -> bool:
        return not p.fixed and (p.kind == "dense" or (p.coverage or coverage) == 1.0)

    heads, index = heads_of(is_dense)
    if heads:
        blocks[:, index] = chunk.causal[:, None].expand(-1, len(heads), -1)
    heads, index = heads_of(lambda p: p.fixed and p.kind == "a_shape")
    if heads:
        blocks[:, index] = a_shape.fixed(chunk, numbers(heads, "sink"), numbers(heads, "window"))
    heads, index = heads_of(lambda p: p.fixed and p.kind == "block_sparse")
    if heads:
        score = _pooled_scores(queries, keys, index)
        blocks[:, index] = block_sparse.fixed(chunk, score, numbers(heads, "blocks"))
    heads, index = heads_of(lambda p: p.fixed and p.kind == "vertical_slash")
    if heads:
        fields = ("vertical", "slash")
        most = tuple(max(getattr(patterns[i], field) for i in heads) for field in fields)
        blocks[:, index], position = vertical_slash.spend(
            chunk, *keys.line_sums(queries[-LAST_ROWS:], index),
            *(numbers(heads, field) for field in fields), most=most, ascending=_ascending,
        )  # fmt: skip
        for part in columns:
            part.append((index, position))
    heads, index = heads_of(lambda p: not p.fixed and not is_dense(p))
    if heads:
        request = _request(patterns, heads, coverage, chunk.device)
        _adaptive(chunk, request, queries, keys, blocks, columns)

    ranges = [slice(0, body), *(slice(t, t + 1) for t in range(body, chunk.tiles))]
    return [
        (
            blocks[tiles],
            _joined(part, len(patterns), tiles.stop - tiles.start),
            chunk.last_key[tiles],
        )
        for tiles, part in zip(ranges, columns, strict=True)
    ]


def _joined(parts: list[Columns], heads: int, tiles: int) -> torch.Tensor | None:
    """Columns of all heads in a range of tiles that read the same: int32 [T, H, M]."""
    if not parts:
        return None
    if len(parts) == 1 and len(parts[0][0]) == heads:
        return parts[0][1].expand(tiles, -1, -1)
    width = max(position.shape[1] for _, position in parts)
    joined = torch.full((heads, width), -1, dtype=torch.int32, device=parts[0][0].device)
    for index, position in parts:
        joined[index, : position.shape[1]] = position.to(torch.int32)
    return joined.expand(tiles, -1, -1)


def _ascending(columns: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`kernels.sort_columns`, as wide as what is given: what is needed only the device knows."""
    last = torch.iinfo(columns.dtype).max
    order = columns.masked_fill(~keep, last).sort(-1).values
    return order.masked_fill(order == last, -1).to(torch.int32)


def _tile_means(queries: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """`kernels.tile_means` by the GPU's mean of blocks: a tile is a page of queries."""
    whole = queries.shape[0] // TILE
    tiles = queries[: whole * TILE].unflatten(0, (whole, TILE)).transpose(1, 2)
    table = torch.arange(whole, dtype=torch.int32, device=queries.device)
    mean = block_means(tiles, table, whole * TILE, heads)
    if whole * TILE == queries.shape[0]:
        return mean
    rest = queries[whole * TILE :, heads].float().mean(0)
    return torch.cat([mean, rest[:, None]], 1)


def _pooled_scores(queries: torch.Tensor, keys: DeviceKeys, heads: torch.Tensor) -> torch.Tensor:
    group = queries.shape[1] // keys.heads
    pooled_q = _tile_means(queries, heads)
    if len(heads) < queries.shape[1]:
        return block_sparse.scores(pooled_q, keys.block_means(heads // group), keys.scale)
    # All heads: one product for each KV head, whose means need no copies.
    grouped = pooled_q.view(keys.heads, -1, pooled_q.shape[2])
    score = block_sparse.scores(grouped, keys.all_block_means(), keys.scale)
    return score.view(len(heads), pooled_q.shape[1], -1)


def _adaptive(
    chunk: Chunk,
    request: adaptive.Request,
    queries: torch.Tensor,
    keys: DeviceKeys,
    blocks: torch.Tensor,
    columns: list[list[Columns]],
) -> None:
    """`adaptive.plan` for all heads of the request at once, into blocks and columns."""
    heads, top = request.heads, top_block(chunk.start)
    # The last rows: as `adaptive.measure` and `adaptive.finish`.
    rows = _rows_at_end(chunk.query_len, chunk.seq_len, chunk.device)
    count = len(rows.index)
    measured = keys.score(
        queries[-count:], rows.positions, heads, by_heaviest=True,
        columns=min(adaptive.column_count(chunk), adaptive.LAST_COLUMNS),
        base_from=rows.base_from,
    )  # fmt: skip
    few = last_rows.COLUMN_COUNTS[-1]
    ends = LastRows(
        measured.blocks, measured.column_mass, sort_columns(measured.columns), request.coverage,
        chunk.query_len, chunk.seq_len, few,
    )  # fmt: skip
    position = None
    if chunk.tiles > 1:
        found, candidates = _search_body(chunk, request, queries, keys)
        choice = choose_pattern(found, _allowed(chunk, request))
        where = (choice, ends.bad, sort_columns(candidates), heads, blocks)
        position = write_body(found, *where, top=top)
        columns[0].append((heads, position))
    else:
        choice = _on_device((WINDOW,) * len(heads), torch.int32, chunk.device)
    mine = ends.write(choice, heads, blocks)
    if ends.ends > 1:  # the tile before the last reads them beside its pattern's
        both = torch.cat([position, mine[:, 0]], 1).sort(1).values
        repeated = torch.zeros_like(both, dtype=torch.bool)
        repeated[:, 1:] = both[:, 1:] == both[:, :-1]
        columns[-2].append((heads, both.masked_fill(repeated, -1)))
    columns[-1].append((heads, mine[:, -1]))


def _allowed(chunk: Chunk, request: adaptive.Request) -> Allowed:
    """When patterns compete, as `adaptive.compete` has it."""
    narrow = adaptive.NARROW * chunk.base_cost
    good = max(adaptive.GOOD * chunk.dense_cost, narrow)
    return Allowed(request.kinds.view(torch.uint8), narrow, good, MAX_COST * chunk.dense_cost)


@functools.lru_cache(maxsize=32)
def _rows_of_body(query_len: int, seq_len: int, count: int, device: torch.device) -> Rows:
    """`samples.rows_of_body`, made on the host: what they see is a number there."""
    return _moved(rows_of_body(chunk_of(query_len, seq_len, torch.device("cpu")), count), device)


@functools.lru_cache(maxsize=32)
def _rows_at_end(query_len: int, seq_len: int, device: torch.device) -> Rows:
    return _moved(rows_at_end(chunk_of(query_len, seq_len, torch.device("cpu"))), device)


def forget() -> None:
    """Drop every tensor that is kept from plan to plan; the next plan makes what it needs anew."""
    for kept in (
        _on_device, _request, _rows_of_body, _rows_at_end, rows_of_body, rows_at_end, chunk_of,
        limits,
    ):  # fmt: skip
        kept.cache_clear()


def _moved(rows: Rows, device: torch.device) -> Rows:
    fields = (rows.index, rows.positions, rows.tiles, rows.base_from)
    return Rows(*(upload(x, device) for x in fields), rows.keys)


def _search_body(
    chunk: Chunk, request: adaptive.Request, queries: torch.Tensor, keys: DeviceKeys
) -> tuple[Found, torch.Tensor]:
    """What the searches of `adaptive.plan_body` find for the tiles before the last, and the
    columns that competed, int64 [h, M]."""
    heads, coverage = request.heads, request.coverage
    probing = chunk.seq_len > adaptive.PROBE_FROM

    def score(count: int, **wanted) -> tuple[SampledMass, RowScores, int]:
        body_rows = (chunk.tiles - 1) * TILE
        count = min(count, body_rows)
        rows = _rows_of_body(chunk.query_len, chunk.seq_len, count, chunk.device)
        if "columns" in wanted:
            wanted["base_from"] = rows.base_from
        scores = keys.score(queries[rows.index], rows.positions, heads, **wanted)
        return SampledMass(scores.blocks, rows.tiles, chunk.last_block), scores, rows.keys

    count = min(max(chunk.query_len // ROWS_EACH, MIN_ROWS), MAX_ROWS)
    mass, scores, seen = score(count, columns=adaptive.column_count(chunk), squares=not probing)
    few, probe, seen = score(PROBE_ROWS, squares=True) if probing else (mass, scores, seen)
    geometry = dict(top=top_block(chunk.start), base_cost=chunk.base_cost)
    window_cost, offset, dense = search_window(
        mass, few, probe.squares, coverage, most_keys=adaptive.HOPELESS * seen, **geometry
    )
    columns_cost, level, budget = search_columns(
        mass, coverage, scores.columns, scores.column_mass, start=chunk.start, **geometry
    )
    score_of = _pooled_scores(queries, keys, heads)
    blocks_cost, limit, tops = search_threshold(mass, coverage, score_of, **geometry)
    found = Found(
        dense, window_cost, offset, columns_cost, level, budget, blocks_cost, limit, score_of, tops
    )
    return found, scores.columns
