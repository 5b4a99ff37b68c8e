"""Vertical-slash: key columns that every row reads, and diagonals at fixed distances."""

from __future__ import annotations

import math

import torch

from vllm_sparse.kernels.block_indices import BLOCK

from .base import Chunk, columns_ascending
from .samples import Samples, first, sure

# Budgets tried: the best items of each up to a cost growing by 1.15 from one to the next.
LEVELS = 48
GROWTH = 1.15
NEIGHBOUR = 0.05


def support(mass: torch.Tensor) -> torch.Tensor:
    """What each key is worth as a column: [R, ..., n] -> [..., n].

    The sum over the rows less the heaviest of them: a key that one row alone attends is no column,
    and would rank before any true diagonal, whose mass a column shares with 63 other keys.
    """
    return mass.sum(0).sub_(mass.amax(0))


def candidate(
    chunk: Chunk, samples: Samples, coverage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cheapest columns and block diagonals that cover `coverage` [h] with the base.

    Taken by mass per cost. How large a budget must be is judged crosswise: what one half of the
    sampled rows would take for it, on the other half. Where each query attends keys of its own,
    columns and diagonals of the one half mean nothing to the other, and no budget covers.

    Returns:
        keys read per tile [h], inf where nothing covers; diagonals bool [h, nb] by block offset;
        columns bool [h, M], of `samples.columns`.
    """
    heads, rows, blocks = samples.blocks.shape
    half = rows // 2  # an odd row, where there is one, is left out of the judging
    cost = torch.cat([samples.offset_cost.expand(heads, -1), samples.column_cost], 1)
    # Rows alternate between the halves: [2, h, half, nb] and [2, h, half, M].
    diagonal = _halves(samples.by_offset, half)
    column = _halves(samples.column_mass, half)
    base = _halves(samples.base_mass, half)
    last = _halves(chunk.last_block[samples.tiles][None], half)[:, 0]

    level, _, _ = _levels(_worth(diagonal, column), cost)
    covered = base[..., None] + _covered(level.flip(0), diagonal, column, samples.columns, last)
    covered = covered.transpose(0, 1).flatten(1, 2)  # [h, 2 half, LEVELS + 1]
    enough = sure(covered, 1)[:, :LEVELS] >= coverage[:, None]
    best = first(enough).clamp(max=LEVELS - 1)[:, None]

    # The same budget, spent by all rows.
    level, ranked, order = _levels(_worth(samples.by_offset, samples.column_mass), cost)
    total = samples.base_cost + (cost.gather(1, order) * (ranked <= best)).sum(1)
    taken = level <= best
    return (
        total.masked_fill(~enough.any(1), torch.inf),
        taken[:, :blocks],
        taken[:, blocks:],
    )


def _worth(diagonal: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Mass of each item over the rows: [..., R, nb], [..., R, M] -> [..., nb + M].

    A diagonal of tokens crosses two or three diagonals of blocks, and few rows may meet the last
    of these; so a little of each diagonal's mass is credited to its neighbours.
    """
    mass = diagonal.sum(-2)
    spread = mass.clone()
    spread[..., 2:] += NEIGHBOUR * mass[..., 1:-1]
    spread[..., 2:-1] += NEIGHBOUR * mass[..., 3:]
    return torch.cat([spread, support(column.movedim(-2, 0))], -1)


def _halves(rows: torch.Tensor, half: int) -> torch.Tensor:
    """[h, S, ...] -> [2, h, S // 2, ...]: the rows at even and at odd places."""
    return torch.stack([rows[:, 0 : 2 * half : 2], rows[:, 1 : 2 * half : 2]])


def _levels(
    worth: torch.Tensor, cost: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first budget that pays for each item [..., items] when the best buys come first.

    Returns:
        level of each item, LEVELS for never; the same in order of purchase; that order.
    """
    value = torch.where(cost > 0, worth / cost, 0.0)
    value, order = value.sort(-1, descending=True)
    spent = cost.expand_as(value).gather(-1, order).cumsum(-1).clamp_(min=BLOCK)
    ranked = ((spent / BLOCK).log_() / math.log(GROWTH)).ceil_().clamp_(max=LEVELS).long()
    ranked.masked_fill_(value <= 0, LEVELS)
    return torch.empty_like(ranked).scatter_(-1, order, ranked), ranked, order


def _covered(
    level: torch.Tensor,
    diagonal: torch.Tensor,
    column: torch.Tensor,
    positions: torch.Tensor,
    last: torch.Tensor,
) -> torch.Tensor:
    """Mass that each budget covers outside the base: [2, h, s, LEVELS + 1].

    Args:
        level: [2, h, nb + M] of the items; diagonal: [2, h, s, nb]; column: [2, h, s, M].
        positions: [h, M] of the columns; last: [2, s] last block of each row's tile.
    """
    level_d, level_c = level.split([diagonal.shape[-1], column.shape[-1]], -1)
    rows = diagonal.shape[2]
    gained = diagonal.new_zeros(*diagonal.shape[:3], LEVELS + 1)
    gained.scatter_add_(3, level_d[:, :, None].expand_as(diagonal), diagonal)
    # A column counts from its own level on, until the block that it lies in comes and brings it.
    offset = (last[:, None, :, None] - (positions // BLOCK)[None, :, None]).clamp_(min=0)
    inside = level_d.gather(2, offset.flatten(2)).view_as(offset)
    mine = level_c[:, :, None].expand(-1, -1, rows, -1)
    mass = torch.where(mine < inside, column, 0.0)
    gained.scatter_add_(3, mine, mass)
    gained.scatter_add_(3, inside, mass.neg_())
    return gained.cumsum(-1)


def mask(chunk: Chunk, diagonals: torch.Tensor) -> torch.Tensor:
    """Blocks on `diagonals` (bool [h, nb] by block offset) and the base: bool [T, h, nb]."""
    heads = diagonals.shape[0]
    offset = chunk.offsets.clamp(min=0)
    on = diagonals[:, offset.flatten()].view(heads, *offset.shape).transpose(0, 1)
    return on | chunk.base[:, None]


def columns(chunk: Chunk, samples_columns: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The kept columns [h, M'] ascending, -1 after the last."""
    return columns_ascending(samples_columns, keep, chunk.seq_len)


def fixed(
    chunk: Chunk,
    mass: torch.Tensor,
    vertical: torch.Tensor,
    slash: torch.Tensor,
    *,
    most: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heaviest columns and diagonals of the chunk's last rows, by fixed counts.

    Args:
        mass: [h, R, n], causal attention of the chunk's last R rows.
        vertical, slash: int64 [h], how many of each.
        most: at least the largest of `vertical`, where the caller knows it without asking a GPU.

    Returns:
        blocks bool [T, h, nb], columns int64 [h, M] ascending and -1 after the last.
    """
    _, rows, n = mass.shape
    order = mass.sum(1).sort(-1, descending=True).indices
    count = torch.arange(n, device=mass.device)
    width = min(int(vertical.max()) if most is None else most, n)
    keep = count[:width] < vertical[:, None]
    position = columns_ascending(order[:, :width], keep, n, cut=most is None)

    # Row r stands at n - R + r: shifted right by R - 1 - r, its diagonal of distance d ends up at
    # n - 1 - d. Laid out in rows of n + R and read back in rows of n + R - 1, every row moves one
    # to the left against the one before, so the rows go in bottom up.
    padded = mass.new_zeros(mass.shape[0], rows, n + rows)
    padded[..., :n] = mass.flip(1)
    skewed = padded.flatten(1)[:, : rows * (n + rows - 1)].view(-1, rows, n + rows - 1)
    by_distance = skewed.sum(1)[:, :n].flip(1)  # [h, n]
    best = by_distance.sort(-1, descending=True).indices
    chosen = torch.zeros_like(by_distance, dtype=torch.bool)
    chosen.scatter_(1, best, count < slash[:, None])
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
