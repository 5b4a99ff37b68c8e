"""Large buffers that outlive a call, because touching new ones costs more than filling old ones.

A page that a process touches for the first time takes 1.6 us here, 13 ms for the 32 MiB that a
chunk at 16K keys needs: a sixth of all its planning.
"""

from __future__ import annotations

import math
import threading

import torch

MAX_KEPT = 128 << 20  # bytes of a buffer; a larger one is made and freed each time
GROWTH = 1.25  # contexts grow chunk by chunk; buffers less often


class Workspace(threading.local):
    """Uninitialised tensors by name, valid until the next request of that name in this thread."""

    def __init__(self):
        self._kept: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def empty(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A contiguous tensor of this shape, of any content."""
        count = math.prod(shape)
        if count * dtype.itemsize > MAX_KEPT:
            return torch.empty(shape, dtype=dtype, device=device)
        key = (name, dtype, device)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < count:
            size = min(int(count * GROWTH), MAX_KEPT // dtype.itemsize)
            kept = self._kept[key] = torch.empty(size, dtype=dtype, device=device)
        return kept[:count].view(shape)


WORKSPACE = Workspace()
