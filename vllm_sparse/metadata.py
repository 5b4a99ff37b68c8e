"""vLLM's metadata of a step -> SparseMetadata, once for all layers of a KV cache group."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from . import log
from .backend import SparseAttentionBackend
from .config import SparseConfig
from .kernels.block_indices import TILE
from .kernels.shared_prefix import SharedPrefixes, shared_prefixes
from .stats import STATS, Reporter

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Segment:
    """Adjacent sequences of a batch that prefill in one call. All on the CPU."""

    begin: int  # first row of the batch's queries
    end: int
    first: int  # number in the batch of its first sequence
    query_start_loc: torch.Tensor  # int32 [S + 1], from 0
    seq_lens: torch.Tensor  # int32 [S], new tokens included
    block_table: torch.Tensor  # int32 [S, P]
    query_lens: list[int]  # [S]
    seq_lens_list: list[int]  # [S]
    sparse: bool  # False: every causal key is read

    @functools.cached_property
    def causal_keys(self) -> int:
        """Keys that dense attention reads, in keys x query tiles (of one head)."""
        pairs = zip(self.query_lens, self.seq_lens_list, strict=True)
        return sum(
            min(seq_len - query_len + end, seq_len)
            for query_len, seq_len in pairs
            for end in range(TILE, query_len + TILE, TILE)
        )


@dataclass
class SparseMetadata:
    """One step: the decoding sequences first, one row each, then the prefill segments."""

    num_actual_tokens: int  # rows beyond it are padding
    num_decodes: int
    decode_seq_lens: torch.Tensor  # int32 [num_decodes]
    decode_block_table: torch.Tensor  # int32 [num_decodes, P]
    segments: list[Segment]  # cut where sparse and dense sequences meet
    dense_segments: list[Segment]  # all prefill as one, for layers that are always dense
    starts: list[int]  # first row of each sequence, and the end
    seq_lens: list[int]  # of each sequence, new tokens included
    block_table: torch.Tensor  # int32 [S, P]
    shared: SharedPrefixes | None = None  # of the decoding sequences; None: none share
    batch: Any = None  # offload.Batch, made by the first layer that needs it


class SparseMetadataBuilder(AttentionMetadataBuilder[SparseMetadata]):
    """Splits each step into decode rows and prefill segments, and counts it.

    Raises:
        ValueError: at start-up, for a layer whose attention is not the ordinary causal one.
    """

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # One row per decoding sequence; speculated tokens are prefill rows, and dense.
        self._init_reorder_batch_threshold(1)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        for name in layer_names:
            _refuse_special(name, layers[name])
        self.break_even = layers[layer_names[0]].impl.break_even
        config = SparseConfig.from_additional_config(vllm_config.additional_config)
        # Pages that went to host memory all have one number.
        self.shares = config.shared_prefix is not False and not config.offloads
        # Of several KV cache groups one counts the step.
        ours = [n for n, layer in layers.items() if _backend(layer) is SparseAttentionBackend]
        self.counts = ours[0] in layer_names
        self.reporter = Reporter(STATS, logger)
        if self.counts:
            STATS.fallbacks |= _left_to_vllm(layers)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparseMetadata:
        """The step's SparseMetadata. vLLM 0.27 passes the arguments by name."""
        common = common_attn_metadata
        refuse_non_causal(common, "the sparse backend")
        starts = common.query_start_loc_cpu.tolist()
        query_lens = [b - a for a, b in itertools.pairwise(starts)]
        while query_lens and query_lens[-1] == 0:  # padding
            query_lens.pop()
        num_seqs = len(query_lens)
        num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), num_seqs)
        seq_lens = common.seq_lens[:num_seqs].tolist()
        # A missing flag means an older vLLM, which has no rows that are neither.
        prompts = common.is_prefilling
        prompts = [True] * num_seqs if prompts is None else prompts.tolist()
        sparse = [
            n > 1 and prompts[i] and seq_lens[i] >= self.break_even
            for i, n in enumerate(query_lens)
        ]

        def segment(first: int, last: int, is_sparse: bool) -> Segment:
            query_start_loc = common.query_start_loc[first : last + 1]
            return Segment(
                begin=starts[first],
                end=starts[last],
                first=first,
                query_start_loc=query_start_loc - query_start_loc[0],
                seq_lens=common.seq_lens[first:last],
                block_table=common.block_table_tensor[first:last],
                query_lens=query_lens[first:last],
                seq_lens_list=seq_lens[first:last],
                sparse=is_sparse,
            )

        cuts = [i for i in range(num_decodes + 1, num_seqs) if sparse[i] != sparse[i - 1]]
        bounds = [num_decodes, *cuts, num_seqs] if num_decodes < num_seqs else []
        metadata = SparseMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            decode_seq_lens=common.seq_lens[:num_decodes],
            decode_block_table=common.block_table_tensor[:num_decodes],
            segments=[segment(a, b, sparse[a]) for a, b in itertools.pairwise(bounds)],
            dense_segments=[segment(num_decodes, num_seqs, False)] if bounds else [],
            starts=starts[: num_seqs + 1],
            seq_lens=seq_lens,
            block_table=common.block_table_tensor,
            shared=self._shared(common.block_table_tensor[:num_decodes], common.seq_lens),
        )
        if self.counts:
            self._count(metadata, query_lens, prompts, sparse)
        return metadata

    def _shared(self, block_table: torch.Tensor, seq_lens: torch.Tensor) -> SharedPrefixes | None:
        """What the sequences of a block table, one row each, begin with together."""
        num = len(block_table)
        if not self.shares or num < 2:
            return None
        page = self.kv_cache_spec.block_size
        found = shared_prefixes(block_table, None, seq_lens[:num], page=page)
        return found if found.tile_keys.any() else None

    def _count(
        self, metadata: SparseMetadata, query_lens: list[int], prompts: list[bool],
        sparse: list[bool],
    ) -> None:  # fmt: skip
        # What has more rows than one and reads no prompt has tokens that were speculated.
        chunks = [n for n, prompt in zip(query_lens, prompts, strict=True) if n > 1 and prompt]
        self.reporter.step(decode_only=not chunks)
        STATS.decode_rows += sum(query_lens) - sum(chunks)
        if metadata.shared is not None:
            STATS.shared_rows += int((metadata.shared.keys > 0).sum())
        STATS.prefill_tokens += sum(chunks)
        STATS.sparse_chunks += sum(sparse)
        STATS.dense_chunks += len(chunks) - sum(sparse)


def refuse_non_causal(common: CommonAttentionMetadata, what: str) -> None:
    """Raise NotImplementedError, of what is causal only, for a step with rows that are not."""
    if isinstance(common.causal, torch.Tensor) or not common.causal:  # a tensor: row by row
        raise NotImplementedError(f"{what} is causal only")


def _backend(layer) -> type | None:
    # Not every such layer has a backend at hand (those of Mamba models ask vLLM for it).
    return getattr(layer, "attn_backend", None)


def _refuse_special(name: str, layer) -> None:
    """Raise ValueError for attention that is derived from a backend, such as chunked-local.

    vLLM asks for a backend as for an ordinary layer and then subclasses it, so that the platform's
    selection cannot tell.
    """
    if _backend(layer) is not SparseAttentionBackend:
        raise ValueError(
            f"The sparse attention backend cannot run layer {name!r}: {type(layer).__name__} is "
            "not ordinary causal attention. Leave --attention-backend out to serve this model "
            "with vLLM's own backend."
        )
    value_size = getattr(layer, "head_size_v", layer.head_size)
    if value_size != layer.head_size:
        raise ValueError(
            f"The sparse attention backend cannot run layer {name!r}: its keys have size "
            f"{layer.head_size} and its values {value_size}, and must have the same. Leave "
            "--attention-backend out to serve this model with vLLM's own backend."
        )


def _left_to_vllm(layers: dict) -> dict[str, int]:
    """Number of attention layers that vLLM's own backend serves, by reason."""
    found: dict[str, int] = {}
    for layer in layers.values():
        if _backend(layer) in (None, SparseAttentionBackend):
            continue
        window = getattr(layer, "sliding_window", None) is not None
        sink = getattr(layer, "has_sink", False)
        reason = "sliding_window" if window else "sinks" if sink else "other"
        found[reason] = found.get(reason, 0) + 1
    return found
