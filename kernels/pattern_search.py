"""The native searches behind the signatures of `pattern_reference`.

In torch each is dozens of ops over small tensors: 9 ms of the 44 that planning took for 4 layers of
2K tokens, where each of these takes less than 0.1 a layer.
"""

from __future__ import annotations

import ctypes

import torch

from . import cpu, pattern_reference
from .pattern_reference import COLUMN_COST, SampledMass

_i64, _ptr, _float = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Sampled(ctypes.Structure):
    _fields_ = [
        ("blocks", _ptr), ("row_tile", _ptr), ("last_block", _ptr), ("coverage", _ptr),
        ("heads", _i64), ("rows", _i64), ("tiles", _i64), ("num_blocks", _i64),
    ]  # fmt: skip


class _LeastKeys(ctypes.Structure):
    _fields_ = [("mass", _Sampled), ("squares", _ptr), ("keys", _ptr)]


class _SortColumns(ctypes.Structure):
    _fields_ = [
        ("columns", _ptr), ("keep", _ptr), ("heads", _i64), ("width", _i64),
        ("ascending", _ptr), ("count", _ptr),
    ]  # fmt: skip


class _WindowSearch(ctypes.Structure):
    _fields_ = [("mass", _Sampled), ("cost", _ptr), ("offset", _ptr)]


class _ColumnSearch(ctypes.Structure):
    _fields_ = [
        ("mass", _Sampled), ("columns", _ptr), ("column_mass", _ptr),
        ("width", _i64), ("first_key", _i64),
        ("column_price", _float), ("neighbour", _float), ("growth", ctypes.c_double),
        ("levels", _i64), ("wanted", _ptr),
        ("cost", _ptr), ("diagonals", _ptr), ("taken", _ptr),
    ]  # fmt: skip


class _ThresholdSearch(ctypes.Structure):
    _fields_ = [
        ("mass", _Sampled), ("score", _ptr), ("edges", _ptr), ("levels", _i64),
        ("cost", _ptr), ("chosen", _ptr),
    ]  # fmt: skip


class _UnionSearch(ctypes.Structure):
    _fields_ = [
        ("blocks", _ptr), ("base", _ptr), ("columns", _ptr), ("column_mass", _ptr),
        ("coverage", _ptr), ("counts", _ptr),
        ("heads", _i64), ("rows", _i64), ("num_blocks", _i64), ("width", _i64),
        ("num_counts", _i64), ("column_price", _float),
        ("chosen", _ptr), ("single", _ptr),
    ]  # fmt: skip


def least_keys(sampled: SampledMass, coverage: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """See `pattern_reference.least_keys`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return pattern_reference.least_keys(sampled, coverage, squares)
    mass, _keep = _enter(sampled, coverage)
    _expect("squares", squares, sampled.blocks.shape, torch.float32)
    squares = squares.contiguous()
    keys = torch.empty(mass.heads, dtype=torch.float32)
    args = _LeastKeys(mass, squares.data_ptr(), keys.data_ptr())
    cpu.check(library.vllm_sparse_least_keys(ctypes.byref(args)), "least_keys")
    return keys


def sort_columns(columns: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """See `pattern_reference.sort_columns`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return pattern_reference.sort_columns(columns, keep)
    heads, width = columns.shape
    _expect("columns", columns, (heads, width), torch.int64)
    _expect("keep", keep, (heads, width), torch.bool)
    columns, keep = columns.contiguous(), keep.contiguous()
    ascending = torch.empty(heads, width, dtype=torch.int32)
    count = (_i64 * heads)()
    args = _SortColumns(
        columns.data_ptr(), keep.data_ptr(), heads, width, ascending.data_ptr(),
        ctypes.addressof(count),
    )  # fmt: skip
    cpu.check(library.vllm_sparse_sort_columns(ctypes.byref(args)), "sort_columns")
    return ascending[:, : max(count, default=0)]


def cheapest_window(
    sampled: SampledMass, coverage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pattern_reference.cheapest_window`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return pattern_reference.cheapest_window(sampled, coverage)
    mass, _keep = _enter(sampled, coverage)
    cost = torch.empty(mass.heads, dtype=torch.float32)
    offset = torch.empty(mass.heads, dtype=torch.int64)
    args = _WindowSearch(mass, cost.data_ptr(), offset.data_ptr())
    cpu.check(library.vllm_sparse_cheapest_window(ctypes.byref(args)), "cheapest_window")
    return cost, offset


def cheapest_columns(
    sampled: SampledMass,
    coverage: torch.Tensor,
    columns: torch.Tensor,
    column_mass: torch.Tensor,
    first_key: int,
    wanted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `pattern_reference.cheapest_columns`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return pattern_reference.cheapest_columns(
            sampled, coverage, columns, column_mass, first_key, wanted
        )
    mass, _keep = _enter(sampled, coverage)
    columns, column_mass = _enter_columns(mass.heads, mass.rows, columns, column_mass)
    _expect("wanted", wanted, (mass.heads,), torch.bool)
    wanted = wanted.contiguous()
    cost = torch.empty(mass.heads, dtype=torch.float32)
    diagonals = torch.empty(mass.heads, mass.num_blocks, dtype=torch.bool)
    taken = torch.empty(columns.shape, dtype=torch.bool)
    args = _ColumnSearch(
        mass, columns.data_ptr(), column_mass.data_ptr(), columns.shape[1], first_key,
        COLUMN_COST, pattern_reference.NEIGHBOUR, pattern_reference.GROWTH,
        pattern_reference.BUDGETS, wanted.data_ptr(),
        cost.data_ptr(), diagonals.data_ptr(), taken.data_ptr(),
    )  # fmt: skip
    cpu.check(library.vllm_sparse_cheapest_columns(ctypes.byref(args)), "cheapest_columns")
    return cost, diagonals, taken


def cheapest_threshold(
    sampled: SampledMass, coverage: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pattern_reference.cheapest_threshold`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return pattern_reference.cheapest_threshold(sampled, coverage, score)
    mass, _keep = _enter(sampled, coverage)
    shape = (mass.heads, mass.tiles, mass.num_blocks)
    _expect("score", score, shape, torch.float32)
    score, edges = score.contiguous(), pattern_reference.thresholds()
    cost = torch.empty(mass.heads, dtype=torch.float32)
    chosen = torch.empty(shape, dtype=torch.bool)
    args = _ThresholdSearch(
        mass, score.data_ptr(), edges.data_ptr(), edges.numel(), cost.data_ptr(), chosen.data_ptr()
    )
    cpu.check(library.vllm_sparse_cheapest_threshold(ctypes.byref(args)), "cheapest_threshold")
    return cost, chosen


def cheapest_union(
    blocks: torch.Tensor,
    base: torch.Tensor,
    columns: torch.Tensor,
    column_mass: torch.Tensor,
    coverage: torch.Tensor,
    counts: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pattern_reference.cheapest_union`: same arguments, same meaning."""
    library = cpu.native()
    if library is None:
        return pattern_reference.cheapest_union(
            blocks, base, columns, column_mass, coverage, counts
        )
    heads, rows, num_blocks = blocks.shape
    _expect("blocks", blocks, (heads, rows, num_blocks), torch.float32)
    _expect("base", base, (num_blocks,), torch.bool)
    _expect("coverage", coverage, (heads,), torch.float32)
    columns, column_mass = _enter_columns(heads, rows, columns, column_mass)
    width = columns.shape[1]
    if list(counts) != sorted(counts) or not all(0 <= count <= width for count in counts):
        raise ValueError(f"counts: got {counts}; give them ascending, 0 to the {width} columns")
    blocks, base, coverage = blocks.contiguous(), base.contiguous(), coverage.contiguous()
    chosen = torch.empty(heads, num_blocks, dtype=torch.bool)
    single = torch.empty(columns.shape, dtype=torch.bool)
    tried = (_i64 * len(counts))(*counts)
    args = _UnionSearch(
        blocks.data_ptr(), base.data_ptr(), columns.data_ptr(), column_mass.data_ptr(),
        coverage.data_ptr(), ctypes.addressof(tried),
        heads, rows, num_blocks, width, len(counts), COLUMN_COST,
        chosen.data_ptr(), single.data_ptr(),
    )  # fmt: skip
    cpu.check(library.vllm_sparse_cheapest_union(ctypes.byref(args)), "cheapest_union")
    return chosen, single


def _enter(
    sampled: SampledMass, coverage: torch.Tensor
) -> tuple[_Sampled, tuple[torch.Tensor, ...]]:
    """Check and enter what the searches share; what is returned last must outlive the call."""
    heads, rows, blocks = sampled.blocks.shape
    tiles = sampled.last_block.numel()
    _expect("blocks", sampled.blocks, (heads, rows, blocks), torch.float32)
    _expect("row_tile", sampled.row_tile, (rows,), torch.int64)
    _expect("last_block", sampled.last_block, (tiles,), torch.int64)
    _expect("coverage", coverage, (heads,), torch.float32)
    if tiles < 2:
        raise ValueError(
            f"last_block: got {tiles} tiles; give at least 2, the last is not searched"
        )
    keep = tuple(x.contiguous() for x in (*sampled, coverage))
    return _Sampled(*(x.data_ptr() for x in keep), heads, rows, tiles, blocks), keep


def _enter_columns(
    heads: int, rows: int, columns: torch.Tensor, column_mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    width = columns.shape[-1]
    _expect("columns", columns, (heads, width), torch.int64)
    _expect("column_mass", column_mass, (heads, rows, width), torch.float32)
    return columns.contiguous(), column_mass.contiguous()


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; give {shape} "
            f"{dtype} on the CPU"
        )
