"""The chunk's last rows: a selection made from their exact attention.

Questions stand at the end of a prompt, so what these rows read decides the answer: here every row
reaches the coverage, not the mean of them, and nothing is extrapolated from other rows.
"""

from __future__ import annotations

import torch

from vllm_sparse.kernels import cheapest_union

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
    return cheapest_union(blocks, base, columns, column_mass, coverage, counts(columns.shape[1]))


def counts(width: int) -> tuple[int, ...]:
    """How many of `width` candidate columns are tried."""
    return tuple(sorted({min(count, width) for count in (*COLUMN_COUNTS, width)}))
