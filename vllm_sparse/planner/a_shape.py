"""A-shape: the sink and a window of the last tokens."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.block_indices import BLOCK

from .base import Chunk
from .samples import Samples, first, sure


def fixed(chunk: Chunk, sink: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Blocks that hold the first `sink` [h] and, of each row, the last `window` [h] tokens.

    Returns:
        bool [T, h, nb].
    """
    first = torch.arange(chunk.blocks, device=chunk.device) * BLOCK
    from_key = (chunk.first_key[:, None] - window + 1)[..., None]  # [T, h, 1]
    in_window = first + BLOCK > from_key
    return in_window | (first < sink[:, None]) | chunk.base[:, None]


def candidate(
    chunk: Chunk, samples: Samples, coverage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The narrowest window of whole blocks that, with the base, covers `coverage` [h].

    Judged on all sampled rows: one number is fitted to them, so that nothing can be learnt by
    heart. Returns (keys read per tile [h], inf where none covers; last block offset [h]).
    """
    covered = samples.base_mass[..., None] + samples.by_offset.cumsum(-1)
    enough = sure(covered, 1) >= coverage[:, None]  # [h, nb]
    offset = first(enough).clamp(max=chunk.blocks - 1)
    cost = samples.base_cost + samples.offset_cost.cumsum(0)[offset]
    return cost.masked_fill(~enough.any(-1), torch.inf), offset


def mask(chunk: Chunk, offset: torch.Tensor) -> torch.Tensor:
    """Blocks up to `offset` [h] before each tile's last: bool [T, h, nb]."""
    return (chunk.offsets[:, None] <= offset[:, None]) | chunk.base[:, None]
