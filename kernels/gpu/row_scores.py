"""Exact attention of a few rows, reduced to what planning asks: see `reference.row_scores`.

Two passes over the keys, each split over programs: the rows' softmax denominators, then the mass of
each block and what each key is worth as a column. The columns' own masses are made from their keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .. import reference
from ..block_indices import BLOCK
from ..paged_cache import FP8, check_scales
from . import launch
from .launch import (
    DTYPES,
    HEAD_SIZES,
    Config,
    Target,
    caches,
    kernel,
    named,
    scale_types,
    unspecialized,
)
from .row_lse import row_lse

ROWS = 64
WARPS, STAGES = 4, 2
COUNTS = unspecialized(
    numbers=("seq_len", "num_rows", "blocks_each", "num_columns"),
    pointers=(
        "table", "positions", "heads", "tops", "sums", "lse", "base_from", "blocks", "squares",
        "worth", "columns", "column_mass", "k_scale",
    ),
)  # fmt: skip
PROGRAMS = 1024  # that the keys are split over, all heads together


@triton.jit
def _load_rows(q, head, q_row, q_head, num_rows, D: tl.constexpr, D_PADDED: tl.constexpr):
    m = tl.arange(0, 64).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    there = (m < num_rows)[:, None] & (d < D)[None, :]
    return tl.load(q + m[:, None] * q_row + head * q_head + d[None, :], mask=there, other=0.0)


@triton.jit
def _logits(
    q_tile, keys, table, key, inside, kv_page, kv_row, scale, D: tl.constexpr,
    D_PADDED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Products of the rows [64, D] with the keys at positions `key` [N], scaled: fp32 [64, N]."""
    d = tl.arange(0, D_PADDED)
    page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
    at = page * kv_page + (key % PAGE).to(tl.int64) * kv_row
    k = tl.load(keys + at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
    return tl.dot(q_tile, k.to(q_tile.dtype), input_precision="ieee") * scale


@triton.jit(**COUNTS)
def _row_sums(
    q,  # [R, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    table,  # i32 [P]
    positions,  # i64 [R]
    heads,  # i64 [h]
    tops,  # fp32 [h, splits, 64]
    sums,  # fp32 [h, splits, 64]
    seq_len,
    num_rows,
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
):
    """Of one head and a part of the keys: each row's largest logit and sum of exponentials."""
    split = tl.program_id(0)
    head = tl.load(heads + tl.program_id(1))
    m = tl.arange(0, 64)
    position = tl.load(positions + m, mask=m < num_rows, other=-1).to(tl.int32)
    q_tile = _load_rows(q, head, q_row, q_head, num_rows, D, D_PADDED)
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    keys = k_cache + head // GROUP * kv_head
    top = tl.full([64], float("-inf"), tl.float32)
    total = tl.zeros([64], tl.float32)
    first = split * blocks_each
    last = tl.minimum(first + blocks_each, tl.cdiv(seq_len, 64))
    for block in range(first, last):
        key = block * 64 + tl.arange(0, 64)
        s = _logits(
            q_tile, keys, table, key, key < seq_len, kv_page, kv_row, scale, D, D_PADDED, PAGE
        )
        see = key[None, :] <= position[:, None]
        # 0, and NaN where a logit that counts is not finite.
        total += tl.sum(tl.where(see, s - s, 0.0), 1)
        s = tl.where(see, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
        top = new_top
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + split) * 64 + m
    tl.store(tops + at, top)
    tl.store(sums + at, total)


@triton.jit(**COUNTS)
def _block_scores(
    q,
    k_cache,
    table,
    positions,
    heads,
    lse,  # fp32 [h, 64]
    base_from,  # i64 [R]
    blocks,  # fp32 [h, R, nb]
    squares,  # fp32 [h, R, nb]
    worth,  # fp32 [h, n]
    seq_len,
    num_rows,
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
    SQUARES: tl.constexpr,
    WORTH: tl.constexpr,  # 0: none, 1: all rows but the heaviest, 2: the heaviest row
    BASE: tl.constexpr,
):
    """Of one head and a part of the keys: the mass of blocks in rows, the worth of keys."""
    number = tl.program_id(1)
    head = tl.load(heads + number)
    m = tl.arange(0, 64)
    is_row = m < num_rows
    position = tl.load(positions + m, mask=is_row, other=-1).to(tl.int32)
    q_tile = _load_rows(q, head, q_row, q_head, num_rows, D, D_PADDED)
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    keys = k_cache + head // GROUP * kv_head
    row_lse = tl.load(lse + number * 64 + m)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    if BASE:
        base = tl.load(base_from + m, mask=is_row, other=0).to(tl.int32)
    num_blocks = tl.cdiv(seq_len, 64)
    first = tl.program_id(0) * blocks_each
    last = tl.minimum(first + blocks_each, num_blocks)
    row_at = (number.to(tl.int64) * num_rows + m) * num_blocks
    for block in range(first, last):
        key = block * 64 + tl.arange(0, 64)
        s = _logits(
            q_tile, keys, table, key, key < seq_len, kv_page, kv_row, scale, D, D_PADDED, PAGE
        )
        p = tl.where(key[None, :] <= position[:, None], tl.exp(s - row_lse[:, None]), 0.0)
        # A row with a logit that is not finite has no mass to speak of, in any block.
        p = tl.where((row_lse != row_lse)[:, None], float("nan"), p)
        tl.store(blocks + row_at + block, tl.sum(p, 1), mask=is_row)
        if SQUARES:
            tl.store(squares + row_at + block, tl.sum(p * p, 1), mask=is_row)
        if WORTH > 0:
            counted = is_row
            if BASE:
                counted = counted & (block != 0) & (block < base)
            p = tl.where(counted[:, None], p, 0.0)
            value = tl.max(p, 0)
            if WORTH == 1:
                value = tl.sum(p, 0) - value
            value = tl.where(value == value, value, 0.0)
            tl.store(worth + number.to(tl.int64) * seq_len + key, value, mask=key < seq_len)


@triton.jit(**COUNTS)
def _column_scores(
    q,
    k_cache,
    table,
    positions,
    heads,
    lse,
    base_from,
    columns,  # i64 [h, M]
    column_mass,  # fp32 [h, R, M]
    seq_len,
    num_rows,
    num_columns,
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
):
    """Of one head and 64 of its columns: their mass in each row, 0 in the row's base."""
    number = tl.program_id(1)
    head = tl.load(heads + number)
    m = tl.arange(0, 64)
    is_row = m < num_rows
    position = tl.load(positions + m, mask=is_row, other=-1).to(tl.int32)
    q_tile = _load_rows(q, head, q_row, q_head, num_rows, D, D_PADDED)
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    i = tl.program_id(0) * 64 + tl.arange(0, 64)
    inside = i < num_columns
    key = tl.load(columns + number.to(tl.int64) * num_columns + i, mask=inside, other=0)
    key = key.to(tl.int32)
    keys = k_cache + head // GROUP * kv_head
    s = _logits(q_tile, keys, table, key, inside, kv_page, kv_row, scale, D, D_PADDED, PAGE)
    row_lse = tl.load(lse + number * 64 + m)
    safe = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    p = tl.where(key[None, :] <= position[:, None], tl.exp(s - safe[:, None]), 0.0)
    p = tl.where((row_lse != row_lse)[:, None], float("nan"), p)
    if BASE:
        base = tl.load(base_from + m, mask=is_row, other=0).to(tl.int32)
        block = key // 64
        p = tl.where((block == 0)[None, :] | (block[None, :] >= base[:, None]), 0.0, p)
    at = (number.to(tl.int64) * num_rows + m)[:, None] * num_columns + i[None, :]
    tl.store(column_mass + at, p, mask=is_row[:, None] & inside[None, :])


_COMMON = {
    "table": "*i32", "positions": "*i64", "heads": "*i64", "seq_len": "i32", "num_rows": "i32",
    "scale": "fp32", "q_row": "i64", "q_head": "i64", "kv_page": "i64", "kv_head": "i64",
    "kv_row": "i64",
}  # fmt: skip
_FP32 = "*fp32"


def _configs(
    target: Target, more: dict[str, str], use: str = "", **constants: object
) -> Iterator[Config]:
    # float16 compiles to the same code but for the types.
    dtype = torch.bfloat16
    for cache in caches(target, dtype):
        scales, no_scales = scale_types(cache, "k_scale")
        for head_size in HEAD_SIZES:
            signature = _COMMON | more | {"q": f"*{DTYPES[dtype]}", "k_cache": f"*{DTYPES[cache]}"}
            aligned = {"q", "k_cache", *(k for k, v in signature.items() if v == "i64")}
            yield Config(
                f"{named(dtype, cache)}-d{head_size}{use}",
                {**_shape(head_size, 4, 16), **constants, **no_scales}, WARPS, STAGES,
                signature | scales, serving=True, aligned=frozenset(aligned),
            )  # fmt: skip


def _shape(head_size: int, group: int, page: int) -> dict[str, int]:
    return {
        "GROUP": group,
        "D": head_size,
        "D_PADDED": triton.next_power_of_2(head_size),
        "PAGE": page,
    }


@kernel(_row_sums)
def _row_sums_configs(target: Target) -> Iterator[Config]:
    yield from _configs(target, {"tops": _FP32, "sums": _FP32, "blocks_each": "i32"})


@kernel(_block_scores)
def _block_scores_configs(target: Target) -> Iterator[Config]:
    more = {"lse": _FP32, "base_from": "*i64", "blocks": _FP32, "squares": _FP32, "worth": _FP32}
    more |= {"blocks_each": "i32"}
    # As the planner's probe, its samples and its last rows ask.
    yield from _configs(target, more, "-probe", SQUARES=True, WORTH=0, BASE=False)
    yield from _configs(target, more, "-sample", SQUARES=False, WORTH=1, BASE=True)
    yield from _configs(target, more, "-last", SQUARES=False, WORTH=2, BASE=True)


@kernel(_column_scores)
def _column_scores_configs(target: Target) -> Iterator[Config]:
    more = {"lse": _FP32, "base_from": "*i64", "columns": "*i64", "column_mass": _FP32}
    yield from _configs(target, more | {"num_columns": "i32"}, BASE=True)


def row_denominators(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    k_scale: torch.Tensor | None,
) -> torch.Tensor:
    """fp32 [h, 64]: log-sum-exp of the rows' logits; arguments as those of `row_scores`."""
    wanted = heads.numel()
    each, splits = _split(-(-seq_len // BLOCK), wanted)
    scales, strides, options = _launch_arguments(q, k_cache, scale, k_scale)
    tops, sums = positions.new_empty((2, wanted, splits, ROWS), dtype=torch.float32)
    _row_sums[(splits, wanted)](
        q, k_cache, block_table, positions, heads, tops, sums, seq_len, q.shape[0], each, *scales,
        *strides, **options,
    )  # fmt: skip
    return row_lse(tops, sums)


def _split(blocks: int, heads: int) -> tuple[int, int]:
    """(blocks of a program, programs of a head)."""
    each = -(-blocks * heads // PROGRAMS)
    return each, -(-blocks // each)


def _launch_arguments(
    q: torch.Tensor, k_cache: torch.Tensor, scale: float, k_scale: torch.Tensor | None
) -> tuple[tuple, tuple[int, ...], dict]:
    """(scales, strides, constants and options)."""
    shape = _shape(q.shape[2], q.shape[1] // k_cache.shape[1], k_cache.shape[2])
    strides = (*q.stride()[:2], *k_cache.stride()[:3])
    return (k_scale, float(scale)), strides, {**shape, **launch.options(WARPS, STAGES)}


def row_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    base_from: torch.Tensor | None = None,
    squares: bool = False,
    columns: int = 0,
    by_heaviest: bool = False,
    k_scale: torch.Tensor | None = None,
) -> reference.RowScores:
    """See `reference.row_scores`: same arguments, same meaning."""
    reference.check_row_scores(q, k_cache, positions, base_from, seq_len, columns)
    check_scales(q.device, k_scale=k_scale)
    if k_cache.dtype not in (q.dtype, FP8):
        raise ValueError(
            f"k_cache: got {k_cache.dtype} for q of {q.dtype}; give the same dtype, or {FP8}"
        )
    rows, wanted, blocks = q.shape[0], heads.numel(), -(-seq_len // BLOCK)
    new = positions.new_empty
    shape = (wanted, rows, blocks)
    mass = new(shape, dtype=torch.float32)
    square = new(shape if squares else (1,), dtype=torch.float32)
    if not rows or not wanted or not seq_len:
        return reference.RowScores(
            mass, square if squares else None,
            torch.arange(columns, device=q.device).expand(wanted, -1),
            new((wanted, rows, columns), dtype=torch.float32),
        )  # fmt: skip
    given = (q, k_cache, block_table, positions, heads)
    lse = row_denominators(*given, seq_len, scale=scale, k_scale=k_scale)
    each, splits = _split(blocks, wanted)
    scales, strides, options = _launch_arguments(q, k_cache, scale, k_scale)
    worth = new((wanted, seq_len if columns else 1), dtype=torch.float32)
    base = positions if base_from is None else base_from
    has_base = base_from is not None
    _block_scores[(splits, wanted)](
        *given, lse, base, mass, square, worth, seq_len, rows, each, *scales, *strides,
        SQUARES=squares, WORTH=(2 if by_heaviest else 1) if columns else 0, BASE=has_base,
        **options,
    )  # fmt: skip
    top = worth.topk(columns).indices if columns else new((wanted, 0), dtype=torch.int64)
    column_mass = new((wanted, rows, columns), dtype=torch.float32)
    if columns:
        _column_scores[(-(-columns // 64), wanted)](
            *given, lse, base, top, column_mass, seq_len, rows, columns, *scales, *strides,
            BASE=has_base, **options,
        )  # fmt: skip
    return reference.RowScores(mass, square if squares else None, top, column_mass)
