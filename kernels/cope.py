"""Attention with contextual positions: the CPU's native kernel behind `cope_reference`."""

from __future__ import annotations

import ctypes

import torch

from . import cope_reference, cpu
from .paged_cache import refuse_fp8

_i64, _ptr = ctypes.c_int64, ctypes.c_void_p


class _Cope(ctypes.Structure):
    _fields_ = [
        *cpu.QUERY_FIELDS,
        ("query_start_loc", _ptr), ("seq_lens", _ptr),
        ("pos_emb", _ptr), ("pos_emb_stride", _i64), ("num_positions", _i64),
    ]  # fmt: skip


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
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `cope_reference.cope_attention`: same arguments, same meaning.

    Memory beside the output: for each thread a tile of 64 rows and [P, 64] fp32.

    Raises:
        ValueError: arguments that do not fit together, or an FP8 cache.
    """
    cope_reference.check_pos_emb(q, pos_emb)
    refuse_fp8(k_cache, v_cache)
    library = cpu.native()
    if library is None:
        return cope_reference.cope_attention(
            q, k_cache, v_cache, block_table, query_start_loc, seq_lens, pos_emb,
            scale=scale, out=out,
        )  # fmt: skip
    args = _Cope()
    out, lse, _keep = cpu.fill(args, q, k_cache, v_cache, block_table, seq_lens, scale, out)
    starts = cpu.query_starts(query_start_loc, args.shape.num_seqs)
    pos_emb = pos_emb if pos_emb.stride(1) == 1 else pos_emb.contiguous()
    args.query_start_loc = starts.data_ptr()
    args.pos_emb, args.pos_emb_stride = pos_emb.data_ptr(), pos_emb.stride(0)
    args.num_positions = len(pos_emb)
    cpu.check(library.vllm_sparse_cope(ctypes.byref(args)), "cope_attention")
    return out, lse
