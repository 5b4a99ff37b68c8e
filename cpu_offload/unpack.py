"""int8 rows of a host store as the numbers that they stand for, on the threads of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from vllm_sparse.kernels import cpu

from .host import struct
from .layout import Layout

_i64, _ptr = ctypes.c_int64, ctypes.c_void_p
_Unpack = struct(
    "_Unpack", ("part", _ptr), ("part_bytes", _i64), ("scales_at", _i64), ("pages", _ptr),
    ("num_pages", _i64), ("rows", _i64), ("head_size", _i64), ("dtype", _i64), ("out", _ptr),
)  # fmt: skip


def unpack(layout: Layout, part: torch.Tensor, pages: Sequence[int], into: torch.Tensor) -> None:
    """Unpack pages of one layer.

    Args:
        part: uint8 [pages of the store, part_bytes], all there is of the layer.
        pages: numbers of those to unpack.
        into: [len(pages), kv_heads, page_rows, 2, head_size], contiguous, in one of `cpu.DTYPES`.

    Raises:
        MemoryError: there is none for the threads' scratch.
    """
    library = cpu.native()
    if library is None:
        for i, page in enumerate(pages):  # one at a time stays in cache
            layout.unpack(part[page : page + 1], into[i : i + 1])
        return
    assert layout.dtype == torch.int8 and into.is_contiguous() and part.stride(1) == 1
    assert into.shape == (len(pages), *layout.rows(part[:1]).shape[1:])
    numbers = np.array(pages, np.int64)
    assert not pages or 0 <= numbers.min() <= numbers.max() < len(part)
    args = _Unpack(
        part.data_ptr(), part.stride(0), layout.rows_bytes, numbers.ctypes.data, len(pages),
        layout.kv_heads * layout.page_rows, layout.head_size, cpu.DTYPES[into.dtype],
        into.data_ptr(),
    )  # fmt: skip
    if library.vllm_sparse_unpack(ctypes.byref(args)) != 0:
        raise MemoryError("unpack: out of memory for scratch buffers")
