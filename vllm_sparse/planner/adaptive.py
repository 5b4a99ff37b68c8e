"""Heads without fixed budgets: the cheapest pattern that covers the mass, found chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.kernels.block_indices import TILE
from vllm_sparse.patterns import HeadPattern

from . import a_shape, block_sparse, last_rows, vertical_slash
from .base import MAX_COST, Chunk, Selection, columns_ascending
from .samples import (
    MAX_ROWS,
    MIN_ROWS,
    PROBE_ROWS,
    ROWS_EACH,
    Samples,
    base_keys,
    sample_rows,
)
from .scores import RowScorer, block_mass

KINDS = ("a_shape", "vertical_slash", "block_sparse")
# Single columns that compete: 1/16 of the keys, at most 1024 (8% of the cost at 16K).
COLUMN_SHARE, MIN_COLUMNS, MAX_COLUMNS = 16, 64, 1024
LAST_COLUMNS = 512
# Needing more than this share of its keys in the best case, a head is dense without a search.
HOPELESS = 0.6
# Heads below this share of the dense cost look no further for a cheaper pattern.
GOOD = 0.1
# Heads whose A-shape reads at most so many times the base do not look for diagonals and columns.
NARROW = 1.5


@dataclass
class Request:
    """The heads [h] of a layer to plan, ascending, each with its coverage and allowed kinds."""

    heads: torch.Tensor  # int64 [h]
    coverage: torch.Tensor  # fp32 [h]
    kinds: torch.Tensor  # bool [h, 3], order of KINDS

    @classmethod
    def of(
        cls, heads: list[int], patterns: list[HeadPattern], coverage: float, device: torch.device
    ) -> Request:
        return cls(
            torch.tensor(heads, device=device),
            # Types are spelled out: when the break-even is measured, vLLM is loading a model, and
            # torch's default type is the model's.
            torch.tensor(
                [coverage if p.coverage is None else p.coverage for p in patterns],
                dtype=torch.float32,
                device=device,
            ),
            torch.tensor(
                [[p.kind in ("adaptive", kind) for kind in KINDS] for p in patterns], device=device
            ),
        )

    def where(self, keep: torch.Tensor) -> Request:
        return Request(self.heads[keep], self.coverage[keep], self.kinds[keep])


def plan(
    selection: Selection,
    request: Request,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
) -> None:
    """Write the request's heads into the selection.

    Args:
        queries: [Tq, H, D] of the chunk.
        keys: [Hkv, 64 nb, D] of the sequence, zeros after the last.
    """
    chunk, group = selection.chunk, queries.shape[1] // keys.shape[0]
    body_rows = (chunk.tiles - 1) * TILE
    count = min(max(chunk.query_len // ROWS_EACH, MIN_ROWS), MAX_ROWS) if body_rows else 0
    rows_at_once = max(count, min(chunk.query_len, TILE)) * group
    scorer = RowScorer(keys[0], scale, rows_at_once)
    if body_rows:
        hopeless = probe(chunk, request, queries, keys, scorer, body_rows)
        selection.set_blocks(request.heads[hopeless], chunk.causal[:, None])
        request = request.where(~hopeless)
    if not len(request.heads):
        return
    measured = measure(
        chunk, request, queries, keys, scorer, sample_rows(body_rows, count, chunk.device)
    )
    if body_rows:
        dense = compete(selection, request, measured.samples, queries, keys, scale)
    else:
        dense = torch.zeros_like(request.heads, dtype=torch.bool)
    # What is not finite cannot be judged: read everything.
    dense |= ~measured.finite
    selection.set_blocks(request.heads[dense], chunk.causal[:, None])
    finish(selection, request, measured, ~dense)


def by_kv_head(heads: torch.Tensor, group: int) -> list[tuple[int, torch.Tensor]]:
    """(KV head, index into `heads` of those that share it)."""
    kv = heads // group
    return [(i, (kv == i).nonzero()[:, 0]) for i in kv.unique().tolist()]


def probe(
    chunk: Chunk,
    request: Request,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scorer: RowScorer,
    body_rows: int,
) -> torch.Tensor:
    """Heads [h] whose mass is so even that no few keys can hold it; from a handful of rows.

    k keys of masses p hold at most sqrt(k sum p^2), so what the base leaves to be covered, c,
    takes at least c^2 / sum p^2 of the other keys.
    """
    group = queries.shape[1] // keys.shape[0]
    rows = sample_rows(body_rows, min(PROBE_ROWS, body_rows), chunk.device)
    skip = base_keys(chunk, rows // TILE)[:, None]
    share = torch.empty_like(request.coverage)
    for kv, index in by_kv_head(request.heads, group):
        q = queries[rows[:, None], request.heads[index]]
        mass = scorer.attention(q, keys[kv], chunk.start + rows)
        mass.scatter_(2, skip.expand(-1, len(index), -1), 0.0)
        rest = block_mass(mass).sum(-1)
        squares = block_mass(mass.square_()).sum(-1)
        missing = (request.coverage[index] - 1 + rest).clamp(min=0.0)
        least = missing.square() / squares.clamp(min=1e-30)
        share[index] = (least / (chunk.start + rows + 1)[:, None]).mean(0)
    return share > HOPELESS


@dataclass
class Measured:
    """Exact attention of the sampled rows and of the chunk's last rows."""

    samples: Samples
    rows: torch.Tensor  # int64 [R], the chunk's last rows
    blocks: torch.Tensor  # [h, R, nb]
    columns: torch.Tensor  # int64 [h, M']
    column_mass: torch.Tensor  # [h, R, M']
    finite: torch.Tensor  # bool [h]


def measure(
    chunk: Chunk,
    request: Request,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scorer: RowScorer,
    sample: torch.Tensor,
) -> Measured:
    group = queries.shape[1] // keys.shape[0]
    last = torch.arange(max(chunk.query_len - TILE, 0), chunk.query_len, device=chunk.device)
    heads = len(request.heads)
    width = min(max(chunk.seq_len // COLUMN_SHARE, MIN_COLUMNS), MAX_COLUMNS, chunk.seq_len)
    part = _Part.empty(chunk.device, heads, len(sample), chunk.blocks, width)
    last_part = _Part.empty(chunk.device, heads, len(last), chunk.blocks, min(width, LAST_COLUMNS))
    for rows, out in ((sample, part), (last, last_part)):
        skip = base_keys(chunk, rows // TILE)[:, None]
        for kv, index in by_kv_head(request.heads, group) if len(rows) else ():
            q = queries[rows[:, None], request.heads[index]]
            mass = scorer.attention(q, keys[kv], chunk.start + rows)
            out.blocks[index] = block_mass(mass).transpose(0, 1)
            mass.scatter_(2, skip.expand(-1, len(index), -1), 0.0)
            support = mass.amax(0) if out is last_part else vertical_slash.support(mass)
            out.columns[index] = top = support.topk(out.columns.shape[1]).indices
            out.column_mass[index] = gather_columns(mass, top)
    samples = Samples(chunk, sample // TILE, part.blocks, part.columns, part.column_mass)
    finite = (part.blocks.sum((1, 2)) + last_part.blocks.sum((1, 2))).isfinite()
    return Measured(
        samples, last, last_part.blocks, last_part.columns, last_part.column_mass, finite
    )


@dataclass
class _Part:
    """What is kept of the attention of R rows: [h, R, nb], [h, M], [h, R, M]."""

    blocks: torch.Tensor
    columns: torch.Tensor
    column_mass: torch.Tensor

    @classmethod
    def empty(cls, device: torch.device, heads: int, rows: int, blocks: int, width: int) -> _Part:
        return cls(
            torch.empty(heads, rows, blocks, dtype=torch.float32, device=device),
            torch.zeros(heads, width, dtype=torch.int64, device=device),
            torch.empty(heads, rows, width, dtype=torch.float32, device=device),
        )


def gather_columns(mass: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[R, g, n] at columns [g, M] -> [g, R, M]."""
    return mass.gather(2, columns.expand(mass.shape[0], -1, -1)).transpose(0, 1)


def compete(
    selection: Selection,
    request: Request,
    samples: Samples,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Give each head its cheapest pattern; returns the heads [h] that none pays for."""
    chunk, coverage, heads = selection.chunk, request.coverage, request.heads
    group = queries.shape[1] // keys.shape[0]
    cost = coverage.new_full((len(heads), len(KINDS)), torch.inf)
    cost[:, 0], offset = a_shape.candidate(chunk, samples, coverage)
    cost.masked_fill_(~request.kinds, torch.inf)
    # A window of a few blocks is hard to beat, so these heads look no further.
    open_ = ((cost[:, 0] > NARROW * samples.base_cost) & request.kinds[:, 1]).nonzero()[:, 0]
    diagonals = torch.zeros(len(heads), chunk.blocks, dtype=torch.bool, device=chunk.device)
    keep = torch.zeros_like(samples.columns, dtype=torch.bool)
    if len(open_):
        cost[open_, 1], diagonals[open_], keep[open_] = vertical_slash.candidate(
            chunk, samples.of(open_), coverage[open_]
        )
    # Pooled scores are made for the heads where the others leave something to gain.
    dense_cost = chunk.dense_cost(samples.body)
    open_ = ((cost.amin(1) > GOOD * dense_cost) & request.kinds[:, 2]).nonzero()[:, 0]
    tile_blocks = torch.zeros(len(heads), 0, 0, dtype=torch.bool, device=chunk.device)
    if len(open_):
        pooled_q = block_sparse.pooled_queries(chunk, queries)[:, heads[open_]]
        pooled_k = block_sparse.pooled_keys(chunk, keys)[heads[open_] // group]
        score = block_sparse.scores(chunk, pooled_q, pooled_k, scale)
        cost[open_, 2], blocks = block_sparse.candidate(
            chunk, samples.of(open_), score, coverage[open_]
        )
        tile_blocks = tile_blocks.new_zeros(len(heads), *blocks.shape[1:])
        tile_blocks[open_] = blocks

    least, kind = cost.min(1)
    dense = ~(least < MAX_COST * dense_cost)
    for number, mask in enumerate(
        (
            lambda chosen: a_shape.mask(chunk, offset[chosen]),
            lambda chosen: vertical_slash.mask(chunk, diagonals[chosen]),
            lambda chosen: tile_blocks[chosen].transpose(0, 1),
        )
    ):
        chosen = ~dense & (kind == number)
        if bool(chosen.any()):
            selection.set_blocks(heads[chosen], mask(chosen))
    columns = ~dense & (kind == 1) & keep.any(1)
    if bool(columns.any()):
        position = vertical_slash.columns(chunk, samples.columns[columns], keep[columns])
        selection.set_columns(slice(0, samples.body), heads[columns], position)
    return dense


def finish(selection: Selection, request: Request, measured: Measured, keep: torch.Tensor) -> None:
    """The tiles of the chunk's last rows, for the heads [h] to `keep`.

    The last tile reads what its rows need. Where the chunk is no whole number of tiles, the last
    64 rows begin in the tile before; that tile reads what they need beside its pattern.
    """
    chunk, heads = selection.chunk, request.heads[keep]
    if not len(heads):
        return
    tiles = measured.rows // TILE
    for tile in tiles.unique().tolist():
        rows = tiles == tile
        blocks, single = last_rows.select(
            measured.blocks[keep][:, rows],
            chunk.base[tile] & chunk.causal[tile],
            measured.columns[keep],
            measured.column_mass[keep][:, rows],
            request.coverage[keep],
        )
        columns = columns_ascending(measured.columns[keep], single, chunk.seq_len)
        if tile == chunk.tiles - 1:
            selection.blocks[tile, heads] = blocks
            selection.set_columns(slice(tile, tile + 1), heads, columns)
        else:
            selection.blocks[tile, heads] |= blocks
            selection.add_columns(tile, heads, columns)


__all__ = ["KINDS", "Request", "plan"]
