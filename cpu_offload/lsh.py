"""The hash tables of one segment's keys: immutable once it is full, cheap to add to until then."""

from __future__ import annotations

import numpy as np
import torch

from . import hashing, native
from .store import KVStore, Segment

# Rows whose codes are compared one by one, before they enter the tables together: entering takes a
# pass over every table, 3 ms a KV head at 64K rows and 48 tables.
RECENT = 1024
# Keys are centred by the mean of those that were there first; as long as these are few, by a new
# mean, and hashed anew, each time their number has doubled.
FIRM = 4096


class LshIndex:
    """For each KV head and table: row numbers sorted by bucket, and where each bucket begins."""

    def __init__(self, store: KVStore, bits: int, tables: int, directions: torch.Tensor):
        heads, rows = store.kv_heads, store.segment_rows
        self.bits, self.tables, self.directions = bits, tables, directions
        self.centre = torch.zeros(heads, store.head_size)
        self.length = self.built = self._centred = 0
        self._ids = np.empty((heads * tables, rows), np.uint16)
        self._offsets = np.zeros((heads * tables, 2**bits + 1), np.uint32)
        self._recent = np.empty((heads * tables, min(RECENT, rows)), np.uint16)

    def extend(self, keys: torch.Tensor, store: KVStore, segment: Segment) -> None:
        """Add keys [kv_heads, n, D], the segment's rows from `length` on, hashed where they are."""
        total = self.length + keys.shape[1]
        if self._centred < FIRM and total >= 2 * self._centred:
            keys = keys if self.length == 0 else store.keys(segment)
            self.length = self.built = 0
            self._offsets[:] = 0
            self._centred = keys.shape[1]
            self.centre = keys.float().mean(1).cpu()
        centred = keys.float() - self.centre.to(keys.device)[:, None]
        codes = hashing.hash_vectors(centred, self.directions, self.bits).cpu().numpy()
        self._add(codes.reshape(-1, codes.shape[2]).view(np.uint16))

    def _add(self, codes: np.ndarray) -> None:
        """Codes [kv_heads * tables, n]: among the recent ones, or into the tables with these."""
        waiting = self.length - self.built
        if waiting + codes.shape[1] <= self._recent.shape[1]:
            self._recent[:, waiting : waiting + codes.shape[1]] = codes
        else:
            self._enter(np.concatenate([self._recent[:, :waiting], codes], 1))
        self.length += codes.shape[1]

    def _enter(self, codes: np.ndarray) -> None:
        count = codes.shape[1]
        if native.available():
            native.lsh_enter(self._ids, self._offsets, codes, self.bits, self.built, count)
        else:
            every = np.concatenate([self._codes(slice(None)), codes], 1)
            order = every.argsort(1, kind="stable")
            self._ids[:, : every.shape[1]] = order
            for table, row in enumerate(every):
                np.cumsum(np.bincount(row, minlength=2**self.bits), out=self._offsets[table, 1:])
        self.built += count

    def codes(self, kv_head: int) -> torch.Tensor:
        """int16 [L, length] of one KV head, read back from the tables."""
        mine = slice(kv_head * self.tables, (kv_head + 1) * self.tables)
        waiting = self._recent[mine, : self.length - self.built]
        return torch.from_numpy(np.concatenate([self._codes(mine), waiting], 1).view(np.int16))

    def _codes(self, tables: slice) -> np.ndarray:
        sizes = np.diff(self._offsets[tables])
        codes = np.empty((len(sizes), self.built), np.uint16)
        for row, ids, size in zip(codes, self._ids[tables], sizes, strict=True):
            row[ids[: self.built]] = np.repeat(np.arange(len(size), dtype=np.uint16), size)
        return codes

    def entry(self) -> tuple:
        """Of native.LSH_SEGMENT."""
        return (
            self._ids.ctypes.data, self._offsets.ctypes.data, self._recent.ctypes.data,
            self.centre.data_ptr(), self.built, self.length, self._recent.shape[1],
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Of the rows in it: ids and codes, bucket offsets, centres. Memory for rows to come,
        which the system has not given yet, is not counted."""
        ids = self._ids.itemsize * self.length * len(self._ids)
        return ids + self._offsets.nbytes + self.centre.nbytes
