"""The native kernel behind `reference.row_scores`."""

from __future__ import annotations

import ctypes

import torch

from . import cpu, reference
from .block_indices import BLOCK

_i64, _ptr = ctypes.c_int64, ctypes.c_void_p


class _RowScores(ctypes.Structure):
    _fields_ = [
        ("shape", cpu.Shape), ("kv", cpu.PagedKV),
        ("q", _ptr), ("q_row_stride", _i64), ("q_head_stride", _i64),
        ("positions", _ptr), ("base_from", _ptr), ("heads", _ptr),
        ("num_rows", _i64), ("num_wanted", _i64), ("seq_len", _i64), ("num_columns", _i64),
        ("by_heaviest", _i64),
        ("blocks", _ptr), ("squares", _ptr), ("columns", _ptr), ("column_mass", _ptr),
    ]  # fmt: skip


def row_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    base_from: torch.Tensor | None = None,
    squares: bool = False,
    columns: int = 0,
    by_heaviest: bool = False,
) -> reference.RowScores:
    """See `reference.row_scores`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return reference.row_scores(
            q, k_cache, block_table, positions, heads, seq_len, scale=scale, base_from=base_from,
            squares=squares, columns=columns, by_heaviest=by_heaviest,
        )  # fmt: skip
    reference.check_row_scores(q, k_cache, positions, base_from, seq_len, columns)
    cpu.check_keys(q, k_cache)
    rows, wanted = q.shape[0], heads.numel()
    shape = (wanted, rows, -(-seq_len // BLOCK))
    out = reference.RowScores(
        torch.empty(shape, dtype=torch.float32),
        torch.empty(shape, dtype=torch.float32) if squares else None,
        torch.empty(wanted, columns, dtype=torch.int64),
        torch.empty(wanted, rows, columns, dtype=torch.float32),
    )
    if not rows or not wanted or not seq_len:
        if columns:
            out.columns.copy_(torch.arange(columns))
        return out
    table = cpu.int32("block_table", block_table)
    positions, heads = positions.long().contiguous(), heads.long().contiguous()
    base_from = None if base_from is None else base_from.long().contiguous()
    where = (k_cache.data_ptr(), *k_cache.stride()[:3])
    args = _RowScores(
        shape=cpu.Shape(
            cpu.DTYPES[q.dtype], 1, q.shape[1], k_cache.shape[1], q.shape[2], scale
        ),
        kv=cpu.PagedKV(
            where[0], where[0], *where[1:], *where[1:],
            table.data_ptr(), 0, k_cache.shape[2], k_cache.shape[0],
        ),
        q=q.data_ptr(), q_row_stride=q.stride(0), q_head_stride=q.stride(1),
        positions=positions.data_ptr(),
        base_from=None if base_from is None else base_from.data_ptr(),
        heads=heads.data_ptr(),
        num_rows=rows, num_wanted=wanted, seq_len=seq_len, num_columns=columns,
        by_heaviest=by_heaviest,
        blocks=out.blocks.data_ptr(),
        squares=None if out.squares is None else out.squares.data_ptr(),
        columns=out.columns.data_ptr(), column_mass=out.column_mass.data_ptr(),
    )  # fmt: skip
    cpu.check(library.vllm_sparse_row_scores(ctypes.byref(args)), "row_scores")
    return out
