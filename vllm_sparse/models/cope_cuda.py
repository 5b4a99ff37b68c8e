"""Attention with contextual positions on CUDA builds of vLLM: pages and their writing are those of
vLLM's Triton backend, attention is ours."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from ..cuda_backend import SparseCudaBackend
from ..metadata import refuse_non_causal
from .cope_backend import COPE, WHAT, CoPEBackend, attend, refuse_layer


class CoPECudaBackend(SparseCudaBackend):
    """What is served is what the sparse backend of GPUs serves, but for FP8 caches."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = CoPEBackend.supported_kv_cache_dtypes

    @staticmethod
    def get_name() -> str:
        return COPE

    @staticmethod
    def get_impl_cls():
        return CoPECudaImpl

    @staticmethod
    def get_builder_cls():
        return CoPECudaMetadataBuilder

    @classmethod
    def validate_configuration(cls, **config) -> list[str]:
        """vLLM's reasons against a configuration (none: supported), that of the dtype in full."""
        # Not those of sparse prefill, whose memory and FP8 scales are its own.
        reasons = super(SparseCudaBackend, cls).validate_configuration(**config)
        if "dtype not supported" in reasons:
            reasons.remove("dtype not supported")
            reasons.append(f"{config['dtype']}: supported are bfloat16 and float16 (--dtype)")
        return reasons

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False


class CoPECudaMetadataBuilder(TritonAttentionMetadataBuilder):
    """vLLM's metadata is what the kernel reads."""

    # Not tried: the launches depend on the longest query. Piecewise graphs leave attention out.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        """The step's metadata. vLLM 0.27 passes the arguments by name."""
        refuse_non_causal(common_attn_metadata, WHAT)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)


class CoPECudaImpl(TritonAttentionImpl):
    """Attention of one layer; see `cope_backend.CoPEImpl` for the table and what is refused."""

    supports_dcp = False
    supports_pcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        *,
        pos_emb: torch.nn.Parameter,
        **special,
    ) -> None:
        refuse_layer(
            kv_cache_dtype,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **special,
        )
        super().__init__(
            num_heads, head_size, scale, num_kv_heads or num_heads, None, None, kv_cache_dtype,
        )  # fmt: skip
        self.pos_emb = pos_emb
        self.supports_quant_query_input = False

    def fused_output_quant_supported(self, quant_key) -> bool:
        return False

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write `output` [T, H, D]; query is [T, H, D], kv_cache [num_pages, Hkv, page, 2 D].

        key and value were written by do_kv_cache_update.
        """
        return attend(query, kv_cache, attn_metadata, self.pos_emb, self.scale, output)
