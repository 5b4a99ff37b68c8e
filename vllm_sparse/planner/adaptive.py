"""Heads without fixed budgets: the cheapest pattern that covers the mass, found chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.kernels import RowScores
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
    sample_rows,
)
from .scores import Keys

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


def plan(selection: Selection, request: Request, queries: torch.Tensor, keys: Keys) -> None:
    """Write the request's heads into the selection; queries [Tq, H, D] of the chunk."""
    chunk = selection.chunk
    body_rows = (chunk.tiles - 1) * TILE
    count = min(max(chunk.query_len // ROWS_EACH, MIN_ROWS), MAX_ROWS) if body_rows else 0
    if body_rows:
        hopeless = probe(chunk, request, queries, keys, body_rows)
        selection.set_blocks(request.heads[hopeless], chunk.causal[:, None])
        request = request.where(~hopeless)
    if not len(request.heads):
        return
    sample = sample_rows(body_rows, count, chunk.device)
    measured = measure(chunk, request, queries, keys, sample)
    if body_rows:
        dense = compete(selection, request, measured.samples, queries, keys)
    else:
        dense = torch.zeros_like(request.heads, dtype=torch.bool)
    # What is not finite cannot be judged: read everything.
    dense |= ~measured.finite
    selection.set_blocks(request.heads[dense], chunk.causal[:, None])
    finish(selection, request, measured, ~dense)


def probe(
    chunk: Chunk, request: Request, queries: torch.Tensor, keys: Keys, body_rows: int
) -> torch.Tensor:
    """Heads [h] whose mass is so even that no few keys can hold it; from a handful of rows.

    k keys of masses p hold at most sqrt(k sum p^2), so what the base leaves to be covered, c,
    takes at least c^2 / sum p^2 of the other keys.
    """
    rows = sample_rows(body_rows, min(PROBE_ROWS, body_rows), chunk.device)
    scores = keys.score(queries[rows], chunk.start + rows, request.heads, squares=True)
    outside = (~chunk.base[rows // TILE]).float()
    rest = (scores.blocks * outside).sum(-1)
    squares = (scores.squares * outside).sum(-1)
    missing = (request.coverage[:, None] - 1 + rest).clamp(min=0.0)
    least = missing.square() / squares.clamp(min=1e-30)
    # Of the keys of all rows together: the mean of their shares is pulled down by early rows, most
    # of whose keys are the base's. An even head of 2K tokens is at 0.59 by it, and at 0.72 so.
    return least.sum(1) > HOPELESS * (chunk.start + rows + 1).sum()


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
    chunk: Chunk, request: Request, queries: torch.Tensor, keys: Keys, sample: torch.Tensor
) -> Measured:
    last = torch.arange(max(chunk.query_len - TILE, 0), chunk.query_len, device=chunk.device)
    width = min(max(chunk.seq_len // COLUMN_SHARE, MIN_COLUMNS), MAX_COLUMNS, chunk.seq_len)

    def score(rows: torch.Tensor, columns: int, by_heaviest: bool) -> RowScores:
        return keys.score(
            queries[rows], chunk.start + rows, request.heads, columns=columns,
            by_heaviest=by_heaviest, base_from=chunk.last_block[rows // TILE] - 1,
        )  # fmt: skip

    of_sample, of_last = score(sample, width, False), score(last, min(width, LAST_COLUMNS), True)
    samples = Samples(
        chunk, sample // TILE, of_sample.blocks, of_sample.columns, of_sample.column_mass
    )
    finite = (of_sample.blocks.sum((1, 2)) + of_last.blocks.sum((1, 2))).isfinite()
    return Measured(samples, last, of_last.blocks, of_last.columns, of_last.column_mass, finite)


def compete(
    selection: Selection,
    request: Request,
    samples: Samples,
    queries: torch.Tensor,
    keys: Keys,
) -> torch.Tensor:
    """Give each head its cheapest pattern; returns the heads [h] that none pays for."""
    chunk, coverage, heads = selection.chunk, request.coverage, request.heads
    group = queries.shape[1] // keys.heads
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
        pooled_q = block_sparse.pooled_queries(chunk, queries, heads[open_])
        pooled_k = keys.block_means(heads[open_] // group)
        score = block_sparse.scores(chunk, pooled_q, pooled_k, keys.scale)
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
