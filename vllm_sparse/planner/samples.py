"""The rows of a chunk that are scored, and what the patterns are chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_sparse.kernels import SampledMass
from vllm_sparse.kernels.block_indices import TILE

from .base import Chunk

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


@dataclass(frozen=True)
class Rows:
    """Rows of a chunk, ascending: int64 [R] each."""

    index: torch.Tensor  # in the chunk
    positions: torch.Tensor  # in the sequence
    tiles: torch.Tensor
    base_from: torch.Tensor  # first block of each row's base but for block 0
    keys: int  # that all of them see

    @classmethod
    def of(cls, chunk: Chunk, index: torch.Tensor) -> Rows:
        positions, tiles = chunk.start + index, index // TILE
        base_from = chunk.last_block[tiles] - 1
        return cls(index, positions, tiles, base_from, int((positions + 1).sum()))


# Shared like the chunks: the layers of a step ask for the same.
@lru_cache(maxsize=16)
def rows_of_body(chunk: Chunk, count: int) -> Rows:
    """Sampled rows of all tiles but the last."""
    return Rows.of(chunk, sample_rows((chunk.tiles - 1) * TILE, count, chunk.device))


@lru_cache(maxsize=16)
def rows_at_end(chunk: Chunk) -> Rows:
    """The last 64 rows."""
    first = max(chunk.query_len - TILE, 0)
    return Rows.of(chunk, torch.arange(first, chunk.query_len, device=chunk.device))


@dataclass
class Samples:
    """Exact attention mass of S sampled rows of h heads outside the chunk's last tile.

    columns: int64 [h, M] candidate columns, the heaviest first.
    column_mass: [h, S, M] mass of each candidate where it lies outside the row's base, else 0.
    """

    mass: SampledMass
    columns: torch.Tensor
    column_mass: torch.Tensor

    def of(self, index: torch.Tensor) -> Samples:
        """The samples of some of the heads."""
        mass = self.mass._replace(blocks=self.mass.blocks[index])
        return Samples(mass, self.columns[index], self.column_mass[index])
