"""Exact attention of a few rows, reduced to what planning asks: see `reference.row_scores`.

One pass over the keys finds the masses of blocks. Where columns are asked for, a second finds what
keys are worth, and a third reads the columns themselves.
"""

from __future__ import annotations

import torch

from .. import reference
from ..block_indices import BLOCK
from ..paged_cache import FP8, check_scales
from .block_sums import block_mass
from .key_worth import _column_scores, _key_worth
from .scored_rows import ROWS, launch_arguments, packing, split, units

SAMPLED_ROWS, FEW_ROWS = 32, 16


def row_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    base_from: torch.Tensor | None = None,
    squares: bool = False,
    columns: int = 0,
    by_heaviest: bool = False,
    k_scale: torch.Tensor | None = None,
) -> reference.RowScores:
    """See `reference.row_scores`: same arguments, same meaning."""
    reference.check_row_scores(q, k_cache, positions, base_from, seq_len, columns)
    check_scales(q.device, k_scale=k_scale)
    if k_cache.dtype not in (q.dtype, FP8):
        raise ValueError(
            f"k_cache: got {k_cache.dtype} for q of {q.dtype}; give the same dtype, or {FP8}"
        )
    rows, wanted, blocks = q.shape[0], heads.numel(), -(-seq_len // BLOCK)
    new = positions.new_empty
    shape = (wanted, rows, blocks)
    if not rows or not wanted or not seq_len:
        return reference.RowScores(
            new(shape, dtype=torch.float32), new(shape, dtype=torch.float32) if squares else None,
            torch.arange(columns, device=q.device).expand(wanted, -1),
            new((wanted, rows, columns), dtype=torch.float32),
        )  # fmt: skip
    padded = _padded(rows, columns, by_heaviest)
    given = (q, k_cache, block_table, positions, heads)
    listed = by_heaviest and columns > 0
    lse, mass, square, peaks = block_mass(
        *given, seq_len, scale=scale, k_scale=k_scale, padded=padded, squares=squares,
        peaks=listed and blocks > columns, base_from=base_from,
    )  # fmt: skip
    if not columns:
        none = new((wanted, 0)), new((wanted, rows, 0), dtype=torch.float32)
        return reference.RowScores(mass, square, *none)
    kv_heads = k_cache.shape[1]
    group = q.shape[1] // kv_heads
    packed = packing(padded, 1 if listed else group, *q.shape[1:])
    number = wanted if listed else units(packed, group, kv_heads)
    chosen = _heaviest_blocks(peaks, columns, blocks, q.device) if listed else heads[None]
    count = chosen.shape[1] if listed else blocks
    chosen_row = chosen.stride(0) if len(chosen) > 1 else 0  # one list may serve all heads
    each, splits = split(count, number)
    scales, strides, options = launch_arguments(q, k_cache, scale, k_scale)
    base = positions if base_from is None else base_from
    has_base = base_from is not None
    worth = new((wanted, count * BLOCK), dtype=torch.float32)
    _key_worth[(splits, number)](
        *given, lse, base, chosen, worth, seq_len, rows, wanted, count, chosen_row, each,
        *scales, *strides, **packed, BASE=has_base, HEAVIEST=listed, **options,
    )  # fmt: skip
    best = worth.topk(columns).indices
    top = torch.empty_like(best)
    column_mass = new((wanted, rows, columns), dtype=torch.float32)
    _column_scores[(-(-columns // 64), wanted)](
        *given, lse, base, chosen, best, top, column_mass, seq_len, rows, columns,
        chosen_row, *scales, *strides, BASE=has_base, LISTED=listed, **options,
    )  # fmt: skip
    return reference.RowScores(mass, square, top, column_mass)


def _padded(rows: int, columns: int, by_heaviest: bool) -> int:
    """How many rows each head's part of a tile has: one of three, by what is asked for, so that a
    short chunk's few rows compile nothing of their own."""
    if by_heaviest or rows > SAMPLED_ROWS:
        return ROWS
    return SAMPLED_ROWS if columns or rows > FEW_ROWS else FEW_ROWS


def _heaviest_blocks(
    peaks: torch.Tensor | None, columns: int, blocks: int, device: torch.device
) -> torch.Tensor:
    """int64 [h or 1, B <= columns]: blocks that hold each head's `columns` heaviest keys.

    As many blocks as columns are enough: a key of any other is no heavier than the heaviest of each
    of these. At 128K tokens 512 columns lie in a quarter of the blocks.

    Args:
        peaks: fp32 [h, R, nb], the mass of each block's heaviest key; None: all blocks are wanted.
    """
    if peaks is None:
        return torch.arange(blocks, device=device).expand(1, -1)
    return peaks.amax(1).topk(columns, sorted=False).indices
