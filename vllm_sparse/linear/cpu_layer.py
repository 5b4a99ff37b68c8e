"""A linear layer on a CPU: packed weights for our kernel, and vLLM's own where it is faster."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch

from vllm_sparse.kept import processor
from vllm_sparse.kernels import cpu
from vllm_sparse.kernels.linear import PackedWeight, linear

from . import timing
from .choice import VLLM, Choice
from .rows import by_rows

FLAT = "flat"
NAMES = (FLAT, VLLM)

# vLLM's own layer, for x and a bias or None.
Theirs = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

_layers: weakref.WeakValueDictionary[int, CpuLayer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class CpuLayer:
    """What computes one layer, found by `key` in compiled graphs.

    A graph takes tensors of a layer as inputs, but not Python objects; as a number the key would
    stand in the graph, each layer's would be another, and vLLM compile all instead of one.
    """

    def __init__(
        self,
        choice: Choice,
        packed: PackedWeight | None,
        bias: torch.Tensor | None,
        theirs: Theirs | None,
    ) -> None:
        """`packed` and `theirs` may be missing where the choice never names them; `bias` is of the
        type of the weights, which the layer's own need not be: vLLM changes it for some kernels.
        """
        self.choice, self.packed, self.theirs = choice, packed, theirs
        self.bias = bias
        number = next(_numbers)
        self.key = torch.tensor([number], dtype=torch.int64, device="cpu")
        _layers[number] = self

    @classmethod
    def of(cls, key: torch.Tensor) -> CpuLayer:
        return _layers[int(key)]

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., K] to [..., N]; `bias` is the layer's, or None to leave it out."""
        if self.choice.name(x.shape[:-1].numel()) == VLLM:
            return self.theirs(x, bias)
        own = None if bias is None else self.bias
        return by_rows(x, lambda rows: linear(rows, self.packed, own))


def choose(
    weight: torch.Tensor, make_theirs: Callable[[torch.Tensor], Theirs], threads: int
) -> tuple[Choice, str]:
    """The choice for layers of this shape on this machine, and whether it was measured or kept.

    Args:
        weight: [N, K].
        make_theirs: vLLM's own for some weights, which it takes over.
        threads: of the kernels' pool, which the caller has sized.
    """
    n, k = weight.shape

    def measure() -> Choice:
        each = timing.copies(weight)
        packed = [PackedWeight(one) for one in each]
        theirs = [make_theirs(one) for one in each]
        runs = {
            FLAT: [lambda x, p=p: linear(x, p) for p in packed],
            VLLM: [lambda x, run=run: run(x, None) for run in theirs],
        }
        return timing.choose(runs, k, weight.dtype, weight.device, timing.cpu_seconds)

    machine = f"{processor()}, {cpu.isa()}, {threads} threads"
    return timing.settled(f"{machine}, {n}x{k} {weight.dtype}", NAMES, measure)
