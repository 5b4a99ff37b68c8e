"""Block-sparse: each tile reads the key blocks whose mean key its mean query likes best."""

from __future__ import annotations

import torch

from .base import Chunk


def scores(pooled_q: torch.Tensor, pooled_k: torch.Tensor, scale: float) -> torch.Tensor:
    """[h, T, D] x [h, nb, D] -> [h, T, nb], of blocks in the future as well."""
    return torch.bmm(pooled_q * scale, pooled_k.transpose(1, 2))


def fixed(chunk: Chunk, score: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` [h] best blocks of each tile, the base among them: bool [T, h, nb]."""
    score = score.nan_to_num(nan=torch.inf)  # what cannot be judged is read
    wanted = score.masked_fill(~chunk.causal, -torch.inf)
    wanted.masked_fill_(chunk.base & chunk.causal, torch.inf)
    rank = wanted.argsort(-1, descending=True).argsort(-1)
    return (rank < count[:, None, None]).transpose(0, 1) | chunk.base[:, None]
