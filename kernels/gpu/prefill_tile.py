"""The sparse prefill kernel: 128 query rows, two halves of 64, over the keys either half selects.

The halves are two query heads of one KV head, or two tiles of one head (`pack_tiles` chooses), so
that a key or value that both select is read once and multiplied with a full tile. A program goes
over blocks that all its rows see (no mask), blocks that some see, and single columns.

The online softmax is FlashAttention-2's (Dao 2023, arXiv:2307.08691, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..paged_cache import FP8
from .integers import next_power_of_2
from .launch import (
    DTYPES,
    HEAD_SIZES,
    SERVING_DTYPES,
    Config,
    Target,
    caches,
    kernel,
    named,
    scale_types,
    unspecialized,
)

HALF = 64  # rows of each half; `block_indices.TILE`
ROWS = 2 * HALF
BLOCK = 64  # keys of a block; `block_indices.BLOCK`
# Fields of a tile's record.
SEQUENCE, TILE_A, HEAD_A, TILE_B, HEAD_B, PLAIN, BLOCKS, COLUMNS = range(8)
RECORD = 8
_LOG2E = 1.4426950408889634


@triton.jit
def _rows_of_keys(position, inside, table, page_stride, row_stride, PAGE: tl.constexpr):
    """Where the keys at `position` [N] lie from their head's first: int64 [N] elements."""
    page = tl.load(table + position // PAGE, mask=inside, other=0).to(tl.int64)
    return page * page_stride + (position % PAGE).to(tl.int64) * row_stride


@triton.jit
def _softmax_step(q, k, v, see, top, total, acc, scale_log2, MASKED: tl.constexpr):
    """Add keys k [D, N] with values v [N, D] to the running softmax of the rows of q [M, D].

    `top` [M] is the largest product so far, without the scale.
    """
    product = tl.dot(q, k, input_precision="ieee")
    if MASKED:
        product = tl.where(see, product, float("-inf"))
    new_top = tl.maximum(top, tl.max(product, 1))
    # A row that has seen nothing yet: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.math.exp2((product - safe_top[:, None]) * scale_log2)
    shrink = tl.math.exp2((top - safe_top) * scale_log2)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _entry(i, entries, first, plain_from, plain, count, DENSE: tl.constexpr):
    """Entry i [N] of a tile's blocks, `4 block + halves that select it`.

    Without lists blocks follow each other from `first`, those of `plain_from` coming first.
    """
    if DENSE:
        before = plain_from - first
        rest = i - plain
        other = tl.where(rest < before, first + rest, plain_from + plain + rest - before)
        return tl.where(i < plain, plain_from + i, other) * 4 + 3
    return tl.load(entries + i, mask=i < count, other=0)


@triton.jit(
    **unspecialized(
        numbers=("window", "table_row", "num_heads"),
        pointers=(
            "lse", "sinks", "block_table", "query_start_loc", "seq_lens", "records", "order",
            "entry_offsets", "entries", "column_offsets", "columns", "k_scale", "v_scale",
        ),
    )
)  # fmt: skip
def _sparse_prefill(
    q,  # [T, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    v_cache,
    out,  # [T, H, D]
    lse,  # fp32 [T, H]
    sinks,  # fp32 [H]
    block_table,  # i32 [S, pages]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    records,  # i32 [programs, RECORD]
    order,  # i32 [programs], those with the most keys first; not read without lists
    entry_offsets,  # i32 [programs], of the tile's first entry; without lists its first block
    entries,  # i32, 4 block + halves
    column_offsets,  # i32 [programs]; without lists the first plain block
    columns,  # i32, 4 position + halves
    k_scale,  # fp32 [1]: a key is what is stored times this; None: 1
    v_scale,
    scale_log2,  # of products, in powers of two: multiplied here, d256 spills 12 bytes on sm_90
    window,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head_stride: tl.int64,
    kv_row: tl.int64,
    out_row: tl.int64,
    out_head: tl.int64,
    table_row,
    num_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED_KEYS: tl.constexpr,
    DENSE: tl.constexpr,
    SINKS: tl.constexpr,
):
    HALF: tl.constexpr = 64
    BLOCK: tl.constexpr = 64
    # Begin with the most keys, or a long tile is alone in the last wave. Without lists the last
    # programs have them.
    if DENSE:
        program = tl.num_programs(0) - 1 - tl.program_id(0)
    else:
        program = tl.load(order + tl.program_id(0))
    record = records + program.to(tl.int64) * 8
    sequence = tl.load(record)
    if sequence < 0:
        return
    tile_a, head_a = tl.load(record + 1), tl.load(record + 2)
    tile_b, head_b = tl.load(record + 3), tl.load(record + 4)
    plain, count, num_columns = tl.load(record + 5), tl.load(record + 6), tl.load(record + 7)
    first = tl.load(entry_offsets + program)
    second = tl.load(column_offsets + program)
    begin = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - begin
    seq_len = tl.load(seq_lens + sequence)

    m = tl.arange(0, 2 * HALF)
    in_b = m >= HALF
    row = tl.where(in_b, tile_b, tile_a) * HALF + m % HALF
    head = tl.where(in_b, head_b, head_a)
    is_row = (row < query_len) & (row >= 0)
    position = seq_len - query_len + row
    token = (begin + row).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    is_d = d < D
    q_tile = tl.load(
        q + token[:, None] * q_row + head.to(tl.int64)[:, None] * q_head + d[None, :],
        mask=is_row[:, None] & is_d[None, :],
        other=0.0,
    )

    kv_head = (head_a // GROUP).to(tl.int64)
    table = block_table + sequence.to(tl.int64) * table_row
    k_base = k_cache + kv_head * kv_head_stride
    v_base = v_cache + kv_head * kv_head_stride
    n = tl.arange(0, KEYS)
    block_of = n // BLOCK
    half_bit = tl.where(in_b, 2, 1)
    if k_scale is not None:
        scale_log2 = scale_log2 * tl.load(k_scale)

    top = tl.full([2 * HALF], float("-inf"), tl.float32)
    total = tl.zeros([2 * HALF], tl.float32)
    if SINKS:
        # A logit without a value; in the unit of products, which have no scale yet.
        top = tl.load(sinks + head) * 1.4426950408889634 / scale_log2
        total += 1.0
    acc = tl.zeros([2 * HALF, D_PADDED], tl.float32)

    entries_of = entries if DENSE else entries + first
    BLOCKS_EACH: tl.constexpr = KEYS // BLOCK

    # Blocks that all rows see. Where a step's keys lie is looked up during the step before.
    i = tl.zeros([KEYS], tl.int32) + block_of
    entry = _entry(i, entries_of, first, second, plain, plain, DENSE)
    key = (entry >> 2) * BLOCK + n % BLOCK
    at = _rows_of_keys(key, i < plain, table, kv_page, kv_row, PAGE)
    for start in range(0, plain, BLOCKS_EACH):
        if D == D_PADDED:
            k = tl.load(k_base + at[None, :] + d[:, None])
            v = tl.load(v_base + at[:, None] + d[None, :])
        else:
            k = tl.load(k_base + at[None, :] + d[:, None], mask=is_d[:, None], other=0.0)
            v = tl.load(v_base + at[:, None] + d[None, :], mask=is_d[None, :], other=0.0)
        i = start + BLOCKS_EACH + block_of
        entry = _entry(i, entries_of, first, second, plain, plain, DENSE)
        key = (entry >> 2) * BLOCK + n % BLOCK
        at = _rows_of_keys(key, i < plain, table, kv_page, kv_row, PAGE)
        top, total, acc = _softmax_step(
            q_tile, k.to(q_tile.dtype), v.to(q_tile.dtype), None, top, total, acc, scale_log2, False
        )

    # Blocks that some rows see, and columns after them.
    lane = tl.arange(0, MASKED_KEYS)
    steps = tl.cdiv((count - plain) * BLOCK, MASKED_KEYS)
    column_steps = 0 if DENSE else tl.cdiv(num_columns, MASKED_KEYS)
    for step in range(0, steps + column_steps):
        index = plain + (step * MASKED_KEYS + lane) // BLOCK
        item = _entry(index, entries_of, first, second, plain, count, DENSE)
        place = (item >> 2) * BLOCK + (step * MASKED_KEYS + lane) % BLOCK
        inside = index < count
        if not DENSE:
            # The same step takes either, so that the loop's body is there once.
            j = (step - steps) * MASKED_KEYS + lane
            is_column = (j >= 0) & (j < num_columns)
            column = tl.load(columns + second + j, mask=is_column, other=0)
            place = tl.where(is_column, column >> 2, place)
            item = tl.where(is_column, column, item)
            # Blocks and columns do not meet in one step: the blocks are over where j is 0.
            inside = inside | is_column
        inside = inside & (place < seq_len)
        rows_at = _rows_of_keys(place, inside, table, kv_page, kv_row, PAGE)
        some_k = tl.load(
            k_base + rows_at[None, :] + d[:, None],
            mask=is_d[:, None] & inside[None, :],
            other=0.0,
        )
        some_v = tl.load(
            v_base + rows_at[:, None] + d[None, :],
            mask=is_d[None, :] & inside[:, None],
            other=0.0,
        )
        # A key that is not there has no half's bit.
        item = tl.where(inside, item, 0)
        see = (place[None, :] <= position[:, None]) & (place[None, :] > position[:, None] - window)
        see = see & ((item[None, :] & half_bit[:, None]) != 0)
        top, total, acc = _softmax_step(
            q_tile, some_k.to(q_tile.dtype), some_v.to(q_tile.dtype), see, top, total, acc,
            scale_log2, True,
        )  # fmt: skip

    some = total > 0
    if v_scale is not None:
        acc = acc * (tl.load(v_scale) / tl.where(some, total, 1.0))[:, None]
    else:
        acc = acc * (1.0 / tl.where(some, total, 1.0))[:, None]
    natural = (top * scale_log2 + tl.math.log2(tl.where(some, total, 1.0))) / 1.4426950408889634
    natural = tl.where(some, natural, float("-inf"))
    tl.store(
        out + token[:, None] * out_row + head.to(tl.int64)[:, None] * out_head + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_d[None, :],
    )
    tl.store(lse + token * num_heads + head, natural, mask=is_row)


SIGNATURE = {
    "out": "q", "lse": "*fp32", "sinks": "*fp32", "block_table": "*i32",
    "query_start_loc": "*i32", "seq_lens": "*i32", "records": "*i32", "order": "*i32",
    "entry_offsets": "*i32", "entries": "*i32", "column_offsets": "*i32", "columns": "*i32",
    "scale_log2": "fp32", "window": "i32", "table_row": "i32", "num_heads": "i32",
}  # fmt: skip
STRIDES = (
    "q_row", "q_head", "kv_page", "kv_head_stride", "kv_row", "out_row", "out_head",
)  # fmt: skip
# Pages of 16 tokens are vLLM's default on GPUs.
PAGE = 16


def constants(
    target: Target, head_size: int, *, group: int, page: int, dense: bool, sinks: bool
) -> dict[str, object]:
    """The constants of a launch; head_size, group and page are the model's and vLLM's."""
    padded = next_power_of_2(head_size)
    # Without wgmma queries and probabilities are in registers, too.
    wgmma = target.backend == "cuda" and target.arch >= 90
    # Two blocks a step where keys and values of two steps fit beside the queries.
    roomy = target.backend == "cuda" and padded <= (128 if target.shared_bytes > 200000 else 64)
    return {
        "GROUP": group,
        "D": head_size,
        "D_PADDED": padded,
        "PAGE": page,
        "KEYS": 2 * BLOCK if roomy and not dense else BLOCK,
        # The mask of two blocks beside their products is more than there are registers for. With
        # head size 256 lists take what a whole block would need; without lists it is the half
        # block that spills: 32 bytes with Triton 3.6 on sm_90, 52 with 3.9 on sm_100.
        "MASKED_KEYS": BLOCK if padded <= _whole_block(wgmma, dense) else BLOCK // 2,
        "DENSE": dense,
        "SINKS": sinks,
    }


def _whole_block(wgmma: bool, dense: bool) -> int:
    """The largest padded head size whose masked steps are a block of keys."""
    if not wgmma:
        return 64
    return 256 if dense else 128


def warps_and_stages(target: Target, head_size: int, cache: torch.dtype) -> tuple[int, int]:
    """Not tuned, as nothing was timed. With three stages the loads of a step are under way during
    two others, and not only at the end of the one before; head size 256 has shared memory for that
    in FP8 alone (where sm_100 spills 56 bytes with two), and sm_80 no registers beyond head size
    64."""
    if target.backend == "hip":
        return 8, 1
    if target.arch >= 90:
        return 8, 3 if head_size <= 128 or cache == FP8 else 2
    return 8, 3 if head_size <= 64 else 2


def _shown(target: Target) -> Iterator[tuple[torch.dtype, torch.dtype, int, str]]:
    """(queries, cache, head size, form) of the configurations that stand for all."""
    for dtype in SERVING_DTYPES:
        for cache in caches(target, dtype):
            for head_size in HEAD_SIZES:
                for form in ("sparse", "dense", "sinks"):
                    # float16 compiles to the same code but for the types: one head size shows it.
                    if dtype is not torch.bfloat16 and (head_size != 128 or form != "sparse"):
                        continue
                    if form == "sinks" and head_size != 64:  # gpt-oss
                        continue
                    yield dtype, cache, head_size, form


@kernel(_sparse_prefill)
def configs(target: Target) -> Iterator[Config]:
    for dtype, cache, head_size, form in _shown(target):
        warps, stages = warps_and_stages(target, head_size, cache)
        scales, no_scales = scale_types(cache, "k_scale", "v_scale")
        signature = {x: f"*{DTYPES[dtype]}" if t == "q" else t for x, t in SIGNATURE.items()}
        signature |= dict.fromkeys(STRIDES, "i64") | scales
        signature["q"] = f"*{DTYPES[dtype]}"
        signature |= dict.fromkeys(("k_cache", "v_cache"), f"*{DTYPES[cache]}")
        made = constants(
            target, head_size, group=4, page=PAGE, dense=form == "dense", sinks=form == "sinks"
        )
        yield Config(
            f"{named(dtype, cache)}-d{head_size}-{form}", made | no_scales, warps, stages,
            # Dense chunks over FP8 are vLLM's; sm_100 spills 44 bytes there with head size 256.
            signature, serving=form != "dense" or cache != FP8,
            aligned=frozenset(("q", "k_cache", "v_cache", "out", *STRIDES)),
        )  # fmt: skip
