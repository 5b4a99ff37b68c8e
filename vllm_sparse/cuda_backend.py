"""The AttentionBackend on CUDA builds of vLLM: sparse prefill on top of vLLM's Triton backend.

Its pages and its writing of keys and values are vLLM's own, and short prompts go to vLLM's kernels;
long chunks of prompts, and decoding, go to ours.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from .backend import HEAD_SIZES
from .kernels.gpu.launch import FP8_CAPABILITY
from .plugin import BACKEND

LEAST_CAPABILITY = (8, 0)
CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")


def cache_problem(kv_cache_dtype: str | None, capability=None) -> str | None:
    """Why no layer can have this cache and what to do, or None: it can.

    Args:
        capability: vLLM's DeviceCapability of the GPU, None: not known yet.
    """
    name = kv_cache_dtype or "auto"
    given = f"--kv-cache-dtype {name}"
    if name.endswith("per_token_head"):
        return (
            f"{given}: its scales of each token and head are not read by the sparse kernels; give "
            "fp8, which has one scale a layer, or auto"
        )
    if name == "fp8_e5m2":
        return (
            f"{given}: vLLM's Triton backend, which writes the cache, stores e4m3 under that name; "
            "give fp8"
        )
    if name not in CACHE_DTYPES:
        return f"{given}: supported are {', '.join(CACHE_DTYPES)}"
    if name.startswith("fp8") and capability is not None:
        got = capability.major, capability.minor
        if got < FP8_CAPABILITY:
            return (
                f"{given}: Triton reads FP8 from compute capability "
                f"{'.'.join(map(str, FP8_CAPABILITY))} on, this GPU has "
                f"{'.'.join(map(str, got))}; give auto"
            )
    return None


def head_size_problem(head_size: int, capability=None) -> str | None:
    """Why layers of this head size cannot run on a GPU where others do, and what to do, or None."""
    if capability is None or head_size <= 128:
        return None
    got = capability.major, capability.minor
    if got not in ((8, 6), (8, 9)) and capability.major < 12:
        return None
    return (
        f"head size {head_size}: sparse prefill takes 144 KiB of shared memory for it, and GPUs of "
        f"compute capability {'.'.join(map(str, got))} give a program 99 KiB; head sizes up to 128 "
        "run there"
    )


class SparseCudaBackend(TritonAttentionBackend):
    """Dynamic sparse prefill on NVIDIA GPUs."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        # Attention.__init__ looks its enum member up under this name.
        return BACKEND

    @staticmethod
    def get_impl_cls():
        from .cuda_impl import SparseCudaImpl

        return SparseCudaImpl

    @staticmethod
    def get_builder_cls():
        from .cuda_metadata import SparseCudaMetadataBuilder

        return SparseCudaMetadataBuilder

    @classmethod
    def validate_configuration(cls, **config) -> list[str]:
        """vLLM's reasons against a configuration (none: supported), our own in full."""
        reasons = super().validate_configuration(**config)
        reasons = [reason for reason in reasons if reason != "kv_cache_dtype not supported"]
        if "per-head quant scales not supported" in reasons:
            reasons.append(
                "FP8 scales of each head (attn_head in the checkpoint) are not read, one a layer "
                "is: take a checkpoint with those"
            )
        capability = config["device_capability"]
        problems = (
            cache_problem(config["kv_cache_dtype"], capability),
            head_size_problem(config["head_size"], capability),
        )
        return [*reasons, *(problem for problem in problems if problem is not None)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_SIZES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        # Where chunks are cut decides what is selected.
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # Steps are cut by the host's lengths, which adaptive verification changes on the device.
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return (capability.major, capability.minor) >= LEAST_CAPABILITY
