"""What the kernels that score a few rows share: their tiles of rows, and how they are compiled.

The rows of a KV head's query heads lie in one tile, so that its keys are read once for all of them:
HEADS heads times ROWS rows, of which those that are not there are padding. A unit is such a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import launch
from .integers import next_power_of_2
from .launch import (
    DTYPES,
    HEAD_SIZES,
    Config,
    Target,
    caches,
    named,
    scale_types,
    unspecialized,
)

ROWS = 64  # most rows of a head
# Of all heads of a unit, with head sizes up to 128 and above: with 128 rows of 256 the worth of FP8
# keys spills 436 bytes on sm_90.
TILE_ROWS, WIDE_TILE_ROWS = 128, 64
# Table entries are looked up two steps ahead, keys one.
STAGES = 3
COUNTS = unspecialized(
    numbers=(
        "seq_len", "num_rows", "blocks_each", "num_columns", "num_heads", "num_chosen",
        "chosen_row", "num_blocks",
    ),
    pointers=(
        "table", "positions", "heads", "tops", "sums", "lse", "base_from", "blocks", "squares",
        "worth", "columns", "column_mass", "k_scale", "chosen", "best",
    ),
)  # fmt: skip
GROUP, PAGE = 4, 16  # of what the compile report shows
PROGRAMS = 1024  # that the keys are split over, all heads together


@triton.jit
def unit_heads(
    unit, heads, num_heads, GROUP: tl.constexpr, HEADS: tl.constexpr, ALL_HEADS: tl.constexpr
):
    """(KV head, query head [HEADS], its place in `heads` or -1 [HEADS]) of a unit."""
    units_each: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    within = unit % units_each * HEADS + tl.arange(0, HEADS)
    head = unit // units_each * GROUP + within
    i = tl.arange(0, ALL_HEADS)
    listed = tl.load(heads + i, mask=i < num_heads, other=-1).to(tl.int32)
    found = (listed[None, :] == head[:, None]) & (within < GROUP)[:, None]
    return unit // units_each, head, tl.max(tl.where(found, i[None, :], -1), 1)


@triton.jit
def spread(of_heads, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """[HEADS] -> [HEADS ROWS]: each head's number at all of its rows."""
    return tl.reshape(tl.broadcast_to(of_heads[:, None], [HEADS, ROWS]), [HEADS * ROWS])


@triton.jit
def load_rows(q, head, row, there, q_row, q_head, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Rows [M] of heads, [M] or one: [M, D]."""
    d = tl.arange(0, D_PADDED)
    at = row.to(tl.int64) * q_row + head * q_head
    there = there[:, None] & (d < D)[None, :]
    return tl.load(q + at[:, None] + d[None, :], mask=there, other=0.0)


@triton.jit
def load_keys(
    keys, table, key, inside, kv_page, kv_row, D: tl.constexpr, D_PADDED: tl.constexpr,
    PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys at positions `key` [N]: [N, D]. All are `inside` where not MASKED."""
    d = tl.arange(0, D_PADDED)
    if MASKED:
        page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
        at = page * kv_page + (key % PAGE).to(tl.int64) * kv_row
        there = inside[:, None] & (d < D)[None, :]
        return tl.load(keys + at[:, None] + d[None, :], mask=there, other=0.0)
    else:
        page = tl.load(table + key // PAGE).to(tl.int64)
        at = page * kv_page + (key % PAGE).to(tl.int64) * kv_row
        if D == D_PADDED:
            return tl.load(keys + at[:, None] + d[None, :])
        else:
            return tl.load(keys + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)


@triton.jit
def seen_by_all(position, is_row, first, last):
    """Up to which block of a program's, first .. last - 1, every row sees every key."""
    least = tl.min(tl.where(is_row, position, 2147483647), 0)
    # (-1 + 1) // 64 is 0: a row that sees nothing.
    return tl.maximum(tl.minimum(tl.maximum(least + 1, 0) // 64, last), first)


@triton.jit
def logits(
    q_tile, keys, table, key, inside, kv_page, kv_row, scale, D: tl.constexpr,
    D_PADDED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Products of the rows [M, D] with the keys at positions `key` [N], scaled: fp32 [M, N]."""
    k = load_keys(keys, table, key, inside, kv_page, kv_row, D, D_PADDED, PAGE, True)
    return tl.dot(q_tile, tl.trans(k).to(q_tile.dtype), input_precision="ieee") * scale


_COMMON = {
    "table": "*i32", "positions": "*i64", "heads": "*i64", "seq_len": "i32", "num_rows": "i32",
    "scale": "fp32", "q_row": "i64", "q_head": "i64", "kv_page": "i64", "kv_head": "i64",
    "kv_row": "i64",
}  # fmt: skip


def configs(
    target: Target,
    more: dict[str, str],
    use: str = "",
    rows: int = 0,
    group: int = GROUP,
    **constants: object,
) -> Iterator[Config]:
    """With `rows`, those of units: see `packing`, of which `group` heads are packed."""
    # float16 compiles to the same code but for the types.
    dtype = torch.bfloat16
    for cache in caches(target, dtype):
        scales, no_scales = scale_types(cache, "k_scale")
        for head_size in HEAD_SIZES:
            signature = _COMMON | more | {"q": f"*{DTYPES[dtype]}", "k_cache": f"*{DTYPES[cache]}"}
            aligned = {"q", "k_cache", *(k for k, v in signature.items() if v == "i64")}
            packed = packing(rows, group, 8 * GROUP, head_size) if rows else {}
            yield Config(
                f"{named(dtype, cache)}-d{head_size}{use}",
                {**shape(head_size, GROUP, PAGE), **packed, **constants, **no_scales},
                warps(head_size), STAGES, signature | scales, serving=True,
                aligned=frozenset(aligned),
            )  # fmt: skip


def warps(head_size: int) -> int:
    """With 4, head size 256 spills: the worth of FP8 keys 164 bytes on sm_90."""
    return 4 if head_size <= 128 else 8


def shape(head_size: int, group: int, page: int) -> dict[str, int]:
    return {
        "GROUP": group,
        "D": head_size,
        "D_PADDED": next_power_of_2(head_size),
        "PAGE": page,
    }


def packing(rows: int, group: int, heads: int, head_size: int) -> dict[str, int]:
    """The constants of units whose heads have up to so many rows; `heads` is the layer's."""
    most = TILE_ROWS if head_size <= 128 else WIDE_TILE_ROWS
    each = min(next_power_of_2(group), max(most // rows, 1))
    return {"HEADS": each, "ROWS": rows, "ALL_HEADS": next_power_of_2(heads)}


def units(packed: dict[str, int], group: int, kv_heads: int) -> int:
    return kv_heads * -(-group // packed["HEADS"])


def split(blocks: int, units: int) -> tuple[int, int]:
    """(blocks of a program, programs of a unit)."""
    each = -(-blocks * units // PROGRAMS)
    return each, -(-blocks // each)


def launch_arguments(
    q: torch.Tensor, k_cache: torch.Tensor, scale: float, k_scale: torch.Tensor | None
) -> tuple[tuple, tuple[int, ...], dict]:
    """(scales, strides, constants and options)."""
    shaped = shape(q.shape[2], q.shape[1] // k_cache.shape[1], k_cache.shape[2])
    strides = (*q.stride()[:2], *k_cache.stride()[:3])
    return (k_scale, float(scale)), strides, {**shaped, **launch.options(warps(q.shape[2]), STAGES)}
