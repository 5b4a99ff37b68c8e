"""What the GPU kernels' tests share: they run on a GPU where there is one, and under Triton's
interpreter on the CPU otherwise."""

from __future__ import annotations

import dataclasses

import pytest
import quick_interpreter
import torch
from cases import Case

from vllm_sparse.kernels.block_indices import BlockIndices

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
if not HAS_GPU:
    quick_interpreter.install()

FLOAT16 = pytest.param(torch.float16, id="fp16")
BFLOAT16 = pytest.param(
    torch.bfloat16,
    id="bf16",
    marks=pytest.mark.skipif(
        not HAS_GPU, reason="needs a GPU: the interpreter's dot of bfloat16 is wrong (triton 11584)"
    ),
)
FLOAT32 = pytest.param(
    torch.float32,
    id="fp32",
    marks=pytest.mark.skipif(HAS_GPU, reason="the kernels take float32 when interpreted only"),
)
# For what no dtype changes.
ANY_DTYPE = torch.float16 if HAS_GPU else torch.float32


def to_device(x):
    """A case, indices or tensor on the device of the GPU kernels; strides are kept."""
    if isinstance(x, (Case, BlockIndices)):
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        moved = {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        return type(x)(**moved)
    if not HAS_GPU or x is None:
        return x
    where = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
    return where.copy_(x)


def caches_to_device(case: Case) -> Case:
    """A case whose two caches stay halves of one."""
    moved = to_device(case)
    if HAS_GPU:
        both = to_device(torch.cat([case.k_cache, case.v_cache], -1))
        moved.k_cache, moved.v_cache = both.chunk(2, -1)
    return moved
