"""Block-sparse: each tile reads the key blocks whose mean key its mean query likes best."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparse.kernels import block_means
from vllm_sparse.kernels.block_indices import BLOCK, TILE

from .base import Chunk
from .samples import Samples, first, sure

# A block is read where its score is at most this much below the tile's best (logits).
LEVELS = 32
SMALLEST, LARGEST = 0.02, 40.0


def pooled_queries(
    chunk: Chunk,
    queries: torch.Tensor,
    heads: torch.Tensor,
    block_means: Callable[..., torch.Tensor] = block_means,
) -> torch.Tensor:
    """Mean query of each tile: [Tq, H, D] -> fp32 [h, T, D] of `heads`."""
    whole = chunk.query_len // TILE
    tiles = queries[: whole * TILE].unflatten(0, (whole, TILE)).transpose(1, 2)
    table = torch.arange(whole, dtype=torch.int32, device=chunk.device)
    mean = block_means(tiles, table, whole * TILE, heads)  # a tile is a page of queries
    if whole == chunk.tiles:
        return mean
    rest = queries[whole * TILE :, heads].float().mean(0)
    return torch.cat([mean, rest[:, None]], 1)


def scores(
    chunk: Chunk, pooled_q: torch.Tensor, pooled_k: torch.Tensor, scale: float
) -> torch.Tensor:
    """[h, T, D] x [h, nb, D] -> [h, T, nb], -inf for blocks in the future."""
    score = torch.bmm(pooled_q * scale, pooled_k.transpose(1, 2))
    score = score.nan_to_num(nan=torch.inf)  # what cannot be judged is read
    score.masked_fill_(~chunk.causal, -torch.inf)
    return score


def candidate(
    chunk: Chunk, samples: Samples, score: torch.Tensor, coverage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest threshold below each tile's best score that covers `coverage` [h].

    Returns:
        keys read per tile [h], inf where none covers; blocks bool [h, T, nb].
    """
    heads, _, _ = samples.blocks.shape
    gap = score.amax(-1, keepdim=True) - score  # [h, T, nb], inf in the future
    gap.nan_to_num_(nan=0.0, posinf=torch.inf)
    edges = SMALLEST * (LARGEST / SMALLEST) ** torch.linspace(
        0, 1, LEVELS, dtype=torch.float32, device=score.device
    )
    level = torch.bucketize(gap, edges)  # LEVELS: never
    rest = ~chunk.base & chunk.causal
    counted = torch.zeros(heads, LEVELS + 1, dtype=torch.float32, device=score.device)
    body = slice(0, samples.body)
    used = rest[body].expand(heads, -1, -1).flatten(1).float()
    counted.scatter_add_(1, level[:, body].flatten(1), used)
    cost = samples.base_cost + counted.cumsum(1) * (BLOCK / samples.body)
    gained = counted.new_zeros(heads, len(samples.tiles), LEVELS + 1)
    gained.scatter_add_(2, level[:, samples.tiles], samples.rest)
    covered = samples.base_mass[..., None] + gained.cumsum(2)
    enough = sure(covered, 1)[:, :LEVELS] >= coverage[:, None]
    best = first(enough).clamp(max=LEVELS - 1)
    total = cost.gather(1, best[:, None])[:, 0].masked_fill(~enough.any(1), torch.inf)
    return total, (level <= best[:, None, None]) | chunk.base


def fixed(chunk: Chunk, score: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` [h] best blocks of each tile, the base among them: bool [T, h, nb]."""
    wanted = score.masked_fill(chunk.base & chunk.causal, torch.inf)
    rank = wanted.argsort(-1, descending=True).argsort(-1)
    return (rank < count[:, None, None]).transpose(0, 1) | chunk.base[:, None]
