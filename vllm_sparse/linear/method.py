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

from . import cpu_layer, op
from .choice import VLLM, Choice
from .cpu_layer import CpuLayer

logger = log.get_logger(__name__)

MEASURED = "auto"


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
            count_left(reason)
            return super().process_weights_after_loading(layer)
        if current_platform.is_cpu():
            self._take_on_cpu(layer, remove)
        else:
            super().process_weights_after_loading(layer)
            self._take_on_gpu(layer)

    def _take_on_cpu(self, layer: torch.nn.Module, remove: bool) -> None:
        weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
        threads = size_pool()
        choice, source = Choice.always(cpu_layer.FLAT), "given"
        if self.setting == MEASURED:
            choice, source = cpu_layer.choose(weight, vllms_own_of, threads)
        say(weight, choice, source)
        packed = theirs = None
        if cpu_layer.FLAT in choice.names:
            # Before vLLM's own, which changes the type of a bias for some kernels.
            packed, bias = PackedWeight(weight), None if bias is None else bias.detach().clone()
        if VLLM in choice.names:
            theirs = vllms_own(layer, remove)
        elif remove:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        layer.flat = CpuLayer(choice, packed, bias, theirs)
        layer.flat_outputs = weight.shape[0]
        layer.register_buffer("flat_key", layer.flat.key, persistent=False)

    def _take_on_gpu(self, layer: torch.nn.Module) -> None:
        from . import gpu_layer  # loads Triton

        choice, source = gpu_layer.decide(layer.weight, self.setting == MEASURED)
        layer.flat_on_gpu = True
        say(layer.weight, choice, source)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
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

    Of one that is only looked up, nothing is packed, where vLLM's own keeps a second copy. Should
    it be multiplied after all, it is packed then.
    """

    def __init__(self, setting: str, multiplied: bool) -> None:
        """`multiplied`: whether it is the output layer, as far as one can tell."""
        super().__init__()
        self.setting, self.multiplied = setting, multiplied

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        # In time for vLLM, which shares out the memory that is left among KV blocks.
        if self.multiplied:
            self.take(layer, remove=False)
        else:
            layer.flat_pending = True

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if getattr(layer, "flat_pending", False):
            layer.flat_pending = False
            with torch.inference_mode(False):
                self.take(layer, remove=False)
        return super().apply(layer, x, bias)


def count_left(reason: str) -> None:
    STATS.fell_back(reason)
    log.once(logger, logging.INFO, f"Some linear layers are left to vLLM: {reason}")


def vllms_own(layer: torch.nn.Module, remove: bool) -> cpu_layer.Theirs:
    """What vLLM makes of a layer's weights; `remove`: which may go."""
    dispatch_cpu_unquantized_gemm(layer, remove_weight=remove)
    # Where it makes nothing of them, it multiplies the weights themselves.
    run, weight = layer.cpu_linear, layer.weight
    return lambda x, bias: run(x, weight, bias)


def vllms_own_of(weight: torch.Tensor) -> cpu_layer.Theirs:
    """vLLM's own layer of these weights."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return vllms_own(layer, remove=True)


_said: set[str] = set()


def say(weight: torch.Tensor, choice: Choice, source: str) -> None:
    """One line for each shape of layers; the first measures, and the others find it kept."""
    n, k = weight.shape
    line = f"Linear layers {n}x{k} {str(weight.dtype).removeprefix('torch.')}: {choice.line()}"
    if line not in _said:
        _said.add(line)
        logger.info("%s (%s)", line, source)
