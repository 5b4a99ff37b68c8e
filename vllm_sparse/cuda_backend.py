"""The AttentionBackend on CUDA builds of vLLM: sparse prefill on top of vLLM's Triton backend.

Its pages, its writing of keys and values, its decode and its dense prefill are vLLM's own; long
chunks of prompts go to the sparse kernels instead.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from .backend import HEAD_SIZES
from .plugin import BACKEND

LEAST_CAPABILITY = (8, 0)


class SparseCudaBackend(TritonAttentionBackend):
    """Dynamic sparse prefill on NVIDIA GPUs."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

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
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return (capability.major, capability.minor) >= LEAST_CAPABILITY
