"""Linear layers on a CPU, for few rows: the native kernel behind `linear_reference`."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

from . import cpu, linear_reference

# As in csrc/attention.h: weights are packed in strips of so many rows, in steps of so many bytes.
STRIP_ROWS, STEP_BYTES = 4, 64
HUGE_PAGE = 2 << 20

_i64, _ptr = ctypes.c_int64, ctypes.c_void_p


class _Linear(ctypes.Structure):
    _fields_ = [
        ("dtype", _i64), ("num_rows", _i64), ("num_outputs", _i64), ("num_inputs", _i64),
        ("x", _ptr), ("x_row_stride", _i64), ("packed", _ptr), ("bias", _ptr),
        ("out", _ptr), ("out_row_stride", _i64),
    ]  # fmt: skip


class _LinearWeight(ctypes.Structure):
    _fields_ = [
        ("dtype", _i64), ("num_outputs", _i64), ("num_inputs", _i64),
        ("weight", _ptr), ("row_stride", _i64), ("packed", _ptr),
    ]  # fmt: skip


def _memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] that nobody has touched, in huge pages where Linux gives them.

    The CPU's own fetching of a stream ends at each page (25 GB/s of 4 KiB pages, 34 of 2 MiB: AMD
    Zen 4, one row), and what an allocator hands out again has small ones already.
    """
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class PackedWeight:
    """A linear layer's weights, copied into the order in which the kernel reads them.

    As large as the weights, but for rows filled up to 64 bytes and their number to a multiple of 4.
    The given weights are not needed any more.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [N, K] on the CPU, in one of `linear_reference.DTYPES`.

        Raises:
            ValueError: weights of another kind.
        """
        if weight.dim() != 2 or not weight.shape[1] or weight.dtype not in cpu.DTYPES:
            raise ValueError(
                f"weight: got {tuple(weight.shape)} of {weight.dtype}; give [N, K] with K of at "
                f"least 1, in one of {', '.join(map(str, cpu.DTYPES))}"
            )
        if not weight.is_cpu:
            raise ValueError(f"weight: is on {weight.device}; this kernel takes CPU tensors")
        weight = weight.detach()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.num_outputs, self.num_inputs = weight.shape
        self.dtype = weight.dtype
        # What `check` looks at in place of the weights.
        self.like = weight.new_empty(1, self.num_inputs).expand(weight.shape)
        library = cpu.native()
        if library is None:
            self.data = weight.clone()
            return
        n, k = weight.shape
        steps = -(-k * weight.itemsize // STEP_BYTES)
        rows = -(-n // STRIP_ROWS) * STRIP_ROWS
        self.data = _memory(rows * steps * STEP_BYTES).view(weight.dtype)
        args = _LinearWeight(
            cpu.DTYPES[weight.dtype], n, k, weight.data_ptr(), weight.stride(0),
            self.data.data_ptr(),
        )  # fmt: skip
        cpu.check(library.vllm_sparse_pack_linear(ctypes.byref(args)), "PackedWeight")

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `linear_reference.linear`, with packed weights.

    A row of x gives the same bits whatever rows it is among, and with any number of threads. On
    CPUs with products of bfloat16 pairs, bfloat16 numbers below the smallest normal one count as 0.

    Memory beside the output: a copy of up to 256 rows of x, kept by the thread for the next call.

    Raises:
        ValueError: arguments that do not fit together.
    """
    library = cpu.native()
    if library is None:
        return linear_reference.linear(x, weight.data, bias, out=out)
    out = linear_reference.check(x, weight.like, bias, out)
    args = _Linear(
        cpu.DTYPES[x.dtype], x.shape[0], weight.num_outputs, weight.num_inputs,
        x.data_ptr(), x.stride(0), weight.data.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), out.stride(0),
    )  # fmt: skip
    cpu.check(library.vllm_sparse_linear(ctypes.byref(args)), "linear")
    return out
