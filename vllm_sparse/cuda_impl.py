"""forward() on a GPU: long chunks of prompts and decode to our kernels, all else to vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadata

from . import compat, log
from .config import SECTION, SparseConfig
from .cuda_backend import cache_problem
from .cuda_dense import Flash, flash_for, triton_dense
from .cuda_metadata import GpuSegment, SparseCudaMetadata, decode_rows
from .cuda_runtime import Counters, shared_counters, start, workspace_bytes
from .cuda_sums import LayerSums
from .impl import refuse_special
from .kernels.gpu import left_out
from .kernels.gpu.block_means import PageSums
from .kernels.gpu.paged_decode import (
    Workspace,
    members_of,
    paged_decode,
    shared_workspace,
    warm_up,
)
from .kernels.gpu.sparse_prefill import sparse_prefill
from .kernels.paged_cache import FP8, check_scales, halves
from .kernels.softmax_modes import Softmax
from .layer_names import layer_index
from .patterns import ADAPTIVE
from .planner.device import plan_on_device
from .planner.device_break_even import NEVER_PAYS, BreakEven
from .runtime import HeadSettings, Model
from .stats import STATS

if TYPE_CHECKING:
    from .cuda_offload import CudaOffloadedLayer
    from .staging import Staging

logger = log.get_logger(__name__)


class SparseCudaImpl(TritonAttentionImpl):
    """Attention of one layer.

    Raises:
        ValueError: for a kind of attention that only the layer itself tells of (ALiBi, logits
            soft cap, KV shared between layers, ...).
    """

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
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **special,
    ) -> None:
        refuse_special(
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            # What stands for "none" here.
            **{k: v for k, v in special.items() if v not in (None, False, -1)},
        )
        if problem := cache_problem(kv_cache_dtype):
            raise ValueError(problem)
        num_kv_heads = num_kv_heads or num_heads
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks,
        )  # fmt: skip
        vllm_config = get_current_vllm_config()
        self.config = SparseConfig.from_additional_config(vllm_config.additional_config)
        if self.config.offloads and kv_cache_dtype.startswith("fp8"):
            raise ValueError(
                f'{SECTION}["decode"] is {self.config.decode!r}: host memory has rows in the '
                "model's dtype, and this cache is FP8; give --kv-cache-dtype bfloat16"
            )
        if self.config.mean_correction:
            left_out.check_head_size(head_size)
        scheduler = vllm_config.scheduler_config
        self.chunk = scheduler.max_num_batched_tokens
        self.longest = vllm_config.model_config.max_model_len
        self.most_seqs = scheduler.max_num_seqs
        self.most_rows = decode_rows(vllm_config)
        self.dtype = torch.get_default_dtype()
        self.fp8 = kv_cache_dtype.startswith("fp8")
        self.cache_dtype = FP8 if self.fp8 else self.dtype
        # Our kernels take queries in the model's dtype; vLLM's takes them as well, beside FP8 keys.
        self.supports_quant_query_input = False
        # A window of a few thousand tokens leaves little to leave out.
        self.always_dense = sliding_window is not None
        # What follows is known once the cache is laid out; see `settle`.
        self.page: int | None = None
        self.flash: Flash | None = None
        self.break_even = NEVER_PAYS
        self.counters: Counters | None = None
        self.patterns: tuple | None = None
        self.layer_sums = LayerSums(
            self.dtype, vllm_config.cache_config,
            from_elsewhere=vllm_config.kv_transfer_config is not None,
        )  # fmt: skip
        self.window = sliding_window
        # Most sequences whose decode reads what they begin with together; below 2: none do.
        self.members = 0
        if self.config.shared_prefix and sliding_window is None:
            self.members = members_of(num_heads // num_kv_heads, head_size, self.most_rows)
        self.workspace: Workspace | None = None
        self.phi: torch.Tensor | None = None
        self.offload: CudaOffloadedLayer | None = None
        self.staging: Staging | None = None
        if self.config.offloads:
            from .cpu_offload import kv_spec

            kv_spec.install()  # vLLM asks the layers what they keep once all of them are made
        if self.always_dense:
            STATS.fell_back("sliding_window")
        # A draft's layers are not those that the settings' layers and patterns are of.
        self.layers = 0
        self.heads = HeadSettings()
        if not compat.makes_draft(vllm_config):
            model = Model.of(vllm_config)
            self.layers = model.layers
            self.heads = HeadSettings.of(self.config, model)

    def fused_output_quant_supported(self, quant_key) -> bool:
        return False

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Write a step's keys and values; vLLM calls it before forward. A graph can hold it."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        self.prepare(kv_cache)
        if self.sums is not None:
            self.sums.update(self._caches(kv_cache)[0], slot_mapping)

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_pages, Hkv, page, D] of vLLM's cache, which holds FP8 as bytes."""
        if self.fp8 and kv_cache.dtype != FP8:
            kv_cache = kv_cache.view(FP8)
        return halves(kv_cache, self.head_size)

    def _scales(self, layer) -> dict[str, torch.Tensor]:
        """Of keys and values, on the device, as vLLM calibrated or loaded them."""
        return {"k_scale": layer._k_scale, "v_scale": layer._v_scale} if self.fp8 else {}

    def prepare(self, kv_cache: torch.Tensor) -> None:
        """Make room for the sums of pages; see `LayerSums.prepare`."""
        # Empty: vLLM measures memory.
        if not self.always_dense and kv_cache.numel() and self.layer_sums.is_new(kv_cache):
            self.layer_sums.prepare(self._caches(kv_cache)[0])

    @property
    def sums(self) -> PageSums | None:
        return self.layer_sums.sums

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparseCudaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write `output` [T, H, D]; query is [T, H, D], kv_cache [num_pages, Hkv, page, 2 D].

        key and value were written by do_kv_cache_update.
        """
        self._prepare(layer, query.device)
        if attn_metadata is None:  # vLLM measures memory: show it what planning will take
            if not self.always_dense:
                vertical = max(p.vertical or 0 for p in self.patterns)
                shape = (self.num_heads, self.head_size)
                need = workspace_bytes(self.chunk, self.longest, *shape, vertical)
                if self.config.mean_correction:
                    need += left_out.means_bytes(self.longest, self.num_kv_heads, self.head_size)
                torch.empty(need, dtype=torch.uint8, device=query.device)
            return output.fill_(0)
        given = (layer, query, key, value, kv_cache, attn_metadata, output)
        if not self.config.offloads:
            return self.attend(*given)
        if self.offload is None:
            from .cuda_offload import layer_of

            self.offload = layer_of(self, layer.layer_name)
        if self.offload is None:  # vLLM tries the model out before it serves
            return output.zero_()
        return self.offload.forward(*given)

    def attend(
        self, layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kv_cache: torch.Tensor, attn_metadata: SparseCudaMetadata, output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """`forward` over a cache that has every key."""
        segments = attn_metadata.segments
        if segments is None and attn_metadata.decodes:
            tokens = attn_metadata.num_actual_tokens
            rows = slice(0, tokens)
            self.decode(layer, attn_metadata, query[rows], kv_cache, output[rows])
            return output
        if segments is None or self.always_dense:
            tokens = attn_metadata.num_actual_tokens
            rows = slice(0, tokens)
            given = (query[rows], key, value, kv_cache, output[rows])
            self._dense(layer, attn_metadata, *given)
            return output
        for segment in segments:
            rows = slice(segment.begin, segment.end)
            if segment.decodes:
                self.decode(layer, segment.metadata, query[rows], kv_cache, output[rows])
            else:
                given = (query[rows], key[rows], value[rows], kv_cache, output[rows])
                self.prefill(layer, segment, *given)
        return output

    def prefill(
        self, layer, segment: GpuSegment, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        if segment.sparse and not self.always_dense:
            self._sparse(layer, segment, query, kv_cache, out)
        else:
            self._dense(layer, segment.metadata, query, key, value, kv_cache, out)

    def _dense(
        self,
        layer,
        metadata: TritonAttentionMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if self.flash is None:
            super().forward(layer, query, key, value, kv_cache, metadata, out)
            return
        self.flash.attend(
            query, *self._caches(kv_cache), metadata.block_table, metadata.query_start_loc,
            metadata.seq_lens, scale=self.scale, longest_query=metadata.max_query_len,
            longest=metadata.max_seq_len, window=self.window, out=out.view_as(query),
            sinks=self.sinks,
        )  # fmt: skip

    def decode(
        self,
        layer,
        metadata: SparseCudaMetadata,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the rows' lse, fp32 [T, H]."""
        _, lse = paged_decode(
            query,
            *self._caches(kv_cache),
            metadata.block_table,
            metadata.seq_lens,
            scale=self.scale,
            out=out.view_as(query),
            softmax=self._softmax(),
            phi=self.phi,
            flagged=None if self.phi is None else self.counters.flagged,
            query_start_loc=metadata.query_start_loc,
            max_query_len=metadata.max_query_len,
            window=self.window,
            sinks=self.sinks,
            shared=metadata.shared if self.window is None else None,
            workspace=self.workspace,
            **self._scales(layer),
        )
        return lse

    def _sparse(
        self,
        layer,
        segment: GpuSegment,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        k_cache, v_cache = self._caches(kv_cache)
        scales = self._scales(layer)
        where = segment.metadata
        # As wide as the longest sequence: room for means goes by it.
        table = where.block_table[:, : -(-max(segment.seq_lens) // k_cache.shape[2])]
        with self.counters.timed() as planned:
            indices = plan_on_device(
                query,
                k_cache,
                where.block_table,
                segment.query_lens,
                segment.seq_lens,
                self.patterns,
                scale=self.scale,
                coverage=self.config.coverage,
                means=None if self.sums is None else self.sums.means,
                k_scale=scales.get("k_scale"),
            )
            planned()
            sparse_prefill(
                query, k_cache, v_cache, table, where.query_start_loc, where.seq_lens, indices,
                scale=self.scale, sinks=self.sinks, mean_correction=self.config.mean_correction,
                out=out.view_as(query), **scales,
            )  # fmt: skip
        self.counters.add(indices, segment.query_lens, segment.seq_lens)

    def _prepare(self, layer, device: torch.device) -> None:
        """What a captured graph must find: patterns, phi, and room for decode. The first time,
        vLLM is measuring memory, which what is made here belongs to."""
        if self.workspace is not None:
            return
        check_scales(device, **self._scales(layer))
        self.workspace = shared_workspace(device)
        self.workspace.reserve(self.head_size, device)
        if self.config.offloads:
            from .cuda_offload import staging_of

            self.staging = staging_of(self, device)
        if self.window is None:
            self.counters = shared_counters(device)
            self._find_patterns(layer.layer_name)

    def settle(self, layer, page: int, device: torch.device) -> None:
        """Compile and measure what depends on the tokens of a page, which vLLM settles for good
        when it lays out the cache. It does so twice, first to try graphs: once is enough."""
        self._prepare(layer, device)
        if page == self.page:
            return
        self.page = page
        has_sinks = self.sinks is not None
        shape = (self.head_size, self.num_heads, self.num_kv_heads)
        sinks = self.sinks.dtype if has_sinks else None
        self.flash = flash_for(*shape, page, self.dtype, self.cache_dtype, sinks, device)
        if self.config.offloads:
            from .cuda_offload import settle

            settle(self, device)
        if not self.always_dense:
            self.break_even = start(
                self.config, dtype=self.dtype, cache_dtype=self.cache_dtype,
                head_size=self.head_size, num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads, chunk=self.chunk, page=page, device=device,
                dense=self.flash or triton_dense, has_sinks=has_sinks,
                of_first_rank=of_first_rank,
            )  # fmt: skip
        if device.type == "cuda":  # the interpreter has nothing to compile
            warm_up(
                device, self.dtype, self.cache_dtype, self.num_heads, self.num_kv_heads,
                self.head_size, page, self.longest, self.most_seqs, self._softmax(),
                self.window, has_sinks, self.most_rows, self.members > 1,
            )  # fmt: skip

    def _softmax(self) -> Softmax:
        # Layers with a window have no phi: they are not looked at in calibration.
        softmax = self.config.softmax
        return "online" if softmax == "unified" and self.phi is None else softmax

    def _find_patterns(self, layer_name: str) -> None:
        index = layer_index(layer_name)
        if index >= self.layers:  # a draft's, which goes on counting after the target's layers
            self.patterns = (ADAPTIVE,) * self.num_heads
            return
        first_head = get_tensor_model_parallel_rank() * self.num_heads
        self.patterns = self.heads.patterns(index, first_head, self.num_heads)
        phi = self.heads.phi(index, first_head, self.num_heads)
        self.phi = None if phi is None else phi.to(self.counters.flagged.device)
        self.always_dense = index in self.config.dense_layers or all(
            p.kind == "dense" for p in self.patterns
        )


def of_first_rank(measure: Callable[[], BreakEven]) -> BreakEven:
    """What `measure` finds on the first tensor-parallel rank, on all of them."""
    group = get_tp_group()
    return group.broadcast_object(measure() if group.rank_in_group == 0 else None)
