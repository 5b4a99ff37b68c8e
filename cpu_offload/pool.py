"""Attention over keys and values in host memory, for all requests and layers of one vLLM worker."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import reference
from .layout import PAGE_ROWS, Layout
from .pages import Pages
from .store import StoreFull, allocate, quantise

SAMPLERS = ("exact",)
KINDS = ("inline",)
DEADLINE = 2.0  # seconds


@dataclass
class _Request:
    name: str
    lengths: list[int]  # rows of each layer
    pages: list[int] = field(default_factory=list)
    keys: dict[int, Hashable] = field(default_factory=dict)  # of pages that are not full yet


@dataclass(frozen=True)
class Ticket:
    """Attention that was asked for and is to be collected."""

    layer: int
    q: torch.Tensor
    slots: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]


@dataclass(frozen=True)
class Capacity:
    """Of a pool; rows count once, however many layers they have."""

    pages: int
    free_pages: int  # idle ones, whose keys are still found, included
    page_rows: int
    page_bytes: int
    max_requests: int
    max_tokens: int


class Pool:
    """The host store of one vLLM worker, and who computes attention over it.

    A request's rows lie in pages of `page_rows` tokens, the same pages for all layers. The worker
    mirrors every row that it writes with `append`, layer by layer; in decode it asks for attention
    over the rows that its own device does not hold with `submit`, and gets it with `collect`.

    Used by one thread.

    Args:
        layers: whose KV is kept here, numbered from 0 by the caller.
        heads, kv_heads, head_size: of this worker.
        dtype: of the queries.
        kv_dtype: how rows are kept, torch.int8 included; None: `dtype`.
        host_bytes: memory for rows.
        sampler: "exact".
        sampler_options: keyword arguments of the sampler.
        rows: the most rows that a KV head reads of a request; None: the sampler's default.
        scale: factor on the logits; None: head_size^-0.5.
        actors: how many compute beside the worker.
        kind: "inline", the calling thread.
        max_requests: that are open at a time.
        max_tokens: of one request.
        deadline_s: seconds that any wait may take.
        page_rows: a power of two.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self, *, layers: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None, host_bytes: int, sampler: str = "exact",
        sampler_options: dict[str, Any] | None = None, rows: int | None = None,
        scale: float | None = None, actors: int = 1, kind: str = "inline",
        max_requests: int = 256, max_tokens: int, deadline_s: float = DEADLINE,
        page_rows: int = PAGE_ROWS, seed: int = 0,
    ):  # fmt: skip
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {sampler!r}; use one of {', '.join(SAMPLERS)}")
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}; use one of {', '.join(KINDS)}")
        if heads % kv_heads or not heads:
            raise ValueError(
                f"heads: got {heads} query heads and {kv_heads} KV heads; query heads must be a "
                "multiple of KV heads"
            )
        self.layout = Layout(layers, kv_heads, head_size, kv_dtype or dtype, page_rows)
        self.pages = Pages(self.layout.pages(host_bytes))
        self.heads, self.dtype = heads, dtype
        self.scale = head_size**-0.5 if scale is None else scale
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self._memory = allocate(self.pages.count * self.layout.page_bytes + 64)
        skip = -self._memory.data_ptr() % 64
        self._memory = self._memory[skip:]
        self._requests: dict[int, _Request] = {}
        self._free_slots = list(range(max_requests - 1, -1, -1))
        self._rows_read = 0
        self._rows_there = 0

    # Requests

    def open(self, request: str) -> int:
        """A slot for the KV of a request.

        Raises:
            StoreFull: max_requests are open.
        """
        if not self._free_slots:
            raise StoreFull(
                f"open: {self.max_requests} requests are open already; close one, or make the pool "
                "with a larger max_requests"
            )
        slot = self._free_slots.pop()
        self._requests[slot] = _Request(request, [0] * self.layout.layers)
        return slot

    def length(self, slot: int, layer: int = -1) -> int:
        """Rows of a request in a layer."""
        return self._of(slot).lengths[layer]

    def share(self, slot: int, keys: Iterable[Hashable]) -> int:
        """Take over the pages of these keys, as far as the store has them, for an empty request.

        Returns:
            rows that the request has by it, in every layer.
        """
        request = self._of(slot)
        if request.pages:
            raise ValueError(f"share: request {request.name!r} has rows already; share comes first")
        for key in keys:
            page = self.pages.acquire(key)
            if page is None:
                break
            request.pages.append(page)
        rows = len(request.pages) * self.layout.page_rows
        request.lengths = [rows] * self.layout.layers
        return rows

    def has(self, keys: Iterable[Hashable]) -> int:
        """How many of the leading keys `share` would find."""
        found = 0
        for key in keys:
            if self.pages.find(key) is None:
                break
            found += 1
        return found

    def append(
        self, slot: int, layer: int, k: torch.Tensor, v: torch.Tensor,
        keys: Sequence[Hashable] = (),
    ) -> None:  # fmt: skip
        """Keep rows of one layer behind those that are there.

        Args:
            k, v: [n, kv_heads, head_size], any float dtype and device.
            keys: of the pages that become full by these rows, in order; others find a page by its
                key when all layers are full. The same keys may be given with every layer, or with
                one.

        Raises:
            StoreFull: no page is free; nothing is stored then.
            ValueError: the rows do not fit, or are more than max_tokens.
        """
        request, size = self._of(slot), self.layout.page_rows
        shape = (len(k), self.layout.kv_heads, self.layout.head_size)
        if tuple(k.shape) != shape or tuple(v.shape) != shape:
            raise ValueError(
                f"k, v: got {tuple(k.shape)}, {tuple(v.shape)}; give {list(shape)} for both"
            )
        start = request.lengths[layer]
        stop = start + len(k)
        if stop > self.max_tokens:
            raise ValueError(
                f"append: {stop} rows of request {request.name!r} are more than max_tokens "
                f"{self.max_tokens}"
            )
        missing = -(-stop // size) - len(request.pages)
        if missing > 0:
            request.pages += self.pages.allocate(missing)
        self._write(request, layer, start, k, v)
        request.lengths[layer] = stop
        for number, key in enumerate(keys, start // size):
            request.keys[number] = key
        if request.keys:
            self._seal(request)

    def truncate(self, slot: int, rows: int) -> None:
        """Forget the rows from `rows` on, in all layers."""
        request, size = self._of(slot), self.layout.page_rows
        if rows < 0:
            raise ValueError(f"rows: got {rows}; give 0 or more")
        if rows >= max(request.lengths):
            return
        request.lengths = [min(n, rows) for n in request.lengths]
        kept = -(-rows // size)
        if rows % size and self.pages.shared(request.pages[kept - 1]):
            # Others read this page, and rows will be written over it: go on with a copy.
            (copy,) = self.pages.allocate()
            self._copy(request.pages[kept - 1], copy)
            self.pages.release([request.pages[kept - 1]])
            request.pages[kept - 1] = copy
        self.pages.release(request.pages[kept:])
        del request.pages[kept:]
        request.keys = {n: key for n, key in request.keys.items() if n < rows // size}

    def close_request(self, slot: int) -> None:
        """Give back a slot and its pages; pages under a key stay until they are needed."""
        request = self._of(slot)
        del self._requests[slot]
        self.pages.release(request.pages)
        self._free_slots.append(slot)

    def forget(self) -> None:
        """Let no page be shared any more: the model that made its rows has changed."""
        self.pages.forget()
        for request in self._requests.values():
            request.keys.clear()

    # Reading

    def prefill_view(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer where they lie, for kernels that read paged caches.

        Returns:
            k, v: [pages, kv_heads, page_rows, head_size], strided views; with `block_table` they
            are what `kernels.cpu.sparse_prefill` and `paged_decode` take.
        """
        if self.layout.dtype == torch.int8:
            raise ValueError("prefill_view: rows are kept as int8 with scales; use `read` instead")
        rows = self._rows(layer)
        return rows[..., 0, :], rows[..., 1, :]

    def block_table(self, slots: Sequence[int]) -> torch.Tensor:
        """int32 [requests, most pages], the pages of each request; 0 behind its last."""
        lists = [self._of(slot).pages for slot in slots]
        table = torch.zeros(len(lists), max(map(len, lists), default=0), dtype=torch.int32)
        for row, pages in zip(table, lists, strict=True):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table

    def read(self, slot: int, layer: int, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """k, v: [last - first, kv_heads, head_size], copies of the rows, int8 ones as float32."""
        request = self._of(slot)
        if not 0 <= first <= last <= request.lengths[layer]:
            raise ValueError(
                f"read: rows {first} to {last} are not among the {request.lengths[layer]} of "
                f"request {request.name!r}"
            )
        at = torch.arange(first, last)
        pages = torch.tensor(request.pages or [0])[at // self.layout.page_rows]
        both = self._rows(layer)[pages, :, at % self.layout.page_rows]  # [n, Hkv, 2, D]
        if self.layout.dtype == torch.int8:
            scales = self._scales(layer)[pages, :, at % self.layout.page_rows]
            both = both.float() * scales[..., None]
        return both[:, :, 0], both[:, :, 1]

    # Attention

    def submit(
        self, layer: int, q: torch.Tensor, slots: Sequence[int], first: Sequence[int],
        last: Sequence[int],
    ) -> Ticket:  # fmt: skip
        """Ask for attention of one token of each request over its rows first .. last - 1.

        Args:
            q: [B, heads, head_size].
            slots, first, last: B numbers each; an empty range is answered by out 0, lse -inf.
        """
        for slot, begin, end in zip(slots, first, last, strict=True):
            have = self._of(slot).lengths[layer]
            if not 0 <= begin <= have or end > have:
                raise ValueError(
                    f"submit: rows {begin} to {end} are not among the {have} of request "
                    f"{self._of(slot).name!r} in layer {layer}"
                )
        return Ticket(layer, q.detach(), tuple(slots), tuple(first), tuple(last))

    def collect(self, ticket: Ticket, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Wait for an answer and put it into out [B, heads, head_size] and lse fp32 [B, heads]."""
        group = self.heads // self.layout.kv_heads
        for b, slot in enumerate(ticket.slots):
            first, last = ticket.first[b], max(ticket.first[b], ticket.last[b])
            k, v = self.read(slot, ticket.layer, first, last)
            for h in range(self.layout.kv_heads):
                mine = slice(h * group, (h + 1) * group)
                o, e = reference.gathered_attention(
                    ticket.q[b, mine].float().cpu(), k[:, h].float(), v[:, h].float(), None,
                    self.scale,
                )  # fmt: skip
                out[b, mine], lse[b, mine] = o.to(out.dtype), e
            self._rows_read += (last - first) * self.layout.kv_heads
            self._rows_there += (last - first) * self.layout.kv_heads

    # The whole

    def capacity(self) -> Capacity:
        return Capacity(
            self.pages.count, self.pages.free, self.layout.page_rows, self.layout.page_bytes,
            self.max_requests, self.max_tokens,
        )  # fmt: skip

    def stats(self) -> dict[str, float]:
        """Counters since the start, and gauges; names as in the docs."""
        used = self.pages.count - self.pages.free
        return {
            "rows_read": self._rows_read,
            "rows_there": self._rows_there,
            "host_bytes_used": used * self.layout.page_bytes,
            "host_bytes": self.pages.count * self.layout.page_bytes,
            "requests": len(self._requests),
            "restarts": 0,
        }

    def shutdown(self) -> None:
        """End what was started and give memory back; may be called again."""
        self._requests.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)

    # Parts

    def _of(self, slot: int) -> _Request:
        request = self._requests.get(slot)
        if request is None:
            raise ValueError(f"slot: {slot} is not open; use what `open` returned")
        return request

    def _seal(self, request: _Request) -> None:
        full = min(request.lengths) // self.layout.page_rows
        for number in [n for n in request.keys if n < full]:
            key = request.keys.pop(number)
            if key is not None:
                request.pages[number] = self.pages.seal(request.pages[number], key)

    def _part(self, layer: int) -> torch.Tensor:
        size = self.layout.part_bytes
        first = layer * self.pages.count * size
        return self._memory[first : first + self.pages.count * size].view(-1, size)

    def _rows(self, layer: int) -> torch.Tensor:
        """[pages, kv_heads, page_rows, 2, head_size]."""
        at = self.layout
        part = self._part(layer)[:, : at.rows_bytes].view(at.dtype)
        return part.unflatten(1, (at.kv_heads, at.page_rows, 2, at.head_size))

    def _scales(self, layer: int) -> torch.Tensor:
        """fp32 [pages, kv_heads, page_rows, 2]."""
        at = self.layout
        part = self._part(layer)[:, at.rows_bytes :][:, : at.kv_heads * at.page_rows * 8]
        return part.view(torch.float32).unflatten(1, (at.kv_heads, at.page_rows, 2))

    def _write(
        self, request: _Request, layer: int, start: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        size = self.layout.page_rows
        both = torch.stack([k, v], 2).to("cpu")  # [n, Hkv, 2, D]
        done = 0
        while done < len(both):
            page, row = request.pages[(start + done) // size], (start + done) % size
            count = min(size - row, len(both) - done)
            part = both[done : done + count].transpose(0, 1)
            if self.layout.dtype == torch.int8:
                part, self._scales(layer)[page, :, row : row + count] = quantise(part)
            self._rows(layer)[page, :, row : row + count] = part
            done += count

    def _copy(self, source: int, target: int) -> None:
        for layer in range(self.layout.layers):
            part = self._part(layer)
            part[target] = part[source]


def pages_of(rows: int, page_rows: int = PAGE_ROWS) -> int:
    """Pages that so many rows take."""
    return math.ceil(rows / page_rows)
