"""The paged cache: writing to it, reading from it in plain torch, and what FP8 in it means.

An FP8 cache holds keys / k_scale and values / v_scale as float8_e4m3fn, as vLLM's Triton backend
writes them. The scales are tensors of one element, where the cache is: no host looks at them.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Store new keys and values in the paged cache.

    Args:
        key, value: [T, Hkv, D]; rows beyond the slot mapping are padding.
        k_cache, v_cache: [num_pages, Hkv, page, D], written in place.
        slot_mapping: int64 [T' <= T]; slot = page index * page + offset, negative: do not store.
        k_scale, v_scale: fp32, one element; what is stored is key / k_scale and value / v_scale, in
            FP8 at most 448 to either side. None: 1.
    """
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    page = k_cache.shape[2]
    index = (slots // page, slice(None), slots % page)
    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        new = new[: slot_mapping.numel()][keep]
        new = new if scale is None else new.float() / scale
        if cache.dtype == FP8:  # torch makes NaN of what is beyond
            new = new.float().clamp(-LARGEST_FP8, LARGEST_FP8)
        cache[index] = new.to(cache.dtype)


def halves(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [num_pages, Hkv, page, D] of the keys and values in vLLM's cache, [..., 2 D]."""
    return kv_cache[..., :head_size], kv_cache[..., head_size:]


def gather_keys(
    k_cache: torch.Tensor,
    block_table_row: torch.Tensor,
    length: int,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sequence's first `length` rows of a paged cache: [Hkv, length, D].

    In the cache's dtype; in fp32 from FP8 or where a scale (fp32, one element) is given, which they
    are multiplied with.
    """
    page = k_cache.shape[2]
    pages = block_table_row[: -(-length // page)].long()
    rows = k_cache[pages].transpose(0, 1)  # [Hkv, pages, page, D]
    rows = rows.reshape(k_cache.shape[1], -1, k_cache.shape[3])[:, :length].contiguous()
    if scale is not None:
        return rows.float() * scale
    return rows.float() if rows.dtype == FP8 else rows


def check_scales(device: torch.device, **scales: torch.Tensor | None) -> None:
    """Raises ValueError for a scale that is not one number of fp32 on the device of the cache."""
    for name, scale in scales.items():
        if scale is None:
            continue
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != device:
            raise ValueError(
                f"{name}: got {scale.numel()} entries of {scale.dtype} on {scale.device}; give one "
                f"float32 on {device} (scales of each head are not read)"
            )


def refuse_fp8(k_cache: torch.Tensor, v_cache: torch.Tensor, *scales: torch.Tensor | None) -> None:
    """Raises ValueError for an FP8 cache, and for the scales that such a cache comes with."""
    if FP8 in (k_cache.dtype, v_cache.dtype) or any(scale is not None for scale in scales):
        raise ValueError(
            "FP8 caches and their scales (k_scale, v_scale) are for GPUs; on a CPU keep the "
            "cache in the query's dtype (--kv-cache-dtype auto), or use kernels.reference"
        )
