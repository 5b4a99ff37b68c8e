"""Attention over keys and values in host memory, for all requests and layers of one vLLM worker."""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from . import numa, ring
from .actors import Actors, ProcessHandle, ThreadHandle, shut_down, spare_cpus, tasks_for
from .host_store import HostStore
from .layout import PAGE_ROWS, Layout
from .ring import Ring
from .sampling import Sampling
from .tickets import Capacity, Ticket, answer_in_torch
from .worker import Task

KINDS = ("inline", "thread", "process", "ray")
DEADLINE = 0.25  # seconds
OPEN_TICKETS = 2  # kDepth in csrc/ring.h


class Pool:
    """The host store of one vLLM worker, and who computes attention over it.

    A request's rows lie in pages of `page_rows` tokens, the same pages for all layers. The worker
    mirrors every row that it writes with `append`, layer by layer; in decode it asks for attention
    over the rows that its own device does not hold with `submit`, and gets it with `collect`.

    Used by one thread. What is sampled depends on the rows, the queries and their number, and
    neither on the batch nor on who answers.

    Args:
        layers: whose KV is kept here, numbered from 0 by the caller.
        heads, kv_heads, head_size: of this worker.
        dtype: of the queries.
        kv_dtype: how rows are kept, torch.int8 included; None: `dtype`.
        host_bytes: memory for rows and what samplers know of them, all of it taken at once.
        sampler: "exact", "lsh", "vattention" or "topk"; see `Sampling`.
        sampler_options: see `Sampling`.
        rows: the most rows that a KV head reads of a request; None: the sampler's default.
        scale: factor on the logits; None: head_size^-0.5.
        actors: how many compute beside the worker; the worker always does, too, while it waits.
        kind: "inline": the worker alone; "thread", "process": threads of its process, or local
            processes; "ray": Ray actors on its node.
        cpus: of each actor; None: those of this machine that the calling thread is not bound to,
            divided among them, each one's on one NUMA node where there are enough actors; where
            there are none, any. An actor takes memory from its CPUs' nodes alone.
        threads: of each actor, at most 256; None: one for each of its CPUs, or one.
        max_requests: that are open at a time.
        max_tokens: of one request.
        deadline_s: seconds without an answer after which the worker answers in an actor's place.
            An actor whose process has ended is not waited for.
        spin_s: seconds that a wait spins before it sleeps.
        page_rows: a power of two.
        pinned: page-lock the rows, for a GPU that copies from them.

    Raises:
        ValueError: an argument is none of these.
        MemoryError: the machine has no room for host_bytes.
    """

    def __init__(
        self, *, layers: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None, host_bytes: int, sampler: str = "exact",
        sampler_options: dict[str, Any] | None = None, rows: int | None = None,
        scale: float | None = None, actors: int = 1, kind: str = "inline",
        cpus: Sequence[Sequence[int]] | None = None, threads: int | None = None,
        max_requests: int = 256, max_tokens: int, deadline_s: float = DEADLINE,
        spin_s: float = ring.SPIN, page_rows: int = PAGE_ROWS, pinned: bool = False,
    ):  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}; use one of {', '.join(KINDS)}")
        if not heads or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"heads: got {heads} query heads and {kv_heads} KV heads; query heads must be a "
                "multiple of KV heads"
            )
        if actors < 1 or max_requests < 1 or max_tokens < 1 or deadline_s <= 0:
            raise ValueError(
                f"actors, max_requests, max_tokens, deadline_s: got {actors}, {max_requests}, "
                f"{max_tokens}, {deadline_s}; give numbers above 0"
            )
        actors = 0 if kind == "inline" else actors
        self.sampling = Sampling.of(sampler, rows, sampler_options)
        self.layout = Layout(
            layers, kv_heads, head_size, kv_dtype or dtype, page_rows,
            self.sampling.sketched, self.sampling.hash_tables,
        )  # fmt: skip
        self.heads, self.dtype, self.kind, self.deadline_s = heads, dtype, kind, deadline_s
        self.scale = head_size**-0.5 if scale is None else scale
        self.store = HostStore(
            self.layout, self.sampling, heads=heads, host_bytes=host_bytes, scale=self.scale,
            max_requests=max_requests, max_tokens=max_tokens, actors=actors,
            shared=kind in ("process", "ray"), pinned=pinned,
        )  # fmt: skip
        self._open_tickets: set[int] = set()
        self._newest = 0
        self._counts = dict.fromkeys(
            ("tickets", "rows_read", "rows_there", "items", "items_own", "items_rescued", "late"), 0
        )
        self._wait_ns = 0
        self._actors: Actors | None = None
        self._ring: Ring | None = None
        if self.store.file is None:
            if kind != "inline" or sampler != "exact":
                self.store.close()
                raise ValueError(
                    f"sampler, kind: {sampler!r}, {kind!r} need the native kernels, which were not "
                    "built here; reinstall where a C++17 compiler is installed, or use 'exact' and "
                    "'inline'"
                )
            return
        self._ring = self._make_ring(actors, spin_s)
        if actors:
            try:
                self._start(actors, cpus, threads, spin_s)
            except BaseException:
                self.store.close()
                raise
        self._finalizer = weakref.finalize(
            self, shut_down, os.getpid(), self._ring if actors else None, self._actors, self.store
        )

    def _make_ring(self, actors: int, spin_s: float) -> Ring:
        store = self.store
        return Ring(
            store.shape, store.region.address, store.ring_at, file=store.file,
            max_batch=store.max_requests, actors=actors, spin_s=spin_s,
        )  # fmt: skip

    def _start(
        self, actors: int, cpus: Sequence[Sequence[int]] | None, threads: int | None, spin_s: float
    ) -> None:
        if cpus is None:
            cpus = numa.divide(spare_cpus(), actors)
        if len(cpus) != actors:
            raise ValueError(f"cpus: got {len(cpus)} lists for {actors} actors")
        store, region = self.store, self.store.region
        source: int | str = region.fd if self.kind == "process" else 0
        if self.kind == "ray":
            source = region.path
        task = Task(
            os.getpid(), source, asdict(store.shape), store.ring_at, store.file,
            store.max_requests, actors, 0, spin_s, [],
        )  # fmt: skip
        tasks = [
            t.with_threads(threads or max(len(t.cpus), 1))
            for t in tasks_for(task, [list(c) for c in cpus])
        ]
        if self.kind == "ray":
            from .actor import start
        else:
            start = {"thread": self._thread, "process": ProcessHandle}[self.kind]
        self._actors = Actors(tasks, start, self._ring.beat, self._ring.watch)

    def _thread(self, task: Task) -> ThreadHandle:
        return ThreadHandle(task, self.store.region.address)

    # Requests

    def open(self, request: str) -> int:
        """A slot for the KV of a request.

        Raises:
            StoreFull: max_requests are open.
        """
        return self.store.open(request)

    def length(self, slot: int, layer: int = -1) -> int:
        """Rows of a request in a layer."""
        return self.store.of(slot).lengths[layer]

    def share(self, slot: int, keys: Iterable[Hashable]) -> int:
        """Take over the pages of these keys, as far as the store has them, for an empty request.

        Returns:
            rows that the request has by it, in every layer.
        """
        return self.store.share(slot, keys)

    def has(self, keys: Iterable[Hashable]) -> int:
        """How many of the leading keys `share` would find."""
        found = 0
        for key in keys:
            if self.store.pages.find(key) is None:
                break
            found += 1
        return found

    def reserve(self, slot: int, rows: int) -> None:
        """Take the pages for so many rows of a request now.

        Raises:
            StoreFull: too few pages are free; nothing changes then.
        """
        self.store.reserve(slot, rows)

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
        self.store.append(layer, (slot,), (len(k),), k, v)
        request = self.store.requests[slot]
        if keys or request.keys:
            self.store.name(slot, request.lengths[layer] - len(k), keys)

    def append_each(
        self, layer: int, slots: Sequence[int], k: torch.Tensor, v: torch.Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """`append` for several requests in one call, without keys (`name` gives these later).

        Args:
            k, v: [n, kv_heads, head_size], the rows of the first request, of the second, ...
            counts: rows of each; None: one.
        """
        self.store.append(layer, slots, counts or (1,) * len(slots), k, v)

    def name(self, slot: int, first: int, keys: Sequence[Hashable]) -> None:
        """Give keys to the pages from row `first` on; as those of `append`."""
        self.store.name(slot, first, keys)

    def truncate(self, slot: int, rows: int) -> None:
        """Forget the rows from `rows` on, in all layers."""
        self.store.truncate(slot, rows)

    def close_request(self, slot: int) -> None:
        """Give back a slot and its pages; pages under a key stay until they are needed."""
        self.store.close_request(slot)

    def forget(self) -> None:
        """Let no page be shared any more: the model that made its rows has changed."""
        self.store.forget()

    # Reading

    def prefill_view(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer where they lie, for kernels that read paged caches.

        Returns:
            k, v: [pages, kv_heads, page_rows, head_size], strided views; with `block_table` they
            are what `kernels.cpu.sparse_prefill` and `paged_decode` take. Not after `shutdown`.
        """
        if self.layout.dtype == torch.int8:
            raise ValueError("prefill_view: rows are kept as int8 with scales; use `read` instead")
        rows = self.store.rows(layer)
        return rows[..., 0, :], rows[..., 1, :]

    def part(self, layer: int) -> torch.Tensor:
        """All there is of a layer where it lies, uint8 [pages, bytes of a page]: a view, which
        `Layout.rows` reads. Not after `shutdown`."""
        return self.store.part(layer)

    def block_table(self, slots: Sequence[int]) -> torch.Tensor:
        """int32 [requests, most pages], the pages of each request; 0 behind its last."""
        lists = [self.store.of(slot).pages for slot in slots]
        table = torch.zeros(len(lists), max(map(len, lists), default=0), dtype=torch.int32)
        for row, pages in zip(table, lists, strict=True):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table

    def read(self, slot: int, layer: int, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """k, v: [last - first, kv_heads, head_size], copies of the rows, int8 ones as float32."""
        return self.store.read(slot, layer, first, last)

    # Attention

    def submit(
        self, layer: int, q: torch.Tensor, slots: Sequence[int], first: Sequence[int],
        last: Sequence[int],
    ) -> Ticket:  # fmt: skip
        """Ask for attention of one token of each request over its rows first .. last - 1.

        At most two tickets may be open, the last two. The rows asked for must stay until it is
        collected.

        Args:
            q: [B, heads, head_size].
            slots, first, last: B numbers each; an empty range is answered by out 0, lse -inf.
        """
        requests = self.store.requests
        for slot, begin, end in zip(slots, first, last, strict=True):
            have = requests[slot].lengths[layer] if slot in requests else -1
            if not 0 <= begin <= end <= have and not (begin >= end >= 0 and have >= 0):
                raise ValueError(
                    f"submit: rows {begin} to {end} are not among the {have} of request "
                    f"{self.store.of(slot).name!r} in layer {layer}"
                )
        if tuple(q.shape) != (len(slots), self.heads, self.layout.head_size):
            raise ValueError(
                f"q: got {tuple(q.shape)}; give {[len(slots), self.heads, self.layout.head_size]}"
            )
        if len(self._open_tickets) >= OPEN_TICKETS:
            raise RuntimeError(f"submit: {OPEN_TICKETS} tickets are open; collect one first")
        if self._open_tickets and self._newest not in self._open_tickets:
            # It would be written over: slots take turns.
            raise RuntimeError("submit: collect the ticket before the last one first")
        q = q.detach().cpu().contiguous()
        number = -1
        if self._ring is not None:
            kept = q if q.dtype in (torch.float32, torch.bfloat16) else q.float()
            kind = 0 if kept.dtype == torch.float32 else 1
            number = self._ring.ask(ring.ATTEND, layer, kept.data_ptr(), kind, slots, first, last)
            self._open_tickets.add(number)
            self._newest = number
        return Ticket(number, layer, q, tuple(slots), tuple(first), tuple(last))

    def collect(self, ticket: Ticket, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Put the answer into out [B, heads, head_size] and lse fp32 [B, heads].

        Answers what nobody has begun with, waits for the rest, and answers what does not come.
        """
        if self._ring is None:
            read = answer_in_torch(self.store, ticket, out, lse)
            self._counts["rows_read"] += read
            self._counts["rows_there"] += read
            return
        self._open_tickets.remove(ticket.number)
        direct = out.dtype == torch.float32 and out.is_contiguous() and out.device.type == "cpu"
        o = out if direct else torch.empty(out.shape)
        e = lse if lse.is_contiguous() and lse.device.type == "cpu" else torch.empty(lse.shape)
        answers = self._ring.collect(ticket.number, o.data_ptr(), e.data_ptr(), self.deadline_s)
        if o is not out:
            out.copy_(o)
        if e is not lse:
            lse.copy_(e)
        counts = self._counts
        counts["tickets"] += 1
        counts["rows_read"] += answers.rows_read
        counts["rows_there"] += answers.rows_there
        counts["items"] += len(ticket.slots) * self.layout.kv_heads
        counts["items_own"] += answers.own
        counts["items_rescued"] += answers.rescued
        counts["late"] += answers.late
        self._wait_ns += answers.wait_ns
        for actor in answers.ended:
            self._actors.ended(actor)
        if answers.rescued:
            self.look()

    # The whole

    def capacity(self) -> Capacity:
        """How much there is, and how much of it is free."""
        pages = self.store.pages
        return Capacity(
            pages.count, pages.free, self.layout.page_rows, self.layout.page_bytes,
            self.store.max_requests, self.store.max_tokens,
        )  # fmt: skip

    def stats(self) -> dict[str, float]:
        """Counters since the start, and gauges; docs/offload.md says what each is."""
        pages = self.store.pages
        return {
            **self._counts,
            "wait_seconds": self._wait_ns * 1e-9,
            "actor_seconds": self._ring.busy_seconds() if self._ring else 0.0,
            "bytes_written": self.store.bytes_written,
            "host_bytes_used": (pages.count - pages.free) * self.layout.page_bytes,
            "host_bytes_idle": pages.idle * self.layout.page_bytes,
            "host_bytes": pages.count * self.layout.page_bytes,
            "requests": len(self.store.requests),
            "actors": self._actors.alive() if self._actors else 0,
            "restarts": self._actors.restarts if self._actors else 0,
        }

    def look(self) -> None:
        """See whether actors have ended since the last look, and start those again.

        `collect` does where answers were missing; a worker without work calls this now and then.
        """
        if self._actors is not None:
            self._actors.look()

    def shutdown(self) -> None:
        """End what was started and give memory back; may be called again."""
        if self._ring is None:
            self.store.close()
        else:
            self._finalizer()
        self._open_tickets.clear()
