"""What the searches on a GPU share: sampled mass by block offset, and what an item costs a tile.

A chunk begins at key `start` and has `body` tiles before its last; `top` is the block of the first
tile's last row, so that tile t's is `top + t`. Offsets count back from there. The base is block 0,
a tile's last block and the one before it: see `pattern_reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import pattern_reference
from . import launch
from .launch import unspecialized

ROWS = 32  # most sampled rows; the planner's MAX_ROWS
CHUNK = 64  # offsets, blocks or columns handled at once
WARPS, STAGES = 4, 2
OPTIONS = launch.options(WARPS, STAGES)
COLUMN_COST = tl.constexpr(pattern_reference.COLUMN_COST)
# Numbers and addresses that differ from step to step compile no code of their own.
COUNTS = unspecialized(
    numbers=(
        "num_rows", "few_rows", "num_blocks", "num_columns", "start", "top", "body", "tiles",
        "base_cost",
    ),
    pointers=(
        "blocks", "row_tile", "few_blocks", "few_squares", "few_tile", "coverage", "columns",
        "column_mass", "value", "order", "level", "covered", "cost", "best", "offset", "dense",
        "score", "tops", "counts", "gained", "limits", "kept", "order_of",
    ),
)  # fmt: skip


def top_block(start: int) -> int:
    """Block of the last row of the first tile of a chunk that begins at key `start`."""
    return (start + 63) // 64


@triton.jit
def tiles_beyond(offset, top, body):
    """How many of the body's tiles have a block at this offset (the tiles with top + t >= it)."""
    return tl.minimum(tl.maximum(body - tl.maximum(offset - top, 0), 0), body)


@triton.jit
def offset_cost(offset, top, body):
    """Keys that a tile reads on average for the diagonal of blocks at `offset`.

    As `SampledMass.offset_cost`: the diagonal's block 0 is the base's.
    """
    seen = tiles_beyond(offset + 1, top, body).to(tl.float32) / body.to(tl.float32)
    return tl.where(offset >= 2, seen * 64.0, 0.0)


@triton.jit
def column_cost(column, start, body):
    """Keys' worth that a tile pays on average for the column at this position."""
    tile = tl.maximum(column - start, 0) // 64
    seen = tl.maximum(body - tile, 0).to(tl.float32)
    return COLUMN_COST * seen / body.to(tl.float32)


@triton.jit
def offset_mass(rows, last, is_row, offset):
    """Mass outside the base at `offset` [N] of each row: fp32 [rows, N].

    Args:
        rows: addresses of the rows' masses of blocks, [rows].
        last: block of the last row of each row's tile, [rows].
    """
    block = last[:, None] - offset[None, :]
    there = is_row[:, None] & (block > 0) & (offset >= 2)[None, :]
    return tl.load(rows[:, None] + tl.where(there, block, 0), mask=there, other=0.0)


@triton.jit
def base_mass(rows, last, is_row):
    """Mass that the base covers: fp32 [rows]."""
    mass = tl.load(rows, mask=is_row, other=0.0)
    mass += tl.load(rows + last, mask=is_row & (last > 0), other=0.0)
    return mass + tl.load(rows + last - 1, mask=is_row & (last > 1), other=0.0)


@triton.jit
def rest_mass(rows, last, is_row, block, num_blocks):
    """Mass of blocks [N] outside the base: fp32 [rows, N]."""
    there = is_row[:, None] & ((block > 0) & (block < num_blocks))[None, :]
    there = there & (block[None, :] != last[:, None]) & (block[None, :] != last[:, None] - 1)
    return tl.load(rows[:, None] + block[None, :], mask=there, other=0.0)


@triton.jit
def sure(covered, is_row, num_rows):
    """`pattern_reference.sure` over the rows: fp32 [rows, N] -> [N]; NaN of a single row."""
    n = num_rows.to(tl.float32)
    mean = tl.sum(tl.where(is_row[:, None], covered, 0.0), 0) / n
    apart = tl.where(is_row[:, None], covered - mean[None, :], 0.0)
    return mean - tl.sqrt(tl.sum(apart * apart, 0) / (n - 1.0)) / tl.sqrt(n)


@triton.jit
def first_of(enough, index, none):
    """The smallest `index` [N] where `enough` holds, `none` where it nowhere does."""
    return tl.min(tl.where(enough, index, none), 0)
