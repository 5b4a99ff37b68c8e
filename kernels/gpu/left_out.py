"""Mean correction on a GPU: what `left_out.attend_means` says, merged into a finished result.

A launch of its own after `prefill_tile`, which it leaves as it is: the means are 1/64 of the keys
that were left out, and the tile of 128 rows is a union of lists, of which each leaves out another
rest. A program takes the 64 rows of one list and goes over the blocks before them, 64 at a time,
whose means are made for the whole step before. Of a block's sum it takes away the single columns
that the list reads, by a product with which column lies in which block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..paged_cache import FP8
from . import launch
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
from .pack_tiles import _is_in, _sequence_of
from .prefill_tile import PAGE, _rows_of_keys

MEANS_WARPS, WARPS, STAGES = 4, 8, 1
BLOCK = 64  # keys of a block; `block_indices.BLOCK`
# With 256, registers spill on sm_90: 96 bytes of a thread where it takes 16 blocks at a time.
MAX_HEAD_SIZE = 128


@triton.jit(
    **unspecialized(("table_row", "num_blocks"), ("k_means", "v_means", "block_table", "seq_lens"))
)
def _complete_means(
    k_cache,  # [pages, Hkv, PAGE, D]
    v_cache,
    k_means,  # fp32 [S, Hkv, num_blocks, D]
    v_means,
    block_table,  # i32 [S, pages]
    seq_lens,  # i32 [S]
    kv_page: tl.int64,
    kv_head_stride: tl.int64,
    kv_row: tl.int64,
    table_row,
    num_blocks,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Mean key and value of one block of one head, where the sequence has the whole block."""
    sequence = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    kv_head = tl.program_id(1).to(tl.int64)
    if (block + 1) * 64 > tl.load(seq_lens + sequence):
        return
    n = tl.arange(0, 64)
    d = tl.arange(0, D_PADDED)
    table = block_table + sequence.to(tl.int64) * table_row
    at = _rows_of_keys(block * 64 + n, n >= 0, table, kv_page, kv_row, PAGE)
    at = at[:, None] + kv_head * kv_head_stride + d[None, :]
    is_d = (d < D)[None, :]
    row = (sequence.to(tl.int64) * tl.num_programs(1) + kv_head) * num_blocks + block
    k = tl.load(k_cache + at, mask=is_d, other=0.0)
    tl.store(k_means + row * D + d, tl.sum(k.to(tl.float32), 0) / 64, mask=d < D)
    v = tl.load(v_cache + at, mask=is_d, other=0.0)
    tl.store(v_means + row * D + d, tl.sum(v.to(tl.float32), 0) / 64, mask=d < D)


@triton.jit(
    **unspecialized(
        numbers=("table_row", "num_blocks", "num_seqs", "num_heads"),
        pointers=(
            "k_means", "v_means", "lse", "block_table", "query_start_loc", "seq_lens",
            "tile_offsets", "block_offsets", "blocks", "column_offsets", "columns", "k_scale",
            "v_scale",
        ),
    )
)  # fmt: skip
def _attend_left_out(
    q,  # [T, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    v_cache,
    k_means,  # fp32 [S, Hkv, num_blocks, D]
    v_means,
    out,  # [T, H, D], merged in place
    lse,  # fp32 [T, H], merged in place
    block_table,  # i32 [S, pages]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    tile_offsets,  # i32 [S + 1]
    block_offsets,  # i32 [tiles * H + 1]
    blocks,  # i32, ascending
    column_offsets,  # i32 [tiles * H + 1]
    columns,  # i32, ascending
    k_scale,  # fp32 [1]: a key is what is stored times this; None: 1
    v_scale,
    scale,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head_stride: tl.int64,
    kv_row: tl.int64,
    out_row: tl.int64,
    out_head: tl.int64,
    table_row,
    num_blocks,
    num_seqs,
    num_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    # The last programs leave out most: begin with them.
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, head = row // num_heads, row % num_heads
    sequence = _sequence_of(tile, tile_offsets, num_seqs)
    if sequence >= num_seqs:
        return
    begin = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - begin
    seq_len = tl.load(seq_lens + sequence)
    first = (tile - tl.load(tile_offsets + sequence)) * 64
    end = (seq_len - query_len + first + 1) // 64  # blocks that every row sees whole

    m = tl.arange(0, 64)
    d = tl.arange(0, D_PADDED)
    is_d = (d < D)[None, :]
    is_row = first + m < query_len
    token = (begin + first + m).to(tl.int64)
    q_at = token[:, None] * q_row + head.to(tl.int64) * q_head + d[None, :]
    q_tile = tl.load(q + q_at, mask=is_row[:, None] & is_d, other=0.0)

    kv_head = (head // GROUP).to(tl.int64)
    table = block_table + sequence.to(tl.int64) * table_row
    means_row = (sequence.to(tl.int64) * (num_heads // GROUP) + kv_head) * num_blocks
    k_base = k_cache + kv_head * kv_head_stride
    v_base = v_cache + kv_head * kv_head_stride
    block_from = tl.load(block_offsets + row)
    block_count = tl.load(block_offsets + row + 1) - block_from
    column_from = tl.load(column_offsets + row)
    column_end = tl.load(column_offsets + row + 1)
    cursor = column_from
    # Means are of what is stored, as the keys that are taken away from them.
    if k_scale is not None:
        scale = scale * tl.load(k_scale)

    top = tl.full([64], float("-inf"), tl.float32)  # in powers of two
    total = tl.zeros([64], tl.float32)
    acc = tl.zeros([64, D_PADDED], tl.float32)
    for start in range(0, end, BLOCKS):
        b = start + tl.arange(0, BLOCKS)
        is_out = (b < end) & (_is_in(b, blocks, block_from, block_count) == 0)
        at = (means_row + b)[:, None] * D + d[None, :]
        some = is_out[:, None] & is_d
        sum_k = tl.load(k_means + at, mask=some, other=0.0) * 64
        sum_v = tl.load(v_means + at, mask=some, other=0.0) * 64
        rest = tl.zeros([BLOCKS], tl.int32) + 64
        more = cursor < column_end
        while more:
            i = cursor + tl.arange(0, COLUMNS)
            x = tl.load(columns + i, mask=i < column_end, other=2147483647)
            before = tl.load(columns + i - 1, mask=(i > column_from) & (i < column_end), other=-1)
            passed = x < (start + BLOCKS) * 64
            use = passed & (x > before) & (x >= start * 64)
            key_at = _rows_of_keys(x, use, table, kv_page, kv_row, PAGE)[:, None] + d[None, :]
            member = ((x // 64)[None, :] == b[:, None]) & use[None, :]
            # Into the sums: products of their own spill, 32 bytes with Triton 3.6 on sm_90.
            minus = tl.where(member, -1.0, 0.0).to(q_tile.dtype)
            there = use[:, None] & is_d
            k = tl.load(k_base + key_at, mask=there, other=0.0).to(q_tile.dtype)
            sum_k = tl.dot(minus, k, sum_k, input_precision="ieee")
            v = tl.load(v_base + key_at, mask=there, other=0.0).to(q_tile.dtype)
            sum_v = tl.dot(minus, v, sum_v, input_precision="ieee")
            rest -= tl.sum(member.to(tl.int32), 1)
            taken = tl.sum(passed.to(tl.int32), 0)
            cursor += taken
            more = taken == COLUMNS
        is_out = is_out & (rest > 0)
        count = tl.where(is_out, rest, 1).to(tl.float32)
        k = (sum_k / count[:, None]).to(q_tile.dtype)
        logit = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        logit = tl.where(is_out[None, :], logit + tl.math.log2(count)[None, :], float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2(logit - safe_top[:, None])
        shrink = tl.math.exp2(top - safe_top)
        total = total * shrink + tl.sum(p, 1)
        v = (sum_v / count[:, None]).to(q_tile.dtype)
        acc = tl.dot(p.to(q_tile.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    # Where a row leaves nothing out its result stays as it is, to the last bit.
    changed = is_row & (top > float("-inf"))
    lse_at = lse + token * num_heads + head
    had = tl.load(lse_at, mask=changed, other=0.0) * LOG2E
    highest = tl.where(changed, tl.maximum(had, top), 0.0)
    keep = tl.math.exp2(had - highest)
    grow = tl.math.exp2(top - highest)
    sum_ = keep + total * grow
    sum_ = tl.where(changed, sum_, 1.0)
    out_at = token[:, None] * out_row + head.to(tl.int64) * out_head + d[None, :]
    mask = changed[:, None] & is_d
    if v_scale is not None:
        acc = acc * tl.load(v_scale)
    read = tl.load(out + out_at, mask=mask, other=0.0).to(tl.float32)
    joined = (read * keep[:, None] + acc * grow[:, None]) / sum_[:, None]
    tl.store(out + out_at, joined.to(out.dtype.element_ty), mask=mask)
    tl.store(lse_at, (highest + tl.math.log2(sum_)) / LOG2E, mask=changed)


def constants(head_size: int, *, group: int, page: int) -> dict[str, int]:
    """The constants of a launch; head_size, group and page are the model's and vLLM's."""
    padded = next_power_of_2(head_size)
    return {
        "GROUP": group,
        "D": head_size,
        "D_PADDED": padded,
        "PAGE": page,
        "BLOCKS": 64,
        "COLUMNS": 16,  # of which the addresses are held as well: 32 spill with FP8
    }


def check_head_size(head_size: int) -> None:
    """Raises ValueError for heads that mean correction is not made for on GPUs."""
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(
            f"mean_correction: got head size {head_size}; on a GPU it is for up to "
            f"{MAX_HEAD_SIZE}, leave it out"
        )


def means_bytes(longest: int, kv_heads: int, head_size: int) -> int:
    """Memory of the means of a sequence of `longest` keys."""
    return 8 * head_size * kv_heads * (longest // BLOCK)


def add_means(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tile_offsets: torch.Tensor,
    lists: tuple[torch.Tensor, ...],
    scale: float,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> None:
    """Merge the means of what the lists leave out into out [T, H, D] and lse [T, H], in place.

    Takes `means_bytes` for each sequence, of the keys that the block table has room for: 1/32 of
    so many keys and values in 16 bits.

    Args:
        tile_offsets: int32 [S + 1], the first tile of each sequence.
        lists: block offsets, blocks, column offsets and columns, ascending (`_clean_lists`).
        scales: of keys and values, see `launch.scales`.

    Raises:
        ValueError: heads larger than MAX_HEAD_SIZE.
    """
    heads, head_size = q.shape[1:]
    check_head_size(head_size)
    kv_heads, page = k_cache.shape[1:3]
    num_seqs = seq_lens.numel()
    num_blocks = block_table.shape[1] * page // BLOCK
    rows = lists[0].numel() - 1
    if not num_blocks or not rows:
        return
    shape = (2, num_seqs, kv_heads, num_blocks, head_size)
    means = torch.empty(shape, dtype=torch.float32, device=q.device)
    form = constants(head_size, group=heads // kv_heads, page=page)
    strides = k_cache.stride()[:3]
    _complete_means[(num_seqs * num_blocks, kv_heads)](
        k_cache, v_cache, means[0], means[1], block_table, seq_lens, *strides,
        block_table.stride(0), num_blocks,
        **{name: form[name] for name in ("D", "D_PADDED", "PAGE")},
        **launch.options(MEANS_WARPS, STAGES),
    )  # fmt: skip
    _attend_left_out[(rows,)](
        q, k_cache, v_cache, means[0], means[1], out, lse, block_table, query_start_loc, seq_lens,
        tile_offsets, *lists, *scales, float(scale), q.stride(0), q.stride(1), *strides,
        out.stride(0), out.stride(1), block_table.stride(0), num_blocks, num_seqs, heads,
        **form, **launch.options(WARPS, STAGES),
    )  # fmt: skip


_HEAD_SIZES = tuple(size for size in HEAD_SIZES if size <= MAX_HEAD_SIZE)
_KV_STRIDES = ("kv_page", "kv_head_stride", "kv_row")
_STRIDES = ("q_row", "q_head", *_KV_STRIDES, "out_row", "out_head")


def _common(cache: torch.dtype) -> dict[str, str]:
    return {
        **dict.fromkeys(("k_cache", "v_cache"), f"*{DTYPES[cache]}"),
        **dict.fromkeys(("k_means", "v_means"), "*fp32"),
        **dict.fromkeys(("block_table", "seq_lens"), "*i32"),
        **dict.fromkeys(("table_row", "num_blocks"), "i32"),
        **dict.fromkeys(_KV_STRIDES, "i64"),
    }


def _shown(target: Target) -> Iterator[tuple[torch.dtype, torch.dtype, int]]:
    """(queries, cache, head size) of the configurations that stand for all."""
    for dtype in SERVING_DTYPES:
        for cache in caches(target, dtype):
            # float16 compiles to the same code but for the types: one head size shows it.
            sizes = _HEAD_SIZES if dtype is torch.bfloat16 else (128,)
            yield from ((dtype, cache, size) for size in sizes)


@kernel(_complete_means)
def _mean_configs(target: Target) -> Iterator[Config]:
    for dtype, cache, head_size in _shown(target):
        if dtype is not torch.bfloat16:
            continue
        form = constants(head_size, group=4, page=PAGE)
        form = {name: form[name] for name in ("D", "D_PADDED", "PAGE")}
        aligned = frozenset(("k_cache", "v_cache", *_KV_STRIDES))
        name = f"e4m3-d{head_size}" if cache == FP8 else f"d{head_size}"
        yield Config(name, form, MEANS_WARPS, STAGES, _common(cache), True, aligned)


@kernel(_attend_left_out)
def _configs(target: Target) -> Iterator[Config]:
    lists = (
        "query_start_loc", "tile_offsets", "block_offsets", "blocks", "column_offsets", "columns",
    )  # fmt: skip
    for dtype, cache, head_size in _shown(target):
        scales, no_scales = scale_types(cache, "k_scale", "v_scale")
        signature = {
            **_common(cache),
            **dict.fromkeys(("q", "out"), f"*{DTYPES[dtype]}"),
            **dict.fromkeys(lists, "*i32"),
            **dict.fromkeys(_STRIDES, "i64"),
            **dict.fromkeys(("num_seqs", "num_heads"), "i32"),
            **scales, "lse": "*fp32", "scale": "fp32",
        }  # fmt: skip
        form = constants(head_size, group=4, page=PAGE) | no_scales
        aligned = frozenset(("q", "k_cache", "v_cache", "out", *_STRIDES))
        name = f"{named(dtype, cache)}-d{head_size}"
        yield Config(name, form, WARPS, STAGES, signature, True, aligned)
