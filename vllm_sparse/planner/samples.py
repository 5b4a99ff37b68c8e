"""The sampled rows of a chunk, reduced to what the patterns are chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_sparse.kernels.block_indices import BLOCK, TILE

from .base import COLUMN_COST, Chunk

MIN_ROWS, MAX_ROWS = 16, 32
ROWS_EACH = 32  # one sampled row for so many of the chunk
PROBE_ROWS = 4
GOLDEN = 0.6180339887498949


def sample_rows(rows: int, count: int, device: torch.device) -> torch.Tensor:
    """int64 [count <= rows]: one row of each of `count` equal strata of `rows` rows.

    Where in its stratum follows the golden ratio: all places within a tile are met alike, and the
    same prompt is planned alike.
    """
    i = torch.arange(count, device=device, dtype=torch.float64)
    return ((i + (i * GOLDEN + 0.5) % 1.0) * (rows / max(count, 1))).long().clamp(max=rows - 1)


def sure(covered: torch.Tensor, dim: int) -> torch.Tensor:
    """The mean over rows less its standard error: what coverage is compared to.

    Where each row is covered alike that is the mean. Where some rows are covered and others not at
    all, a mean of 32 of them can be 5% too high by chance, and the cheapest pattern that passes is
    the one that chance favoured.
    """
    count = covered.shape[dim]
    return covered.mean(dim) - covered.std(dim) / count**0.5


def first(enough: torch.Tensor) -> torch.Tensor:
    """Index of the first True of each row: bool [h, L] -> int64 [h], L where there is none."""
    return (enough.cumsum(-1) == 0).sum(-1)


@dataclass
class Samples:
    """Exact attention mass of S sampled rows of h heads outside the chunk's last tile.

    tiles: int64 [S], tile of each row, ascending.
    blocks: [h, S, nb] mass of each key block.
    columns: int64 [h, M] candidate columns, the heaviest first.
    column_mass: [h, S, M] mass of each candidate where it lies outside the row's base, else 0.
    """

    chunk: Chunk
    tiles: torch.Tensor
    blocks: torch.Tensor
    columns: torch.Tensor
    column_mass: torch.Tensor

    def of(self, index: torch.Tensor) -> Samples:
        """The samples of some of the heads."""
        return Samples(
            self.chunk,
            self.tiles,
            self.blocks[index],
            self.columns[index],
            self.column_mass[index],
        )

    @property
    def body(self) -> int:
        """Number of tiles that are planned from samples: all but the last."""
        return self.chunk.tiles - 1

    @cached_property
    def base(self) -> torch.Tensor:
        """bool [S, nb]: base blocks of each row's tile."""
        return self.chunk.base[self.tiles]

    @cached_property
    def base_mass(self) -> torch.Tensor:
        """[h, S]: mass that the base covers."""
        return (self.blocks * self.base).sum(-1)

    @cached_property
    def rest(self) -> torch.Tensor:
        """[h, S, nb]: mass of each block outside the base."""
        return self.blocks.masked_fill(self.base, 0.0)

    @cached_property
    def by_offset(self) -> torch.Tensor:
        """[h, S, nb]: mass outside the base by block offset instead of block."""
        source = self.chunk.last_block[self.tiles][:, None] - torch.arange(
            self.chunk.blocks, device=self.chunk.device
        )
        mass = self.rest.gather(2, source.clamp(min=0).expand_as(self.rest))
        return mass.masked_fill(source < 0, 0.0)

    @cached_property
    def base_cost(self) -> float:
        """Keys of base blocks that a tile reads on average."""
        return self.chunk.base_cost(self.body)

    @cached_property
    def offset_cost(self) -> torch.Tensor:
        """[nb]: keys that a tile reads on average for each block offset outside the base."""
        offset = torch.arange(self.chunk.blocks, device=self.chunk.device)
        last = self.chunk.last_block[: self.body]
        cost = (last[:, None] > offset).float().mean(0) * BLOCK
        cost[:2] = 0.0
        return cost

    @cached_property
    def column_cost(self) -> torch.Tensor:
        """[h, M]: keys that a tile reads on average for each candidate column."""
        # Tiles from the column's own on see it.
        tile = ((self.columns - self.chunk.start) // TILE).clamp(min=0)
        return COLUMN_COST * (self.body - tile).clamp(min=0).float() / self.body
