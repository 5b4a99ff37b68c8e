"""Block-sparse: each tile reads the key blocks whose mean key its mean query likes best."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.block_indices import BLOCK, TILE

from .base import Chunk
from .samples import Samples, first, sure
from .scores import score_dtype

# A block is read where its score is at most this much below the tile's best (logits).
LEVELS = 32
SMALLEST, LARGEST = 0.02, 40.0


def pooled_queries(chunk: Chunk, queries: torch.Tensor) -> torch.Tensor:
    """Mean query of each tile: [Tq, H, D] -> fp32 [T, H, D]."""
    whole = chunk.query_len // TILE
    parts = [pooled(queries[: whole * TILE].flatten(1)).unflatten(1, queries.shape[1:])]
    if whole < chunk.tiles:
        parts.append(queries[whole * TILE :].float().mean(0, keepdim=True))
    return torch.cat(parts)


def pooled_keys(chunk: Chunk, keys: torch.Tensor) -> torch.Tensor:
    """Mean key of each block: [Hkv, 64 nb, D], zero after the last key -> fp32 [Hkv, nb, D]."""
    mean = pooled(keys.flatten(0, 1)).unflatten(0, (len(keys), chunk.blocks))
    mean[:, -1] *= BLOCK / (chunk.seq_len - (chunk.blocks - 1) * BLOCK)
    return mean


def pooled(rows: torch.Tensor) -> torch.Tensor:
    """Means of 64 rows each: [64 m, X] -> fp32 [m, X].

    As a product: a mean in bf16 takes four times as long (2.2 instead of 0.5 ms for 4M entries).
    """
    dtype = score_dtype(rows.dtype)
    weight = torch.full((1, BLOCK), 1 / BLOCK, dtype=dtype, device=rows.device)
    return torch.matmul(weight, rows.to(dtype).unflatten(0, (-1, BLOCK)))[:, 0].float()


def scores(
    chunk: Chunk, pooled_q: torch.Tensor, pooled_k: torch.Tensor, scale: float
) -> torch.Tensor:
    """[T, h, D] x [h, nb, D] -> [h, T, nb], -inf for blocks in the future."""
    score = torch.bmm(pooled_q.transpose(0, 1) * scale, pooled_k.transpose(1, 2))
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
