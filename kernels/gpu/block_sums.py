"""The mass of blocks in a few rows, and the rows' softmax denominators, in one pass over the keys.

The pass stores each block's largest logit and its sum of exponentials below that. What a row's
logits sum to is known when all blocks are, and turns both into masses without the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..block_indices import BLOCK
from . import launch
from .launch import Config, Target, kernel
from .scored_rows import (
    COUNTS,
    ROWS,
    configs,
    launch_arguments,
    load_keys,
    load_rows,
    packing,
    seen_by_all,
    split,
    spread,
    unit_heads,
    units,
)

MASS_CHUNK, MASS_WARPS = 1024, 4


@triton.jit
def _sum_block(
    q_tile, keys, table, block, seq_len, position, kv_page, kv_row, scale, D: tl.constexpr,
    D_PADDED: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Each row's largest logit in a block (powers of two), sum below it, sum of squares: [M]."""
    key = block * 64 + tl.arange(0, 64)
    k = load_keys(keys, table, key, key < seq_len, kv_page, kv_row, D, D_PADDED, PAGE, MASKED)
    s = tl.dot(q_tile, tl.trans(k).to(q_tile.dtype), input_precision="ieee") * scale
    if MASKED:
        see = key[None, :] <= position[:, None]
        lowest = tl.min(tl.where(see, s, float("inf")), 1)
        s = tl.where(see, s, float("-inf"))
    else:
        lowest = tl.min(s, 1)
    top = tl.max(s, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.math.exp2(s - safe[:, None])
    # Inf and NaN make a sum NaN by themselves, -inf adds nothing to one.
    total = tl.where(lowest == float("-inf"), float("nan"), tl.sum(p, 1))
    if SQUARES:
        return top, total, tl.sum(p * p, 1)
    else:
        return top, total, total


@triton.jit(**COUNTS)
def _block_sums(
    q,  # [R, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    table,  # i32 [P]
    positions,  # i64 [R]
    heads,  # i64 [h]
    tops,  # fp32 [h, R, nb]: largest logit of the keys that the row sees, in powers of two
    sums,  # fp32 [h, R, nb]: sum of 2^(logit - top)
    squares,  # fp32 [h, R, nb]: of their squares
    seq_len,
    num_rows,
    num_heads,  # h
    blocks_each,
    k_scale,  # fp32 [1]: a key is what is stored times this; None: 1
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
    SQUARES: tl.constexpr,
):
    """Of one unit and a part of the keys; NaN sums where a logit that counts is not finite."""
    of_kv, head, number = unit_heads(tl.program_id(1), heads, num_heads, GROUP, HEADS, ALL_HEADS)
    if tl.max(number, 0) < 0:
        return
    number = spread(number, HEADS, ROWS).to(tl.int64)
    r = tl.arange(0, HEADS * ROWS) % ROWS
    is_row = (r < num_rows) & (number >= 0)
    position = tl.load(positions + r, mask=is_row, other=-1).to(tl.int32)
    q_tile = load_rows(q, spread(head, HEADS, ROWS), r, is_row, q_row, q_head, D, D_PADDED)
    scale = scale * 1.4426950408889634
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    keys = k_cache + of_kv * kv_head
    num_blocks = tl.cdiv(seq_len, 64)
    first = tl.program_id(0) * blocks_each
    last = tl.minimum(first + blocks_each, num_blocks)
    middle = seen_by_all(position, is_row, first, last)
    at = (number * num_rows + r) * num_blocks
    for block in range(first, middle):
        top, total, square = _sum_block(
            q_tile, keys, table, block, seq_len, position, kv_page, kv_row, scale, D, D_PADDED,
            PAGE, False, SQUARES,
        )  # fmt: skip
        tl.store(tops + at + block, top, mask=is_row)
        tl.store(sums + at + block, total, mask=is_row)
        if SQUARES:
            tl.store(squares + at + block, square, mask=is_row)
    for block in range(middle, last):
        top, total, square = _sum_block(
            q_tile, keys, table, block, seq_len, position, kv_page, kv_row, scale, D, D_PADDED,
            PAGE, True, SQUARES,
        )  # fmt: skip
        tl.store(tops + at + block, top, mask=is_row)
        tl.store(sums + at + block, total, mask=is_row)
        if SQUARES:
            tl.store(squares + at + block, square, mask=is_row)


@triton.jit(**COUNTS)
def _row_mass(
    tops,  # fp32 [h, R, nb]; with PEAKS becomes blocks' heaviest keys, 0 in the base
    sums,  # fp32 [h, R, nb]; becomes each block's mass
    squares,  # fp32 [h, R, nb]; becomes the sum of its keys' squared masses
    base_from,  # i64 [R]
    lse,  # fp32 [h, 64]
    num_rows,
    num_blocks,
    SQUARES: tl.constexpr,
    PEAKS: tl.constexpr,
    BASE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of one head and row. A row whose logits are not all finite has NaN for mass everywhere."""
    head, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = (head * num_rows + r) * num_blocks
    top = tl.full([CHUNK], float("-inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        inside = block < num_blocks
        highest = tl.load(tops + row + block, mask=inside, other=float("-inf"))
        new_top = tl.maximum(top, highest)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        part = tl.load(sums + row + block, mask=inside, other=0.0)
        total = total * tl.math.exp2(top - safe) + part * tl.math.exp2(highest - safe)
        top = new_top
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    all_of_it = tl.sum(total * tl.math.exp2(top - highest), 0)
    log2 = highest + tl.math.log2(all_of_it)
    tl.store(lse + head * 64 + r, log2 / 1.4426950408889634)
    log2 = tl.where(log2 == float("-inf"), 0.0, log2)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        inside = block < num_blocks
        heaviest = tl.math.exp2(tl.load(tops + row + block, mask=inside, other=0.0) - log2)
        mass = tl.load(sums + row + block, mask=inside, other=0.0) * heaviest
        tl.store(sums + row + block, mass, mask=inside)
        if SQUARES:
            square = tl.load(squares + row + block, mask=inside, other=0.0)
            tl.store(squares + row + block, square * heaviest * heaviest, mask=inside)
        if PEAKS:
            if BASE:
                base = tl.load(base_from + r).to(tl.int32)
                heaviest = tl.where((block == 0) | (block >= base), 0.0, heaviest)
            tl.store(tops + row + block, heaviest, mask=inside)


_FP32 = "*fp32"


@kernel(_block_sums)
def _sum_configs(target: Target) -> Iterator[Config]:
    more = {"tops": _FP32, "sums": _FP32, "squares": _FP32, "num_heads": "i32"}
    more |= {"blocks_each": "i32"}
    # As the planner's probe, its samples and its last rows ask.
    for use, rows in (("-probe", 16), ("-sample", 32), ("-last", 64)):
        yield from configs(target, more, use, rows, SQUARES=use == "-probe")


@kernel(_row_mass)
def _mass_configs(target: Target) -> Iterator[Config]:
    signature = dict.fromkeys(("tops", "sums", "squares", "lse"), _FP32)
    signature |= {"base_from": "*i64", "num_rows": "i32", "num_blocks": "i32"}
    for name, squares, peaks in (
        ("probe", True, False), ("sample", False, False), ("last", False, True),
    ):  # fmt: skip
        constants = {"SQUARES": squares, "PEAKS": peaks, "BASE": peaks, "CHUNK": MASS_CHUNK}
        yield Config(name, constants, MASS_WARPS, 2, signature, True)


class BlockMass(NamedTuple):
    """Of h heads' rows."""

    lse: torch.Tensor  # fp32 [h, 64], log-sum-exp of the logits; only the rows there are
    blocks: torch.Tensor  # fp32 [h, R, nb]
    squares: torch.Tensor | None  # fp32 [h, R, nb]
    peaks: torch.Tensor | None  # fp32 [h, R, nb]: mass of the heaviest key outside the base


def block_mass(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    k_scale: torch.Tensor | None,
    padded: int = ROWS,
    squares: bool = False,
    peaks: bool = False,
    base_from: torch.Tensor | None = None,
) -> BlockMass:
    """Arguments as those of `reference.row_scores`; `padded` rows of each head, R or more."""
    rows, wanted, blocks = q.shape[0], heads.numel(), -(-seq_len // BLOCK)
    kv_heads = k_cache.shape[1]
    group = q.shape[1] // kv_heads
    packed = packing(padded, group, *q.shape[1:])
    number = units(packed, group, kv_heads)
    each, splits = split(blocks, number)
    scales, strides, options = launch_arguments(q, k_cache, scale, k_scale)
    made = positions.new_empty((2 + squares, wanted, rows, blocks), dtype=torch.float32)
    tops, sums, square = made if squares else (*made, made[0])
    _block_sums[(splits, number)](
        q, k_cache, block_table, positions, heads, tops, sums, square, seq_len, rows, wanted, each,
        *scales, *strides, **packed, SQUARES=squares, **options,
    )  # fmt: skip
    lse = made.new_empty(wanted, ROWS)
    has_base = peaks and base_from is not None
    _row_mass[(wanted, rows)](
        tops, sums, square, base_from if has_base else positions, lse, rows, blocks,
        SQUARES=squares, PEAKS=peaks, BASE=has_base, CHUNK=MASS_CHUNK,
        **launch.options(MASS_WARPS, 2),
    )  # fmt: skip
    return BlockMass(lse, sums, square if squares else None, tops if peaks else None)
