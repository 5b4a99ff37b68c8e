"""Attention with contextual positions on CPU builds of vLLM: one call of a kernel a step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.selector import AttentionSelectorConfig

from .. import compat, kernels, log, runtime
from ..backend import SparseAttentionBackend
from ..impl import CpuAttentionImpl, special_features
from ..kernels import cpu
from ..kernels.paged_cache import halves
from ..metadata import refuse_non_causal

logger = log.get_logger(__name__)

COPE = "COPE"
WHAT = "attention with contextual positions"


class CoPEBackend(SparseAttentionBackend):
    """The cache, and the writing of it, are those of the sparse backend: keys carry no position.

    It is never chosen: the layers of a CoPE model bring it.
    """

    @staticmethod
    def get_name() -> str:
        return COPE

    @staticmethod
    def get_impl_cls():
        return CoPEImpl

    @staticmethod
    def get_builder_cls():
        return CoPEMetadataBuilder


@dataclass
class CoPEMetadata:
    """One step: the sequences after another, decoding ones and chunks of prompts alike."""

    num_actual_tokens: int  # rows beyond it are padding
    max_query_len: int
    query_start_loc: torch.Tensor  # int32 [S + 1]
    seq_lens: torch.Tensor  # int32 [S], new tokens included
    block_table: torch.Tensor  # int32 [S, P]


class CoPEMetadataBuilder(AttentionMetadataBuilder[CoPEMetadata]):
    """Takes from vLLM's metadata what the kernel reads."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CoPEMetadata:
        """The step's CoPEMetadata. vLLM 0.27 passes the arguments by name."""
        common = common_attn_metadata
        refuse_non_causal(common, WHAT)
        return CoPEMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
        )


class CoPEImpl(CpuAttentionImpl):
    """Attention of one layer.

    Args:
        pos_emb: [P, D] in the model's dtype, the layer's table. It is read in each step, so that
            weights may be loaded after the layer is made, and again.

    Raises:
        ValueError: for a kind of attention that has no contextual positions here (ALiBi, a window,
            KV shared between layers, an FP8 cache, ...).
    """

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
        attn_type: str = AttentionType.DECODER,
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
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.pos_emb = pos_emb
        threads = runtime.size_pool()
        log.once(
            logger, logging.INFO,
            f"CoPE attention: kernels {cpu.isa()} x {threads} thread{'' if threads == 1 else 's'}",
        )  # fmt: skip

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CoPEMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write `output` [T, H, D]; query is [T, H, D], kv_cache [num_pages, Hkv, page, 2 D].

        key and value were written by do_kv_cache_update.
        """
        return attend(query, kv_cache, attn_metadata, self.pos_emb, self.scale, output)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata,
    pos_emb: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """Write `output`, in which rows of padding are left alone, on a CPU or a GPU.

    Args:
        metadata: a CoPEMetadata or what has its fields; None: vLLM measures memory.
    """
    if metadata is None:
        return output.fill_(0)
    rows = slice(0, metadata.num_actual_tokens)
    kernels.cope_attention(
        query[rows],
        *halves(kv_cache, query.shape[-1]),
        metadata.block_table,
        metadata.query_start_loc,
        metadata.seq_lens,
        pos_emb,
        scale=scale,
        max_query_len=metadata.max_query_len,
        out=output[rows].view_as(query[rows]),
    )
    return output


def refuse_layer(kv_cache_dtype: str, **asked) -> None:
    """Raise ValueError for what a layer asks of attention beside contextual positions."""
    features = special_features(**asked)
    if kv_cache_dtype not in CoPEBackend.supported_kv_cache_dtypes:
        features.append(f"a KV cache of {kv_cache_dtype!r} (give --kv-cache-dtype auto)")
    if features:
        raise ValueError(
            f"Attention with contextual positions (CoPE) cannot run layers with "
            f"{', '.join(features)}: it is causal, over all keys of its own layer, in the model's "
            "dtype"
        )


def backend_of_platform() -> type[AttentionBackend]:
    """The backend that CoPE layers have here.

    Raises:
        ValueError: vLLM runs on neither a CPU nor an NVIDIA GPU.
    """
    if current_platform.is_cpu():
        return CoPEBackend
    if current_platform.is_cuda():
        from .cope_cuda import CoPECudaBackend

        return CoPECudaBackend
    raise ValueError(
        f"CoPE models are served on CPUs and on NVIDIA GPUs, and vLLM runs on "
        f"{current_platform.device_type!r}"
    )


def make_known(backend: type[AttentionBackend]) -> None:
    """Add the backend to vLLM's enum, which every layer looks its backend's name up in. No config
    holds the member, so that processes without such a layer need not know it."""
    compat.backend_member(COPE, f"{backend.__module__}.{backend.__qualname__}")


def selector_config(vllm_config) -> AttentionSelectorConfig:
    """What vLLM would ask a backend for, if it chose one for the layers of this model."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    asked = {
        "head_size": vllm_config.model_config.get_head_size(),
        "dtype": vllm_config.model_config.dtype,
        "kv_cache_dtype": cache.cache_dtype,
        # One that vLLM settles by itself fits.
        "block_size": cache.block_size if cache.user_specified_block_size else None,
        "use_non_causal": getattr(vllm_config.attention_config, "use_non_causal", False),
        "use_batch_invariant": envs.VLLM_BATCH_INVARIANT,
        "use_pcp": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "use_dcp": parallel.decode_context_parallel_size > 1,
    }
    known = AttentionSelectorConfig._fields  # more in each version
    return AttentionSelectorConfig(**{k: v for k, v in asked.items() if k in known})
