"""The public attention entries: the CPU's kernels or the GPU's, by where the tensors are."""

from __future__ import annotations

from importlib import import_module

import torch

from . import cpu, softmax_modes
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
    mean_correction: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sparse_prefill`."""
    run = cpu.sparse_prefill if q.is_cpu else _gpu("sparse_prefill").sparse_prefill
    return run(
        q, k_cache, v_cache, block_table, query_start_loc, seq_lens, indices,
        scale=scale, window=window, sinks=sinks, mean_correction=mean_correction, out=out,
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
    softmax: softmax_modes.Softmax = "online",
    phi: torch.Tensor | None = None,
    flagged: torch.Tensor | None = None,
    **gpu_only,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.paged_decode`, and for what only GPUs take `gpu.paged_decode`.

    Raises:
        ValueError: arguments that do not fit together, or that the CPU's kernel does not take.
    """
    modes = {"softmax": softmax, "phi": phi, "flagged": flagged}
    given = {name: value for name, value in gpu_only.items() if value is not None}
    if not q.is_cpu:
        return _gpu("paged_decode").paged_decode(
            q, k_cache, v_cache, block_table, seq_lens, scale=scale, out=out, **modes, **given
        )
    if given:
        raise ValueError(
            f"paged_decode: {', '.join(sorted(given))} given for tensors on the CPU, whose kernel "
            "takes one query a sequence and every key; leave it out, or use kernels.reference"
        )
    return cpu.paged_decode(
        q, k_cache, v_cache, block_table, seq_lens, scale=scale, out=out, **modes
    )
