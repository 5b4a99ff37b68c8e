"""Room on a device for one layer's host pages of one request, for prompts that read them there."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels
from .cpu_offload.layout import Layout
from .kernels.paged_cache import halves


@dataclass(frozen=True)
class Rows:
    """Rows of a layer and request that the host has.

    name: tells them apart from any other's of this step and of others.
    part: uint8 [pages of the store, part_bytes], the layer's; pages: the request's, in order.
    count: how many of its first rows.
    """

    name: Hashable
    part: torch.Tensor
    pages: Sequence[int]
    count: int


@dataclass
class Room:
    """A paged cache on the device.

    holds: what it was filled with ahead of its use.
    filled, used: events of the device, None where it is the CPU: the copies to it are done; what
        was launched on its last contents is done.
    """

    bytes: torch.Tensor
    holds: Hashable | None = None
    filled: Any = None
    used: Any = None


class Staging:
    """Two rooms in turns: one is filled on a stream of its own while the other is attended to.

    Args:
        layout: of the host pages, whose bytes are taken over as they are.
        longest: the most rows of a request.
        dtype: the model's; rows that the host has as int8 are unpacked into one room more.
    """

    def __init__(
        self, layout: Layout, longest: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.device = layout, device
        pages = -(-longest // layout.page_rows)
        with torch.inference_mode(False):  # it outlives the step
            shape = (2, pages, layout.part_bytes)
            self._rooms = [
                Room(x) for x in torch.empty(shape, dtype=torch.uint8, device=device).unbind()
            ]
            self.block_table = torch.arange(pages, dtype=torch.int32, device=device)[None]
            self._unpacked = None
            if layout.dtype != dtype:
                rows = layout.rows(self._rooms[0].bytes)
                self._unpacked = torch.empty(rows.shape, dtype=dtype, device=device)
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            for room in self._rooms:
                room.filled, room.used = torch.cuda.Event(), torch.cuda.Event()

    def ahead(self, rows: Rows) -> None:
        """Begin to copy what the next `take` is for, while the device does what is launched.

        The host's rows must stay until `wait`; those behind them in their pages may be written.
        """
        self._fill(self._rooms[0], rows)

    def take(self, rows: Rows, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """A cache [pages, Hkv, page, 2 D] with a request's rows, for what is launched from now on
        and until the call after the next, or the next where rows are unpacked.

        Args:
            rows: from the host, copied before by `ahead` or now.
            key, value: [n, Hkv, D] on the device, the rows behind them.
        """
        room = self._rooms[0]
        if room.holds != rows.name:
            self._fill(room, rows)
        room.holds = None
        self._rooms.reverse()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(room.filled)
            # Whatever reads the other room was launched before.
            self._rooms[0].used.record(current)
        if self._unpacked is None:
            cache = self.layout.rows(room.bytes).flatten(3)
        else:
            pages = -(-rows.count // self.layout.page_rows)
            self.layout.unpack(room.bytes[:pages], self._unpacked[:pages])
            cache = self._unpacked.flatten(3)
        slots = torch.arange(rows.count, rows.count + len(key), device=self.device)
        kernels.write_kv(key, value, *halves(cache, self.layout.head_size), slots)
        return cache

    def _fill(self, room: Room, rows: Rows) -> None:
        on = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with on:
            if self._stream is not None:
                self._stream.wait_event(room.used)
            for at, page, count in runs(rows.pages[: -(-rows.count // self.layout.page_rows)]):
                part = rows.part[page : page + count]
                room.bytes[at : at + count].copy_(part, non_blocking=True)
            if self._stream is not None:
                room.filled.record(self._stream)
        room.holds = rows.name

    def wait(self) -> None:
        """Return when no copy reads the host's pages any more."""
        if self._stream is not None:
            self._stream.synchronize()


def runs(pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place in the list, page, count) of pages that follow each other in memory as in the list."""
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield start, pages[start], i - start
            start = i
