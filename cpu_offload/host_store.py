"""The rows of a worker's requests in host memory: which pages are whose, and what is written."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_sparse.kernels import cpu

from . import hashing
from .host import DTYPES, SAMPLERS, HostAppend, HostShape, StoreLost, load
from .layout import Layout, aligned
from .pages import Pages
from .pinned import pin
from .region import Region, check_room
from .ring import Ring
from .sampling import Sampling
from .store import StoreFull, allocate, quantise

HEAD = b"vllm-sparse host store, 1".ljust(64, b"\0")  # what every region begins with
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass
class Request:
    name: str
    lengths: list[int]  # rows of each layer
    pages: list[int] = field(default_factory=list)
    keys: dict[int, Hashable] = field(default_factory=dict)  # of pages that are not full yet


class HostStore:
    """Requests, their pages, and one region that holds all of it: tables, ring, rows.

    Args:
        shared: whether other processes are to see the memory.
        pinned: whether a GPU copies from it.
    """

    def __init__(
        self, layout: Layout, sampling: Sampling, *, heads: int, host_bytes: int, scale: float,
        max_requests: int, max_tokens: int, actors: int, shared: bool, pinned: bool = False,
    ):  # fmt: skip
        check_room(host_bytes)
        self.layout = layout
        self.pages = Pages(layout.pages(host_bytes))
        self.max_requests, self.max_tokens = max_requests, max_tokens
        file = cpu.library_file()
        self.file = None if file is None else str(file)
        size = layout.page_rows
        max_pages = -(-max_tokens // size)
        directions = hashing.directions(
            layout.head_size, sampling.bits, sampling.hash_tables, sampling.seed
        )
        inclusion = torch.zeros(hashing.INCLUSION_STEPS + 1)
        if sampling.hash_tables:
            inclusion = hashing.log_inclusion_table(sampling.bits, sampling.tables)
        at, places = len(HEAD), []
        for nbytes in (4 * max_requests * max_pages, directions.nbytes, inclusion.nbytes):
            places.append(at)
            at = aligned(at + nbytes)
        layer_bytes = self.pages.count * layout.part_bytes
        self.shape = HostShape(
            layers=layout.layers, layer_bytes=layer_bytes, part_bytes=layout.part_bytes,
            scales_at=layout.rows_bytes, index_at=layout.index_at,
            index_bytes=layout.index_bytes, dtype=DTYPES[str(layout.dtype).split(".")[1]],
            head_size=layout.head_size, kv_heads=layout.kv_heads,
            group=heads // layout.kv_heads, shift=size.bit_length() - 1, pages=self.pages.count,
            max_requests=max_requests, max_pages=max_pages, sampler=SAMPLERS[sampling.name],
            rows=sampling.rows or 0, least=sampling.least, bits=sampling.bits,
            tables=sampling.hash_tables, scale=scale, share=sampling.share, even=sampling.even,
            epsilon=sampling.epsilon, quantile=sampling.quantile, table_at=places[0],
            directions_at=places[1], inclusion_at=places[2], parts_at=0,
        )  # fmt: skip
        self.ring_at = at
        if self.file is not None:
            at = aligned(at + Ring.nbytes(self.shape, self.file, max_requests, actors))
        at = -(-at // 4096) * 4096
        object.__setattr__(self.shape, "parts_at", at)
        nbytes = at + layout.layers * layer_bytes
        self.region = Region(nbytes) if shared else _Private(nbytes)
        self._unpin = pin(self.region.address, nbytes) if pinned else None
        self._memory = _view(self.region.address, nbytes)
        self._memory[: len(HEAD)] = torch.frombuffer(bytearray(HEAD), dtype=torch.uint8)
        self._memory[places[1] : places[1] + directions.nbytes] = _bytes(directions)
        self._memory[places[2] : places[2] + inclusion.nbytes] = _bytes(inclusion)
        table = self._memory[places[0] :][: 4 * max_requests * max_pages].view(torch.int32)
        self._table = table.view(max_requests, max_pages).numpy()
        self._kept = np.zeros_like(self._table)  # the same where no other process can write
        self._host = self.shape.at(self.region.address)
        self._append = HostAppend()
        self._jobs = np.zeros((max_requests, 4), np.int64)
        self.requests: dict[int, Request] = {}
        self._free_slots = list(range(max_requests - 1, -1, -1))
        self.bytes_written = 0

    @property
    def pinned(self) -> bool:
        """Whether the region is page-locked."""
        return self._unpin is not None

    # Requests

    def open(self, request: str) -> int:
        if not self._free_slots:
            raise StoreFull(
                f"open: {self.max_requests} requests are open already; close one, or make the pool "
                "with a larger max_requests"
            )
        slot = self._free_slots.pop()
        self.requests[slot] = Request(request, [0] * self.layout.layers)
        return slot

    def of(self, slot: int) -> Request:
        request = self.requests.get(slot)
        if request is None:
            raise ValueError(f"slot: {slot} is not open; use what `open` returned")
        return request

    def share(self, slot: int, keys: Iterable[Hashable]) -> int:
        request = self.of(slot)
        if request.pages:
            raise ValueError(f"share: request {request.name!r} has rows already; share comes first")
        pages = []
        for key in keys:
            if (len(pages) + 1) * self.layout.page_rows > self.max_tokens:
                break
            page = self.pages.acquire(key)
            if page is None:
                break
            pages.append(page)
        self._give(slot, pages)
        rows = len(request.pages) * self.layout.page_rows
        request.lengths = [rows] * self.layout.layers
        return rows

    def _give(self, slot: int, pages: Sequence[int]) -> None:
        request = self.requests[slot]
        start = len(request.pages)
        request.pages += pages
        self._enter(slot, slice(start, start + len(pages)), pages)

    def _enter(self, slot: int, at: slice | int, pages: Sequence[int] | int) -> None:
        """Page numbers for whoever reads the region."""
        self._table[slot, at] = self._kept[slot, at] = pages

    def reserve(self, slot: int, rows: int) -> None:
        """Have pages for so many rows.

        Raises:
            StoreFull: no page is free; nothing changes then.
            ValueError: more than max_tokens.
        """
        request = self.of(slot)
        if rows > self.max_tokens:
            raise ValueError(
                f"append: {rows} rows of request {request.name!r} are more than max_tokens "
                f"{self.max_tokens}"
            )
        missing = -(-rows // self.layout.page_rows) - len(request.pages)
        if missing > 0:
            pages = self.pages.allocate(missing)
            for page in pages:
                self._clear(page)
            self._give(slot, pages)

    def _clear(self, page: int) -> None:
        """Leave nothing of who had the page before, not even for a reader that errs."""
        if self.pages.generations[page] > 1:
            for layer in range(self.layout.layers):
                self.part(layer)[page].zero_()

    def append(
        self, layer: int, slots: Sequence[int], counts: Sequence[int], k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:  # fmt: skip
        """Rows of several requests in one layer, one request after another in k and v."""
        shape = (sum(counts), self.layout.kv_heads, self.layout.head_size)
        if tuple(k.shape) != shape or tuple(v.shape) != shape or k.dtype != v.dtype:
            raise ValueError(
                f"k, v: got {tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}; give "
                f"{list(shape)} for both, of one dtype"
            )
        if not 0 <= layer < self.layout.layers:
            raise ValueError(f"layer: got {layer}; the store has {self.layout.layers}")
        jobs, at = self._jobs, 0
        for i, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            start = self.of(slot).lengths[layer]
            if start + count > len(self.requests[slot].pages) * self.layout.page_rows:
                self.reserve(slot, start + count)
            jobs[i] = slot, start, count, at
            at += count
        if k.dtype not in _FLOATS:
            raise ValueError(f"k, v: got {k.dtype}; give float32, bfloat16 or float16")
        k, v = (x.detach().cpu() for x in (k, v))
        if k.stride(-1) != 1 or v.stride(-1) != 1:
            k, v = k.contiguous(), v.contiguous()
        if self.file is not None:
            self._native_append(layer, len(slots), k, v)
        else:
            for slot, start, count, first in jobs[: len(slots)].tolist():
                part = slice(first, first + count)
                self._torch_append(layer, self.requests[slot], start, k[part], v[part])
        for slot, count in zip(slots, counts, strict=True):
            self.requests[slot].lengths[layer] += count
        self.bytes_written += at * self.layout.kv_heads * self.layout.row_bytes

    def _native_append(self, layer: int, count: int, k: torch.Tensor, v: torch.Tensor) -> None:
        a = self._append
        a.layer, a.count, a.jobs, a.dtype = layer, count, self._jobs.ctypes.data, _FLOATS[k.dtype]
        a.k, a.v = k.data_ptr(), v.data_ptr()
        a.k_row_stride, a.k_head_stride = k.stride()[:2]
        a.v_row_stride, a.v_head_stride = v.stride()[:2]
        library = load(self.file)
        code = library.vllm_sparse_host_append(ctypes.addressof(self._host), ctypes.addressof(a))
        if code == 2:
            raise StoreLost("append: the page lists in the region were overwritten")
        if code != 0:
            raise StoreLost(
                "append: out of memory for the kernel's scratch buffers, with a part of the rows "
                "written"
            )

    def _torch_append(
        self, layer: int, request: Request, start: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        size = self.layout.page_rows
        both = torch.stack([k, v], 2)  # [n, Hkv, 2, D]
        done = 0
        while done < len(both):
            page, row = request.pages[(start + done) // size], (start + done) % size
            count = min(size - row, len(both) - done)
            part = both[done : done + count].transpose(0, 1)
            if self.layout.dtype == torch.int8:
                part, self.scales(layer)[page, :, row : row + count] = quantise(part)
            self.rows(layer)[page, :, row : row + count] = part
            done += count

    def name(self, slot: int, first: int, keys: Iterable[Hashable]) -> None:
        """Keys of the pages from row `first` on, under which others find them once all layers
        have filled them."""
        request, size = self.of(slot), self.layout.page_rows
        for number, key in enumerate(keys, first // size):
            if key is not None:
                request.keys[number] = key
        full = min(request.lengths) // size
        for number in [n for n in request.keys if n < full]:
            page = self.pages.seal(request.pages[number], request.keys.pop(number))
            request.pages[number] = page
            self._enter(slot, number, page)

    def truncate(self, slot: int, rows: int) -> None:
        request, size = self.of(slot), self.layout.page_rows
        if rows < 0:
            raise ValueError(f"rows: got {rows}; give 0 or more")
        request.lengths = [min(n, rows) for n in request.lengths]
        kept = -(-rows // size)
        if kept > len(request.pages):
            return
        if rows % size and self.pages.shared(request.pages[kept - 1]):
            # Others read this page, and rows will be written over it: go on with a copy.
            (copy,) = self.pages.allocate()
            for layer in range(self.layout.layers):
                part = self.part(layer)
                part[copy] = part[request.pages[kept - 1]]
            self.pages.release([request.pages[kept - 1]])
            request.pages[kept - 1] = copy
            self._enter(slot, kept - 1, copy)
        self._drop(slot, kept)
        request.keys = {n: key for n, key in request.keys.items() if n < rows // size}

    def forget(self) -> None:
        """Let no page be shared any more."""
        self.pages.forget()
        for request in self.requests.values():
            request.keys.clear()

    def close_request(self, slot: int) -> None:
        self.of(slot)
        self._drop(slot, 0)
        del self.requests[slot]
        self._free_slots.append(slot)

    def _drop(self, slot: int, kept: int) -> None:
        request = self.requests[slot]
        self.pages.release(request.pages[kept:])
        self._enter(slot, slice(kept, len(request.pages)), 0)
        del request.pages[kept:]

    # Memory

    def part(self, layer: int) -> torch.Tensor:
        """uint8 [pages, part_bytes], all there is of a layer: a view."""
        first = self.shape.parts_at + layer * self.shape.layer_bytes
        part = self._memory[first : first + self.shape.layer_bytes]
        return part.view(-1, self.layout.part_bytes)

    def rows(self, layer: int) -> torch.Tensor:
        """[pages, kv_heads, page_rows, 2, head_size], a view."""
        return self.layout.rows(self.part(layer))

    def scales(self, layer: int) -> torch.Tensor:
        """fp32 [pages, kv_heads, page_rows, 2], a view."""
        return self.layout.scales(self.part(layer))

    def read(self, slot: int, layer: int, first: int, last: int) -> tuple[torch.Tensor, ...]:
        request, size = self.of(slot), self.layout.page_rows
        if not 0 <= first <= last <= request.lengths[layer]:
            raise ValueError(
                f"read: rows {first} to {last} are not among the {request.lengths[layer]} of "
                f"request {request.name!r}"
            )
        at = torch.arange(first, last)
        pages = torch.tensor(request.pages or [0])[at // size]
        both = self.rows(layer)[pages, :, at % size]  # [n, Hkv, 2, D]
        if self.layout.dtype == torch.int8:
            both = both.float() * self.scales(layer)[pages, :, at % size][..., None]
        return both[:, :, 0], both[:, :, 1]

    def verify(self) -> None:
        """Look at what tells the region's memory apart from any other.

        Raises:
            StoreLost: its head or the page lists of open requests are not what was written there.
        """
        if bytes(self._memory[: len(HEAD)].numpy()) != HEAD:
            raise StoreLost("the head of the region was overwritten")
        used = max(self.requests, default=-1) + 1
        if not np.array_equal(self._table[:used], self._kept[:used]):
            raise StoreLost("the page lists in the region were overwritten")

    def close(self) -> None:
        self.requests.clear()
        self._memory = self._table = None
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self.region.close()


class _Private:
    """Memory of this process alone, all of it taken, in huge pages where the system has them."""

    def __init__(self, nbytes: int):
        check_room(nbytes)
        self._memory: torch.Tensor | None = allocate(nbytes + 64, touch=True)
        self.nbytes = nbytes
        self.address = aligned(self._memory.data_ptr())

    def close(self) -> None:
        self._memory = None


def _view(address: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] at an address; keeps nothing alive."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
