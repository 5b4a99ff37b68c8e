"""The operators that compiled graphs call for our linear layers: what is inside is chosen by the
number of rows, which a graph for any number of rows cannot do."""

from __future__ import annotations

import torch

from .cpu_layer import CpuLayer

_library = torch.library.Library("vllm_sparse", "FRAGMENT")  # operators live as long as it does


def _cpu_linear(
    x: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor, num_outputs: int
) -> torch.Tensor:
    return CpuLayer.of(key).run(x, bias)


def _cpu_shape(
    x: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor, num_outputs: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs)


def _gpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from . import gpu_layer  # loads Triton

    return gpu_layer.run(x, weight, bias)


def _gpu_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.define("cpu_linear(Tensor x, Tensor? bias, Tensor key, int num_outputs) -> Tensor")
_library.define("gpu_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("cpu_linear", _cpu_linear, "CPU")
_library.impl("gpu_linear", _gpu_linear, "CUDA")
torch.library.register_fake("vllm_sparse::cpu_linear", _cpu_shape, lib=_library)
torch.library.register_fake("vllm_sparse::gpu_linear", _gpu_shape, lib=_library)

cpu_linear = torch.ops.vllm_sparse.cpu_linear
gpu_linear = torch.ops.vllm_sparse.gpu_linear
