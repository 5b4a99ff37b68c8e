"""The small steps of planning behind the signatures of `reference`.

In torch each is up to a dozen ops over fresh tensors, which cost more than what they compute: at 4K
the lists of a layer took 0.95 ms, and take 0.3.
"""

from __future__ import annotations

import ctypes

import torch

from . import cpu, reference
from .block_indices import BLOCK, BlockIndices, num_tiles

_i64, _ptr = ctypes.c_int64, ctypes.c_void_p


class _BlockMeans(ctypes.Structure):
    _fields_ = [
        ("kv", cpu.PagedKV), ("dtype", _i64), ("head_size", _i64), ("seq_len", _i64),
        ("heads", _ptr), ("num_heads", _i64), ("means", _ptr),
    ]  # fmt: skip


class _TileMeans(ctypes.Structure):
    _fields_ = [
        ("q", _ptr), ("q_row_stride", _i64), ("q_head_stride", _i64),
        ("dtype", _i64), ("head_size", _i64), ("num_rows", _i64),
        ("heads", _ptr), ("num_heads", _i64), ("means", _ptr),
    ]  # fmt: skip


class _Heaviest(ctypes.Structure):
    _fields_ = [
        ("mass", _ptr), ("need", _ptr), ("heads", _i64), ("rows", _i64), ("blocks", _i64),
        ("chosen", _ptr),
    ]  # fmt: skip


class _IndexLists(ctypes.Structure):
    _fields_ = [
        ("mask", _ptr), ("table", _ptr), ("last_key", _ptr),
        ("tiles", _i64), ("heads", _i64), ("blocks", _i64), ("width", _i64),
        ("block_offsets", _ptr), ("column_offsets", _ptr),
        ("block_list", _ptr), ("column_list", _ptr),
    ]  # fmt: skip


def block_means(
    k_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int, heads: torch.Tensor
) -> torch.Tensor:
    """See `reference.block_means`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return reference.block_means(k_cache, block_table, seq_len, heads)
    cpu.check_cache(k_cache)
    page, size = k_cache.shape[2:]
    means = torch.empty(heads.numel(), -(-seq_len // BLOCK), size, dtype=torch.float32)
    table, heads = cpu.int32("block_table", block_table), heads.long().contiguous()
    where = (k_cache.data_ptr(), *k_cache.stride()[:3])
    kv = cpu.PagedKV(
        where[0], where[0], *where[1:], *where[1:], table.data_ptr(), 0, page, k_cache.shape[0]
    )
    args = _BlockMeans(
        kv, cpu.DTYPES[k_cache.dtype], size, seq_len, heads.data_ptr(), heads.numel(),
        means.data_ptr(),
    )  # fmt: skip
    cpu.check(library.vllm_sparse_block_means(ctypes.byref(args)), "block_means")
    return means


def tile_means(q: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """See `reference.tile_means`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return reference.tile_means(q, heads)
    cpu.check_queries(q)
    rows, _, size = q.shape
    means = torch.empty(heads.numel(), num_tiles(rows), size, dtype=torch.float32)
    heads = heads.long().contiguous()
    args = _TileMeans(
        q.data_ptr(), *q.stride()[:2], cpu.DTYPES[q.dtype], size, rows, heads.data_ptr(),
        heads.numel(), means.data_ptr(),
    )  # fmt: skip
    cpu.check(library.vllm_sparse_tile_means(ctypes.byref(args)), "tile_means")
    return means


def heaviest(mass: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """See `reference.heaviest`: same arguments, same meaning; torch where there is a GPU."""
    library = cpu.native() if mass.is_cpu else None
    if library is None:
        return reference.heaviest(mass, need)
    if need.shape != mass.shape[:2] or mass.dtype != torch.float32 or need.dtype != torch.float32:
        raise ValueError(
            f"need: got {tuple(need.shape)} {need.dtype} for mass {tuple(mass.shape)} "
            f"{mass.dtype}; give float32 of all but the last dimension"
        )
    mass, need = mass.contiguous(), need.contiguous()
    chosen = torch.empty(mass.shape, dtype=torch.bool)
    args = _Heaviest(mass.data_ptr(), need.data_ptr(), *mass.shape, chosen.data_ptr())
    cpu.check(library.vllm_sparse_heaviest(ctypes.byref(args)), "heaviest")
    return chosen


def index_lists(
    mask: torch.Tensor, columns: torch.Tensor | None, last_key: torch.Tensor
) -> BlockIndices:
    """See `reference.index_lists`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return reference.index_lists(mask, columns, last_key)
    tiles, heads, blocks = mask.shape
    if columns is None:
        columns = torch.empty(tiles, heads, 0, dtype=torch.int32)
    if columns.shape[:2] != mask.shape[:2] or last_key.numel() != tiles:
        raise ValueError(
            f"columns, last_key: got {tuple(columns.shape)}, {last_key.numel()} for a mask of "
            f"{tuple(mask.shape)}; give the same tiles and heads"
        )
    if columns.dtype != torch.int32 or mask.dtype != torch.bool:
        raise ValueError(
            f"columns, mask: got {columns.dtype}, mask {mask.dtype}; give int32 and bool"
        )
    mask, columns, last_key = mask.contiguous(), columns.contiguous(), last_key.long().contiguous()
    offsets = torch.zeros(2, tiles * heads + 1, dtype=torch.int32)
    args = _IndexLists(
        mask.data_ptr(), columns.data_ptr(), last_key.data_ptr(),
        tiles, heads, blocks, columns.shape[2],
        offsets[0].data_ptr(), offsets[1].data_ptr(), None, None,
    )  # fmt: skip
    cpu.check(library.vllm_sparse_index_lists(ctypes.byref(args)), "index_lists")
    offsets = offsets.cumsum(1, dtype=torch.int32)
    counts = offsets[:, -1].tolist()
    lists = [torch.empty(count, dtype=torch.int32) for count in counts]
    args.block_offsets, args.column_offsets = offsets[0].data_ptr(), offsets[1].data_ptr()
    # An empty list has no address, and without one nothing but counting is done.
    args.block_list, args.column_list = (x.data_ptr() or offsets.data_ptr() for x in lists)
    cpu.check(library.vllm_sparse_index_lists(ctypes.byref(args)), "index_lists")
    return BlockIndices(
        num_heads=heads,
        tile_offsets=torch.tensor([0, tiles], dtype=torch.int32),
        block_offsets=offsets[0],
        blocks=lists[0],
        column_offsets=offsets[1],
        columns=lists[1],
    )
