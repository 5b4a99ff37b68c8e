"""Attention of a layer whose older keys and values lie in host memory.

The device has the first rows of a sequence and the last ones; the host has all. Decode attends to
the device's rows here and to those between in the host's pool, at the same time, and merges.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from . import kernels
from .config import SparseConfig
from .cpu_offload import connector
from .cpu_offload.mirror import HostKV, Place
from .layer_names import layer_index
from .metadata import Segment, SparseMetadata


@dataclass(frozen=True)
class Far:
    """The decoding sequences of which some rows are in host memory only."""

    rows: torch.Tensor  # int64 [F], of the batch
    slots: list[int]
    first: list[int]  # first row that the device lacks
    last: list[int]  # the one behind the last


@dataclass
class Batch:
    """A step, as one KV cache group sees it."""

    requests: list[str]  # of each sequence
    block_table: torch.Tensor | None = None  # int32 [decodes, P], of blocks on the device
    seq_lens: torch.Tensor | None = None  # int32 [decodes], rows in them
    far: Far | None = None
    segments: dict[int, Segment] = field(default_factory=dict)


class OffloadedLayer:
    """One layer's part of the host stores."""

    def __init__(self, layer_name: str, config: SparseConfig, scale: float):
        self.host: HostKV = connector.host()
        self.group = connector.kv_cache_group(layer_name)
        self.number = layer_index(layer_name)
        self.place: Place = self.host.places[self.number]
        self.resident = self.number in config.resident_layers
        self.window, self.sink = config.window, config.sink
        self.scale = scale

    @property
    def lost(self) -> bool:
        """Whether the stores are lost; what this step gives is thrown away then."""
        return self.host.lost is not None

    def append(
        self, metadata: SparseMetadata, key: torch.Tensor, value: torch.Tensor, page: int
    ) -> Batch:
        """Mirror the step's rows [T, Hkv, D]; `page` is the size of a device block, in rows."""
        if metadata.batch is None:
            ends = [(n - 1) // page for n in metadata.seq_lens]
            tails = [int(metadata.block_table[i, end]) for i, end in enumerate(ends)]
            metadata.batch = Batch(self.host.requests(self.group, tails))
        batch: Batch = metadata.batch
        self.host.append(self.number, batch.requests, metadata.starts, key, value)
        return batch

    def decode(
        self, batch: Batch, metadata: SparseMetadata, query: torch.Tensor,
        k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, **softmax,
    ) -> None:  # fmt: skip
        """Attention of the decode rows: query and out [decodes, H, D].

        `softmax` holds how the device's rows are joined: see `kernels.paged_decode`.
        """
        if batch.block_table is None:
            self._split(batch, metadata, k_cache.shape[2])
        pool, far, counters = self.host.pool, batch.far, self.host.counters
        if far is not None:
            begin = time.perf_counter()
            mine = query[far.rows]
            ticket = pool.submit(self.place.layer, mine, far.slots, far.first, far.last)
            counters["pool_seconds"] += time.perf_counter() - begin
        _, lse = kernels.paged_decode(
            query, k_cache, v_cache, batch.block_table, batch.seq_lens, scale=self.scale, out=out,
            **softmax,
        )  # fmt: skip
        if far is not None:
            begin = time.perf_counter()
            far_out = torch.empty_like(mine)
            far_lse = torch.empty(mine.shape[:2], dtype=torch.float32)
            pool.collect(ticket, far_out, far_lse)
            counters["pool_seconds"] += time.perf_counter() - begin
            counters["decode_rows"] += len(mine)
            merged, _ = kernels.merge(out[far.rows], lse[far.rows], far_out, far_lse)
            out[far.rows] = merged

    def segment(self, batch: Batch, segment: Segment) -> tuple[Segment, torch.Tensor, torch.Tensor]:
        """A prefill segment over the host's pages, and the keys and values [pages, Hkv, rows, D]
        there."""
        pool = self.host.pool
        key = (segment.first << 1) | segment.sparse
        if key not in batch.segments:
            who = batch.requests[segment.first : segment.first + len(segment.query_lens)]
            table = pool.block_table([self.host.slots[r][self.place.store] for r in who])
            batch.segments[key] = replace(segment, block_table=table)
        return batch.segments[key], *pool.prefill_view(self.place.layer)

    def _split(self, batch: Batch, metadata: SparseMetadata, page: int) -> None:
        sink = -(-self.sink // page)
        tables: list[torch.Tensor] = []
        lens: list[int] = []
        far = Far(torch.empty(0), [], [], [])
        rows: list[int] = []
        for i in range(metadata.num_decodes):
            length, blocks = metadata.seq_lens[i], metadata.block_table[i]
            end = -(-length // page)
            begin = first_block(length, self.window, page)
            if begin <= sink:
                tables.append(blocks[:end])
                lens.append(length)
                continue
            # The entries between are blocks of other requests by now.
            tables.append(torch.cat([blocks[:sink], blocks[begin:end]]))
            lens.append(length - (begin - sink) * page)
            rows.append(i)
            far.slots.append(self.host.slots[batch.requests[i]][self.place.store])
            far.first.append(sink * page)
            far.last.append(begin * page)
        batch.block_table = _pad(tables)
        batch.seq_lens = torch.tensor(lens, dtype=torch.int32)
        batch.far = replace(far, rows=torch.tensor(rows)) if rows else None


def first_block(length: int, window: int, page: int) -> int:
    """Number of the first block of a sequence of `length` rows, its newest included, that the
    device is certain to have besides the sink's: see OffloadWindowManager."""
    return max(length - window, 0) // page


def _pad(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    padded = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
