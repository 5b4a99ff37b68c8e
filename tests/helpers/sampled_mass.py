"""Random attention that the searches of planning are tried on."""

from __future__ import annotations

import torch

from vllm_sparse.kernels.block_indices import BLOCK
from vllm_sparse.kernels.pattern_reference import SampledMass


class Sampled:
    """Random attention of sampled rows of a chunk: every key's mass, and what is made of it."""

    def __init__(self, tiles: int, start: int, *, heads=3, rows=16, power=8.0, width=40, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.start, self.tiles, self.heads, self.rows = start, tiles, heads, rows
        self.keys = start + tiles * BLOCK
        self.blocks = -(-self.keys // BLOCK)
        last_key = start + (torch.arange(tiles) + 1) * BLOCK - 1
        row = torch.randint((tiles - 1) * BLOCK, (rows,), generator=rng).sort().values
        mass = torch.rand(heads, rows, self.keys, generator=rng)
        # Keys that all rows of a head like, beside what each row likes.
        mass = (mass + torch.rand(heads, 1, self.keys, generator=rng)).pow(power)
        mass = mass.masked_fill(torch.arange(self.keys) > (start + row)[:, None], 0.0)
        self.mass = mass / mass.sum(-1, keepdim=True)
        padded = torch.nn.functional.pad(self.mass, (0, self.blocks * BLOCK - self.keys))
        self.sampled = SampledMass(
            padded.unflatten(-1, (-1, BLOCK)).sum(-1), row // BLOCK, last_key // BLOCK
        )
        base = self.sampled.base[row // BLOCK].repeat_interleave(BLOCK, 1)[:, : self.keys]
        outside = self.mass.masked_fill(base, 0.0)
        self.columns = outside.sum(1).topk(width).indices
        self.column_mass = outside.gather(2, self.columns[:, None].expand(-1, rows, -1))

    def covered(self, head: int, read: list[torch.Tensor]) -> float:
        """What `sure` makes of the mass that rows cover by reading bool [keys] of their tile."""
        got = [
            float(self.mass[head, s, read[tile]].sum())
            for s, tile in enumerate(self.sampled.row_tile.tolist())
        ]
        got = torch.tensor(got, dtype=torch.float64)
        return float(got.mean() - got.std() / len(got) ** 0.5)

    def base(self, tile: int) -> torch.Tensor:
        """bool [keys]"""
        block = torch.arange(self.keys) // BLOCK
        last = int(self.sampled.last_block[tile])
        return (block == 0) | (block == last) | (block == last - 1)

    def cost(self, read: list[torch.Tensor]) -> float:
        """Keys a body tile reads on average, whole blocks to their end."""
        return sum(float(read[tile].sum()) for tile in range(self.tiles - 1)) / (self.tiles - 1)
