"""A layer on a GPU whose older keys and values lie in host memory.

What crosses between the two in a step: the new rows and the queries of decode to the host, its
answers back, and for prompts the rows that the device has given up. The device goes on with its own
part of the layer meanwhile.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .config import SparseConfig
from .cpu_offload import connector
from .cpu_offload.layout import PAGE_ROWS
from .kernels import cpu
from .offload import Batch, Near, OffloadedLayer, merge_rows
from .planner import device_break_even
from .staging import Rows, Staging
from .transfers import shared_transfers

if TYPE_CHECKING:
    from .cuda_impl import SparseCudaImpl
    from .cuda_metadata import GpuSegment, SparseCudaMetadata


@dataclass(frozen=True)
class Asking:
    """Decoding sequences of a step, of which the host is asked for some."""

    near: Near
    q: torch.Tensor | None  # [F, H, D] on the host, once it has come; None: the device has all


class CudaOffloadedLayer(OffloadedLayer):
    """One layer's part of the host stores, as seen from a GPU.

    Args:
        impl: who attends on the device.
    """

    def __init__(self, impl: SparseCudaImpl, layer_name: str) -> None:
        super().__init__(layer_name, impl.config, impl.scale)
        self.impl, self.staging = impl, impl.staging
        self.transfers = shared_transfers(impl.staging.device)
        # Before pages change hands, as those of a request that has ended.
        self.host.settle = self.staging.wait

    def forward(
        self, layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kv_cache: torch.Tensor, metadata: SparseCudaMetadata, output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As the impl's."""
        if self.host.step is None:  # vLLM still tries the model out
            return output.zero_()
        given = (layer, query, key, value, kv_cache, metadata, output)
        return self.guarded(lambda: self._attend(*given), output)

    def _attend(
        self, layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kv_cache: torch.Tensor, metadata: SparseCudaMetadata, output: torch.Tensor,
    ) -> None:  # fmt: skip
        starts = metadata.sequences.starts
        if metadata.batch is None:
            metadata.batch = Batch(self.host.requests(self.group, metadata.sequences.tails))
        batch: Batch = metadata.batch
        rows = [
            self.transfers.fetch(name, x[: starts[-1]])
            for name, x in (("key", key), ("value", value))
        ]
        launch = self._resident if self.resident else self._offloaded
        # What is launched runs while the host waits for the rows, and keeps them.
        answer = launch(batch, layer, query, key, value, kv_cache, metadata, output)
        self.transfers.wait()
        self.host.append(self.number, batch.requests, starts, *rows)
        for one in answer:
            self._answer(*one)

    def _resident(self, batch: Batch, layer, query, key, value, kv_cache, metadata, output) -> list:
        self.transfers.launched()
        self.impl.attend(layer, query, key, value, kv_cache, metadata, output)
        return []

    def _offloaded(
        self, batch: Batch, layer, query, key, value, kv_cache, metadata, output
    ) -> list[tuple[Asking, torch.Tensor, torch.Tensor]]:
        """Launch the device's part; returns what the host has to add to its output and lse."""
        parts = [(segment, slice(segment.begin, segment.end)) for segment in metadata.segments]
        asked = {
            segment.first: self._asking(batch, segment, query[rows], kv_cache.shape[2])
            for segment, rows in parts
            if segment.decodes
        }
        self.transfers.launched()
        following = self._following([segment for segment, _ in parts if segment.far])
        answer = []
        for segment, rows in parts:
            if segment.decodes:
                asking = asked[segment.first]
                near = replace(
                    segment.metadata, block_table=asking.near.block_table,
                    seq_lens=asking.near.seq_lens,
                )  # fmt: skip
                lse = self.impl.decode(layer, near, query[rows], kv_cache, output[rows])
                if asking.q is not None:
                    answer.append((asking, output[rows], lse))
                continue
            new = (query[rows], key[rows], value[rows])
            if segment.far:
                self._prefill_far(batch, segment, layer, *new, output[rows])
                if (after := next(following, None)) is not None:
                    self.staging.ahead(self._host_rows(batch, *after))
            else:
                self.impl.prefill(layer, segment, *new, kv_cache, output[rows])
        return answer

    def _prefill_far(
        self, batch: Batch, segment: GpuSegment, layer, query, key, value, out
    ) -> None:
        """A segment of which the device lacks rows."""
        cache = self.staging.take(self._host_rows(batch, segment, self.place.layer), key, value)
        table = self.staging.block_table[:, : -(-segment.seq_lens[0] // PAGE_ROWS)]
        where = replace(segment, metadata=replace(segment.metadata, block_table=table))
        self.impl.prefill(layer, where, query, key, value, cache, out)

    def _following(self, far: list[GpuSegment]) -> Iterator[tuple[GpuSegment, int]]:
        """The segment and layer of the pool that are staged after each of this layer's segments
        that lack rows, in order; nothing after the last layer's last."""
        mine = self.place.layer
        yield from ((segment, mine) for segment in far[1:])
        if far and mine + 1 < self.host.pool.layout.layers:
            yield far[0], mine + 1

    def _host_rows(self, batch: Batch, segment: GpuSegment, layer: int) -> Rows:
        """Those of a segment of one sequence, in a layer of the pool: the next layer may be of
        another KV cache group, whose batch is another."""
        pool = self.host.pool
        slot = self.host.slots[batch.requests[segment.first]][self.place.store]
        computed = segment.seq_lens[0] - segment.query_lens[0]
        name = self.host.step.number, layer, slot
        return Rows(name, pool.part(layer), pool.store.of(slot).pages, computed)

    def _asking(self, batch: Batch, segment: GpuSegment, query: torch.Tensor, page: int) -> Asking:
        """Send to the host the queries [decodes, H, D] that it is to answer."""
        table = segment.metadata.block_table
        near = self.near(batch, segment.first, segment.seq_lens, table, page)
        if near.far is None:
            return Asking(near, None)
        asked = query if len(near.far.rows) == len(query) else query[near.far.rows]
        return Asking(near, self.transfers.fetch(f"query {segment.first}", asked))

    def _answer(self, asking: Asking, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge what the host has into the device's part: out [decodes, H, D] and its lse."""
        shape = asking.q.shape
        ticket = self.ask(asking.near.far, asking.q)
        host = [
            self.transfers.buffer("out", shape, torch.float32),
            self.transfers.buffer("lse", shape[:2], torch.float32),
        ]
        self.collect(ticket, *host)
        host = [self.transfers.send(x) for x in host]
        merge_rows(out.view(len(out), *shape[1:]), lse, asking.near.far.rows, *host)


def layer_of(impl: SparseCudaImpl, layer_name: str) -> CudaOffloadedLayer | None:
    """The layer's part of the host stores; None while there are none."""
    return CudaOffloadedLayer(impl, layer_name) if connector.is_made() else None


def staging_of(impl: SparseCudaImpl, device: torch.device) -> Staging:
    """Room for a prompt's rows of one layer, of which all layers of a process take turns."""
    shape = (impl.num_kv_heads, impl.head_size, impl.dtype, impl.longest)
    return _staging(impl.config, *shape, device)


@functools.cache
def _staging(
    config: SparseConfig, kv_heads: int, head_size: int, dtype: torch.dtype, longest: int,
    device: torch.device,
) -> Staging:  # fmt: skip
    layout = connector.layout_of(config, 1, kv_heads, head_size, dtype)
    return Staging(layout, longest, dtype, device)


def settle(impl: SparseCudaImpl, device: torch.device) -> None:
    """Give the kernels of the host their threads, and compile what prompts launch over its
    pages."""
    give_threads(connector.ranks())
    if not impl.always_dense:
        shape = (impl.dtype, impl.head_size, impl.num_heads, impl.num_kv_heads)
        _compile(*shape, device, impl.config.mean_correction, impl.sinks is not None)


@functools.cache
def _compile(
    dtype: torch.dtype, head_size: int, heads: int, kv_heads: int, device: torch.device,
    mean_correction: bool, sinks: bool,
) -> None:  # fmt: skip
    device_break_even.warm_up(
        dtype, head_size, heads, kv_heads, page=PAGE_ROWS, device=device,
        mean_correction=mean_correction, sinks=sinks,
    )  # fmt: skip


@functools.cache
def give_threads(ranks: int) -> int:
    """Give the kernels' pool this rank's share of the machine's cores, less one for what else vLLM
    runs there; how many."""
    threads = max(len(os.sched_getaffinity(0)) // ranks - 1, 1)
    cpu.set_threads(threads)
    return threads
