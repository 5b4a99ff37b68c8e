"""Vertical-slash: key columns that every row reads, and diagonals at fixed distances."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparse.kernels import sort_columns
from vllm_sparse.kernels.block_indices import BLOCK

from .base import Chunk


def mask(chunk: Chunk, diagonals: torch.Tensor) -> torch.Tensor:
    """Blocks on `diagonals` (bool [h, nb] by block offset) and the base: bool [T, h, nb]."""
    heads = diagonals.shape[0]
    shape = chunk.offsets.shape
    on = diagonals[:, chunk.flat_offsets].view(heads, *shape).transpose(0, 1)
    return on | chunk.base[:, None]


def fixed(
    chunk: Chunk,
    mass: torch.Tensor,
    vertical: torch.Tensor,
    slash: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heaviest columns and diagonals of the chunk's last rows, by fixed counts.

    Args:
        mass: [h, R, n], causal attention of the chunk's last R rows.
        vertical, slash: int64 [h], how many of each.

    Returns:
        blocks bool [T, h, nb], columns int64 [h, M] ascending and -1 after the last.
    """
    return spend(chunk, mass.sum(1), by_distance(mass), vertical, slash)


def by_distance(mass: torch.Tensor) -> torch.Tensor:
    """Causal attention of a sequence's last rows, [h, R, n], by distance: [h, n]."""
    _, rows, n = mass.shape
    # Row r stands at n - R + r: shifted right by R - 1 - r, its diagonal of distance d ends up at
    # n - 1 - d. Laid out in rows of n + R and read back in rows of n + R - 1, every row moves one
    # to the left against the one before, so the rows go in bottom up.
    padded = mass.new_zeros(mass.shape[0], rows, n + rows)
    padded[..., :n] = mass.flip(1)
    skewed = padded.flatten(1)[:, : rows * (n + rows - 1)].view(-1, rows, n + rows - 1)
    return skewed.sum(1)[:, :n].flip(1)


def spend(
    chunk: Chunk,
    column_sums: torch.Tensor,
    distance_sums: torch.Tensor,
    vertical: torch.Tensor,
    slash: torch.Tensor,
    *,
    most: tuple[int, int] | None = None,
    ascending: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = sort_columns,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heaviest columns and diagonals, by fixed counts.

    Args:
        column_sums, distance_sums: [h, n], mass of each.
        most: at least the largest of `vertical` and of `slash`, where the caller knows them
            without asking a GPU.
        ascending: sorts columns, see `kernels.sort_columns`.

    Returns:
        as `fixed`.
    """
    n = column_sums.shape[1]
    most = most or (int(vertical.max()), int(slash.max()))
    columns, distances = min(most[0], n), min(most[1], n)
    count = torch.arange(max(columns, distances), device=column_sums.device)
    order = column_sums.topk(columns).indices
    position = ascending(order, count[:columns] < vertical[:, None])
    best = distance_sums.topk(distances).indices
    chosen = torch.zeros_like(distance_sums, dtype=torch.bool)
    chosen.scatter_(1, best, count[:distances] < slash[:, None])
    return mask_of_distances(chunk, chosen), position


def mask_of_distances(chunk: Chunk, chosen: torch.Tensor) -> torch.Tensor:
    """Blocks that rows at the `chosen` distances (bool [h, n]) touch, and the base: [T, h, nb]."""
    shape = (chosen.shape[0], chosen.shape[1] + 1)
    before = torch.zeros(shape, dtype=torch.int32, device=chosen.device)
    torch.cumsum(chosen, 1, dtype=torch.int32, out=before[:, 1:])
    first = torch.arange(chunk.blocks, device=chunk.device) * BLOCK
    # A tile's rows see the keys of a block at distances nearest .. farthest.
    nearest = (chunk.first_key[:, None] - first - BLOCK + 1).clamp(0, chunk.seq_len)
    farthest = (chunk.last_key[:, None] - first + 1).clamp(0, chunk.seq_len)
    on = before[:, farthest.flatten()] > before[:, nearest.flatten()]
    return on.view(-1, *nearest.shape).transpose(0, 1) | chunk.base[:, None]
