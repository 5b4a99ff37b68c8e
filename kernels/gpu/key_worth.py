"""What each key is worth as a column, and the masses of the columns that are chosen.

Both need the rows' softmax denominators, and so read keys again: for what is worth most in one row
only those of the blocks with the heaviest keys, which the first pass has found.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .launch import Config, Target, kernel
from .scored_rows import (
    COUNTS,
    configs,
    load_keys,
    load_rows,
    logits,
    seen_by_all,
    spread,
    unit_heads,
)


@triton.jit
def _block_worth(
    q_tile, keys, table, block, seq_len, position, lse, base, kv_page, kv_row, scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    PAGE: tl.constexpr, BASE: tl.constexpr, MASKED: tl.constexpr, HEAVIEST: tl.constexpr,
):  # fmt: skip
    """Of a block's keys: fp32 [64, HEADS], and their positions [64].

    Keys lie along the products' rows here, so that what is summed over rows lies in one warp.
    """
    key = block * 64 + tl.arange(0, 64)
    k = load_keys(keys, table, key, key < seq_len, kv_page, kv_row, D, D_PADDED, PAGE, MASKED)
    s = tl.dot(k.to(q_tile.dtype), tl.trans(q_tile), input_precision="ieee") * scale
    if BASE:
        lse = tl.where((block != 0) & (block < base), lse, float("inf"))
    s -= lse[None, :]
    if MASKED:
        s = tl.where(key[:, None] <= position[None, :], s, float("-inf"))
    s = tl.reshape(s, [64, HEADS, ROWS])
    if HEAVIEST:
        value = tl.math.exp2(tl.max(s, 2))
    else:
        p = tl.math.exp2(s)
        value = tl.sum(p, 2) - tl.max(p, 2)
    value = tl.where(value == value, value, 0.0)
    if MASKED:
        value = tl.where((key < seq_len)[:, None], value, -1.0)
    return value, key


@triton.jit(**COUNTS)
def _key_worth(
    q,
    k_cache,
    table,
    positions,
    heads,
    lse,  # fp32 [h, 64]
    base_from,  # i64 [R]
    chosen,  # i64 [h, B]: blocks to look at, with HEAVIEST
    worth,  # fp32 [h, 64 B], all blocks' but with HEAVIEST; -1 where no key is
    seq_len,
    num_rows,
    num_heads,
    num_chosen,  # B
    chosen_row,  # stride
    blocks_each,
    k_scale,
    scale,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head: tl.int64,
    kv_row: tl.int64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    BASE: tl.constexpr,
    HEAVIEST: tl.constexpr,  # mass in the heaviest row; else in all rows but that
):
    """Of one unit and a part of the blocks; with HEAVIEST, of one head."""
    if HEAVIEST:
        number = tl.program_id(1) + tl.arange(0, HEADS)
        head = tl.load(heads + number).to(tl.int32)
        of_kv = tl.max(head, 0) // GROUP
        chosen += tl.program_id(1).to(tl.int64) * chosen_row
    else:
        of_kv, head, number = unit_heads(
            tl.program_id(1), heads, num_heads, GROUP, HEADS, ALL_HEADS
        )
        if tl.max(number, 0) < 0:
            return
    into = worth + number.to(tl.int64) * num_chosen * 64
    is_head = number >= 0
    number = spread(number, HEADS, ROWS)
    r = tl.arange(0, HEADS * ROWS) % ROWS
    is_row = (r < num_rows) & (number >= 0)
    position = tl.load(positions + r, mask=is_row, other=-1).to(tl.int32)
    q_tile = load_rows(q, spread(head, HEADS, ROWS), r, is_row, q_row, q_head, D, D_PADDED)
    scale = scale * 1.4426950408889634
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    keys = k_cache + of_kv * kv_head
    row_lse = tl.load(lse + number * 64 + r, mask=is_row, other=float("inf")) * 1.4426950408889634
    # A row that sees nothing gives nothing.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    base = position
    if BASE:
        base = tl.load(base_from + r, mask=is_row, other=0).to(tl.int32)
    first = tl.program_id(0) * blocks_each
    last = tl.minimum(first + blocks_each, num_chosen)
    h = tl.arange(0, HEADS)
    if HEAVIEST:
        for i in range(first, last):
            block = tl.load(chosen + i).to(tl.int32)
            value, key = _block_worth(
                q_tile, keys, table, block, seq_len, position, row_lse, base, kv_page, kv_row,
                scale, HEADS, ROWS, D, D_PADDED, PAGE, BASE, True, True,
            )  # fmt: skip
            at = i * 64 + tl.arange(0, 64)
            tl.store(into[None, :] + at[:, None] + h[None, :] * 0, value)
    else:
        middle = seen_by_all(position, is_row, first, last)
        for block in range(first, middle):
            value, key = _block_worth(
                q_tile, keys, table, block, seq_len, position, row_lse, base, kv_page, kv_row,
                scale, HEADS, ROWS, D, D_PADDED, PAGE, BASE, False, False,
            )  # fmt: skip
            tl.store(into[None, :] + key[:, None], value, mask=is_head[None, :])
        for block in range(middle, last):
            value, key = _block_worth(
                q_tile, keys, table, block, seq_len, position, row_lse, base, kv_page, kv_row,
                scale, HEADS, ROWS, D, D_PADDED, PAGE, BASE, True, False,
            )  # fmt: skip
            tl.store(into[None, :] + key[:, None], value, mask=is_head[None, :])


@triton.jit(**COUNTS)
def _column_scores(
    q,
    k_cache,
    table,
    positions,
    heads,
    lse,
    base_from,
    chosen,  # i64 [h, B]: blocks that `best` counts in, with LISTED
    best,  # i64 [h, M]: places in `worth`
    columns,  # i64 [h, M]: their keys
    column_mass,  # fp32 [h, R, M]
    seq_len,
    num_rows,
    num_columns,
    chosen_row,
    k_scale,
    scale,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head: tl.int64,
    kv_row: tl.int64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    BASE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Of one head and 64 of its columns: their mass in each row, 0 in the row's base."""
    number = tl.program_id(1)
    head = tl.load(heads + number)
    m = tl.arange(0, 64)
    is_row = m < num_rows
    position = tl.load(positions + m, mask=is_row, other=-1).to(tl.int32)
    q_tile = load_rows(q, head, m, is_row, q_row, q_head, D, D_PADDED)
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    i = tl.program_id(0) * 64 + tl.arange(0, 64)
    inside = i < num_columns
    key = tl.load(best + number.to(tl.int64) * num_columns + i, mask=inside, other=0)
    if LISTED:
        block = tl.load(chosen + number.to(tl.int64) * chosen_row + key // 64, mask=inside, other=0)
        key = block * 64 + key % 64
    tl.store(columns + number.to(tl.int64) * num_columns + i, key, mask=inside)
    key = key.to(tl.int32)
    keys = k_cache + head // GROUP * kv_head
    s = logits(q_tile, keys, table, key, inside, kv_page, kv_row, scale, D, D_PADDED, PAGE)
    row_lse = tl.load(lse + number * 64 + m, mask=is_row, other=0.0)
    safe = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    p = tl.where(key[None, :] <= position[:, None], tl.exp(s - safe[:, None]), 0.0)
    p = tl.where((row_lse != row_lse)[:, None], float("nan"), p)
    if BASE:
        base = tl.load(base_from + m, mask=is_row, other=0).to(tl.int32)
        block = key // 64
        p = tl.where((block == 0)[None, :] | (block[None, :] >= base[:, None]), 0.0, p)
    at = (number.to(tl.int64) * num_rows + m)[:, None] * num_columns + i[None, :]
    tl.store(column_mass + at, p, mask=is_row[:, None] & inside[None, :])


@kernel(_key_worth)
def _worth_configs(target: Target) -> Iterator[Config]:
    more = {"lse": "*fp32", "base_from": "*i64", "chosen": "*i64", "worth": "*fp32"}
    more |= dict.fromkeys(("num_heads", "num_chosen", "chosen_row", "blocks_each"), "i32")
    for config in configs(target, more, "-sample", 32, BASE=True, HEAVIEST=False):
        # AMD's, on which nothing serves, have 512 bytes less than head size 256 takes.
        if target.backend == "cuda" or config.constants["D"] <= 128:
            yield config
    yield from configs(target, more, "-last", 64, 1, BASE=True, HEAVIEST=True)


@kernel(_column_scores)
def _column_configs(target: Target) -> Iterator[Config]:
    more = dict.fromkeys(("base_from", "chosen", "best", "columns"), "*i64")
    more |= {"lse": "*fp32", "column_mass": "*fp32", "num_columns": "i32", "chosen_row": "i32"}
    for use, listed in (("-sample", False), ("-last", True)):
        yield from configs(target, more, use, BASE=True, LISTED=listed)
