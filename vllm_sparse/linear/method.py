"""What vLLM's linear layers and embeddings call in place of its own unquantized methods."""

from __future__ import annotations

import logging

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from vllm_sparse import log
from vllm_sparse.kernels import cpu
from vllm_sparse.kernels.linear import PackedWeight
from vllm_sparse.kernels.linear_reference import DTYPES
from vllm_sparse.runtime import size_pool
from vllm_sparse.stats import STATS

from . import cpu_layer
from .choice import VLLM, Choice
from .cpu_layer import CpuLayer

logger = log.get_logger(__name__)

MEASURED, GIVEN = "auto", "flat"


def left_to_vllm(layer: torch.nn.Module) -> str | None:
    """Why a layer is not ours, or None."""
    weight = layer.weight
    if weight.is_meta or weight.ndim != 2 or not weight.numel():
        return "linear_without_weights"
    if weight.dtype not in DTYPES:
        return "linear_dtype"
    if getattr(layer, "_cpu_skip_gemm_dispatch", False):
        return "linear_read_as_weights"  # vLLM's MLA multiplies these weights itself
    if weight.is_cpu and cpu.native() is None:
        return "linear_no_native_kernels"
    return None


class _Ours:
    """The parts that both methods share."""

    setting: str

    def take(self, layer: torch.nn.Module, *, remove: bool) -> None:
        """Make what computes the layer, from its weights; `remove`: nobody else reads them."""
        reason = left_to_vllm(layer)
        if reason is not None:
            STATS.fallbacks[reason] = STATS.fallbacks.get(reason, 0) + 1
            log.once(logger, logging.INFO, f"Some linear layers are left to vLLM: {reason}")
            return super().process_weights_after_loading(layer)
        if not current_platform.is_cpu():
            from . import gpu_layer

            super().process_weights_after_loading(layer)
            choice, source = gpu_layer.decide(layer.weight, self.setting == MEASURED)
            layer.flat_on_gpu = True
            return say(layer.weight, choice, source)
        weight = layer.weight.detach()
        choice, source = Choice.always(cpu_layer.FLAT), "given"
        if self.setting == MEASURED:
            choice, source = cpu_layer.choose(weight, vllms_own, size_pool())
        say(weight, choice, source)
        packed = theirs = None
        bias = getattr(layer, "bias", None)
        if cpu_layer.FLAT in choice.names:
            size_pool()
            packed, bias = PackedWeight(weight), None if bias is None else bias.detach().clone()
        if VLLM in choice.names:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=remove)
            theirs = layer.cpu_linear
        elif remove:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        layer.flat_outputs = weight.shape[0]
        layer.flat = CpuLayer(choice, packed, bias, theirs)
        layer.register_buffer("flat_key", layer.flat.key, persistent=False)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        from . import op

        if hasattr(layer, "flat_key"):
            return op.cpu_linear(x, bias, layer.flat_key, layer.flat_outputs)
        if hasattr(layer, "flat_on_gpu"):
            return op.gpu_linear(x, layer.weight, bias)
        return super().apply(layer, x, bias)


class FlatLinearMethod(_Ours, UnquantizedLinearMethod):
    """A linear layer's weights, multiplied by our kernels or vLLM's."""

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.take(layer, remove=True)


class FlatEmbeddingMethod(_Ours, UnquantizedEmbeddingMethod):
    """The same of an embedding, which may be the output layer as well.

    Whether it is shows when it is first multiplied: until then nothing is packed, where vLLM's
    own keeps a second copy of embeddings that are only looked up.
    """

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.flat_pending = True

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if getattr(layer, "flat_pending", False):
            layer.flat_pending = False
            with torch.inference_mode(False):
                self.take(layer, remove=False)
        return super().apply(layer, x, bias)


def vllms_own(weight: torch.Tensor) -> cpu_layer.Theirs:
    """vLLM's own layer of these weights."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer.cpu_linear


def say(weight: torch.Tensor, choice: Choice, source: str) -> None:
    """One line for each shape of layers."""
    n, k = weight.shape
    line = f"Linear layers {n}x{k} {str(weight.dtype).removeprefix('torch.')}: {choice.line()}"
    log.once(logger, logging.INFO, f"{line} ({source})")
