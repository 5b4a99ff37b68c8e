"""A-shape: the sink and a window of the last tokens."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.block_indices import BLOCK

from .base import Chunk


def fixed(chunk: Chunk, sink: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Blocks that hold the first `sink` [h] and, of each row, the last `window` [h] tokens.

    Returns:
        bool [T, h, nb].
    """
    first = torch.arange(chunk.blocks, device=chunk.device) * BLOCK
    from_key = (chunk.first_key[:, None] - window + 1)[..., None]  # [T, h, 1]
    in_window = first + BLOCK > from_key
    return in_window | (first < sink[:, None]) | chunk.base[:, None]
