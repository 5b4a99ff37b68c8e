"""vLLM's metadata of a step on a GPU, cut where dense and sparse sequences meet."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from . import log
from .config import SparseConfig
from .kernels.gpu.shared_prefix import Room, shared_prefixes
from .kernels.shared_prefix import SharedPrefixes
from .planner.device_break_even import NEVER_PAYS
from .stats import STATS, Reporter

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class GpuSegment:
    """Adjacent sequences of a step that one call attends. Tensors are the device's."""

    begin: int  # first row of the batch's queries
    end: int
    first: int  # number in the batch of its first sequence
    query_lens: list[int]  # [S]
    seq_lens: list[int]  # [S], new tokens included
    metadata: SparseCudaMetadata  # of these sequences, not cut, rows counted from 0
    decodes: bool  # one row each, or one and the tokens speculated after it
    sparse: bool  # False: vLLM's own kernels attend
    far: bool = False  # one sequence, of which the device lacks rows that host memory has


@dataclass(frozen=True)
class Sequences:
    """A step's sequences, on the host; for layers whose rows are kept there as well."""

    starts: list[int]  # first row of each, and the end
    tails: list[int]  # the last block of each


@dataclass
class SparseCudaMetadata(TritonAttentionMetadata):
    """vLLM's, and how the step is cut where some of it is sparse (None: it is not cut).

    decodes: in a step that is not cut no sequence has more rows than one that decodes.
    shared: what the sequences of such a step begin with together; None: it was not looked for.
    sequences: None where nothing is kept in host memory.
    batch: an offload.Batch, made by the first layer that needs it.
    """

    segments: list[GpuSegment] | None = None
    decodes: bool = False
    shared: SharedPrefixes | None = None
    sequences: Sequences | None = None
    batch: Any = None


class SparseCudaMetadataBuilder(TritonAttentionMetadataBuilder):
    """Adds the segments to vLLM's metadata, and counts the step."""

    # Decoding is one kernel whose launch follows from the batch's shape, so that a graph can hold
    # it, speculated tokens with it; it is exact, whatever rows of a prompt vLLM replays it for.
    # Where prompts are planned, launches depend on lengths: piecewise graphs leave attention out.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """NEVER over host memory: the host takes part in each layer."""
        if SparseConfig.from_additional_config(vllm_config.additional_config).offloads:
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.most_rows = decode_rows(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        self.layers = [layers[name] for name in layer_names]
        impls = [layer.impl for layer in self.layers]
        with set_current_vllm_config(vllm_config):  # it may name a FlashAttention
            for layer in self.layers:
                layer.impl.settle(layer, kv_cache_spec.block_size, device)
        # Layers with a window are vLLM's throughout, and have no break-even.
        sparse = [impl for impl in impls if not impl.always_dense]
        self.all_dense = not sparse
        # Those of a group are of one shape.
        self.break_even = sparse[0].break_even if sparse else NEVER_PAYS
        ours = [
            name
            for name, layer in layers.items()
            if hasattr(getattr(layer, "impl", None), "break_even") and not layer.impl.always_dense
        ]
        # Of several KV cache groups one counts the step.
        self.counts = bool(ours) and ours[0] in layer_names
        counters = {impl.counters for impl in impls if impl.counters is not None}
        self.reporter = Reporter(STATS, logger, settle=[c.settle for c in counters])
        self.page = kv_cache_spec.block_size
        self.sharing = next(iter(counters)).sharing if self.counts and counters else None
        self.offloads = SparseConfig.from_additional_config(vllm_config.additional_config).offloads
        self.room = None
        if (members := max(impl.members for impl in impls)) > 1:
            graphs = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
            most = max(vllm_config.scheduler_config.max_num_seqs, *graphs)
            self.room = Room(most, members, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparseCudaMetadata:
        """The step's SparseCudaMetadata. vLLM 0.27 passes the arguments by name."""
        common = common_attn_metadata
        for layer in self.layers:
            cache = getattr(layer, "kv_cache", None)
            # vLLM before 0.28 has a list of one for each pipeline's virtual engine.
            cache = cache[0] if isinstance(cache, (list, tuple)) and cache else cache
            if isinstance(cache, torch.Tensor):
                layer.impl.prepare(cache)
        whole = super().build(common_prefix_len, common, fast_build)
        fields = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
        starts = common.query_start_loc_cpu.tolist()
        query_lens = [b - a for a, b in itertools.pairwise(starts)]
        while query_lens and query_lens[-1] == 0:  # padding
            query_lens.pop()
        num_seqs = len(query_lens)
        prompts = common.is_prefilling
        prompts = [True] * num_seqs if prompts is None else prompts.tolist()
        sparse = [False] * num_seqs
        seq_lens: list[int] = []
        if self.offloads or (not self.all_dense and common.max_query_len > 1):
            seq_lens = host_lengths(common)[:num_seqs]
        if not self.all_dense and common.max_query_len > 1:
            sparse = [
                n > 1 and prompts[i] and self.break_even.pays(n, seq_lens[i])
                for i, n in enumerate(query_lens)
            ]
        decodes = [
            n == 1 or (n <= self.most_rows and not prompts[i]) for i, n in enumerate(query_lens)
        ]
        if self.counts:
            self._count(query_lens, sparse, decodes)
        far = [False] * num_seqs
        # A graph of decoding may be replayed for any batch of so few rows each, the ends of prompts
        # among them, and looks in the room: it must be of this step.
        short = all(n <= self.most_rows for n in query_lens)
        shared = self._shared(whole, self.room) if short else None
        if self.offloads:
            fields["sequences"] = self._sequences(common, starts, seq_lens)
            far = [
                not decodes[i] and self._lacks_rows(seq_lens[i] - n)
                for i, n in enumerate(query_lens)
            ]
        elif not any(sparse):
            return SparseCudaMetadata(**fields, decodes=short, shared=shared)
        whole = SparseCudaMetadata(**fields)
        kinds = list(zip(sparse, decodes, far, strict=True))
        cuts = [i for i in range(1, num_seqs) if kinds[i] != kinds[i - 1] or far[i]]
        segments = [
            self._segment(whole, starts, query_lens, seq_lens, a, b, *kinds[a])
            for a, b in itertools.pairwise([0, *cuts, num_seqs])
        ]
        return SparseCudaMetadata(**fields, segments=segments)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SparseCudaMetadata:
        """Of a batch that decodes, whatever vLLM says of its made-up rows: a plan made for one
        step's lengths must not be what a graph replays."""
        decoding = torch.zeros(common_attn_metadata.num_reqs, dtype=torch.bool)
        return super().build_for_cudagraph_capture(
            replace(common_attn_metadata, is_prefilling=decoding)
        )

    def _shared(
        self, metadata: TritonAttentionMetadata, into: Room | None = None
    ) -> SharedPrefixes | None:
        """What the sequences of a batch that decodes begin with together, padding included. `into`:
        where a captured graph looks for it."""
        if self.room is None or len(metadata.seq_lens) < 2:
            return None
        return shared_prefixes(
            metadata.block_table, metadata.query_start_loc, metadata.seq_lens, page=self.page,
            members=self.room.members, into=into, sharing=self.sharing,
        )  # fmt: skip

    def _sequences(
        self, common: CommonAttentionMetadata, starts: list[int], seq_lens: list[int]
    ) -> Sequences:
        """Waits for the device, once a step."""
        from .offload import last_blocks

        tails = last_blocks(common.block_table_tensor, seq_lens, self.page)
        return Sequences(starts[: len(seq_lens) + 1], tails)

    def _lacks_rows(self, computed: int) -> bool:
        """Whether rows of a sequence may be gone from the device before its next chunk."""
        spec = self.kv_cache_spec
        if not hasattr(spec, "sink_blocks"):  # not an OffloadWindowSpec
            return False
        from .offload import first_block

        return first_block(computed + 1, spec.sliding_window, self.page) > spec.sink_blocks

    def _segment(
        self, whole, starts, query_lens, seq_lens, first, last, sparse, decodes, far
    ) -> GpuSegment:
        begin, end = starts[first], starts[last]
        lengths = seq_lens[first:last]
        part = replace(
            whole,
            num_actual_tokens=end - begin,
            max_query_len=self._most_rows_of(query_lens[first:last], decodes),
            query_start_loc=whole.query_start_loc[first : last + 1] - begin,
            max_seq_len=max(lengths),
            seq_lens=whole.seq_lens[first:last],
            block_table=whole.block_table[first:last],
            slot_mapping=whole.slot_mapping[begin:end],
        )
        if decodes:
            part.shared = self._shared(part)
        return GpuSegment(
            begin, end, first, query_lens[first:last], lengths, part, decodes, sparse, far
        )

    def _most_rows_of(self, query_lens: list[int], decodes: bool) -> int:
        """Most rows of a sequence of a segment, on the device as well: with adaptive verification
        vLLM only says there how speculated tokens are spread over sequences."""
        most = max(query_lens)
        return self.most_rows if decodes and most > 1 else most

    def _count(self, query_lens: list[int], sparse: list[bool], decodes: list[bool]) -> None:
        chunks = [n for n, decode in zip(query_lens, decodes, strict=True) if not decode]
        self.reporter.step(decode_only=not chunks)
        STATS.decode_rows += sum(query_lens) - sum(chunks)
        STATS.prefill_tokens += sum(chunks)
        STATS.sparse_chunks += sum(sparse)
        STATS.dense_chunks += len(chunks) - sum(sparse)


def decode_rows(vllm_config) -> int:
    """Most rows of a sequence that decodes: a token, and those that were speculated after it."""
    speculative = vllm_config.speculative_config
    return 1 + ((speculative and speculative.num_speculative_tokens) or 0)


def host_lengths(common: CommonAttentionMetadata) -> list[int]:
    """Keys of each sequence. Exact for those that read a prompt: what vLLM may not know yet on the
    host is how many speculated tokens of a decoding sequence were taken."""
    known = getattr(common, "seq_lens_cpu_upper_bound", None)
    if known is None:  # a wait for the device, once a step and before its first layer
        known = common.seq_lens.cpu()
    return known.tolist()


__all__ = [
    "GpuSegment",
    "Sequences",
    "SparseCudaMetadata",
    "SparseCudaMetadataBuilder",
    "decode_rows",
    "host_lengths",
]
