"""Dense attention of prompts on a GPU: by the kernel that vLLM would take without this plugin.

That is FlashAttention where it reads the cache as it is, and vLLM's Triton kernel otherwise. Both
find keys and values in the same pages.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.v1.attention.ops.triton_unified_attention import unified_attention
from vllm.v1.kv_cache_interface import KVQuantMode

from . import compat, log
from .stats import STATS

logger = log.get_logger(__name__)

# Largest difference of two kernels' outputs of normal numbers, each rounded to bfloat16.
TOLERANCE = 0.03
FP8_DENSE = (
    "Dense chunks over the FP8 cache go to vLLM's Triton kernel: vLLM's FlashAttention 3, which it "
    "would take without this plugin, asks for FP8 queries, and ours are the model's"
)


def triton_dense(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    indices: None,
    *,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """vLLM's Triton attention of one sequence; arguments as `reference.sparse_prefill` has them."""
    out = torch.empty_like(q)
    unified_attention(
        q=q, k=k_cache.transpose(1, 2), v=v_cache.transpose(1, 2), out=out,
        cu_seqlens_q=query_start_loc, max_seqlen_q=q.shape[0], seqused_k=seq_lens,
        max_seqlen_k=block_table.shape[1] * k_cache.shape[2], softmax_scale=scale, causal=True,
        window_size=(-1, -1), block_table=block_table, softcap=0, q_descale=None,
        k_descale=k_scale, v_descale=v_scale,
        kv_quant_mode=KVQuantMode.NONE if k_scale is None else KVQuantMode.FP8_PER_TENSOR,
        sinks=sinks,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Flash:
    """vLLM's FlashAttention for layers of one head size."""

    function: Callable
    version: int

    @property
    def __name__(self) -> str:
        return f"FlashAttention {self.version}"

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        scale: float,
        longest_query: int,
        longest: int,
        window: int | None,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Write causal attention of a batch to `out`.

        Args:
            q, out: [T, H, D]; k_cache, v_cache: [pages, Hkv, page, D].
            block_table: int32 [S, P]; query_start_loc: int32 [S + 1]; seq_lens: int32 [S].
            longest_query, longest: at least the most queries and keys of a sequence.
            window: keys that a query sees, itself included; None: all.
            sinks: [H], logits that take a share of the mass; as vLLM's layer has them. None: none.
        """
        extra = {} if sinks is None else {"s_aux": sinks}
        self.function(
            q=q, k=_one_key_wide(k_cache.transpose(1, 2)), v=_one_key_wide(v_cache.transpose(1, 2)),
            out=out, cu_seqlens_q=query_start_loc, max_seqlen_q=longest_query, seqused_k=seq_lens,
            max_seqlen_k=longest, softmax_scale=scale, causal=True,
            window_size=[-1, -1] if window is None else [window - 1, 0], block_table=block_table,
            fa_version=self.version, **extra,
        )  # fmt: skip

    def __call__(
        self, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, indices, *, scale,
        sinks=None,
    ) -> torch.Tensor:  # fmt: skip
        """As `triton_dense`; for the break-even."""
        out = torch.empty_like(q)
        longest = block_table.shape[1] * k_cache.shape[2]
        self.attend(
            q, k_cache, v_cache, block_table, query_start_loc, seq_lens, scale=scale,
            longest_query=q.shape[0], longest=longest, window=None, out=out, sinks=sinks,
        )  # fmt: skip
        return out


def _one_key_wide(x: torch.Tensor) -> torch.Tensor:
    """Strides as a dense tensor has them where a dimension is 1, which Hopper's copies ask for."""
    strides, step = list(x.stride()), 1
    for i in reversed(range(x.ndim)):
        if x.shape[i] == 1:
            strides[i] = step
        step = strides[i] * x.shape[i]
    return x.as_strided(x.shape, strides, x.storage_offset())


@functools.cache
def flash_for(
    head_size: int,
    heads: int,
    kv_heads: int,
    page: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    sinks: torch.dtype | None,
    device: torch.device,
) -> Flash | None:
    """FlashAttention for layers of this shape; None where vLLM's Triton kernel is to be taken.

    It is tried against that kernel first. FP8 caches stay with Triton: FlashAttention takes FP8
    keys with FP8 queries only, and ours are the model's.

    Args:
        sinks: dtype of the layer's attention sinks; None: it has none.
    """
    found = compat.flash_attention(head_size, has_sinks=sinks is not None)
    if found is None:
        return None
    flash = Flash(*found)
    if cache_dtype != dtype:
        # Version 3 is what vLLM itself would take over an FP8 cache; 2 does not read one.
        if flash.version == 3:
            _left_to_triton("fp8_dense", FP8_DENSE)
        return None
    try:
        apart = difference(flash, head_size, heads, kv_heads, page, dtype, sinks, device)
        problem = None if apart <= TOLERANCE else f"its output is {apart:.3f} off Triton's"
    except Exception as error:  # an op that is not there names every one that is, in 40 lines
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if problem is None:
        log.once(logger, logging.INFO, f"Dense chunks and prompts go to vLLM's {flash.__name__}")
        return flash
    message = f"vLLM's FlashAttention is not used for dense chunks, its Triton kernel is: {problem}"
    _left_to_triton("flash_attention", message)
    return None


def _left_to_triton(reason: str, message: str) -> None:
    log.once(logger, logging.WARNING, message)
    STATS.fell_back(reason)


def difference(
    flash: Flash,
    head_size: int,
    heads: int,
    kv_heads: int,
    page: int,
    dtype: torch.dtype,
    sinks: torch.dtype | None,
    device: torch.device,
) -> float:
    """The largest difference between the two kernels' outputs of a small chunk."""
    rows, keys = 70, 200
    generator = torch.Generator().manual_seed(0)
    pages = -(-keys // page)
    # On the CPU and then moved: while vLLM loads a model, torch's default device is the GPU.
    cache = torch.randn(pages, kv_heads, page, 2 * head_size, generator=generator, device="cpu")
    q = torch.randn(rows, heads, head_size, generator=generator, device="cpu").to(device, dtype)
    k_cache, v_cache = cache.to(device, dtype).chunk(2, -1)
    table = torch.arange(pages, dtype=torch.int32, device=device).flip(0)[None]
    starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, rows], [keys]))
    where = (q, k_cache, v_cache, table, starts, lens, None)
    if sinks is not None:  # of about a key's logits
        sinks = torch.linspace(-1, 1, heads, device="cpu").to(device, sinks)
    got, want = (f(*where, scale=head_size**-0.5, sinks=sinks) for f in (flash, triton_dense))
    return float((got.float() - want.float()).abs().max())


__all__ = ["Flash", "difference", "flash_for", "triton_dense"]
