"""Planning on a GPU: the selection that `plan` makes, and nothing of it on the host.

What the CPU's planner saves by looking only at the heads that still need it would cost a GPU a wait
for the answer each time. Here every step is taken for all heads, and which of the results count is
decided by masks. The scores, means and lists are Triton kernels; what is between them is torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from vllm_sparse.kernels import BlockIndices, SampledMass, pattern_reference
from vllm_sparse.kernels.block_indices import TILE
from vllm_sparse.kernels.gpu.block_means import block_means
from vllm_sparse.kernels.gpu.index_lists import index_lists_of, upload
from vllm_sparse.kernels.gpu.row_scores import row_scores
from vllm_sparse.patterns import HeadPattern

from . import a_shape, adaptive, block_sparse, last_rows, vertical_slash
from .base import MAX_COST, Chunk
from .plan import LAST_ROWS, SHORT_BLOCKS
from .samples import MAX_ROWS, MIN_ROWS, PROBE_ROWS, ROWS_EACH, sample_rows
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

    def block_means(self, kv_heads: torch.Tensor) -> torch.Tensor:
        # Of all heads once, as telling which are wanted would take a look at the device.
        every = torch.arange(self.heads, device=kv_heads.device)
        if self.means is None:
            return block_means(self.cache, self.table, self.length, every, self.k_scale)[kv_heads]
        return self.means(self.table, self.length, every, self.k_scale)[kv_heads]


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
        chunk = Chunk(query_len, seq_len, q.device)
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
    return upload(torch.tensor(values, dtype=dtype), device)


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
    blocks = torch.zeros(shape, dtype=torch.bool, device=chunk.device)
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
    group = len(patterns) // keys.heads
    vertical = [i for i, p in enumerate(patterns) if p.fixed and p.kind == "vertical_slash"]
    for kv in sorted({i // group for i in vertical}):
        heads = tuple(i for i in vertical if i // group == kv)
        index = _on_device(heads, torch.int64, chunk.device)
        first = max(chunk.query_len - LAST_ROWS, 0)
        rows = torch.arange(first, chunk.query_len, device=chunk.device)
        mass = keys.attention(queries[first:, index], chunk.start + rows, kv).transpose(0, 1)
        counts = numbers(heads, "vertical"), numbers(heads, "slash")
        most = max(patterns[i].vertical for i in heads)
        blocks[:, index], position = vertical_slash.fixed(
            chunk, mass, *counts, most=most, ascending=_ascending
        )
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
    pooled_k = keys.block_means(heads // group)
    return block_sparse.scores(_tile_means(queries, heads), pooled_k, keys.scale)


def _adaptive(
    chunk: Chunk,
    request: adaptive.Request,
    queries: torch.Tensor,
    keys: DeviceKeys,
    blocks: torch.Tensor,
    columns: list[list[Columns]],
) -> None:
    """`adaptive.plan` for all heads of the request at once, into blocks and columns."""
    heads = request.heads
    if chunk.tiles > 1:
        dense, chosen, position = _body(chunk, request, queries, keys)
    else:
        dense = torch.zeros_like(heads, dtype=torch.bool)
        chosen = chunk.causal[:, None].expand(-1, len(heads), -1)
        position = torch.full_like(heads, -1, dtype=torch.int32)[:, None]

    # The last rows: as `adaptive.measure` and `adaptive.finish`.
    first = max(chunk.query_len - TILE, 0)
    rows = torch.arange(first, chunk.query_len, device=chunk.device)
    measured = keys.score(
        queries[first:], chunk.start + rows, heads, by_heaviest=True,
        columns=min(adaptive.column_count(chunk), adaptive.LAST_COLUMNS),
        base_from=chunk.last_block[rows // TILE] - 1,
    )  # fmt: skip
    dense = dense | ~measured.blocks.sum((1, 2)).isfinite()
    chosen = torch.where(dense[:, None], chunk.causal[:, None], chosen)
    position = position.masked_fill(dense[:, None], -1)
    body = first // TILE
    columns[0].append((heads, position))
    counts = last_rows.counts(measured.columns.shape[1])
    for tile in range(body, chunk.tiles):
        part = slice(max(tile * TILE - first, 0), (tile + 1) * TILE - first)
        wanted, single = pattern_reference.cheapest_union(
            measured.blocks[:, part],
            chunk.base[tile] & chunk.causal[tile],
            measured.columns,
            measured.column_mass[:, part],
            request.coverage,
            counts,
        )
        mine = _ascending(measured.columns, single & ~dense[:, None])
        if tile < chunk.tiles - 1:
            wanted = wanted | chosen[tile]
            mine = torch.cat([position, mine], 1).sort(1).values
            repeated = torch.zeros_like(mine, dtype=torch.bool)
            repeated[:, 1:] = mine[:, 1:] == mine[:, :-1]
            mine = mine.masked_fill(repeated, -1)
        chosen[tile] = torch.where(dense[:, None], chunk.causal[tile], wanted)
        columns[tile - body + 1].append((heads, mine))
    blocks[:, heads] = chosen


def _body(
    chunk: Chunk, request: adaptive.Request, queries: torch.Tensor, keys: DeviceKeys
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`adaptive.plan_body`: heads bool [h] that read everything, blocks bool [T, h, nb], columns
    int32 [h, M] of the tiles before the last."""
    heads, coverage, kinds = request.heads, request.coverage, request.kinds
    probing = chunk.seq_len > adaptive.PROBE_FROM
    body_rows = (chunk.tiles - 1) * TILE

    def score(count: int, **wanted) -> tuple[SampledMass, object, torch.Tensor]:
        rows = sample_rows(body_rows, min(count, body_rows), chunk.device)
        tiles = rows // TILE
        if "columns" in wanted:
            wanted["base_from"] = chunk.last_block[tiles] - 1
        scores = keys.score(queries[rows], chunk.start + rows, heads, **wanted)
        seen = (chunk.start + rows + 1).sum()
        return SampledMass(scores.blocks, tiles, chunk.last_block), scores, seen

    count = min(max(chunk.query_len // ROWS_EACH, MIN_ROWS), MAX_ROWS)
    mass, scores, seen = score(count, columns=adaptive.column_count(chunk), squares=not probing)
    dense = ~mass.blocks.sum((1, 2)).isfinite()
    few, probe, keys_seen = score(PROBE_ROWS, squares=True) if probing else (mass, scores, seen)
    least = pattern_reference.least_keys(few, coverage, probe.squares)
    dense = dense | (least > adaptive.HOPELESS * keys_seen)

    # As `adaptive.compete`; what it would not look for does not compete here either.
    window, offset = pattern_reference.cheapest_window(mass, coverage)
    window = window.masked_fill(~kinds[:, 0], torch.inf)
    looked = kinds[:, 1] & (window > adaptive.NARROW * chunk.base_cost)
    slash, diagonals, keep = pattern_reference.cheapest_columns(
        mass, coverage, scores.columns, scores.column_mass, chunk.start, looked
    )
    use_window = window <= slash
    diagonals = torch.where(use_window[:, None], chunk.block <= offset[:, None], diagonals)
    cost = torch.minimum(window, slash)
    good = max(adaptive.GOOD * chunk.dense_cost, adaptive.NARROW * chunk.base_cost)
    pooled, tile_blocks = pattern_reference.cheapest_threshold(
        mass, coverage, _pooled_scores(queries, keys, heads)
    )
    pooled = pooled.masked_fill(~(kinds[:, 2] & (cost > good)), torch.inf)
    use_blocks = pooled < cost
    cost = torch.minimum(cost, pooled)
    dense = dense | ~(cost < MAX_COST * chunk.dense_cost)
    chosen = torch.where(
        use_blocks[:, None], tile_blocks.transpose(0, 1), vertical_slash.mask(chunk, diagonals)
    )
    chosen = torch.where(dense[:, None], chunk.causal[:, None], chosen)
    keep = keep & ~(dense | use_window | use_blocks)[:, None]
    return dense, chosen, _ascending(scores.columns, keep)
