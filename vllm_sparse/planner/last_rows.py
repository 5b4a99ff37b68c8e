"""The chunk's last rows: a selection made from their exact attention.

Questions stand at the end of a prompt, so what these rows read decides the answer: here every row
reaches the coverage, not the mean of them, and nothing is extrapolated from other rows.
"""

from __future__ import annotations

import torch

from vllm_sparse.kernels import heaviest
from vllm_sparse.kernels.block_indices import BLOCK

from .base import COLUMN_COST

# How many single columns are tried beside whole blocks.
COLUMN_COUNTS = (0, 32)


def select(
    blocks: torch.Tensor,
    base: torch.Tensor,
    columns: torch.Tensor,
    column_mass: torch.Tensor,
    coverage: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cheapest tried union of blocks and columns that covers every row.

    Args:
        blocks: [h, R, nb] mass of each block in each of the R rows of one tile.
        base: bool [nb], blocks that are read anyway.
        columns: int64 [h, M] candidates, the one with the heaviest row first.
        column_mass: [h, R, M], 0 inside the base.
        coverage: [h].

    Returns:
        blocks bool [h, nb], base included; columns bool [h, M], outside the blocks.
    """
    rest = blocks.masked_fill(base, 0.0)
    missing = coverage[:, None] - (blocks * base).sum(-1)
    block_of = columns // BLOCK
    best_cost = torch.full_like(coverage, torch.inf)
    best_blocks = base.expand(blocks.shape[0], -1).clone()
    best_columns = torch.zeros_like(columns, dtype=torch.bool)
    counts = {min(count, columns.shape[1]) for count in (*COLUMN_COUNTS, columns.shape[1])}
    for count in sorted(counts):
        mass = column_mass[..., :count]
        left = rest.scatter_add(2, block_of[:, None, :count].expand_as(mass), -mass)
        need = missing - mass.sum(-1)
        chosen = heaviest(left, need).any(1) | base
        single = ~chosen.gather(1, block_of[:, :count])
        single &= mass.amax(1) > 0 if count else single
        cost = chosen.sum(1).float() * BLOCK + single.sum(1).float() * COLUMN_COST
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_blocks = torch.where(better[:, None], chosen, best_blocks)
        best_columns[:, count:] &= ~better[:, None]
        best_columns[:, :count] = torch.where(better[:, None], single, best_columns[:, :count])
    return best_blocks, best_columns
