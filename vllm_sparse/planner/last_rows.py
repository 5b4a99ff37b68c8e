"""The chunk's last rows: a selection made from their exact attention.

Questions stand at the end of a prompt, so what these rows read decides the answer: here every row
reaches the coverage, not the mean of them, and nothing is extrapolated from other rows.
"""

from __future__ import annotations

import torch

from vllm_sparse.kernels.block_indices import BLOCK

from .base import COLUMN_COST

# How many single columns are tried beside whole blocks.
COLUMN_COUNTS = (0, 32)
BINS = 192
RANGE = 12.0  # natural logarithm, below a row's heaviest block; a bin is 6% wide


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
        chosen = heaviest(left.clamp_(min=0.0), need).any(1) | base
        single = ~chosen.gather(1, block_of[:, :count])
        single &= mass.amax(1) > 0 if count else single
        cost = chosen.sum(1).float() * BLOCK + single.sum(1).float() * COLUMN_COST
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_blocks = torch.where(better[:, None], chosen, best_blocks)
        best_columns[:, count:] &= ~better[:, None]
        best_columns[:, :count] = torch.where(better[:, None], single, best_columns[:, :count])
    return best_blocks, best_columns


def heaviest(mass: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """The heaviest entries of each row whose sum reaches `need`; near ties come together.

    By a histogram of the logarithms, a fifth of the cost of the sort that it replaces. An even
    row is one bin, and reads all its blocks rather than `need` of them.

    Args:
        mass: [h, R, nb], not negative; need: [h, R].

    Returns:
        bool [h, R, nb]; nothing where need <= 0, everything where it cannot be reached.
    """
    top = mass.amax(-1, keepdim=True).clamp(min=1e-30)
    bin_of = ((mass / top).log_() * (-BINS / RANGE)).clamp_(0, BINS - 1).long()
    held = mass.new_zeros(*mass.shape[:2], BINS).scatter_add_(2, bin_of, mass).cumsum(-1)
    # Bins up to the first that reaches the need: as many as do not reach it, and one more.
    last = (held < need[..., None]).sum(-1, keepdim=True)
    return (bin_of <= last) & (need > 0)[..., None]
