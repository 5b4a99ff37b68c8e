"""Mean keys of blocks, from sums that are kept for each page as pages are written.

Later chunks and prefix hits read 1/16 to 1/64 of what the keys themselves are. A token's page is
summed anew up to the token, so that it does not matter what the rest of the page held before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..block_indices import BLOCK
from ..paged_cache import FP8, check_scales
from . import launch
from .integers import next_power_of_2
from .launch import DTYPES, Config, Target, caches, kernel, scale_types, unspecialized

WARPS, STAGES = 4, 2


def unit(page: int) -> int | None:
    """Keys that one sum is over: the part of a page that lies in one block. None: there is none."""
    if BLOCK % page == 0:
        return page
    return BLOCK if page % BLOCK == 0 else None


@triton.jit(**unspecialized(("num_slots", "num_heads"), ("slot_mapping",)))
def _sum_pages(
    k_cache,  # [pages, Hkv, PAGE, D]
    sums,  # [pages * PAGE / UNIT, Hkv, D]
    slot_mapping,  # i64 [T]
    num_slots,
    kv_page: tl.int64,
    kv_head: tl.int64,
    kv_row: tl.int64,
    num_heads,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """One token of a step: if it is its unit's last one, sum the unit's keys up to it."""
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    after = tl.load(slot_mapping + token + 1, mask=token + 1 < num_slots, other=-1)
    if (after == slot + 1) & (after % UNIT != 0):
        return
    n = tl.arange(0, UNIT)
    d = tl.arange(0, D_PADDED)
    first = slot // UNIT * UNIT
    there = (n <= slot - first)[:, None] & (d < D)[None, :]
    head = tl.program_id(1).to(tl.int64)
    start = k_cache + slot // PAGE * kv_page + head * kv_head + (first % PAGE) * kv_row
    k = tl.load(start + n.to(tl.int64)[:, None] * kv_row + d[None, :], mask=there, other=0.0)
    total = tl.sum(k.to(tl.float32), 0)
    at = (slot // UNIT * num_heads + head) * D + d
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=d < D)


@triton.jit(**unspecialized(("seq_len", "num_blocks"), ("table", "heads", "k_scale")))
def _block_means(
    source,  # the cache, or sums
    table,  # i32 [P]
    heads,  # i64 [h]
    means,  # fp32 [h, nb, D]
    k_scale,  # fp32 [1]: a key is what is stored times this; None: 1
    seq_len,
    kv_page: tl.int64,
    kv_head: tl.int64,
    kv_row: tl.int64,
    num_blocks,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """One block of one head, from its rows (UNIT 1) or from its units' sums."""
    block, number = tl.program_id(0), tl.program_id(1)
    head = tl.load(heads + number)
    n = tl.arange(0, 64 // UNIT)
    d = tl.arange(0, D_PADDED)
    key = block * 64 + n * UNIT
    inside = key < seq_len
    page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
    at = page * kv_page + head * kv_head + (key % PAGE // UNIT).to(tl.int64) * kv_row
    rows = tl.load(
        source + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
    )
    count = tl.minimum(seq_len - block * 64, 64)
    mean = tl.sum(rows.to(tl.float32), 0) / count.to(tl.float32)
    if k_scale is not None:
        mean = mean * tl.load(k_scale)
    tl.store(means + (number.to(tl.int64) * num_blocks + block) * D + d, mean, mask=d < D)


def _shape(head_size: int, page: int) -> dict[str, int]:
    return {"PAGE": page, "D": head_size, "D_PADDED": next_power_of_2(head_size)}


_PREFIX = {torch.bfloat16: "", FP8: "e4m3-"}  # of a Config's name
_STRIDES = {"kv_page": "i64", "kv_head": "i64", "kv_row": "i64"}


@kernel(_sum_pages)
def _sum_configs(target: Target) -> Iterator[Config]:
    for cache in caches(target, torch.bfloat16):
        signature = {
            "k_cache": f"*{DTYPES[cache]}", "sums": f"*{DTYPES[torch.bfloat16]}",
            "slot_mapping": "*i64", "num_slots": "i32", "num_heads": "i32", **_STRIDES,
        }  # fmt: skip
        for page in (16, 64):
            constants = {**_shape(128, page), "UNIT": page}
            aligned = frozenset(("k_cache", "sums", *_STRIDES))
            name = f"{_PREFIX[cache]}page{page}"
            yield Config(name, constants, WARPS, STAGES, signature, True, aligned)


@kernel(_block_means)
def _mean_configs(target: Target) -> Iterator[Config]:
    for cache in caches(target, torch.bfloat16):
        scales, no_scales = scale_types(cache, "k_scale")
        for name, each in (("keys", 1), ("sums", 16)):
            source = DTYPES[cache if name == "keys" else torch.bfloat16]
            signature = {
                "source": f"*{source}", "table": "*i32", "heads": "*i64", "means": "*fp32",
                "seq_len": "i32", "num_blocks": "i32", **_STRIDES, **scales,
            }  # fmt: skip
            constants = {**_shape(128, 16), "UNIT": each, **no_scales}
            aligned = frozenset(("source", "means", *_STRIDES))
            name = f"{_PREFIX[cache]}{name}"
            yield Config(name, constants, WARPS, STAGES, signature, True, aligned)


class PageSums:
    """Sums of keys for each unit of a layer's cache, and the means of blocks from them.

    Sums are of what is stored: an FP8 cache's scale comes in when means are made.

    Args:
        k_cache: [num_pages, Hkv, page, D].
        dtype: what the sums are kept in; 1 / unit of the keys' own memory in their own dtype, and
            twice that in 16 bits where the keys are FP8, whose sums FP8 is too coarse for.

    Raises:
        ValueError: pages that do not divide into blocks (see `unit`), or FP8 sums.
    """

    def __init__(self, k_cache: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        pages, heads, page, size = k_cache.shape
        found = unit(page)
        if found is None:
            raise ValueError(
                f"PageSums: got pages of {page} keys; a page must divide {BLOCK} or be a multiple"
            )
        dtype = dtype or k_cache.dtype
        if dtype == FP8:
            raise ValueError(f"PageSums: got {dtype} for sums; give dtype the queries' or float32")
        self.unit = found
        self.page = page
        self.sums = torch.zeros(
            pages * page // found, heads, size, dtype=dtype, device=k_cache.device
        )

    def update(self, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """After the keys of `slot_mapping` [T] were written to the cache."""
        tokens, heads = slot_mapping.numel(), k_cache.shape[1]
        if tokens:
            _sum_pages[(tokens, heads)](
                k_cache, self.sums, slot_mapping, tokens, *k_cache.stride()[:3], heads,
                UNIT=self.unit, **_shape(k_cache.shape[3], self.page),
                **launch.options(WARPS, STAGES),
            )  # fmt: skip

    def means(
        self,
        block_table: torch.Tensor,
        seq_len: int,
        heads: torch.Tensor,
        k_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `reference.block_means`."""
        per_page = self.page // self.unit
        row = self.sums.stride(0)
        strides = (per_page * row, self.sums.stride(1), row)
        size = self.sums.shape[2]
        where = (block_table, seq_len, heads, size, self.page, self.unit)
        return _means(self.sums, strides, *where, k_scale)


def block_means(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: int,
    heads: torch.Tensor,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.block_means`: same arguments, same meaning; from the keys themselves."""
    page, size = k_cache.shape[2:]
    where = (block_table, seq_len, heads, size, page, 1)
    return _means(k_cache, k_cache.stride()[:3], *where, k_scale)


def _means(source, strides, table, seq_len, heads, size, page, each, k_scale) -> torch.Tensor:
    check_scales(source.device, k_scale=k_scale)
    blocks = -(-seq_len // BLOCK)
    means = heads.new_empty((heads.numel(), blocks, size), dtype=torch.float32)
    if means.numel():
        _block_means[(blocks, heads.numel())](
            source, table, heads, means, k_scale, seq_len, *strides, blocks, UNIT=each,
            **_shape(size, page), **launch.options(WARPS, STAGES),
        )  # fmt: skip
    return means
