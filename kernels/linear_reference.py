"""A linear layer with few rows, in plain fp32 torch: what its kernels mean.

The kernels are those of FlashDecoding++ (arXiv 2311.01282, sections 4 and 5): weights are read
once, however few rows of activations they are for.
"""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`: products and sums in fp32.

    Args:
        x: [M, K] activations, M >= 0, K >= 1; rows may lie further apart than K.
        weight: [N, K] in x's dtype, as vLLM holds it; rows may lie further apart than K.
        bias: [N] in x's dtype, added before the one rounding to it.
        out: [M, N] in x's dtype, written in place where given; rows may lie further apart than N.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: arguments that do not fit together, see `check`.
    """
    out = check(x, weight, bias, out)
    sums = x.float() @ weight.float().T
    if bias is not None:
        sums += bias.float()
    return out.copy_(sums)


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """The output's tensor; raises ValueError where the others do not fit."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x: got {x.dtype}; give one of {', '.join(map(str, DTYPES))}")
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}; give [M, K] with K of at least 1")
    rows, k = x.shape
    if weight.dim() != 2 or weight.shape[1] != k:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)} for x {tuple(x.shape)}; it must be [N, {k}]"
        )
    n = weight.shape[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)} for weight {tuple(weight.shape)}; it must be "
            f"[{n}]"
        )
    if out is None:
        out = x.new_empty(rows, n)
    elif out.shape != (rows, n):
        raise ValueError(f"out: got shape {tuple(out.shape)}; it must be [{rows}, {n}]")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("out", out)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}: got {tensor.dtype} for x of {x.dtype}; give both in one")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}; give all on one")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}: the last dimension has stride {tensor.stride(-1)}; it must be 1 "
                "(use .contiguous())"
            )
    return out
