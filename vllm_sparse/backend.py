"""The AttentionBackend that vLLM loads: what it supports, and where its parts are."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from . import compat
from .plugin import BACKEND

PAGE_MULTIPLE = 16  # tokens
HEAD_SIZES = list(range(64, 257, 16))


class SparseAttentionBackend(compat.LegacyLayout, AttentionBackend):
    """Dynamic sparse prefill and exact decode, on CPU builds of vLLM; `cuda_backend` has GPUs'."""

    # The impl has do_kv_cache_update(), which vLLM calls before forward as an op of its own.
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        # Attention.__init__ looks its enum member up under this name.
        return BACKEND

    @staticmethod
    def get_impl_cls():
        from .impl import SparseAttentionImpl

        return SparseAttentionImpl

    @staticmethod
    def get_builder_cls():
        from .metadata import SparseMetadataBuilder

        return SparseMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return HEAD_SIZES

    @classmethod
    def supported_kv_cache_layouts(cls):
        # CPU_ATTN reads head-major pages only, and a model with sliding-window layers has both
        # backends over one cache.
        return compat.head_major_layouts()

    @classmethod
    def validate_configuration(cls, *args, **kwargs) -> list[str]:
        """vLLM's reasons against a configuration (none: supported), and the platform's."""
        if not current_platform.is_cpu():
            return [
                f"this is the sparse backend of CPU builds of vLLM, and vLLM runs on "
                f"{current_platform.device_type!r}; beside CPUs it has NVIDIA GPUs only: leave "
                "--attention-backend out"
            ]
        return super().validate_configuration(*args, **kwargs)
