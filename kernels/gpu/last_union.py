"""What the tiles of a chunk's last rows read: `pattern_reference.cheapest_union`, in two launches.

The first goes row by row: the heaviest blocks that reach the coverage, beside none, a few or all of
the candidate columns. The second joins the rows of a tile and takes the cheapest of the three.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..reference import MASS_LEVELS, MASS_SHIFT
from . import launch
from .body_mass import COLUMN_COST, OPTIONS, STAGES, WARPS, top_block
from .launch import Config, Target, kernel, unspecialized

TILE = 64
BLOCK_CHUNK, ROW_CHUNK, SORTED = 512, 1024, 256
SHIFT, LEVELS = tl.constexpr(MASS_SHIFT), tl.constexpr(MASS_LEVELS)
_COUNTS = unspecialized(
    numbers=(
        "few", "num_rows", "num_blocks", "num_columns", "num_heads", "first_row", "tiles", "top",
        "last_block", "num_ends",
    ),
    pointers=(
        "blocks", "column_mass", "sorted_columns", "order_of", "coverage", "left", "flags", "bad",
        "choice", "heads", "mask", "bits", "position",
    ),
)  # fmt: skip


@triton.jit
def _last_of(tile, tiles, top, last_block):
    """Block of the tile's last row: the chunk's last tile may end early."""
    return tl.where(tile == tiles - 1, last_block, top + tile)


@triton.jit
def _count(case, few, num_columns):
    """How many candidate columns are tried in cases 0, 1, 2."""
    return tl.where(case == 0, 0, tl.where(case == 1, few, num_columns))


@triton.jit
def _sum_of_run(block_a, sum_a, block_b, sum_b):
    """Two runs of one block's columns are one."""
    return block_b, tl.where(block_a == block_b, sum_a + sum_b, sum_b)


@triton.jit(**_COUNTS)
def _heaviest_blocks(
    blocks,  # fp32 [h, R, nb]
    column_mass,  # fp32 [h, R, M]
    sorted_columns,  # i32 [h, M]
    order_of,  # i32 [h, M]
    coverage,  # fp32 [h]
    left,  # fp32 [h, R, nb]: scratch
    flags,  # u8 [h, R, nb]: bit c where the block is taken in case c
    bad,  # u8 [h, R]: 1 where the row's mass is not finite
    few,
    num_rows,
    num_blocks,
    num_columns,
    first_row,  # of the chunk
    tiles,
    top,
    last_block,
    CHUNK: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    SORTED: tl.constexpr,
):
    """Of one head and row: the heaviest blocks in each case."""
    head, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = _last_of((first_row + r) // 64, tiles, top, last_block)
    row = (head * num_rows + r) * num_blocks
    single = (head * num_rows + r) * num_columns
    base = tl.load(blocks + row)
    base += tl.load(blocks + row + last, mask=last > 0, other=0.0)
    base += tl.load(blocks + row + last - 1, mask=last > 1, other=0.0)
    missing = tl.load(coverage + head) - base
    total = tl.zeros([ROW_CHUNK], tl.float32)
    for first in range(0, num_blocks, ROW_CHUNK):
        block = first + tl.arange(0, ROW_CHUNK)
        total += tl.load(blocks + row + block, mask=block < num_blocks, other=0.0)
    mass = tl.sum(total, 0)
    tl.store(bad + head * num_rows + r, (mass - mass != 0.0).to(tl.uint8))

    for case in range(0, 3):
        count = _count(case, few, num_columns)
        for first in range(0, num_blocks, ROW_CHUNK):
            block = first + tl.arange(0, ROW_CHUNK)
            there = (block > 0) & (block < num_blocks) & (block != last) & (block != last - 1)
            x = tl.load(blocks + row + block, mask=there, other=0.0)
            tl.store(left + row + block, x, mask=block < num_blocks)
        tl.debug_barrier()
        # Without the mass of the columns in them. These are in ascending order: those of a block
        # lie together, and the last of them takes what they sum to.
        need = missing
        for first in range(0, tl.where(count > 0, num_columns, 0), SORTED):
            i = first + tl.arange(0, SORTED)
            inside = i < num_columns
            of_columns = sorted_columns + head * num_columns + i
            block = tl.load(of_columns, mask=inside, other=0) // 64
            after = tl.load(of_columns + 1, mask=i + 1 < num_columns, other=-64) // 64
            place = tl.load(order_of + head * num_columns + i, mask=inside, other=num_columns)
            m = tl.load(column_mass + single + place, mask=place < count, other=0.0)
            need -= tl.sum(m, 0)
            _, m = tl.associative_scan((block, m), 0, _sum_of_run)
            ends = inside & ((block != after) | (i == first + SORTED - 1))
            ends = ends & (block > 0) & (block != last) & (block != last - 1)
            x = tl.load(left + row + block, mask=ends, other=0.0)
            tl.store(left + row + block, x - m, mask=ends)
            tl.debug_barrier()  # the next ones may go on with the same block
        highest = few * 0
        for first in range(0, num_blocks, ROW_CHUNK):
            block = first + tl.arange(0, ROW_CHUNK)
            x = tl.load(left + row + block, mask=block < num_blocks, other=0.0)
            x = tl.where(x > 0.0, x, 0.0)
            tl.store(left + row + block, x, mask=block < num_blocks)
            highest = tl.maximum(highest, tl.max(x.to(tl.int32, bitcast=True), 0) >> SHIFT)
        tl.debug_barrier()
        # Blocks come by levels of mass: the fewest levels that hold the need, LEVELS where none do.
        # First which 64 of these, then which 8, then which one: 24 sums for each block.
        low = few * 0
        for step in range(0, 3):
            each = tl.where(step == 0, 64, tl.where(step == 1, 8, 1))
            levels = low + tl.arange(0, 8) * each + each - 1
            lowest = tl.where(levels >= LEVELS - 1, 0, highest - levels)
            held = tl.zeros([8], tl.float32)
            for first in range(0, num_blocks, CHUNK):
                block = first + tl.arange(0, CHUNK)
                x = tl.load(left + row + block, mask=block < num_blocks, other=0.0)
                level = x.to(tl.int32, bitcast=True) >> SHIFT
                held += tl.sum(tl.where(level[:, None] >= lowest[None, :], x[:, None], 0.0), 0)
            low += tl.sum((held < need).to(tl.int32), 0) * each
        lowest = tl.where(low >= LEVELS - 1, 0, highest - low)
        lowest = tl.where(need > 0, lowest, 2147483647)  # nothing is needed: none
        for first in range(0, num_blocks, ROW_CHUNK):
            block = first + tl.arange(0, ROW_CHUNK)
            inside = block < num_blocks
            x = tl.load(left + row + block, mask=inside, other=0.0)
            taken = x.to(tl.int32, bitcast=True) >> SHIFT >= lowest
            # Each thread reads back what itself wrote: the same chunks in the same order.
            before = tl.load(flags + row + block, mask=inside & (case > 0), other=0).to(tl.int32)
            tl.store(flags + row + block, (before | (taken.to(tl.int32) << case)).to(tl.uint8),
                     mask=inside)  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _heaviest_row(column_mass, head, place, first, end, num_rows, num_columns):
    """The most that any row of a tile gives to columns [N]: fp32 [N]."""
    r = first + tl.arange(0, 64)
    at = (head * num_rows + r)[:, None] * num_columns + place[None, :]
    there = (r < end)[:, None] & (place < num_columns)[None, :]
    return tl.max(tl.load(column_mass + at, mask=there, other=0.0), 0)


@triton.jit(**_COUNTS)
def _join_rows(
    flags,  # u8 [h, R, nb]
    bad,  # u8 [h, R]
    column_mass,  # fp32 [h, R, M]
    sorted_columns,
    order_of,
    choice,  # i32 [h]: 0 reads everything
    heads,  # i64 [h]
    bits,  # u8 [h, ends, nb]: scratch, the union of the rows' flags
    mask,  # u8 [T, H, nb]
    position,  # i32 [h, ends, M]
    few,
    num_rows,
    num_blocks,
    num_columns,
    num_heads,
    first_row,
    tiles,
    top,
    last_block,
    num_ends,
    CHUNK: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
):
    """Of one head and tile: the cheapest case's blocks and columns."""
    head, end = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile = tiles - num_ends + end
    last = _last_of(tile, tiles, top, last_block)
    begin = tl.maximum(tile * 64 - first_row, 0)
    stop = tl.minimum((tile + 1) * 64 - first_row, num_rows)
    r = tl.arange(0, 64)
    lost = tl.load(bad + head * num_rows + r, mask=r < num_rows, other=0)
    dense = ((tl.max(lost.to(tl.int32), 0) != 0) | (tl.load(choice + head) == 0)).to(tl.int32)

    r = begin + r
    rows = flags + (head * num_rows + r) * num_blocks
    mine = bits + (head * num_ends + end) * num_blocks
    read0, read1, read2 = last * 0, last * 0, last * 0
    for first in range(0, num_blocks, BLOCK_CHUNK):
        block = first + tl.arange(0, BLOCK_CHUNK)
        there = (r < stop)[:, None] & (block < num_blocks)[None, :]
        flag = tl.load(rows[:, None] + block[None, :], mask=there, other=0).to(tl.int32)
        base = (block == 0) | (block == last) | (block == last - 1)
        base = base & (block < num_blocks)
        bit0 = tl.max(flag & 1, 0) | base.to(tl.int32)
        bit1 = tl.max((flag >> 1) & 1, 0) | base.to(tl.int32)
        bit2 = tl.max((flag >> 2) & 1, 0) | base.to(tl.int32)
        read0 += tl.sum(bit0, 0)
        read1 += tl.sum(bit1, 0)
        read2 += tl.sum(bit2, 0)
        both = (bit0 | (bit1 << 1) | (bit2 << 2)).to(tl.uint8)
        tl.store(mine + block, both, mask=block < num_blocks)
    tl.debug_barrier()
    single1, single2 = last * 0, last * 0
    of_columns = head * num_columns
    into = position + (head * num_ends + end) * num_columns
    for first in range(0, num_columns, CHUNK):
        i = first + tl.arange(0, CHUNK)
        inside = i < num_columns
        column = tl.load(sorted_columns + of_columns + i, mask=inside, other=0)
        place = tl.load(order_of + of_columns + i, mask=inside, other=num_columns)
        heavy = _heaviest_row(column_mass, head, place, begin, stop, num_rows, num_columns) > 0
        tl.store(into + i, heavy.to(tl.int32), mask=inside)  # for the last loop
        have = tl.load(mine + column // 64, mask=inside, other=7).to(tl.int32)
        single1 += tl.sum((heavy & (place < few) & ((have >> 1) & 1 == 0)).to(tl.int32), 0)
        single2 += tl.sum((heavy & inside & ((have >> 2) & 1 == 0)).to(tl.int32), 0)
    cost0 = read0.to(tl.float32) * 64.0
    cost1 = read1.to(tl.float32) * 64.0 + single1.to(tl.float32) * COLUMN_COST
    cost2 = read2.to(tl.float32) * 64.0 + single2.to(tl.float32) * COLUMN_COST
    best = tl.where(cost1 < cost0, 1, 0)
    best = tl.where(cost2 < tl.minimum(cost0, cost1), 2, best)
    tl.debug_barrier()

    row = mask + ((tile * num_heads).to(tl.int64) + tl.load(heads + head)) * num_blocks
    for first in range(0, num_blocks, BLOCK_CHUNK):
        block = first + tl.arange(0, BLOCK_CHUNK)
        inside = block < num_blocks
        keep = ((tl.load(mine + block, mask=inside, other=0).to(tl.int32) >> best) & 1) != 0
        # A tile before the last reads this beside its pattern.
        other = tl.load(row + block, mask=inside & (block * 0 + tile < tiles - 1), other=0) != 0
        keep = (keep | other | (block * 0 + dense != 0)) & (block <= last)
        tl.store(row + block, keep.to(tl.uint8), mask=inside)
    count = _count(best, few, num_columns)
    for first in range(0, num_columns, CHUNK):
        i = first + tl.arange(0, CHUNK)
        inside = i < num_columns
        column = tl.load(sorted_columns + of_columns + i, mask=inside, other=0)
        place = tl.load(order_of + of_columns + i, mask=inside, other=num_columns)
        heavy = tl.load(into + i, mask=inside, other=0) != 0
        have = tl.load(mine + column // 64, mask=inside, other=7).to(tl.int32)
        keep = heavy & (place < count) & ((have >> best) & 1 == 0) & (i * 0 + dense == 0)
        tl.store(into + i, tl.where(keep, column, -1), mask=inside)


_FP32, _I32, _U8 = "*fp32", "*i32", "*u8"
_TYPES = {
    "blocks": _FP32, "column_mass": _FP32, "sorted_columns": _I32, "order_of": _I32,
    "coverage": _FP32, "left": _FP32, "flags": _U8, "bad": _U8, "choice": _I32, "heads": "*i64",
    "bits": _U8, "mask": _U8, "position": _I32,
}  # fmt: skip


def _configs(function, constants: dict[str, int], warps: int = WARPS) -> Iterator[Config]:
    signature = {
        name: _TYPES.get(name, "i32") for name in function.arg_names if name not in constants
    }
    yield Config("rows", constants, warps, STAGES, signature, True)


_HEAVIEST = {"CHUNK": BLOCK_CHUNK, "ROW_CHUNK": ROW_CHUNK, "SORTED": SORTED}
_JOIN, JOIN_WARPS = {"CHUNK": 64, "BLOCK_CHUNK": 128}, 8  # 4 would take 255 registers on sm_80
_JOIN_OPTIONS = launch.options(JOIN_WARPS, STAGES)


@kernel(_heaviest_blocks)
def _heaviest_configs(target: Target) -> Iterator[Config]:
    yield from _configs(_heaviest_blocks, _HEAVIEST)


@kernel(_join_rows)
def _join_configs(target: Target) -> Iterator[Config]:
    yield from _configs(_join_rows, _JOIN, JOIN_WARPS)


class LastRows:
    """The tiles that hold a chunk's last rows.

    Args:
        blocks: fp32 [h, R, nb], exact mass of the last R <= 64 rows.
        column_mass: fp32 [h, R, M], of candidate columns, 0 inside the row's base.
        columns: of `sort_columns`.
        coverage: fp32 [h].
        query_len, seq_len: of the chunk.
        few: how many of the first candidates are tried beside blocks, when not none or all.
    """

    def __init__(
        self,
        blocks: torch.Tensor,
        column_mass: torch.Tensor,
        columns: tuple[torch.Tensor, torch.Tensor],
        coverage: torch.Tensor,
        query_len: int,
        seq_len: int,
        few: int,
    ) -> None:
        blocks = blocks.contiguous()
        heads, rows, num_blocks = blocks.shape
        assert 0 < rows <= TILE, rows
        self.tiles = -(-query_len // TILE)
        self.first_row = query_len - rows
        self.ends = self.tiles - self.first_row // TILE
        self.top = top_block(seq_len - query_len)
        self.last_block = (seq_len - 1) // TILE
        self.columns, self.column_mass = columns, column_mass.contiguous()
        self.few = min(few, column_mass.shape[2])
        self.flags = blocks.new_empty(blocks.shape, dtype=torch.uint8)
        self.bad = blocks.new_empty(heads, rows, dtype=torch.uint8)
        _heaviest_blocks[(heads, rows)](
            blocks, self.column_mass, *columns, coverage, torch.empty_like(blocks), self.flags,
            self.bad, self.few, rows, num_blocks, column_mass.shape[2], self.first_row, self.tiles,
            self.top, self.last_block, **_HEAVIEST, **OPTIONS,
        )  # fmt: skip

    def write(self, choice: torch.Tensor, heads: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Write the tiles' blocks into `mask`, bool [T, H, nb], beside what is there but in the
        last tile.

        Args:
            choice: int32 [h], 0 for heads that read everything.
            heads: int64 [h], whose blocks these are.

        Returns:
            int32 [h, tiles of the last rows, M]: their columns, ascending where not -1.
        """
        wanted, rows, num_blocks = self.flags.shape
        width = self.column_mass.shape[2]
        position = choice.new_empty(wanted, self.ends, width)
        bits = self.flags.new_empty(wanted, self.ends, num_blocks)
        _join_rows[(wanted, self.ends)](
            self.flags, self.bad, self.column_mass, *self.columns, choice, heads, bits,
            mask.view(torch.uint8), position, self.few, rows, num_blocks, width, mask.shape[1],
            self.first_row, self.tiles, self.top, self.last_block, self.ends, **_JOIN,
            **_JOIN_OPTIONS,
        )  # fmt: skip
        return position
