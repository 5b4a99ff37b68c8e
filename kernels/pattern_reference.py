"""What the searches of planning mean: the cheapest selection of each pattern that covers a head.

Plain fp32 torch, which is also what runs where the native extension could not be built. Costs are
keys that a tile reads on average. What every selection holds, the base, is block 0, a tile's last
block and the one before it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .block_indices import BLOCK, TILE
from .reference import heaviest

# Keys of a block that one gathered column costs as much as: 1.15 in fp32 (1024 columns against 16
# blocks, D = 128), where the heads of a KV head share the blocks they read and not the columns.
COLUMN_COST = 1.15
# Budgets of columns and diagonals that are tried: the best items of each up to a cost growing by
# 1.15 from one to the next.
BUDGETS = 48
GROWTH = 1.15
NEIGHBOUR = 0.05
# A block is read where its score is at most this much below the tile's best (logits).
THRESHOLDS = 32
SMALLEST, LARGEST = 0.02, 40.0


class SampledMass(NamedTuple):
    """Exact attention mass of S sampled rows of h heads outside the last tile of a chunk."""

    blocks: torch.Tensor  # fp32 [h, S, nb]
    row_tile: torch.Tensor  # int64 [S] tile of each row, ascending
    last_block: torch.Tensor  # int64 [T] block of each tile's last row

    @property
    def body(self) -> int:
        """Number of tiles that are planned from samples: all but the last."""
        return self.last_block.numel() - 1

    @property
    def base(self) -> torch.Tensor:
        """bool [T, nb]: base blocks of each tile."""
        block = torch.arange(self.blocks.shape[2], device=self.blocks.device)
        offset = self.last_block[:, None] - block
        return (offset == 0) | (offset == 1) | (block == 0)

    @property
    def rest(self) -> torch.Tensor:
        """[h, S, nb]: mass of each block outside the base."""
        return self.blocks.masked_fill(self.base[self.row_tile], 0.0)

    @property
    def base_mass(self) -> torch.Tensor:
        """[h, S]: mass that the base covers."""
        return (self.blocks * self.base[self.row_tile]).sum(-1)

    @property
    def base_cost(self) -> torch.Tensor:
        """fp32 [], left on the device: a number would have to be waited for."""
        return (self.base[: self.body].sum(-1).double().mean() * BLOCK).float()

    @property
    def by_offset(self) -> torch.Tensor:
        """[h, S, nb]: mass outside the base by block offset, back from the last block."""
        offset = torch.arange(self.blocks.shape[2], device=self.blocks.device)
        block = self.last_block[self.row_tile][:, None] - offset
        mass = self.rest.gather(2, block.clamp(min=0).expand_as(self.blocks))
        return mass.masked_fill(block < 0, 0.0)

    @property
    def offset_cost(self) -> torch.Tensor:
        """[nb]: cost of each block offset outside the base."""
        offset = torch.arange(self.blocks.shape[2], device=self.blocks.device)
        cost = (self.last_block[: self.body, None] > offset).float().mean(0) * BLOCK
        cost[:2] = 0.0
        return cost


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


def least_keys(sampled: SampledMass, coverage: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """How many keys outside the base all rows together read at least, to cover `coverage` [h].

    k keys of masses p hold at most sqrt(k sum p^2), so what the base leaves to be covered, c,
    takes at least c^2 / sum p^2 of the other keys.

    Args:
        squares: fp32 [h, S, nb], sum of the squared masses of each block's keys.

    Returns:
        fp32 [h]
    """
    outside = ~sampled.base[sampled.row_tile]
    missing = (coverage[:, None] - 1 + (sampled.blocks * outside).sum(-1)).clamp(min=0.0)
    return (missing.square() / (squares * outside).sum(-1).clamp(min=1e-30)).sum(1)


def sort_columns(columns: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Columns int64 [h, M] where `keep` holds, ascending, then -1: int32, cut to the longest."""
    last = torch.iinfo(torch.int64).max
    order = columns.masked_fill(~keep, last).sort(-1).values
    order = order.masked_fill(order == last, -1).to(torch.int32)
    return order[:, : int(keep.sum(-1).max())] if keep.numel() else order[:, :0]


def cheapest_window(
    sampled: SampledMass, coverage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The narrowest window of whole blocks that, with the base, covers `coverage` [h].

    Judged on all sampled rows: one number is fitted to them, so that nothing can be learnt by
    heart.

    Returns:
        cost [h], inf where none covers; int64 [h], the window's last block offset.
    """
    covered = sampled.base_mass[..., None] + sampled.by_offset.cumsum(-1)
    enough = sure(covered, 1) >= coverage[:, None]  # [h, nb]
    offset = first(enough).clamp(max=enough.shape[1] - 1)
    cost = sampled.base_cost + sampled.offset_cost.cumsum(0)[offset]
    return cost.masked_fill(~enough.any(-1), torch.inf), offset


def cheapest_columns(
    sampled: SampledMass,
    coverage: torch.Tensor,
    columns: torch.Tensor,
    column_mass: torch.Tensor,
    first_key: int,
    wanted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cheapest columns and block diagonals that cover `coverage` [h] with the base.

    Taken by mass per cost. How large a budget must be is judged crosswise: what one half of the
    sampled rows would take for it, on the other half. Where each query attends keys of its own,
    columns and diagonals of the one half mean nothing to the other, and no budget covers.

    Args:
        columns: int64 [h, M], candidates, each once.
        column_mass: [h, S, M], mass of each where it lies outside the row's base, else 0.
        first_key: position of the chunk's first row.
        wanted: bool [h], heads to look at; nothing covers the others.

    Returns:
        cost [h], inf where nothing covers; diagonals bool [h, nb] by block offset and columns bool
        [h, M], none where nothing covers.
    """
    heads, rows, blocks = sampled.blocks.shape
    half = rows // 2  # an odd row, where there is one, is left out of the judging
    # Tiles from the column's own on see it.
    tile = ((columns - first_key) // TILE).clamp(min=0)
    column_cost = COLUMN_COST * (sampled.body - tile).clamp(min=0).float() / sampled.body
    cost = torch.cat([sampled.offset_cost.expand(heads, -1), column_cost], 1)
    # Rows alternate between the halves: [2, h, half, nb] and [2, h, half, M].
    by_offset = sampled.by_offset
    diagonal = _halves(by_offset, half)
    column = _halves(column_mass, half)
    base = _halves(sampled.base_mass, half)
    last = _halves(sampled.last_block[sampled.row_tile][None], half)[:, 0]

    level, _, _ = _levels(_worth(diagonal, column), cost)
    covered = base[..., None] + _covered(level.flip(0), diagonal, column, columns, last)
    covered = covered.transpose(0, 1).flatten(1, 2)  # [h, 2 half, BUDGETS + 1]
    enough = sure(covered, 1)[:, :BUDGETS] >= coverage[:, None]
    best = first(enough).clamp(max=BUDGETS - 1)[:, None]

    # The same budget, spent by all rows.
    level, ranked, order = _levels(_worth(by_offset, column_mass), cost)
    total = sampled.base_cost + (cost.gather(1, order) * (ranked <= best)).sum(1)
    found = enough.any(1) & wanted
    taken = (level <= best) & found[:, None]
    return total.masked_fill(~found, torch.inf), taken[:, :blocks], taken[:, blocks:]


def _worth(diagonal: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Mass of each item over the rows: [..., R, nb], [..., R, M] -> [..., nb + M].

    A diagonal of tokens crosses two or three diagonals of blocks, and few rows may meet the last
    of these; so a little of each diagonal's mass is credited to its neighbours. A column is worth
    its mass in all rows but the heaviest: a key that one row alone attends is no column, and would
    rank before any true diagonal, whose mass a column shares with 63 other keys.
    """
    mass = diagonal.sum(-2)
    spread = mass.clone()
    spread[..., 2:] += NEIGHBOUR * mass[..., 1:-1]
    spread[..., 2:-1] += NEIGHBOUR * mass[..., 3:]
    return torch.cat([spread, column.sum(-2) - column.amax(-2)], -1)


def _halves(rows: torch.Tensor, half: int) -> torch.Tensor:
    """[h, S, ...] -> [2, h, S // 2, ...]: the rows at even and at odd places."""
    return torch.stack([rows[:, 0 : 2 * half : 2], rows[:, 1 : 2 * half : 2]])


def _levels(
    worth: torch.Tensor, cost: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first budget that pays for each item [..., items] when the best buys come first.

    Returns:
        level of each item, BUDGETS for never; the same in order of purchase; that order.
    """
    value = torch.where(cost > 0, worth / cost, 0.0)
    value, order = value.sort(dim=-1, descending=True, stable=True)
    spent = cost.expand_as(value).gather(-1, order).cumsum(-1).clamp_(min=BLOCK)
    ranked = ((spent / BLOCK).log_() / math.log(GROWTH)).ceil_().clamp_(max=BUDGETS).long()
    ranked.masked_fill_(value <= 0, BUDGETS)
    return torch.empty_like(ranked).scatter_(-1, order, ranked), ranked, order


def _covered(
    level: torch.Tensor,
    diagonal: torch.Tensor,
    column: torch.Tensor,
    positions: torch.Tensor,
    last: torch.Tensor,
) -> torch.Tensor:
    """Mass that each budget covers outside the base: [2, h, s, BUDGETS + 1].

    Args:
        level: [2, h, nb + M] of the items; diagonal: [2, h, s, nb]; column: [2, h, s, M].
        positions: [h, M] of the columns; last: [2, s] last block of each row's tile.
    """
    level_d, level_c = level.split([diagonal.shape[-1], column.shape[-1]], -1)
    rows = diagonal.shape[2]
    gained = diagonal.new_zeros(*diagonal.shape[:3], BUDGETS + 1)
    gained.scatter_add_(3, level_d[:, :, None].expand_as(diagonal), diagonal)
    # A column counts from its own level on, until the block that it lies in comes and brings it.
    offset = (last[:, None, :, None] - (positions // BLOCK)[None, :, None]).clamp_(min=0)
    inside = level_d.gather(2, offset.flatten(2)).view_as(offset)
    mine = level_c[:, :, None].expand(-1, -1, rows, -1)
    mass = torch.where(mine < inside, column, 0.0)
    gained.scatter_add_(3, mine, mass)
    gained.scatter_add_(3, inside, mass.neg_())
    return gained.cumsum(-1)


def thresholds(device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 [THRESHOLDS]: how far below a tile's best score a block may be, in equal ratios."""
    step = torch.linspace(0, 1, THRESHOLDS, dtype=torch.float32, device=device)
    return SMALLEST * (LARGEST / SMALLEST) ** step


def cheapest_threshold(
    sampled: SampledMass, coverage: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest threshold below each tile's best score that covers `coverage` [h].

    Args:
        score: fp32 [h, T, nb], larger where a tile would rather read a block. In the future of the
            tile it does not count; what is not a number is read.

    Returns:
        cost [h], inf where none covers; bool [h, T, nb] of all tiles, base included, and nothing
        more where none covers.
    """
    heads, _, blocks = sampled.blocks.shape
    block = torch.arange(blocks, device=score.device)
    causal = block <= sampled.last_block[:, None]
    base = sampled.base & causal
    score = score.nan_to_num(nan=torch.inf).masked_fill(~causal, -torch.inf)
    gap = score.amax(-1, keepdim=True) - score  # [h, T, nb], inf in the future
    gap = gap.nan_to_num(nan=0.0, posinf=torch.inf)
    level = torch.bucketize(gap, thresholds(score.device))  # THRESHOLDS: never
    counted = torch.zeros(heads, THRESHOLDS + 1, dtype=torch.float32, device=score.device)
    body = slice(0, sampled.body)
    used = (causal & ~base)[body].expand(heads, -1, -1).flatten(1).float()
    counted.scatter_add_(1, level[:, body].flatten(1), used)
    cost = sampled.base_cost + counted.cumsum(1) * (BLOCK / sampled.body)
    gained = counted.new_zeros(heads, len(sampled.row_tile), THRESHOLDS + 1)
    gained.scatter_add_(2, level[:, sampled.row_tile], sampled.rest)
    covered = sampled.base_mass[..., None] + gained.cumsum(2)
    enough = sure(covered, 1)[:, :THRESHOLDS] >= coverage[:, None]
    best = first(enough).clamp(max=THRESHOLDS - 1)
    found = enough.any(1)
    total = cost.gather(1, best[:, None])[:, 0].masked_fill(~found, torch.inf)
    chosen = (level <= best[:, None, None]) & causal & found[:, None, None]
    return total, chosen | base


def cheapest_union(
    blocks: torch.Tensor,
    base: torch.Tensor,
    columns: torch.Tensor,
    column_mass: torch.Tensor,
    coverage: torch.Tensor,
    counts: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cheapest tried union of blocks and columns that covers every row of one tile.

    Each row takes its heaviest blocks, as `heaviest` finds them.

    Args:
        blocks: [h, R, nb] mass of each block in each of the R rows.
        base: bool [nb], blocks that are read anyway.
        columns: int64 [h, M] candidates, each once.
        column_mass: [h, R, M], 0 inside the base.
        coverage: [h].
        counts: how many of the first columns are tried beside blocks, ascending; the first of
            equally cheap ones is taken.

    Returns:
        blocks bool [h, nb], base included; columns bool [h, M], outside the blocks.
    """
    rest = blocks.masked_fill(base, 0.0)
    missing = coverage[:, None] - (blocks * base).sum(-1)
    block_of = columns // BLOCK
    best_cost = torch.full_like(coverage, torch.inf)
    best_blocks = base.expand(blocks.shape[0], -1).clone()
    best_columns = torch.zeros_like(columns, dtype=torch.bool)
    for count in counts:
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
