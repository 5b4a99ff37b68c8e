"""Attention of a layer whose older keys and values lie in host memory.

The device has the first rows of a sequence and the last ones; the host has all. Decode attends to
the device's rows here and to those between in the host's pool, at the same time, and merges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from . import kernels
from .config import SparseConfig
from .cpu_offload import connector
from .cpu_offload.host import StoreLost
from .cpu_offload.mirror import HostKV, Place
from .cpu_offload.tickets import Ticket
from .layer_names import layer_index
from .metadata import Segment, SparseMetadata
from .unpacked import shared_unpacked


@dataclass(frozen=True)
class Far:
    """The decoding sequences of which some rows are in host memory only."""

    rows: torch.Tensor  # int64 [F], of the queries, one each
    slots: list[int]
    first: list[int]  # first row that the device lacks
    last: list[int]  # the one behind the last


@dataclass(frozen=True)
class Near:
    """What the device has of decoding sequences, and what of them it has not."""

    block_table: torch.Tensor  # int32 [decodes, P], of blocks on the device
    seq_lens: torch.Tensor  # int32 [decodes], rows in them
    far: Far | None


@dataclass
class Batch:
    """A step, as one KV cache group sees it."""

    requests: list[str]  # of each sequence
    near: dict[int, Near] = field(default_factory=dict)  # by the first of the sequences
    # By first sequence, number of them, and kind, as layers that are dense cut a step otherwise:
    # over host pages, and which of these are unpacked for it.
    segments: dict[tuple[int, int, bool], tuple[Segment, list[int]]] = field(default_factory=dict)


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

    def guarded(self, attend: Callable[[], None], output: torch.Tensor) -> torch.Tensor:
        """`output`, written by `attend`; zeros where the stores are lost, as what this step gives
        is thrown away then."""
        if self.host.lost is None:
            try:
                attend()
                return output
            except StoreLost as error:
                self.host.lose(error)
        return output.zero_()

    def append(
        self, metadata: SparseMetadata, key: torch.Tensor, value: torch.Tensor, page: int
    ) -> Batch:
        """Mirror the step's rows [T, Hkv, D]; `page` is the size of a device block, in rows."""
        if metadata.batch is None:
            tails = last_blocks(metadata.block_table, metadata.seq_lens, page)
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
        decodes = metadata.num_decodes
        lengths, page = metadata.seq_lens[:decodes], k_cache.shape[2]
        near = self.near(batch, 0, lengths, metadata.block_table[:decodes], page)
        asked = None if near.far is None else self.ask(near.far, query[near.far.rows])
        _, lse = kernels.paged_decode(
            query, k_cache, v_cache, near.block_table, near.seq_lens, scale=self.scale, out=out,
            **softmax,
        )  # fmt: skip
        if asked is not None:
            shape = asked.q.shape
            answer = [torch.empty(x, dtype=torch.float32) for x in (shape, shape[:2])]
            self.collect(asked, *answer)
            merge_rows(out, lse, near.far.rows, *answer)

    def ask(self, far: Far, q: torch.Tensor) -> Ticket:
        """Have the pool attend for q [F, H, D] to the rows that the device lacks."""
        begin = time.perf_counter()
        ticket = self.host.pool.submit(self.place.layer, q, far.slots, far.first, far.last)
        self.host.counters["pool_seconds"] += time.perf_counter() - begin
        return ticket

    def collect(self, asked: Ticket, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Put the pool's answer into out [F, H, D] and lse fp32 [F, H]."""
        begin = time.perf_counter()
        self.host.pool.collect(asked, out, lse)
        self.host.counters["pool_seconds"] += time.perf_counter() - begin
        self.host.counters["decode_rows"] += len(out)

    def segment(self, batch: Batch, segment: Segment) -> tuple[Segment, torch.Tensor, torch.Tensor]:
        """A prefill segment over the host's pages, and the keys and values [pages, Hkv, rows, D]
        there."""
        pool = self.host.pool
        packed = pool.layout.dtype == torch.int8
        key = segment.first, len(segment.query_lens), segment.sparse
        if key not in batch.segments:
            who = batch.requests[segment.first : segment.first + len(segment.query_lens)]
            table = pool.block_table([self.host.slots[r][self.place.store] for r in who])
            pages = []
            if packed:  # tables of the pages that are unpacked
                there, table = table.unique(return_inverse=True)
                pages, table = there.tolist(), table.int()
            batch.segments[key] = replace(segment, block_table=table), pages
        segment, pages = batch.segments[key]
        if packed:
            part, unpacked = pool.part(self.place.layer), shared_unpacked(pool.dtype)
            return segment, *unpacked.fill(pool.layout, part, pages)
        return segment, *pool.prefill_view(self.place.layer)

    def near(
        self, batch: Batch, first: int, lengths: Sequence[int], block_table: torch.Tensor,
        page: int,
    ) -> Near:  # fmt: skip
        """Where decoding sequences, the batch's from `first` on, find their rows on the device.

        Args:
            lengths: of each, the new row included; block_table: int32 [decodes, P], theirs.
        """
        if first not in batch.near:
            slots = [
                self.host.slots[request][self.place.store]
                for request in batch.requests[first : first + len(lengths)]
            ]
            batch.near[first] = self._near(slots, lengths, block_table, page)
        return batch.near[first]

    def _near(
        self, slots: list[int], lengths: Sequence[int], block_table: torch.Tensor, page: int
    ) -> Near:
        sink = -(-self.sink // page)
        begins = [first_block(length, self.window, page) for length in lengths]
        gone = [i for i, begin in enumerate(begins) if begin > sink]
        # The entries between are blocks of other requests by now.
        begins = [max(begin, sink) for begin in begins]
        width = sink + max(-(-n // page) - begin for n, begin in zip(lengths, begins, strict=True))
        number = torch.arange(max(width, sink))
        moved = torch.tensor(begins)[:, None] - sink  # blocks
        numbers = torch.where(number < sink, number, number + moved)
        there = torch.tensor(lengths, dtype=torch.int32) - moved[:, 0].int() * page
        on = block_table.device
        # Behind a sequence's end: any block will do.
        numbers = numbers.clamp_(max=block_table.shape[1] - 1).to(on)
        far = Far(
            torch.tensor(gone, dtype=torch.int64).to(on), [slots[i] for i in gone],
            [sink * page] * len(gone), [begins[i] * page for i in gone],
        )  # fmt: skip
        return Near(block_table.gather(1, numbers), there.to(on), far if gone else None)


def merge_rows(
    out: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor, answer: torch.Tensor,
    answer_lse: torch.Tensor,
) -> None:  # fmt: skip
    """Merge what the host answered, [F, H, D] and fp32 [F, H], into those rows of the device's
    out [decodes, H, D], whose lse is fp32 [decodes, H]."""
    if len(rows) == len(out):
        out.copy_(kernels.merge(out, lse, answer, answer_lse)[0])
    else:
        out[rows] = kernels.merge(out[rows], lse[rows], answer, answer_lse)[0]


def last_blocks(block_table: torch.Tensor, lengths: Sequence[int], page: int) -> list[int]:
    """The block [S] that each sequence of `lengths` rows ends in; block_table: int32 [S, P].

    The blocks' numbers may be the device's alone: then this waits for it.
    """
    ends = torch.tensor([[max(n - 1, 0) // page] for n in lengths], dtype=torch.int64)
    return block_table[: len(lengths)].gather(1, ends.to(block_table.device)).flatten().tolist()


def first_block(length: int, window: int, page: int) -> int:
    """Number of the first block of a sequence of `length` rows, its newest included, that the
    device is certain to have besides the sink's: see OffloadWindowManager."""
    return max(length - window, 0) // page
