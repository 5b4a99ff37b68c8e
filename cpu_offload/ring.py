"""Tickets in shared memory between a worker and who answers beside it; csrc/ring.h says how.

Loads no torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .host import HostShape, StoreLost, load, struct

ATTEND, ECHO = 0, 1
MOST_THREADS = 256  # of an actor; kThreads in csrc/ring.h
SPIN = 100e-6  # seconds before sleeping: longer than most answers' way, shorter than a layer's work

_i64, _ptr = ctypes.c_int64, ctypes.c_void_p
_Ring = struct("_Ring", ("memory", _ptr), ("max_batch", _i64), ("actors", _i64), ("spin_ns", _i64))
_Ask = struct(
    "_Ask", ("operation", _i64), ("layer", _i64), ("batch", _i64), ("slots", _ptr), ("first", _ptr),
    ("last", _ptr), ("dtype", _i64), ("q", _ptr), ("ticket", _i64),
)  # fmt: skip
_Collect = struct(
    "_Collect", ("ticket", _i64), ("out", _ptr), ("lse", _ptr), ("deadline_ns", _i64),
    ("processes", _i64), ("pidfds", _ptr),
    *((n, _i64) for n in (
        "rows_read", "rows_there", "own", "rescued", "late", "ended", "wait_ns",
    )),
)  # fmt: skip


@dataclass
class Answers:
    """What a collected ticket took."""

    rows_read: int
    rows_there: int
    own: int  # items that the asking side answered, as it had time
    rescued: int  # items that it answered as nobody else did in time
    late: bool
    ended: list[int]  # actors whose process is gone
    wait_ns: int


class Ring:
    """The ring of a store in a region that begins at `address` of this process.

    Args:
        shape: of the store; ring_at: bytes from the region's start to the ring.
        file: of the native extension.
        max_batch: requests of a ticket; actors: who may answer beside the asking side.
        spin_s: seconds of spinning before a wait sleeps.
    """

    def __init__(
        self, shape: HostShape, address: int, ring_at: int, *, file: str, max_batch: int,
        actors: int, spin_s: float = SPIN,
    ):  # fmt: skip
        self._library = load(file)
        self.max_batch, self.actors = max_batch, actors
        self.host = shape.at(address)
        self._ring = _Ring(address + ring_at, max_batch, actors, int(spin_s * 1e9))
        self._ask = _Ask()
        self._slots = np.zeros(max_batch, np.int32)
        self._first, self._last = np.zeros((2, max_batch), np.int64)
        self._ask.slots, self._ask.first, self._ask.last = (
            x.ctypes.data for x in (self._slots, self._first, self._last)
        )
        self._collect = _Collect()
        self._pidfds = np.full(max(actors, 1), -1, np.int32)
        self._collect.pidfds, self._collect.processes = self._pidfds.ctypes.data, actors
        host, ring = ctypes.addressof(self.host), ctypes.addressof(self._ring)
        self._arguments = host, ring
        self._ask_at = ctypes.addressof(self._ask)
        self._collect_at = ctypes.addressof(self._collect)

    @staticmethod
    def nbytes(shape: HostShape, file: str, max_batch: int, actors: int) -> int:
        host = shape.at(0)
        return load(file).vllm_sparse_ring_bytes(ctypes.addressof(host), max_batch, actors)

    def watch(self, actor: int, pidfd: int) -> None:
        """A process that is not waited for once it has ended; -1: none."""
        self._pidfds[actor] = pidfd

    def ask(
        self, operation: int, layer: int, q: int, dtype: int, slots: Sequence[int],
        first: Sequence[int], last: Sequence[int],
    ) -> int:  # fmt: skip
        """Publish a ticket and return its number; at most two may be open.

        Args:
            q: address of [B, heads, head_size], float32 or bfloat16 as `dtype` says.
        """
        count = len(slots)
        self._slots[:count], self._first[:count], self._last[:count] = slots, first, last
        ask = self._ask
        ask.operation, ask.layer, ask.batch = operation, layer, count
        ask.q, ask.dtype = q, dtype
        self._library.vllm_sparse_ring_ask(*self._arguments, self._ask_at)
        return ask.ticket

    def collect(self, ticket: int, out: int, lse: int, deadline_s: float) -> Answers:
        """Wait for a ticket, and answer what others do not within the deadline.

        Args:
            out, lse: addresses of float32 [B, heads, head_size] and [B, heads].

        Raises:
            StoreLost: out of memory for the kernels' scratch buffers, or what says where rows lie
                was written over; the ticket stays open.
        """
        c = self._collect
        c.ticket, c.out, c.lse, c.deadline_ns = ticket, out, lse, int(deadline_s * 1e9)
        code = self._library.vllm_sparse_ring_collect(*self._arguments, self._collect_at)
        if code == 1:
            raise StoreLost(
                "collect: out of memory for the kernel's scratch buffers, with a part of the "
                "answers given"
            )
        if code == 2:
            raise StoreLost("collect: the page lists or questions in the region were overwritten")
        ended = [a for a in range(self.actors) if c.ended >> a & 1] if c.ended else []
        return Answers(c.rows_read, c.rows_there, c.own, c.rescued, bool(c.late), ended, c.wait_ns)

    def start(self, actor: int) -> None:
        """To be called before an actor's threads serve, and after those of its last start ended."""
        self._library.vllm_sparse_ring_start(*self._arguments, actor)

    def serve(self, actor: int, thread: int, seconds: float) -> bool:
        """Answer tickets for a while; False when the ring is closing.

        Args:
            thread: of the actor, below MOST_THREADS; no two that serve have the same.

        Raises:
            MemoryError: for the kernels' scratch buffers.
        """
        ns = int(seconds * 1e9)
        code = self._library.vllm_sparse_ring_serve(*self._arguments, actor, thread, ns)
        if code == 1:
            raise MemoryError("serve: out of memory for the kernel's scratch buffers")
        return code == 0

    def beat(self, actor: int) -> int:
        """A number that grows while the actor serves."""
        return self._library.vllm_sparse_ring_beat(*self._arguments, actor)

    def answered(self, actor: int) -> int:
        """How many items an actor has answered."""
        return self._library.vllm_sparse_ring_items(*self._arguments, actor)

    def busy_seconds(self) -> float:
        """That all actors together have spent on answers."""
        busy = self._library.vllm_sparse_ring_busy_ns
        return sum(busy(*self._arguments, a) for a in range(self.actors)) * 1e-9

    def set_isa(self, name: str) -> None:
        """Use the kernels of one instruction set in this process, "" for the best; for tests."""
        if self._library.vllm_sparse_offload_set_isa(name.encode()) != 0:
            raise ValueError(f"isa: {name!r} is not available here")

    def close(self) -> None:
        """Tell all who serve to stop."""
        self._library.vllm_sparse_ring_close(*self._arguments)
