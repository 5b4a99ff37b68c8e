"""forward(): decode rows and prefill segments of a step, dispatched to the kernels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from . import compat, kernels
from .config import SparseConfig
from .kernels.paged_cache import halves
from .kernels.softmax_modes import Softmax
from .layer_names import layer_index
from .metadata import Segment, SparseMetadata
from .patterns import ADAPTIVE
from .planner import plan_prefill
from .runtime import Model, count_flagged, start
from .stats import STATS

if TYPE_CHECKING:
    from .offload import OffloadedLayer


class CpuAttentionImpl(AttentionImpl):
    """What our layers on CPUs have in common: the writing of the cache, and what they refuse."""

    supports_dcp = False  # vLLM's own default was True in 0.26
    supports_pcp = False

    head_size: int

    def do_kv_cache_update(
        self,
        layer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write a step's keys and values, [T, Hkv, D] each; vLLM calls it before forward."""
        kernels.write_kv(key, value, *halves(kv_cache, self.head_size), slot_mapping)


class SparseAttentionImpl(CpuAttentionImpl):
    """Attention of one layer.

    Raises:
        ValueError: for a kind of attention that only the layer itself tells of (ALiBi, logits
            soft cap, KV shared between layers, ...).
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
        **special,
    ) -> None:
        refuse_special(
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

        vllm_config = get_current_vllm_config()
        self.config = SparseConfig.from_additional_config(vllm_config.additional_config)
        model = None if compat.makes_draft(vllm_config) else Model.of(vllm_config)
        self.layers = 0 if model is None else model.layers
        self.runtime = start(
            self.config,
            model,
            dtype=torch.get_default_dtype(),
            head_size=head_size,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            chunk=vllm_config.scheduler_config.max_num_batched_tokens,
        )
        self.break_even = self.runtime.break_even
        self.offload: OffloadedLayer | None = None
        if self.config.offloads:
            from .cpu_offload import kv_spec

            kv_spec.install()  # vLLM asks the layers what they keep once all of them are made
        # The layer's number is first seen in forward.
        self.patterns: tuple | None = None
        self.phi: torch.Tensor | None = None
        self.always_dense = False

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparseMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write `output` [T, H, D]; query is [T, H, D], kv_cache [num_pages, Hkv, page, 2 D].

        key and value were written by do_kv_cache_update.
        """
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        if self.patterns is None:
            self._find_patterns(layer.layer_name)
        k_cache, v_cache = halves(kv_cache, self.head_size)
        if self.config.offloads:
            return self._forward_offloaded(
                layer.layer_name, query, key, value, k_cache, v_cache, attn_metadata, output
            )
        return self._attend(query, k_cache, v_cache, attn_metadata, output)

    def _attend(
        self, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        attn_metadata: SparseMetadata, output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """`forward` over a cache that has every key."""
        decodes = attn_metadata.num_decodes
        if decodes:
            self._decode(attn_metadata, query[:decodes], k_cache, v_cache, output[:decodes])
        for segment in self._segments(attn_metadata):
            rows = slice(segment.begin, segment.end)
            self._prefill(segment, query[rows], k_cache, v_cache, output[rows])
        return output

    def _decode(
        self,
        metadata: SparseMetadata,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        flagged = self.runtime.flagged
        kernels.paged_decode(
            query,
            k_cache,
            v_cache,
            metadata.decode_block_table,
            metadata.decode_seq_lens,
            scale=self.scale,
            out=out,
            softmax=self._softmax(),
            phi=self.phi,
            flagged=flagged,
            shared=metadata.shared,
        )
        if self.phi is not None:
            count_flagged(flagged)

    def _softmax(self) -> Softmax:
        softmax = self.config.softmax
        return "online" if softmax == "unified" and self.phi is None else softmax

    def _segments(self, attn_metadata: SparseMetadata) -> list[Segment]:
        return attn_metadata.dense_segments if self.always_dense else attn_metadata.segments

    def _forward_offloaded(
        self, layer_name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: SparseMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """`forward` where past keys and values lie in host memory."""
        if self.offload is None:
            from .offload import OffloadedLayer

            self.offload = OffloadedLayer(layer_name, self.config, self.scale)
        given = (query, key, value, k_cache, v_cache, metadata, output)
        return self.offload.guarded(lambda: self._attend_offloaded(*given), output)

    def _attend_offloaded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: SparseMetadata,
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        batch = self.offload.append(metadata, key, value, k_cache.shape[2])
        if self.offload.resident:
            self._attend(query, k_cache, v_cache, metadata, output)
            return
        decodes = metadata.num_decodes
        if decodes:
            self.offload.decode(
                batch, metadata, query[:decodes], k_cache, v_cache, output[:decodes],
                softmax=self._softmax(), phi=self.phi, flagged=self.runtime.flagged,
            )  # fmt: skip
            if self.phi is not None:
                count_flagged(self.runtime.flagged)
        for device_segment in self._segments(metadata):
            segment, k_pages, v_pages = self.offload.segment(batch, device_segment)
            rows = slice(segment.begin, segment.end)
            self._prefill(segment, query[rows], k_pages, v_pages, output[rows])

    def _prefill(
        self,
        segment: Segment,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        where = (segment.block_table, segment.query_start_loc, segment.seq_lens)
        begin = time.perf_counter()
        indices = None
        if segment.sparse:
            indices = plan_prefill(
                query,
                k_cache,
                *where,
                self.patterns,
                scale=self.scale,
                coverage=self.config.coverage,
            )
        planned = time.perf_counter()
        kernels.sparse_prefill(
            query, k_cache, v_cache, *where, indices, scale=self.scale,
            mean_correction=self.config.mean_correction, out=out,
        )  # fmt: skip
        done = time.perf_counter()
        STATS.index_seconds += planned - begin
        STATS.attention_seconds += done - planned
        read, causal = self._keys(segment, indices)
        STATS.keys_read += read
        STATS.keys_causal += causal

    def _keys(self, segment: Segment, indices) -> tuple[int, int]:
        """(keys read, keys that are causal), in keys x tiles x heads."""
        if indices is not None:
            return indices.selected_keys(segment.query_lens, segment.seq_lens_list)
        causal = self.num_heads * segment.causal_keys
        return causal, causal

    def _find_patterns(self, layer_name: str) -> None:
        index = layer_index(layer_name)
        if index >= self.layers:  # a draft's, which goes on counting after the target's layers
            self.patterns = (ADAPTIVE,) * self.num_heads
            return
        first_head = get_tensor_model_parallel_rank() * self.num_heads
        self.patterns = self.runtime.heads.patterns(index, first_head, self.num_heads)
        self.phi = self.runtime.heads.phi(index, first_head, self.num_heads)
        self.always_dense = index in self.config.dense_layers or all(
            p.kind == "dense" for p in self.patterns
        )


def refuse_special(**asked) -> None:
    """Raise ValueError for what a layer asks of attention and this backend has not."""
    if present := special_features(**asked):
        raise ValueError(
            f"The sparse attention backend cannot run layers with {', '.join(present)}. "
            "Leave --attention-backend out to serve this model with vLLM's own backend."
        )


def special_features(
    *,
    alibi_slopes: list[float] | None,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    sliding_window: int | None = None,
    **special,
) -> list[str]:
    """Names of what a layer asks of attention beyond causal attention over its own keys."""
    features = {
        "ALiBi": alibi_slopes is not None,
        "a sliding window": sliding_window is not None,
        f"a logits soft cap of {logits_soft_cap}": bool(logits_soft_cap),
        f"attention of type {attn_type!r}": attn_type != AttentionType.DECODER,
        f"KV shared with layer {kv_sharing_target_layer_name!r}": (
            kv_sharing_target_layer_name is not None
        ),
        **{f"{k} = {v!r}": True for k, v in special.items() if v is not None},
    }
    return [name for name, is_present in features.items() if is_present]
