"""Keys and values in host memory: one buffer, cut into segments that contexts may share."""

from __future__ import annotations

import contextlib
import mmap
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_SEGMENT_ROWS = 1 << 16  # row numbers within a segment are 16 bits wide
LINE = 64
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux, which mmap does not name
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class StoreFull(MemoryError):
    """No segment is free, and none can be evicted."""


def allocate(nbytes: int, touch: bool = False) -> torch.Tensor:
    """Zeroed memory for a store, uint8 [nbytes], in huge pages where the system has them.

    `touch`: all of it is taken now, and not as it is written.

    Rows that are scattered over 4 KiB pages cost a page walk each; on 2 MiB pages reading runs
    1.1 to 1.25 times as fast (Zen 4).
    """
    # Private: what mmap makes by default is shared memory, which gets no huge pages on request.
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    made = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
    if touch:
        try:
            memory.madvise(POPULATE_WRITE)
        except OSError:  # a Linux before 5.14
            made.zero_()
    return made


@dataclass(eq=False)
class Segment:
    """Rows of one layer in one slot of a store; full or sealed, it never changes again."""

    slot: int
    length: int = 0
    references: int = 1
    sealed: bool = False
    key: Hashable = None
    # What samplers know of these rows, by sampler; made again where it is missing.
    indexes: dict[Hashable, Any] = field(default_factory=dict)


class KVStore:
    """Segments of keys and values, [kv_heads][rows][K, V][head_size], in a buffer of the caller's.

    A segment belongs to who opened it until it is sealed under a key; from then on `lookup` finds
    it for others, too, and when the last of them has released it, it stays until its slot is
    needed, the least recently used first. The key must tell apart everything that the rows depend
    on: in vLLM the block hash, which holds cache salt, LoRA and multimodal inputs. Token ids alone
    would show one tenant's prefix to another.

    A store is used by one thread at a time.

    Args:
        buffer: writable bytes: a uint8 tensor, a memoryview of shared memory, anything with the
            buffer protocol. The store keeps it alive and never frees it.
        kv_heads, head_size: of the layer; the head size is a multiple of 16, from 16 to 256.
        dtype: how rows are kept: float32, bfloat16, float16, or int8 with a scale for each row.
        segment_rows: a power of two from 16 to 65536. Prefixes are shared by whole segments.

    Raises:
        ValueError: an argument is not one of these, or the buffer holds no segment.
    """

    def __init__(
        self,
        buffer: Any,
        *,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype = torch.bfloat16,
        segment_rows: int = MAX_SEGMENT_ROWS,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype}; use one of {', '.join(map(str, DTYPES))}")
        if kv_heads < 1 or head_size % 16 or not 16 <= head_size <= 256:
            raise ValueError(
                f"kv_heads, head_size: got {kv_heads}, {head_size}; give at least one KV head and "
                "a head size that is a multiple of 16 from 16 to 256"
            )
        if segment_rows & (segment_rows - 1) or not 16 <= segment_rows <= MAX_SEGMENT_ROWS:
            raise ValueError(
                f"segment_rows: got {segment_rows}; give a power of two from 16 to "
                f"{MAX_SEGMENT_ROWS}"
            )
        self.kv_heads, self.head_size, self.dtype = kv_heads, head_size, dtype
        self.segment_rows = segment_rows
        self.row_bytes = 2 * head_size * dtype.itemsize
        self.rows_bytes = kv_heads * segment_rows * self.row_bytes
        scales = kv_heads * segment_rows * 8 if dtype == torch.int8 else 0
        self.segment_bytes = -(-(self.rows_bytes + scales) // LINE) * LINE
        self.buffer = _bytes(buffer)
        skip = -self.buffer.data_ptr() % LINE
        self.slots = (self.buffer.numel() - skip) // self.segment_bytes
        if self.slots < 1:
            raise ValueError(
                f"buffer: {self.buffer.numel()} bytes hold no segment of {self.segment_bytes}; "
                "give a larger buffer or fewer segment_rows"
            )
        self._used = self.buffer[skip : skip + self.slots * self.segment_bytes]
        self._free = list(range(self.slots - 1, -1, -1))
        self._by_key: dict[Hashable, Segment] = {}
        self._idle: OrderedDict[Hashable, Segment] = OrderedDict()  # least recently used first

    @property
    def address(self) -> int:
        """Of slot 0."""
        return self._used.data_ptr()

    @property
    def free_segments(self) -> int:
        """Segments that `open` can give, idle ones included."""
        return len(self._free) + len(self._idle)

    def open(self) -> Segment:
        """An empty segment, to be released by the caller.

        Raises:
            StoreFull: all segments are in use.
        """
        if not self._free and self._idle:
            key, evicted = self._idle.popitem(last=False)
            del self._by_key[key]
            self._free.append(evicted.slot)
        if not self._free:
            raise StoreFull(
                f"all {self.slots} segments of {self.segment_rows} rows are in use; release "
                "contexts, or give the store a larger buffer"
            )
        return Segment(self._free.pop())

    def append(self, segment: Segment, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store rows [n, kv_heads, head_size] of any float dtype and device behind the others.

        Raises:
            ValueError: the segment is sealed or has no room for them, or they do not fit the store.
        """
        count = k.shape[0]
        if segment.sealed or segment.length + count > self.segment_rows:
            raise ValueError(
                f"segment: has {segment.length} of {self.segment_rows} rows"
                f"{' and is sealed' if segment.sealed else ''}; {count} more do not go in"
            )
        self.write(segment, self.checked("k", k, count), self.checked("v", v, count))

    def write(self, segment: Segment, k: torch.Tensor, v: torch.Tensor) -> None:
        """`append` for rows that were `checked`, and that the segment has room for."""
        assert not segment.sealed and segment.length + len(k) <= self.segment_rows
        place = slice(segment.length, segment.length + len(k))
        rows = self.rows(segment)
        for which, x in enumerate((k.transpose(0, 1), v.transpose(0, 1))):
            if self.dtype == torch.int8:
                x, self.scales(segment)[:, place, which] = quantise(x)
            rows[:, place, which] = x
        segment.length = place.stop
        segment.sealed = segment.length == self.segment_rows

    def checked(self, name: str, x: torch.Tensor, count: int) -> torch.Tensor:
        """x, if it is [count, kv_heads, head_size] of finite numbers."""
        if x.shape != (count, self.kv_heads, self.head_size) or not x.is_floating_point():
            raise ValueError(
                f"{name}: got {tuple(x.shape)} {x.dtype}; give floats of "
                f"[{count}, {self.kv_heads}, {self.head_size}]"
            )
        if not bool(torch.isfinite(x).all()):
            row, head, size = (~torch.isfinite(x)).nonzero()[0].tolist()
            raise ValueError(
                f"{name}: row {row} of KV head {head} holds {x[row, head, size].item()} in "
                f"dimension {size}; attention over it is not defined, so all must be finite"
            )
        return x

    def seal(self, segment: Segment, key: Hashable) -> Segment:
        """Make a segment immutable and let others find it by `key` (not None).

        Returns:
            The segment to use from now on: where another holds this key already, that one, and
            the given one is released.
        """
        if key is None or segment.key is not None:
            raise ValueError(
                f"seal: got key {key!r} for a segment with the key {segment.key!r}; give an "
                "unnamed segment a key other than None"
            )
        known = self.lookup(key)
        if known is not None:
            self.release(segment)
            return known
        segment.sealed, segment.key = True, key
        self._by_key[key] = segment
        return segment

    def lookup(self, key: Hashable) -> Segment | None:
        """The segment of this key, to be released by the caller, or None."""
        segment = self._by_key.get(key)
        if segment is not None:
            segment.references += 1
            self._idle.pop(key, None)
        return segment

    def release(self, segment: Segment) -> None:
        """Give back what `open` or `lookup` gave; without a key its rows are gone."""
        if segment.references < 1:
            raise ValueError(f"release: the segment in slot {segment.slot} was released before")
        segment.references -= 1
        if segment.references:
            return
        if segment.key is None:
            segment.length, segment.sealed = 0, True
            segment.indexes.clear()
            self._free.append(segment.slot)
        else:
            self._idle[segment.key] = segment

    def rows(self, segment: Segment) -> torch.Tensor:
        """A view of all its rows, [kv_heads, segment_rows, 2 (K, V), head_size], as stored."""
        first = segment.slot * self.segment_bytes
        view = self._used[first : first + self.rows_bytes].view(self.dtype)
        return view.view(self.kv_heads, self.segment_rows, 2, self.head_size)

    def scales(self, segment: Segment) -> torch.Tensor:
        """A view of the scales of int8 rows, fp32 [kv_heads, segment_rows, 2 (K, V)]."""
        first = segment.slot * self.segment_bytes + self.rows_bytes
        view = self._used[first : first + self.kv_heads * self.segment_rows * 8]
        return view.view(torch.float32).view(self.kv_heads, self.segment_rows, 2)

    def keys(self, segment: Segment, first: int = 0) -> torch.Tensor:
        """fp32 keys from row `first` on, [kv_heads, n, head_size]."""
        keys = self.rows(segment)[:, first : segment.length, 0].float()
        if self.dtype == torch.int8:
            keys *= self.scales(segment)[:, first : segment.length, 0, None]
        return keys


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> integers from -127 to 127, still floats, and the scale of each row fp32 [...]."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    # A subnormal scale would be too coarse for 127 steps.
    scale = scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)
    return (x / scale[..., None]).round(), scale


def _bytes(buffer: Any) -> torch.Tensor:
    if not isinstance(buffer, torch.Tensor):
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise ValueError("buffer: is read-only; give writable memory")
        return torch.frombuffer(view, dtype=torch.uint8)
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"buffer: got {tuple(buffer.shape)} {buffer.dtype}; give a contiguous uint8 [n]"
        )
    if buffer.device.type != "cpu":
        raise ValueError(f"buffer: is on {buffer.device}; a store lies in host memory")
    return buffer
