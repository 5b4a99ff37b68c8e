"""The cheapest threshold of block scores: see `pattern_reference.cheapest_threshold`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .. import pattern_reference
from ..pattern_reference import SampledMass
from .body_mass import (
    CHUNK,
    COUNTS,
    OPTIONS,
    ROWS,
    STAGES,
    WARPS,
    base_mass,
    first_of,
    sure,
)
from .launch import Config, Target, kernel

LIMITS = pattern_reference.THRESHOLDS
HIGHEST_CHUNK = 1024


@triton.jit
def gap_below(score, best, sees):
    """How far scores [N] are below the best, infinite where the tile does not see the block."""
    score = tl.where(score != score, float("inf"), score)
    gap = tl.where(score == best, 0.0, best - score)
    return tl.where(sees, gap, float("inf"))


@triton.jit(**COUNTS)
def _sum_gaps(
    score,  # fp32 [h, T, nb], T tiles or more
    blocks,  # fp32 [h, S, nb]
    row_tile,  # i64 [S]
    limits,  # fp32 [LIMITS]
    tops,  # fp32 [h, body]: each tile's best score
    counts,  # fp32 [h, body, LIMITS]: its blocks outside the base within each limit
    gained,  # fp32 [h, S, LIMITS]: the mass of each row within each limit, the base's included
    num_rows,
    num_blocks,
    tiles,
    top,
    body,
    CHUNK: tl.constexpr,
    HIGHEST_CHUNK: tl.constexpr,
    LIMITS: tl.constexpr,
):
    """Of one head: a tile, or one of the rows that come after all tiles."""
    head, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = place - body
    tile = place
    if s >= 0:
        tile = tl.load(row_tile + s).to(tl.int32)
    last = top + tile
    of_tile = score + (head * tiles + tile) * num_blocks
    best = tl.full([HIGHEST_CHUNK], float("-inf"), tl.float32)
    for first in range(0, last + 1, HIGHEST_CHUNK):
        block = first + tl.arange(0, HIGHEST_CHUNK)
        x = tl.load(of_tile + block, mask=block <= last, other=float("-inf"))
        best = tl.maximum(best, tl.where(x != x, float("inf"), x))
    highest = tl.max(best, 0)
    b = tl.arange(0, LIMITS)
    limit = tl.load(limits + b)
    total = tl.zeros([LIMITS], tl.float32)
    row = blocks + (head * num_rows + s) * num_blocks
    for first in range(0, last - 1, CHUNK):
        block = first + tl.arange(0, CHUNK)
        counted = (block > 0) & (block < last - 1)
        x = tl.load(of_tile + block, mask=counted, other=0.0)
        gap = gap_below(x, highest, counted)
        mass = tl.full([CHUNK], 1.0, tl.float32)
        if s >= 0:
            mass = tl.load(row + block, mask=counted, other=0.0)
        total += tl.sum(tl.where(gap[:, None] <= limit[None, :], mass[:, None], 0.0), 0)
    if s >= 0:
        total += base_mass(row, last, s >= 0)
        tl.store(gained + (head * num_rows + s) * LIMITS + b, total)
    else:
        tl.store(counts + (head * body + tile) * LIMITS + b, total)
        tl.store(tops + head * body + tile, highest)


@triton.jit(**COUNTS)
def _buy_blocks(
    counts,
    gained,
    coverage,  # fp32 [h]
    cost,  # fp32 [h]
    best,  # i32 [h]
    num_rows,
    body,
    base_cost,
    ROWS: tl.constexpr,
    LIMITS: tl.constexpr,
):
    """Of one head: the smallest limit that covers, and what it costs a tile."""
    head = tl.program_id(0)
    s, b = tl.arange(0, ROWS), tl.arange(0, LIMITS)
    is_row = s < num_rows
    at = (head.to(tl.int64) * num_rows + s)[:, None] * LIMITS + b[None, :]
    mass = tl.load(gained + at, mask=is_row[:, None], other=0.0)
    enough = sure(mass, is_row, num_rows) >= tl.load(coverage + head)
    found = first_of(enough, b, LIMITS)
    read = tl.zeros([ROWS], tl.float32)
    for first in range(0, body, ROWS):
        tile = first + s
        of_tile = (head.to(tl.int64) * body + tile) * LIMITS + tl.minimum(found, LIMITS - 1)
        read += tl.load(counts + of_tile, mask=tile < body, other=0.0)
    price = base_cost + tl.sum(read, 0) * (64.0 / body.to(tl.float32))
    tl.store(cost + head, tl.where(found < LIMITS, price, float("inf")))
    tl.store(best + head, tl.where(found < LIMITS, found, -1))


@kernel(_sum_gaps)
def _sum_configs(target: Target) -> Iterator[Config]:
    signature = dict.fromkeys(
        ("score", "blocks", "limits", "tops", "counts", "gained"), "*fp32"
    ) | dict.fromkeys(("num_rows", "num_blocks", "tiles", "top", "body"), "i32")
    constants = {"CHUNK": CHUNK, "HIGHEST_CHUNK": HIGHEST_CHUNK, "LIMITS": LIMITS}
    signature["row_tile"] = "*i64"
    yield Config("limits32", constants, WARPS, STAGES, signature, True)


@kernel(_buy_blocks)
def _buy_configs(target: Target) -> Iterator[Config]:
    signature = {
        "counts": "*fp32", "gained": "*fp32", "coverage": "*fp32", "cost": "*fp32",
        "best": "*i32", "num_rows": "i32", "body": "i32", "base_cost": "fp32",
    }  # fmt: skip
    yield Config("rows32", {"ROWS": ROWS, "LIMITS": LIMITS}, WARPS, STAGES, signature, True)


@functools.lru_cache(maxsize=8)
def limits(device: torch.device) -> torch.Tensor:
    """fp32 [LIMITS]: the thresholds that are tried."""
    return pattern_reference.thresholds(device)


def search_threshold(
    sampled: SampledMass,
    coverage: torch.Tensor,
    score: torch.Tensor,
    *,
    top: int,
    base_cost: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each head's cheapest threshold.

    Args:
        score: fp32 [h, T, nb], larger where a tile would rather read a block; what is not a
            number is read. Others as in `search_window`.

    Returns:
        cost fp32 [h], inf where nothing covers; best int32 [h], which of `limits`, -1 for none;
        tops fp32 [h, T - 1], the best score of each tile before the last.
    """
    heads, rows, blocks = sampled.blocks.shape
    assert rows <= ROWS, rows
    body, score = sampled.body, score.contiguous()
    tops = coverage.new_empty(heads, body)
    counts = coverage.new_empty(heads, body, LIMITS)
    gained = coverage.new_empty(heads, rows, LIMITS)
    _sum_gaps[(heads, body + rows)](
        score, sampled.blocks.contiguous(), sampled.row_tile, limits(score.device), tops, counts,
        gained, rows, blocks, score.shape[1], top, body, CHUNK=CHUNK,
        HIGHEST_CHUNK=HIGHEST_CHUNK, LIMITS=LIMITS, **OPTIONS,
    )  # fmt: skip
    cost = torch.empty_like(coverage)
    best = coverage.new_empty(heads, dtype=torch.int32)
    _buy_blocks[(heads,)](
        counts, gained, coverage, cost, best, rows, body, float(base_cost), ROWS=ROWS,
        LIMITS=LIMITS, **OPTIONS,
    )  # fmt: skip
    return cost, best, tops
