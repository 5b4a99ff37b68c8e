"""The public attention entries: the CPU's kernels or the GPU's, by where the tensors are."""

from __future__ import annotations

from importlib import import_module

import torch

from . import cpu
from .block_indices import BlockIndices


def _gpu(name: str):
    # Triton is loaded where there is a GPU to run it, and nowhere else.
    return import_module(f".gpu.{name}", __package__)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `reference.write_kv`."""
    if not k_cache.is_cpu:
        return _gpu("write_kv").write_kv(key, value, k_cache, v_cache, slot_mapping)
    cpu.write_kv(key, value, k_cache, v_cache, slot_mapping)


def sparse_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    indices: BlockIndices | None,
    *,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sparse_prefill`."""
    run = cpu.sparse_prefill if q.is_cpu else _gpu("sparse_prefill").sparse_prefill
    return run(
        q, k_cache, v_cache, block_table, query_start_loc, seq_lens, indices,
        scale=scale, window=window, sinks=sinks, out=out,
    )  # fmt: skip


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.paged_decode`."""
    if not q.is_cpu:
        raise NotImplementedError(
            f"paged_decode: q is on {q.device}, and there is no decode kernel for GPUs yet; "
            "use vLLM's own decode there"
        )
    return cpu.paged_decode(q, k_cache, v_cache, block_table, seq_lens, scale=scale, out=out)
