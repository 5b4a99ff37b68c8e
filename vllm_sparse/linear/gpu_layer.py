"""A linear layer on a GPU: our GEMV and flat GEMM for few rows, cuBLAS as vLLM has it for more."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparse.kernels.gpu import flat_gemm as flat
from vllm_sparse.kernels.gpu import gemv as vector

from . import timing
from .choice import VLLM, Choice
from .rows import by_rows

GEMV, FLAT = "gemv", "flat"
NAMES = (GEMV, FLAT, VLLM)
MOST_ROWS = {GEMV: vector.MOST_ROWS, FLAT: flat.MOST_ROWS}
# Without a measurement.
GIVEN = Choice((MOST_ROWS[GEMV], MOST_ROWS[FLAT], MOST_ROWS[FLAT] + 1), (GEMV, FLAT, VLLM))

IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    GEMV: vector.gemv,
    FLAT: flat.flat_gemm,
    VLLM: torch.nn.functional.linear,
}

Shape = tuple[int, int, torch.dtype, torch.device]
_choices: dict[Shape, Choice] = {}  # of each shape of weights in this process


def shape_of(weight: torch.Tensor) -> Shape:
    return (*weight.shape, weight.dtype, weight.device)


def decide(weight: torch.Tensor, measured: bool) -> tuple[Choice, str]:
    """The choice for layers of this shape, to be made before any of them runs; and its source."""
    if weight.is_cuda:
        flat.shared_workspace(weight.device)  # captured graphs keep its addresses
    source = "given"
    if not measured:
        choice = GIVEN
    else:
        n, k, dtype, device = shape_of(weight)
        key = f"{torch.cuda.get_device_name(device)}, {n}x{k} {dtype}"
        choice, source = timing.settled(key, NAMES, lambda: choose(weight, timing.gpu_seconds))
    _choices[shape_of(weight)] = choice
    return choice, source


def choose(weight: torch.Tensor, clock: Callable[[Callable[[], None]], float]) -> Choice:
    each = timing.copies(weight)
    runs = {
        name: [lambda x, one=one, run=run: run(x, one) for one in each]
        for name, run in IMPLEMENTATIONS.items()
    }
    return timing.choose(runs, weight.shape[1], weight.dtype, weight.device, clock, MOST_ROWS)


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] to [..., N]."""
    name = _choices[shape_of(weight)].name(x.shape[:-1].numel())
    return by_rows(x, lambda rows: IMPLEMENTATIONS[name](rows, weight, bias))
