"""The public attention entries: the CPU's kernels or the GPU's, by where the tensors are."""

from __future__ import annotations

from importlib import import_module

import torch

from . import cope, cpu, paged_cache, shared_prefix, softmax_modes
from .block_indices import BlockIndices
from .shared_prefix import SharedPrefixes


def _gpu(name: str):
    # Triton is loaded where there is a GPU to run it, and nowhere else.
    return import_module(f".gpu.{name}", __package__)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """See `paged_cache.write_kv`."""
    # On a CPU torch's index_put is at memory speed already.
    write = paged_cache.write_kv if k_cache.is_cpu else _gpu("write_kv").write_kv
    write(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sparse_prefill`.

    Raises:
        ValueError: arguments that do not fit together, or that the CPU's kernel does not take.
    """
    run = cpu.sparse_prefill if q.is_cpu else _gpu("sparse_prefill").sparse_prefill
    return run(
        q, k_cache, v_cache, block_table, query_start_loc, seq_lens, indices,
        scale=scale, window=window, sinks=sinks, mean_correction=mean_correction,
        k_scale=k_scale, v_scale=v_scale, out=out,
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
    shared: SharedPrefixes | None = None,
    **gpu_only,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.paged_decode`, and for what only GPUs take `gpu.paged_decode`.

    Args:
        shared: from `shared_prefixes`: first keys that are read once for several sequences.

    Raises:
        ValueError: arguments that do not fit together, or that the CPU's kernel does not take.
    """
    modes = {"softmax": softmax, "phi": phi, "flagged": flagged, "shared": shared}
    given = {name: value for name, value in gpu_only.items() if value is not None}
    if not q.is_cpu:
        return _gpu("paged_decode").paged_decode(
            q, k_cache, v_cache, block_table, seq_lens, scale=scale, out=out, **modes, **given
        )
    if given:
        raise ValueError(
            f"paged_decode: {', '.join(sorted(given))} given for tensors on the CPU, whose kernel "
            "takes one query a sequence, every key, and caches in the query's dtype; leave it out, "
            "or use kernels.reference"
        )
    return cpu.paged_decode(
        q, k_cache, v_cache, block_table, seq_lens, scale=scale, out=out, **modes
    )


def cope_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    pos_emb: torch.Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `cope_reference.cope_attention`.

    Args:
        max_query_len: the most rows of a sequence, which a GPU's launch goes by; None: unknown.

    Raises:
        ValueError: arguments that do not fit together.
    """
    args = (q, k_cache, v_cache, block_table, query_start_loc, seq_lens, pos_emb)
    if q.is_cpu:
        return cope.cope_attention(*args, scale=scale, out=out)
    run = _gpu("cope_attention").cope_attention
    return run(*args, scale=scale, max_query_len=max_query_len, out=out)


def shared_prefixes(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    seq_lens: torch.Tensor,
    *,
    page: int,
    **options,
) -> SharedPrefixes:
    """See `shared_prefix.shared_prefixes`; for what only GPUs take, `gpu.shared_prefix`'s."""
    find = shared_prefix if seq_lens.is_cpu else _gpu("shared_prefix")
    return find.shared_prefixes(block_table, query_start_loc, seq_lens, page=page, **options)
