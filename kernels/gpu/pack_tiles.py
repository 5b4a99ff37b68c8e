"""From BlockIndices to the tiles of `prefill_tile`: which two halves share one, and what it reads.

The lists are per query head and 64 rows. Of two heads of a KV head and two tiles after another,
four lists, the two tiles of 128 rows are either (one tile, both heads) twice or (both tiles, one
head) twice, whichever leaves fewer keys to read. All on the device, in three launches.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .launch import Config, Target, kernel, unspecialized

CHUNK = 256  # list entries handled at once; each waits for a search through the other list
PLACE_CHUNK = 1024  # programs whose work is compared at once
WARPS = 4
# Numbers and addresses that differ from step to step compile no code of their own.
COUNTS = unspecialized(
    numbers=("window", "num_seqs", "num_heads", "num_squares", "num_programs"),
    pointers=(
        "block_offsets", "blocks", "column_offsets", "columns", "clean_blocks", "clean_columns",
        "tile_offsets", "pair_offsets", "seq_lens", "query_start_loc", "records", "counts",
        "offsets", "entries", "merged_columns", "order",
    ),
)  # fmt: skip


@triton.jit
def _is_in(x, values, start, count):
    """Whether each of x [N] is in the ascending values[start : start + count]."""
    low = tl.zeros_like(x)
    high = tl.zeros_like(x) + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        open_ = low < high
        value = tl.load(values + start + middle, mask=open_, other=0)
        low = tl.where(open_ & (value < x), middle + 1, low)
        high = tl.where(open_ & (value >= x), middle, high)
        left = left // 2
    return (low < count) & (tl.load(values + start + low, mask=low < count, other=0) == x)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _clean_list(source, target, start, end, limit, CHUNK: tl.constexpr):
    """Copy a list with each entry that is no key replaced by the largest before it (-1: none)."""
    largest = tl.min(tl.zeros([CHUNK], tl.int32)) - 1
    for at in range(start, end, CHUNK):
        i = at + tl.arange(0, CHUNK)
        x = tl.load(source + i, mask=i < end, other=-1)
        x = tl.where((x >= 0) & (x < limit), x, -1)
        x = tl.maximum(tl.associative_scan(x, 0, _larger), largest)
        tl.store(target + i, x, mask=i < end)
        largest = tl.maximum(largest, tl.max(x, 0))


@triton.jit
def _sequence_of(x, offsets, num_seqs):
    """The sequence whose offsets hold x, num_seqs beyond the last; offsets i32 [num_seqs + 1]."""
    found = x * 0
    for at in range(0, num_seqs, 64):
        i = at + tl.arange(0, 64)
        end = tl.load(offsets + 1 + i, mask=i < num_seqs, other=2147483647)
        found += tl.sum((end <= x).to(tl.int32), 0)
    return found


@triton.jit(**COUNTS)
def _clean_lists(
    block_offsets,  # i32 [tiles * heads + 1]
    blocks,
    column_offsets,
    columns,
    clean_blocks,  # like blocks
    clean_columns,
    tile_offsets,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    num_seqs,
    num_heads,
    CHUNK: tl.constexpr,
):
    """One list row: entries that are no key out of the way, so that the others are ascending."""
    row = tl.program_id(0)
    sequence = _sequence_of(row // num_heads, tile_offsets, num_seqs)
    if sequence >= num_seqs:
        return
    seq_len = tl.load(seq_lens + sequence)
    start, end = tl.load(block_offsets + row), tl.load(block_offsets + row + 1)
    _clean_list(blocks, clean_blocks, start, end, tl.cdiv(seq_len, 64), CHUNK)
    start, end = tl.load(column_offsets + row), tl.load(column_offsets + row + 1)
    _clean_list(columns, clean_columns, start, end, seq_len, CHUNK)


@triton.jit
def _merge_list(
    values,
    a_from,
    a_to,
    b_from,
    b_to,
    lowest,  # entries below it and above `highest` are out of sight of every row
    highest,
    plain_from,  # entries from here to below `plain_to` are seen by every row
    plain_to,
    b_there,
    target,  # where `4 entry + halves` go
    first_plain,  # so many plain ones come first, further ones among the others, with their mask
    CHUNK: tl.constexpr,
    FILL: tl.constexpr,
):
    """The union of two lists, what all rows see first: (number of those, of all)."""
    plain = a_from * 0
    rest = a_from * 0
    for side in range(0, 2):
        start = tl.where(side == 0, a_from, b_from)
        end = tl.where(side == 0, a_to, b_to)
        other_from = tl.where(side == 0, b_from, a_from)
        other_to = tl.where(side == 0, b_to, a_to)
        for at in range(start, end, CHUNK):
            i = at + tl.arange(0, CHUNK)
            x = tl.load(values + i, mask=i < end, other=-1)
            before = tl.load(values + i - 1, mask=(i < end) & (i > start), other=-1)
            keep = (i < end) & (x > before) & (x >= lowest) & (x <= highest)
            both = _is_in(x, values, other_from, other_to - other_from)
            keep = keep & ((side == 0) | (both == 0))
            seen = keep & (both | (b_there == 0)) & (x >= plain_from) & (x < plain_to)
            if FILL:
                rank = plain + tl.cumsum(seen.to(tl.int32), 0) - 1
                is_first = seen & (rank < first_plain)
                later = keep & (is_first == 0)
                later_rank = first_plain + rest + tl.cumsum(later.to(tl.int32), 0) - 1
                halves = tl.where(both, 3, tl.where(side == 0, 1, 2))
                tl.store(target + tl.where(is_first, rank, later_rank), x * 4 + halves, mask=keep)
                plain += tl.sum(is_first.to(tl.int32), 0)
                rest += tl.sum(later.to(tl.int32), 0)
            else:
                plain += tl.sum(seen.to(tl.int32), 0)
                rest += tl.sum((keep & (seen == 0)).to(tl.int32), 0)
    return plain, plain + rest


@triton.jit
def _halves(option, tile, tiles, head, heads_end):
    """Both halves (tile, head) of one of a square's four pairings; -1: none there."""
    second = option % 2
    by_tile = option >= 2
    tile_a = tl.where(by_tile, tile, tile + second)
    head_a = tl.where(by_tile, head + second, head)
    tile_b = tl.where(by_tile, tile + 1, tile_a)
    head_b = tl.where(by_tile, head_a, head + 1)
    there = (tile_a < tiles) & (head_a < heads_end)
    b_there = there & (tile_b < tiles) & (head_b < heads_end)
    tile_a = tl.where(there, tile_a, -1)
    return tile_a, head_a, tl.where(b_there, tile_b, -1), tl.where(b_there, head_b, head_a)


@triton.jit
def _sight(tile_a, tile_b, start, query_len, window):
    """(first, last position of the rows; lowest key that some, and that all rows' windows hold)."""
    low_tile = tl.where(tile_b >= 0, tl.minimum(tile_a, tile_b), tile_a)
    first = start + low_tile * 64
    last = start + tl.minimum(tl.maximum(tile_a, tile_b) * 64 + 64, query_len) - 1
    return first, last, tl.maximum(first - window + 1, 0), tl.maximum(last - window + 1, 0)


@triton.jit
def _bounds(offsets, row, there):
    """(first, end) of a list row, both 0 where it is not there."""
    return (
        tl.load(offsets + row, mask=there, other=0),
        tl.load(offsets + row + 1, mask=there, other=0),
    )


@triton.jit(**COUNTS)
def _count_tiles(
    pair_offsets,  # i32 [S + 1], first two tiles of each sequence, counted in twos
    tile_offsets,  # i32 [S + 1]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    block_offsets,
    blocks,  # cleaned
    column_offsets,
    columns,  # cleaned
    records,  # i32 [2 * squares, 8]
    counts,  # i32 [2, 2 * squares], entries and columns of each program, 0 where it has nothing
    window,
    num_seqs,
    num_heads,
    num_squares,
    GROUP: tl.constexpr,
    EACH: tl.constexpr,
    DENSE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A square of two tiles and two heads: choose its pairing, write its two records.

    Without lists a record's offsets are its first block and its first plain one, and they take
    the place of the counts.
    """
    square = tl.program_id(0)
    lane = tl.arange(0, 4)  # the options: (by head, by tile) x (first, second)
    squares_each: tl.constexpr = (GROUP + 1) // 2
    kv_heads = num_heads // GROUP
    pair = square // (squares_each * kv_heads)
    kv_head = (square // squares_each) % kv_heads
    head = kv_head * GROUP + 2 * (square % squares_each)
    heads_end = (kv_head + 1) * GROUP
    sequence = _sequence_of(pair, pair_offsets, num_seqs)
    if sequence >= num_seqs:
        tl.store(records + (2 * square + lane % 2).to(tl.int64) * 8, lane * 0 - 1, mask=lane < 2)
        tl.store(counts + 2 * square + lane % 2, lane * 0, mask=lane < 2)
        tl.store(counts + 2 * (square + num_squares) + lane % 2, lane * 0, mask=lane < 2)
        return
    tile = 2 * (pair - tl.load(pair_offsets + sequence))
    query_len = tl.load(query_start_loc + sequence + 1) - tl.load(query_start_loc + sequence)
    tiles = tl.cdiv(query_len, 64)
    start = tl.load(seq_lens + sequence) - query_len

    plain = lane * 0
    num_blocks = lane * 0
    num_columns = lane * 0
    if DENSE:
        tile_a, head_a, tile_b, head_b = _halves(lane, tile, tiles, head, heads_end)
        by_tile = (head + 1 >= heads_end).to(tl.int32)
        first, last, low, all_low = _sight(tile_a, tile_b, start, query_len, window)
        first_block = low // 64
        num_blocks = last // 64 + 1 - first_block
        plain_from = tl.cdiv(all_low, 64)
        plain = tl.maximum((first + 1) // 64 - plain_from, 0)
        plain -= plain % EACH
        plain_from = tl.where(plain > 0, plain_from, first_block)
    else:
        row0 = tl.load(tile_offsets + sequence) * num_heads
        for option in range(0, 4):
            a_tile, a_head, b_tile, b_head = _halves(option, tile, tiles, head, heads_end)
            there = b_tile >= 0
            if a_tile >= 0:
                first, last, low, all_low = _sight(a_tile, b_tile, start, query_len, window)
                a = row0 + a_tile * num_heads + a_head
                b = row0 + b_tile * num_heads + b_head
                a_from, a_to = _bounds(block_offsets, a, a_tile >= 0)
                b_from, b_to = _bounds(block_offsets, b, there)
                n_plain, n_blocks = _merge_list(
                    blocks, a_from, a_to, b_from, b_to, low // 64, last // 64,
                    tl.cdiv(all_low, 64), (first + 1) // 64, there, blocks, 0, CHUNK, False,
                )  # fmt: skip
                a_from, a_to = _bounds(column_offsets, a, a_tile >= 0)
                b_from, b_to = _bounds(column_offsets, b, there)
                _, n_columns = _merge_list(
                    columns, a_from, a_to, b_from, b_to, low, last, 0, 0, there, columns, 0,
                    CHUNK, False,
                )  # fmt: skip
                plain = tl.where(lane == option, n_plain - n_plain % EACH, plain)
                num_blocks = tl.where(lane == option, n_blocks, num_blocks)
                num_columns = tl.where(lane == option, n_columns, num_columns)
        cost = num_blocks * 64 + num_columns
        by_head_cost = tl.sum(tl.where(lane < 2, cost, 0), 0)
        by_tile = (tl.sum(cost, 0) - by_head_cost < by_head_cost).to(tl.int32)

    tile_a, head_a, tile_b, head_b = _halves(lane, tile, tiles, head, heads_end)
    record = records + (2 * square + lane % 2).to(tl.int64) * 8
    count_at = counts + 2 * square + lane % 2
    chosen = lane // 2 == by_tile
    tl.store(record, tl.where(tile_a >= 0, sequence, -1), mask=chosen)
    tl.store(record + 1, tile_a, mask=chosen)
    tl.store(record + 2, head_a, mask=chosen)
    tl.store(record + 3, tile_b, mask=chosen)
    tl.store(record + 4, head_b, mask=chosen)
    tl.store(record + 5, plain, mask=chosen)
    tl.store(record + 6, num_blocks, mask=chosen)
    tl.store(record + 7, num_columns, mask=chosen)
    if DENSE:
        tl.store(count_at, first_block, mask=chosen)
        tl.store(count_at + 2 * num_squares, plain_from, mask=chosen)
    else:
        tl.store(count_at, num_blocks, mask=chosen)
        tl.store(count_at + 2 * num_squares, num_columns, mask=chosen)


@triton.jit
def _work_class(counts, program, num_programs):
    """Work of programs [N] in steps of 14% to 25%, two bits of mantissa; -1 beyond the last."""
    there = program < num_programs
    keys = tl.load(counts + program, mask=there, other=0) * 64
    keys += tl.load(counts + num_programs + program, mask=there, other=0)
    return tl.where(there, keys.to(tl.float32).to(tl.int32, bitcast=True) >> 21, -1)


@triton.jit
def _place(counts, program, num_programs, CHUNK: tl.constexpr):
    """How many programs have more work, or as much and come later."""
    mine = _work_class(counts, program, num_programs)
    place = tl.zeros([CHUNK], tl.int32)
    for first in range(0, num_programs, CHUNK):
        other = first + tl.arange(0, CHUNK)
        work = _work_class(counts, other, num_programs)
        place += ((work > mine) | ((work == mine) & (other > program))).to(tl.int32)
    return tl.sum(place, 0)


@triton.jit(**COUNTS)
def _fill_tiles(
    records,
    counts,  # i32 [2, programs], entries and columns of each program
    order,  # i32 [programs]: the programs with the most work first
    offsets,  # i32 [2, programs], where each program's entries and columns begin
    tile_offsets,
    query_start_loc,
    seq_lens,
    block_offsets,
    blocks,
    column_offsets,
    columns,
    entries,
    merged_columns,
    window,
    num_heads,
    num_programs,
    CHUNK: tl.constexpr,
    PLACE_CHUNK: tl.constexpr,
):
    """One record's lists, the union of its halves', what all rows see first; and its turn: of tiles
    of alike work the last come first, as neighbours read the same keys."""
    program = tl.program_id(0)
    tl.store(order + _place(counts, program, num_programs, PLACE_CHUNK), program)
    record = records + program.to(tl.int64) * 8
    sequence = tl.load(record)
    if sequence < 0:
        return
    tile_a, head_a = tl.load(record + 1), tl.load(record + 2)
    tile_b, head_b = tl.load(record + 3), tl.load(record + 4)
    plain = tl.load(record + 5)
    query_len = tl.load(query_start_loc + sequence + 1) - tl.load(query_start_loc + sequence)
    start = tl.load(seq_lens + sequence) - query_len
    first, last, low, all_low = _sight(tile_a, tile_b, start, query_len, window)
    row0 = tl.load(tile_offsets + sequence) * num_heads
    a, b = row0 + tile_a * num_heads + head_a, row0 + tile_b * num_heads + head_b
    there = tile_b >= 0
    a_from, a_to = _bounds(block_offsets, a, tile_a >= 0)
    b_from, b_to = _bounds(block_offsets, b, there)
    _merge_list(
        blocks, a_from, a_to, b_from, b_to, low // 64, last // 64, tl.cdiv(all_low, 64),
        (first + 1) // 64, there, entries + tl.load(offsets + program), plain, CHUNK, True,
    )  # fmt: skip
    a_from, a_to = _bounds(column_offsets, a, tile_a >= 0)
    b_from, b_to = _bounds(column_offsets, b, there)
    _merge_list(
        columns, a_from, a_to, b_from, b_to, low, last, 0, 0, there,
        merged_columns + tl.load(offsets + num_programs + program), 0, CHUNK, True,
    )  # fmt: skip


_I32 = "i32"
_LISTS = ("block_offsets", "blocks", "column_offsets", "columns")


def _config(
    name: str, pointers: tuple[str, ...], numbers: tuple[str, ...], **constants: object
) -> Config:
    signature = dict.fromkeys(pointers, "*i32") | dict.fromkeys(numbers, _I32)
    return Config(
        name, {**constants, "CHUNK": CHUNK}, WARPS, 2, signature, serving=True,
        aligned=frozenset(),
    )  # fmt: skip


@kernel(_clean_lists)
def _clean_configs(target: Target) -> Iterator[Config]:
    pointers = (*_LISTS, "clean_blocks", "clean_columns", "tile_offsets", "seq_lens")
    yield _config("lists", pointers, ("num_seqs", "num_heads"))


@kernel(_count_tiles)
def _count_configs(target: Target) -> Iterator[Config]:
    pointers = (
        "pair_offsets", "tile_offsets", "query_start_loc", "seq_lens", *_LISTS, "records", "counts",
    )  # fmt: skip
    numbers = ("window", "num_seqs", "num_heads", "num_squares")
    for dense in (False, True):
        name = "dense" if dense else "lists"
        yield _config(name, pointers, numbers, GROUP=4, EACH=2, DENSE=dense)


@kernel(_fill_tiles)
def _fill_configs(target: Target) -> Iterator[Config]:
    pointers = (
        "records", "counts", "order", "offsets", "tile_offsets", "query_start_loc", "seq_lens",
        *_LISTS, "entries", "merged_columns",
    )  # fmt: skip
    names = ("window", "num_heads", "num_programs")
    yield _config("lists", pointers, names, PLACE_CHUNK=PLACE_CHUNK)
