"""The device's share of offloaded layers, in vLLM's terms: which blocks a request holds.

A request keeps the blocks of its first tokens, of the last `sliding_window` ones and of what is
being computed; all others go back to vLLM's block pool once the host has their rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparse.config import SparseConfig
from vllm_sparse.layer_names import layer_index
from vllm_sparse.plugin import BACKEND


@dataclass(frozen=True, kw_only=True)
class OffloadWindowSpec(SlidingWindowSpec):
    """A layer with full attention, of which the device holds sink and window only.

    vLLM sizes its pool and admits requests by what a sliding window holds at most, which it does
    for subclasses of SlidingWindowSpec.
    """

    sink_blocks: int

    @property
    def num_retained_tokens(self) -> int:
        """0: from 0.33 on vLLM's workers strike out a block table's entries below a window's
        reach, the sink's among them, unless that is 0."""
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        held = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(held + self.sink_blocks, -(-max_model_len // self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class OffloadWindowManager(SlidingWindowManager):
    """Frees the middle of each request, and offers nothing to vLLM's prefix cache.

    A hit on a window alone would say nothing of the rows before it: hits come from the host's
    store, through the connector.
    """

    def __init__(self, kv_cache_spec: OffloadWindowSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks
        # Rows of a request that the host has for certain; the connector binds it.
        self.acknowledged: Callable[[str], int] = lambda request_id: 0

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes, max_length, kv_cache_group_ids, *args, **kwargs
    ) -> tuple[tuple[list, ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0

    @classmethod
    def reachable_block_mask(cls, start_block: int, end_block: int, *args, **kwargs) -> list[bool]:
        return [False] * (end_block - start_block)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        rows = min(processed_computed_tokens, self.acknowledged(request_id))
        end = self.get_num_skipped_tokens(rows) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, end)

    def get_num_blocks_to_allocate(
        self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
    ) -> int:
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if not self.req_to_blocks.get(request_id):  # it comes with rows from the host
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
            needed += min(self.sink_blocks, skipped)
        return needed

    def allocate_external_computed_blocks(self, request_id: str, *args, **kwargs) -> None:
        super().allocate_external_computed_blocks(request_id, *args, **kwargs)
        blocks = self.req_to_blocks[request_id]
        for i in range(min(self.sink_blocks, len(blocks))):
            if blocks[i] is self._null_block:
                blocks[i] = self.block_pool.get_new_blocks(1)[0]


# At import: a scheduler's process sees the class when it unpickles what a worker keeps. vLLM adds
# its own specs only while there is none, so ours must not be the first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    OffloadWindowSpec, OffloadWindowManager, uniform_type_base_spec=OffloadWindowSpec
)


@functools.cache
def install() -> None:
    """Let vLLM's attention layers say that they are offloaded, in this process.

    `AttentionBackend.customize_spec` would do, but is not told which layer it is about.
    """
    ask = Attention.get_kv_cache_spec

    def get_kv_cache_spec(self, vllm_config):
        spec = ask(self, vllm_config)
        config = SparseConfig.from_additional_config(vllm_config.additional_config)
        if not config.offloads:
            return spec
        if self.attn_backend.get_name() != BACKEND:
            raise ValueError(
                f'additional_config["sparse"]["decode"] is {config.decode!r}: layer '
                f"{self.layer_name!r} is served by {self.attn_backend.get_name()}, and models "
                "with such layers beside others are not offloaded in this version. Leave decode "
                'at "dense"'
            )
        if layer_index(self.layer_name) in config.resident_layers:
            return spec
        return offloaded(spec, config.window, config.sink)

    Attention.get_kv_cache_spec = get_kv_cache_spec


def offloaded(spec: FullAttentionSpec, window: int, sink: int) -> OffloadWindowSpec:
    """The spec of a layer that would have `spec`; window and sink in tokens."""
    return OffloadWindowSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        dtype=spec.dtype,
        kv_quant_mode=spec.kv_quant_mode,
        sliding_window=window,
        sink_blocks=-(-sink // spec.block_size),
    )
