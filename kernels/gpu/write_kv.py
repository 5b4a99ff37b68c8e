"""Store new keys and values in the paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..paged_cache import FP8
from . import launch
from .integers import next_power_of_2
from .launch import DTYPES, Config, Target, caches, kernel, named, scale_types, unspecialized

WARPS, STAGES = 4, 2


@triton.jit
def _stored(new, scale, cache):
    """What a cache stores of new rows: divided by the scale, and in FP8 at most 448 to a side."""
    if scale is not None:
        new = new.to(tl.float32) / tl.load(scale)
    if cache.dtype.element_ty == tl.float8e4nv:
        ALL: tl.constexpr = tl.PropagateNan.ALL
        new = tl.minimum(new.to(tl.float32), 448.0, propagate_nan=ALL)
        new = tl.maximum(new, -448.0, propagate_nan=ALL)
    return new.to(cache.dtype.element_ty)


@triton.jit(**unspecialized(("num_heads",), ("slot_mapping", "k_scale", "v_scale")))
def _write_kv(
    key,  # [T, Hkv, D]
    value,
    k_cache,  # [pages, Hkv, PAGE, D]
    v_cache,
    slot_mapping,  # i64 [T']
    k_scale,  # fp32 [1], None: 1
    v_scale,
    key_row: tl.int64,
    key_head: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    k_page: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_page: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    num_heads,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
):
    """One token: its keys and values of all KV heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head = tl.arange(0, HEADS_PADDED)[:, None].to(tl.int64)
    d = tl.arange(0, D_PADDED)[None, :]
    there = (head < num_heads) & (d < D)
    page, row = slot // PAGE, slot % PAGE
    k = tl.load(key + token * key_row + head * key_head + d, mask=there)
    tl.store(
        k_cache + page * k_page + row * k_row + head * k_head + d,
        _stored(k, k_scale, k_cache),
        mask=there,
    )
    v = tl.load(value + token * value_row + head * value_head + d, mask=there)
    tl.store(
        v_cache + page * v_page + row * v_row + head * v_head + d,
        _stored(v, v_scale, v_cache),
        mask=there,
    )


_STRIDES = (
    "key_row", "key_head", "value_row", "value_head", "k_page", "k_head", "k_row", "v_page",
    "v_head", "v_row",
)  # fmt: skip


def constants(heads: int, head_size: int, page: int) -> dict[str, int]:
    return {
        "PAGE": page,
        "D": head_size,
        "D_PADDED": next_power_of_2(head_size),
        "HEADS_PADDED": next_power_of_2(heads),
    }


@kernel(_write_kv)
def configs(target: Target) -> Iterator[Config]:
    dtype, pointers = torch.bfloat16, ("key", "value", "k_cache", "v_cache")
    for cache in caches(target, dtype):
        scales, no_scales = scale_types(cache, "k_scale", "v_scale")
        signature = dict.fromkeys(pointers[:2], f"*{DTYPES[dtype]}")
        signature |= dict.fromkeys(pointers[2:], f"*{DTYPES[cache]}") | scales
        signature |= {"slot_mapping": "*i64", "num_heads": "i32"} | dict.fromkeys(_STRIDES, "i64")
        # In serving vLLM's own op writes its cache, and this one what prompts read of host memory.
        yield Config(
            f"{named(dtype, cache)}-8x128", constants(8, 128, 16) | no_scales, WARPS, STAGES,
            signature, serving=cache != FP8, aligned=frozenset((*pointers, *_STRIDES)),
        )  # fmt: skip


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `reference.write_kv`: same arguments, same meaning.

    Raises:
        ValueError: shapes that do not fit together, rows that are not contiguous, or an FP8 cache
            on a GPU that has none.
    """
    if k_cache.dtype == FP8:
        launch.check_fp8(k_cache.device)
    scales = launch.scales(k_cache.device, k_scale, v_scale)
    tokens, (_, heads, page, head_size) = slot_mapping.numel(), k_cache.shape
    for name, new in (("key", key), ("value", value)):
        if new.shape[0] < tokens or new.shape[1:] != (heads, head_size) or new.stride(-1) != 1:
            raise ValueError(
                f"{name}: got {tuple(new.shape)} with strides {new.stride()}; give at least "
                f"{tokens} rows of [{heads}, {head_size}], the last dimension contiguous"
            )
    if v_cache.shape != k_cache.shape or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        raise ValueError(
            f"caches: got k {tuple(k_cache.shape)}, v {tuple(v_cache.shape)}; give the same shape, "
            "the last dimension contiguous"
        )
    if not tokens:
        return
    _write_kv[(tokens,)](
        key, value, k_cache, v_cache, slot_mapping, *scales, *key.stride()[:2], *value.stride()[:2],
        *k_cache.stride()[:3], *v_cache.stride()[:3], heads,
        **constants(heads, head_size, page), **launch.options(WARPS, STAGES),
    )  # fmt: skip
