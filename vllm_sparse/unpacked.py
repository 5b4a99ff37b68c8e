"""Rows that host memory has as int8, in the model's dtype, for prompts that read them on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .cpu_offload.layout import Layout
from .cpu_offload.unpack import unpack


class Unpacked:
    """A paged cache with some pages of one layer; layers take turns.

    It is as large as the requests of a step were at most: 2 x Hkv x D numbers a row.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype)

    def fill(
        self, layout: Layout, part: torch.Tensor, pages: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [pages, Hkv, page rows, D], views that stay until the next call.

        Args:
            part: uint8 [pages of the store, part_bytes], a layer's; pages: those to unpack.
        """
        shape = (len(pages), layout.kv_heads, layout.page_rows, 2, layout.head_size)
        size = torch.Size(shape).numel()
        if size > len(self._memory):
            with torch.inference_mode(False):  # it outlives the step
                self._memory = self._memory.new_empty(size)
        rows = self._memory[:size].view(shape)
        unpack(layout, part, pages, rows)
        return rows[..., 0, :], rows[..., 1, :]


@functools.cache
def shared_unpacked(dtype: torch.dtype) -> Unpacked:
    """The one of all layers of a process."""
    return Unpacked(dtype)
