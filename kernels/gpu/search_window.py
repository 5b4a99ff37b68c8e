"""The cheapest window of each head, and the heads that no few keys can cover.

See `pattern_reference.cheapest_window` and `least_keys`. A program is a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..pattern_reference import SampledMass
from . import launch
from .body_mass import (
    COUNTS,
    ROWS,
    STAGES,
    base_mass,
    first_of,
    offset_mass,
    rest_mass,
    sure,
    tiles_beyond,
)
from .launch import Config, Target, kernel

# A program goes over all blocks of a head by itself, and so over many at a time.
CHUNK, WARPS = 128, 8


@triton.jit(**COUNTS)
def _search_window(
    blocks,  # fp32 [h, S, nb]
    row_tile,  # i64 [S]
    few_blocks,  # fp32 [h, F, nb]: rows that tell whether a head has any hope; F may be S
    few_squares,  # fp32 [h, F, nb]
    few_tile,  # i64 [F]
    coverage,  # fp32 [h]
    cost,  # fp32 [h]
    offset,  # i32 [h]
    dense,  # u8 [h]
    num_rows,
    few_rows,
    num_blocks,
    top,
    body,
    base_cost,
    most_keys,  # a head that needs more keys than this reads everything
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    head = tl.program_id(0)
    wanted = tl.load(coverage + head)
    s = tl.arange(0, ROWS)

    # What the base leaves uncovered takes at least c^2 / sum p^2 of the other keys.
    is_row = s < few_rows
    last = top + tl.load(few_tile + s, mask=is_row, other=0).to(tl.int32)
    at = (head.to(tl.int64) * few_rows + s) * num_blocks
    outside = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        outside += tl.sum(rest_mass(few_blocks + at, last, is_row, block, num_blocks), 1)
        square += tl.sum(rest_mass(few_squares + at, last, is_row, block, num_blocks), 1)
    missing = wanted - 1.0 + outside
    missing = tl.where(missing < 0.0, 0.0, missing)  # NaN stays
    least = tl.sum(missing * missing / tl.maximum(square, 1e-30), 0)

    is_row = s < num_rows
    last = top + tl.load(row_tile + s, mask=is_row, other=0).to(tl.int32)
    rows = blocks + (head.to(tl.int64) * num_rows + s) * num_blocks
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        there = is_row[:, None] & (block < num_blocks)[None, :]
        total += tl.sum(tl.load(rows[:, None] + block[None, :], mask=there, other=0.0), 1)
    mass = tl.sum(total, 0)
    is_finite = mass - mass == 0.0
    tl.store(dense + head, ((is_finite == 0) | (least > most_keys)).to(tl.uint8))

    covered = base_mass(rows, last, is_row)
    found = num_blocks
    first = head * 0
    while (first < num_blocks) & (found == num_blocks):
        o = first + tl.arange(0, CHUNK)
        sums = covered[:, None] + tl.cumsum(offset_mass(rows, last, is_row, o), 1)
        enough = (sure(sums, is_row, num_rows) >= wanted) & (o < num_blocks)
        found = tl.minimum(found, first_of(enough, o, num_blocks))
        covered = tl.sum(tl.where(o[None, :] == first + CHUNK - 1, sums, 0.0), 1)
        first += CHUNK
    # Costs of the offsets up to there, as `offset_cost`; whole numbers until the end.
    tiles = found * 0
    for first in range(0, found + 1, CHUNK):
        o = first + tl.arange(0, CHUNK)
        tiles += tl.sum(tl.where((o >= 2) & (o <= found), tiles_beyond(o + 1, top, body), 0), 0)
    price = base_cost + tiles.to(tl.float32) / body.to(tl.float32) * 64.0
    tl.store(cost + head, tl.where(found < num_blocks, price, float("inf")))
    tl.store(offset + head, tl.minimum(found, num_blocks - 1))


@kernel(_search_window)
def _configs(target: Target) -> Iterator[Config]:
    signature = {
        "blocks": "*fp32", "row_tile": "*i64", "few_blocks": "*fp32", "few_squares": "*fp32",
        "few_tile": "*i64", "coverage": "*fp32", "cost": "*fp32", "offset": "*i32",
        "dense": "*u8", "num_rows": "i32", "few_rows": "i32", "num_blocks": "i32", "top": "i32",
        "body": "i32", "base_cost": "fp32", "most_keys": "fp32",
    }  # fmt: skip
    yield Config("rows32", {"ROWS": ROWS, "CHUNK": CHUNK}, WARPS, STAGES, signature, True)


def search_window(
    sampled: SampledMass,
    few: SampledMass,
    few_squares: torch.Tensor,
    coverage: torch.Tensor,
    *,
    top: int,
    base_cost: float,
    most_keys: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each head's cheapest window, and whether it should read everything.

    Args:
        sampled: rows that the window is judged on, at most 32.
        few, few_squares: rows and the squares of their keys' masses, which `least_keys` takes; a
            head that needs more than `most_keys` of their keys reads everything, and so does one
            whose mass is not finite.
        coverage: fp32 [h].
        top: block of the last row of the chunk's first tile.
        base_cost: keys of base blocks that a tile before the last reads on average.

    Returns:
        cost fp32 [h], inf where no window covers; offset int32 [h]; uint8 [h], 1 for everything.
    """
    heads, rows, blocks = sampled.blocks.shape
    assert rows <= ROWS and few.blocks.shape[1] <= ROWS, (rows, few.blocks.shape)
    cost = torch.empty_like(coverage)
    offset = coverage.new_empty(heads, dtype=torch.int32)
    dense = coverage.new_empty(heads, dtype=torch.uint8)
    _search_window[(heads,)](
        sampled.blocks.contiguous(), sampled.row_tile, few.blocks.contiguous(),
        few_squares.contiguous(), few.row_tile, coverage, cost, offset, dense, rows,
        few.blocks.shape[1], blocks, top, sampled.body, float(base_cost), float(most_keys),
        ROWS=ROWS, CHUNK=CHUNK, **launch.options(WARPS, STAGES),
    )  # fmt: skip
    return cost, offset, dense
