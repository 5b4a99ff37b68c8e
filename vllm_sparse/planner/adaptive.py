"""Heads without fixed budgets: the cheapest pattern that covers the mass, found chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_sparse.kernels import (
    RowScores,
    SampledMass,
    cheapest_columns,
    cheapest_threshold,
    cheapest_window,
    least_keys,
    sort_columns,
    tile_means,
)
from vllm_sparse.kernels.block_indices import TILE
from vllm_sparse.patterns import HeadPattern

from . import block_sparse, last_rows, vertical_slash
from .base import MAX_COST, Chunk, Selection
from .samples import (
    MAX_ROWS,
    MIN_ROWS,
    PROBE_ROWS,
    ROWS_EACH,
    Rows,
    Samples,
    rows_at_end,
    rows_of_body,
)
from .scores import Keys

KINDS = ("a_shape", "vertical_slash", "block_sparse")
# Single columns that compete: 1/16 of the keys, at most 1024 (8% of the cost at 16K).
COLUMN_SHARE, MIN_COLUMNS, MAX_COLUMNS = 16, 64, 1024
LAST_COLUMNS = 512
# Needing more than this share of its keys in the best case, a head is dense without a search.
HOPELESS = 0.6
# Sequences up to this long judge that by all sampled rows, longer ones by a few rows before those.
PROBE_FROM = 4096
# Heads below this share of the dense cost look no further for a cheaper pattern.
GOOD = 0.1
# Nor do heads that read at most so many times the base: no pooled scores are made for them, nor,
# where it is their A-shape that reads so little, diagonals and columns looked for.
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
    if selection.chunk.tiles > 1 and len(request.heads):
        request = plan_body(selection, request, queries, keys)
    if not len(request.heads):
        return
    measured = measure(selection.chunk, request, queries, keys)
    if not finite(measured.blocks):
        dense = ~measured.blocks.sum((1, 2)).isfinite()
        request, keep = read_whole(selection, request, dense)
        measured = measured.of(keep)
    finish(selection, request, measured)


def plan_body(selection: Selection, request: Request, queries: torch.Tensor, keys: Keys) -> Request:
    """The tiles before the last, from sampled rows; returns the heads that are not dense."""
    chunk = selection.chunk
    probing = chunk.seq_len > PROBE_FROM
    if probing:
        few = rows_of_body(chunk, PROBE_ROWS)
        scores = keys.score(queries[few.index], few.positions, request.heads, squares=True)
        request, _ = read_whole(selection, request, hopeless(request, chunk, few, scores))
        if not len(request.heads):
            return request
    rows = rows_of_body(chunk, min(max(chunk.query_len // ROWS_EACH, MIN_ROWS), MAX_ROWS))
    scores = keys.score(
        queries[rows.index], rows.positions, request.heads, squares=not probing,
        columns=column_count(chunk), base_from=rows.base_from,
    )  # fmt: skip
    mass = SampledMass(scores.blocks, rows.tiles, chunk.last_block)
    samples = Samples(mass, scores.columns, scores.column_mass)
    if not probing:
        without_hope = hopeless(request, chunk, rows, scores)
        request, keep = read_whole(selection, request, without_hope)
        samples = samples if keep is None else samples.of(keep)
        if not len(request.heads):
            return request
    dense = compete(selection, request, samples, queries, keys)
    if not finite(scores.blocks):
        dense |= ~samples.mass.blocks.sum((1, 2)).isfinite()
    return read_whole(selection, request, dense)[0]


def finite(mass: torch.Tensor) -> bool:
    """Whether all of it is. What is not finite cannot be judged: such heads read everything."""
    return math.isfinite(float(mass.sum()))


def read_whole(
    selection: Selection, request: Request, dense: torch.Tensor
) -> tuple[Request, torch.Tensor | None]:
    """Heads `dense` [h] read everything; returns the others, and their places, None for all."""
    if not bool(dense.any()):
        return request, None
    selection.set_blocks(request.heads[dense], selection.chunk.causal[:, None])
    keep = (~dense).nonzero()[:, 0]
    return request.where(keep), keep


def column_count(chunk: Chunk) -> int:
    """How many single columns of a head compete."""
    return min(max(chunk.seq_len // COLUMN_SHARE, MIN_COLUMNS), MAX_COLUMNS, chunk.seq_len)


def hopeless(request: Request, chunk: Chunk, rows: Rows, scores: RowScores) -> torch.Tensor:
    """Heads [h] whose mass in these rows is so even that no few keys can hold it."""
    mass = SampledMass(scores.blocks, rows.tiles, chunk.last_block)
    least = least_keys(mass, request.coverage, scores.squares)
    # Of the keys of all rows together: the mean of their shares is pulled down by early rows, most
    # of whose keys are the base's. An even head of 2K tokens is at 0.59 by it, and at 0.72 so.
    return least > HOPELESS * rows.keys


@dataclass
class Measured:
    """Exact attention of the chunk's last rows."""

    blocks: torch.Tensor  # [h, R, nb]
    columns: torch.Tensor  # int64 [h, M']
    column_mass: torch.Tensor  # [h, R, M']

    def of(self, keep: torch.Tensor | None) -> Measured:
        """Of some of the heads, None for all."""
        if keep is None:
            return self
        return Measured(self.blocks[keep], self.columns[keep], self.column_mass[keep])


def measure(chunk: Chunk, request: Request, queries: torch.Tensor, keys: Keys) -> Measured:
    rows = rows_at_end(chunk)
    scores = keys.score(
        queries[-len(rows.index) :], rows.positions, request.heads, by_heaviest=True,
        columns=min(column_count(chunk), LAST_COLUMNS), base_from=rows.base_from,
    )  # fmt: skip
    return Measured(scores.blocks, scores.columns, scores.column_mass)


def compete(
    selection: Selection,
    request: Request,
    samples: Samples,
    queries: torch.Tensor,
    keys: Keys,
) -> torch.Tensor:
    """Give each head its cheapest pattern; returns the heads [h] that none pays for."""
    chunk, coverage, heads = selection.chunk, request.coverage, request.heads
    body = chunk.tiles - 1
    window, offset = cheapest_window(samples.mass, coverage)
    allowed = request.kinds.unbind(1)
    window = torch.where(allowed[0], window, torch.inf)
    # A window of a few blocks is hard to beat, so these heads look no further.
    wanted = allowed[1] & (window > NARROW * chunk.base_cost)
    slash, diagonals, keep = cheapest_columns(
        samples.mass, coverage, samples.columns, samples.column_mass, chunk.start, wanted
    )
    # Windows are diagonals as well.
    use_window = window <= slash
    near = chunk.block <= offset[:, None]
    diagonals = torch.where(use_window[:, None], near, diagonals)
    selection.set_blocks(heads, vertical_slash.mask(chunk, diagonals))
    cost = torch.minimum(window, slash)
    # Pooled scores are made for the heads where the others leave something to gain.
    good = max(GOOD * chunk.dense_cost, NARROW * chunk.base_cost)
    open_ = (allowed[2] & (cost > good)).nonzero()[:, 0]
    if len(open_):
        some = heads[open_]
        pooled_k = keys.block_means(some // (queries.shape[1] // keys.heads))
        score = block_sparse.scores(tile_means(queries, some), pooled_k, keys.scale)
        mass = samples.mass._replace(blocks=samples.mass.blocks[open_])
        pooled, blocks = cheapest_threshold(mass, coverage[open_], score)
        better = (pooled < cost[open_]).nonzero()[:, 0]
        selection.set_blocks(some[better], blocks[better].transpose(0, 1))
        cost[open_[better]] = pooled[better]
        use_window[open_[better]] = True  # no columns
    dense = ~(cost < MAX_COST * chunk.dense_cost)
    keep &= ~(dense | use_window)[:, None]
    selection.set_columns(slice(0, body), heads, sort_columns(samples.columns, keep))
    return dense


def finish(selection: Selection, request: Request, measured: Measured) -> None:
    """The tiles of the chunk's last rows.

    The last tile reads what its rows need. Where the chunk is no whole number of tiles, the last
    64 rows begin in the tile before; that tile reads what they need beside its pattern.
    """
    chunk, heads = selection.chunk, request.heads
    if not len(heads):
        return
    begin = chunk.query_len - measured.blocks.shape[1]
    for tile in range(begin // TILE, chunk.tiles):
        rows = slice(max(tile * TILE - begin, 0), (tile + 1) * TILE - begin)
        blocks, single = last_rows.select(
            measured.blocks[:, rows],
            chunk.base[tile] & chunk.causal[tile],
            measured.columns,
            measured.column_mass[:, rows],
            request.coverage,
        )
        columns = sort_columns(measured.columns, single)
        if tile == chunk.tiles - 1:
            selection.blocks[tile, heads] = blocks
            selection.set_columns(slice(tile, tile + 1), heads, columns)
        else:
            selection.blocks[tile, heads] |= blocks
            selection.add_columns(tile, heads, columns)


__all__ = ["KINDS", "Request", "plan"]
