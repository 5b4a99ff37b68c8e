"""One sequence's keys and values of one layer: the segments of a store that hold them, in order."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import torch

from .store import KVStore, Segment

if TYPE_CHECKING:
    from .samplers import Sampler


class Context:
    """Rows 0 .. length - 1 over the segments of a store. Free it when the sequence ends.

    Every segment but the last is full. Rows that come while decoding are appended like those of
    the prompt, and sampled like them.

    Args:
        store: where the rows lie.
        keys: the store's keys of the leading segments; as many as the store still has are shared
            instead of written again. `length` says how far that reached.
        samplers: whose indexes are brought up to date as rows are appended, on the device that
            the keys come from; others read the store's rows when they are first asked.
    """

    def __init__(
        self, store: KVStore, keys: Iterable[Hashable] = (), samplers: Iterable[Sampler] = ()
    ):
        self.store = store
        self.samplers = tuple(samplers)
        self.segments: list[Segment] = []
        for key in keys:
            segment = store.lookup(key)
            if segment is None:
                break
            if segment.length < store.segment_rows:
                store.release(segment)
                raise ValueError(
                    f"keys: the segment {key!r} has {segment.length} of {store.segment_rows} rows; "
                    "only full segments can be shared"
                )
            self.segments.append(segment)

    @property
    def length(self) -> int:
        """Rows."""
        full = self.store.segment_rows * max(len(self.segments) - 1, 0)
        return full + (self.segments[-1].length if self.segments else 0)

    def append(self, k: torch.Tensor, v: torch.Tensor, keys: Iterable[Hashable] = ()) -> None:
        """Store rows behind the others.

        Args:
            k, v: [n, kv_heads, head_size], any float dtype, any device.
            keys: of the segments that become full by it, in order; without, they stay private.

        Raises:
            ValueError: the rows do not fit the store, or are not finite; nothing is stored then.
            StoreFull: the store has no segment left; nothing is stored then.
        """
        for name, x in (("k", k), ("v", v)):
            self.store.checked(name, x, k.shape[0])
        size = self.store.segment_rows
        opened = self._open(-(-(self.length + k.shape[0]) // size) - len(self.segments))
        names = iter(keys)
        done = 0
        while done < k.shape[0]:
            if not self.segments or self.segments[-1].length == size:
                self.segments.append(opened.pop())
            segment = self.segments[-1]
            part = slice(done, done + min(size - segment.length, k.shape[0] - done))
            self.store.write(segment, k[part], v[part])
            for sampler in self.samplers:
                sampler.extend(self.store, segment, k[part])
            key = next(names, None) if segment.length == size else None
            if key is not None:
                self.segments[-1] = self.store.seal(segment, key)
            done = part.stop

    def _open(self, count: int) -> list[Segment]:
        opened: list[Segment] = []
        try:
            for _ in range(count):
                opened.append(self.store.open())
        except MemoryError:
            for segment in opened:
                self.store.release(segment)
            raise
        return opened[::-1]

    def free(self) -> None:
        """Release all segments; the context is empty then."""
        while self.segments:
            self.store.release(self.segments.pop())

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def rows(self, kv_head: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 keys and values [R, head_size] of the rows int64 [R]."""
        store = self.store
        number, within = rows // store.segment_rows, rows % store.segment_rows
        both = torch.empty(len(rows), 2, store.head_size)
        for i in number.unique().tolist():
            mine = number == i
            part = store.rows(self.segments[i])[kv_head][within[mine]].float()
            if store.dtype == torch.int8:
                part *= store.scales(self.segments[i])[kv_head][within[mine]][..., None]
            both[mine] = part
        return both[:, 0], both[:, 1]
