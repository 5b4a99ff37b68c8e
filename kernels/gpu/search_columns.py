"""The cheapest columns and block diagonals of each head: see `pattern_reference.cheapest_columns`.

An item is a diagonal (0 .. nb - 1) or a column (nb ..). Three groups of rows buy items, the best
first: those at even places, those at odd places, and all of them. What the first two would buy is
judged on each other's rows, and tells how large the budget of the third has to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..pattern_reference import BUDGETS, GROWTH, NEIGHBOUR, SampledMass
from .body_mass import (
    CHUNK,
    COUNTS,
    OPTIONS,
    ROWS,
    STAGES,
    WARPS,
    base_mass,
    column_cost,
    first_of,
    offset_cost,
    offset_mass,
    sure,
)
from .launch import Config, Target, kernel

GROUPS = 3
SORTED_CHUNK = 512  # items that one program goes over, handled at once
LEVELS = 64  # BUDGETS and one for never, padded
LOG_GROWTH = tl.constexpr(math.log(GROWTH))
SPREAD = tl.constexpr(NEIGHBOUR)
NEVER = tl.constexpr(BUDGETS)


@triton.jit
def _item_cost(item, of_columns, num_blocks, num_items, start, top, body):
    """Keys' worth of items [N] for a tile."""
    is_column = (item >= num_blocks) & (item < num_items)
    column = tl.load(of_columns + item - num_blocks, mask=is_column, other=0).to(tl.int32)
    diagonal = tl.where(item < num_blocks, offset_cost(item, top, body), 0.0)
    return tl.where(is_column, column_cost(column, start, body), diagonal)


@triton.jit(**COUNTS)
def _value_items(
    blocks,  # fp32 [h, S, nb]
    row_tile,  # i64 [S]
    columns,  # i64 [h, M]
    column_mass,  # fp32 [h, S, M]
    value,  # fp32 [h, 3, nb + M]: mass for cost
    num_rows,
    num_blocks,
    num_columns,
    start,
    top,
    body,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of one head and group of rows: what some items, all diagonals or all columns, are worth for
    what they cost."""
    head, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s = tl.arange(0, ROWS)
    # An odd row, where there is one, is in the third group only.
    mine = s * 0 + group
    is_row = (s < num_rows) & ((mine == 2) | ((s % 2 == mine) & (s < num_rows // 2 * 2)))
    last = top + tl.load(row_tile + s, mask=is_row, other=0).to(tl.int32)
    row = head.to(tl.int64) * num_rows + s
    rows = blocks + row * num_blocks
    into = value + (head.to(tl.int64) * 3 + group) * (num_blocks + num_columns)
    first = part * CHUNK
    if first < num_blocks:
        o = first + tl.arange(0, CHUNK)
        # A diagonal of tokens crosses two or three of blocks: some goes to the neighbours.
        worth = tl.sum(offset_mass(rows, last, is_row, o), 0)
        before = tl.sum(offset_mass(rows, last, is_row, o - 1), 0)
        after = tl.sum(offset_mass(rows, last, is_row, o + 1), 0)
        after = tl.where(o + 1 < num_blocks, after, 0.0)
        worth = tl.where(o >= 2, worth + SPREAD * before + SPREAD * after, 0.0)
        cost = offset_cost(o, top, body)
        bought = tl.where(cost > 0, worth / tl.where(cost > 0, cost, 1.0), 0.0)
        tl.store(into + o, bought, mask=o < num_blocks)
    else:
        i = (part - tl.cdiv(num_blocks, CHUNK)) * CHUNK + tl.arange(0, CHUNK)
        inside = i < num_columns
        at = row[:, None] * num_columns + i[None, :]
        mass = tl.load(column_mass + at, mask=is_row[:, None] & inside[None, :], other=0.0)
        column = tl.load(columns + head.to(tl.int64) * num_columns + i, mask=inside, other=0)
        cost = column_cost(column.to(tl.int32), start, body)
        worth = tl.sum(mass, 0) - tl.max(mass, 0)
        bought = tl.where(cost > 0, worth / tl.where(cost > 0, cost, 1.0), 0.0)
        tl.store(into + num_blocks + i, bought, mask=inside)


@triton.jit(**COUNTS)
def _level_items(
    value,  # fp32 [h, 3, items], descending
    order,  # i64 [h, 3, items]: the items in that order
    columns,  # i64 [h, M]
    level,  # i32 [h, 3, items] of each item
    num_blocks,
    num_columns,
    start,
    top,
    body,
    CHUNK: tl.constexpr,
):
    """Of one head and group: the first budget that pays for each item, NEVER where none does."""
    head, group = tl.program_id(0), tl.program_id(1)
    num_items = num_blocks + num_columns
    row = (head.to(tl.int64) * 3 + group) * num_items
    of_columns = columns + head.to(tl.int64) * num_columns
    spent = tl.sum(tl.zeros([CHUNK], tl.float32), 0)
    for first in range(0, num_items, CHUNK):
        i = first + tl.arange(0, CHUNK)
        inside = i < num_items
        item = tl.load(order + row + i, mask=inside, other=0).to(tl.int32)
        cost = _item_cost(item, of_columns, num_blocks, num_items, start, top, body)
        cost = tl.where(inside, cost, 0.0)
        sums = spent + tl.cumsum(cost, 0)
        spent += tl.sum(cost, 0)
        budget = tl.ceil(tl.log(tl.maximum(sums, 64.0) / 64.0) / LOG_GROWTH).to(tl.int32)
        bought = tl.load(value + row + i, mask=inside, other=0.0) > 0
        budget = tl.where(bought, tl.minimum(budget, NEVER), NEVER)
        tl.store(level + row + item, budget, mask=inside)


@triton.jit(**COUNTS)
def _cover_rows(
    blocks,
    row_tile,
    columns,
    column_mass,
    level,
    covered,  # fp32 [h, 2 half, LEVELS]
    num_rows,
    num_blocks,
    num_columns,
    top,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Of one head and row: the mass that the other half's purchases cover, by their budget."""
    head, s = tl.program_id(0), tl.program_id(1)
    num_items = num_blocks + num_columns
    levels = level + (head.to(tl.int64) * 3 + 1 - s % 2) * num_items
    row = head.to(tl.int64) * num_rows + s
    mass_of = blocks + row * num_blocks
    last = top + tl.load(row_tile + s).to(tl.int32)
    budget = tl.arange(0, LEVELS)
    total = tl.zeros([LEVELS], tl.float32)
    for first in range(2, last, CHUNK):
        o = first + tl.arange(0, CHUNK)
        there = (o < last) & (o < num_blocks)
        mass = tl.load(mass_of + tl.where(there, last - o, 0), mask=there, other=0.0)
        mine = tl.load(levels + o, mask=there, other=NEVER)
        total += tl.sum(tl.where(mine[:, None] <= budget[None, :], mass[:, None], 0.0), 0)
    for first in range(0, num_columns, CHUNK):
        i = first + tl.arange(0, CHUNK)
        inside = i < num_columns
        column = tl.load(columns + head.to(tl.int64) * num_columns + i, mask=inside, other=0)
        mass = tl.load(column_mass + row * num_columns + i, mask=inside, other=0.0)
        mine = tl.load(levels + num_blocks + i, mask=inside, other=NEVER)
        # It counts until the block that it lies in comes and brings it.
        block = tl.maximum(last - column.to(tl.int32) // 64, 0)
        until = tl.load(levels + block, mask=inside, other=NEVER)
        counts = (mine[:, None] <= budget[None, :]) & (budget[None, :] < until[:, None])
        total += tl.sum(tl.where(counts, mass[:, None], 0.0), 0)
    total += base_mass(mass_of, last, s >= 0)
    pairs = num_rows // 2 * 2
    tl.store(covered + (head.to(tl.int64) * pairs + s) * LEVELS + budget, total)


@triton.jit(**COUNTS)
def _buy_items(
    covered,  # fp32 [h, 2 half, LEVELS]
    level,  # i32 [h, 3, items]
    columns,
    coverage,  # fp32 [h]
    cost,  # fp32 [h]
    best,  # i32 [h]
    num_rows,
    num_blocks,
    num_columns,
    start,
    top,
    body,
    base_cost,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Of one head: the smallest budget that covers, and what all rows spend of it."""
    head = tl.program_id(0)
    s = tl.arange(0, ROWS)
    pairs = num_rows // 2 * 2
    is_row = s < pairs
    budget = tl.arange(0, LEVELS)
    at = (head.to(tl.int64) * pairs + s)[:, None] * LEVELS + budget[None, :]
    mass = tl.load(covered + at, mask=is_row[:, None], other=0.0)
    enough = (sure(mass, is_row, pairs) >= tl.load(coverage + head)) & (budget < NEVER)
    found = first_of(enough, budget, NEVER)
    found = tl.where(found < NEVER, found, -1)
    num_items = num_blocks + num_columns
    of_levels = level + (head.to(tl.int64) * 3 + 2) * num_items
    of_columns = columns + head.to(tl.int64) * num_columns
    spent = tl.zeros([CHUNK], tl.float32)
    for first in range(0, num_items, CHUNK):
        item = first + tl.arange(0, CHUNK)
        taken = tl.load(of_levels + item, mask=item < num_items, other=NEVER) <= found
        price = _item_cost(item, of_columns, num_blocks, num_items, start, top, body)
        spent += tl.where(taken, price, 0.0)
    total = base_cost + tl.sum(spent, 0)
    tl.store(cost + head, tl.where(found >= 0, total, float("inf")))
    tl.store(best + head, found)


_FP32, _I32, _I64 = "*fp32", "*i32", "*i64"
_TYPES = {
    "blocks": _FP32, "row_tile": _I64, "columns": _I64, "column_mass": _FP32, "value": _FP32,
    "order": _I64, "level": _I32, "covered": _FP32, "coverage": _FP32, "cost": _FP32,
    "best": _I32, "num_rows": "i32", "num_blocks": "i32", "num_columns": "i32", "start": "i32",
    "top": "i32", "body": "i32", "base_cost": "fp32",
}  # fmt: skip


def _configs(function, constants: dict[str, int]) -> Iterator[Config]:
    signature = {name: _TYPES[name] for name in function.arg_names if name not in constants}
    yield Config("items", constants, WARPS, STAGES, signature, True)


@kernel(_value_items)
def _value_configs(target: Target) -> Iterator[Config]:
    yield from _configs(_value_items, {"ROWS": ROWS, "CHUNK": CHUNK})


@kernel(_level_items)
def _level_configs(target: Target) -> Iterator[Config]:
    yield from _configs(_level_items, {"CHUNK": SORTED_CHUNK})


@kernel(_cover_rows)
def _cover_configs(target: Target) -> Iterator[Config]:
    yield from _configs(_cover_rows, {"CHUNK": CHUNK, "LEVELS": LEVELS})


@kernel(_buy_items)
def _buy_configs(target: Target) -> Iterator[Config]:
    yield from _configs(_buy_items, {"ROWS": ROWS, "CHUNK": SORTED_CHUNK, "LEVELS": LEVELS})


def search_columns(
    sampled: SampledMass,
    coverage: torch.Tensor,
    columns: torch.Tensor,
    column_mass: torch.Tensor,
    *,
    start: int,
    top: int,
    base_cost: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each head's cheapest columns and diagonals.

    Args:
        columns: int64 [h, M], candidates, each once.
        column_mass: fp32 [h, S, M], mass of each where it lies outside the row's base, else 0.
        start: position of the chunk's first row; others as in `search_window`.

    Returns:
        cost fp32 [h], inf where nothing covers; level int32 [h, 3, nb + M] and best int32 [h]:
        bought is where `level[:, 2] <= best`, which is -1 where nothing covers.
    """
    heads, rows, blocks = sampled.blocks.shape
    width, pairs = columns.shape[1], rows // 2 * 2
    assert 2 <= rows <= ROWS, rows
    body, columns, column_mass = sampled.body, columns.contiguous(), column_mass.contiguous()
    value = coverage.new_empty(heads, GROUPS, blocks + width)
    where = (sampled.blocks.contiguous(), sampled.row_tile, columns, column_mass)
    parts = -(-blocks // CHUNK) + -(-width // CHUNK)
    _value_items[(heads, GROUPS, parts)](
        *where, value, rows, blocks, width, start, top, body, ROWS=ROWS, CHUNK=CHUNK, **OPTIONS
    )
    value, order = value.sort(dim=-1, descending=True, stable=True)
    level = torch.empty_like(value, dtype=torch.int32)
    _level_items[(heads, GROUPS)](
        value, order, columns, level, blocks, width, start, top, body, CHUNK=SORTED_CHUNK, **OPTIONS
    )
    covered = coverage.new_empty(heads, pairs, LEVELS)
    _cover_rows[(heads, pairs)](
        *where, level, covered, rows, blocks, width, top, CHUNK=CHUNK, LEVELS=LEVELS, **OPTIONS
    )
    cost = torch.empty_like(coverage)
    best = coverage.new_empty(heads, dtype=torch.int32)
    _buy_items[(heads,)](
        covered, level, columns, coverage, cost, best, rows, blocks, width, start, top, body,
        float(base_cost), ROWS=ROWS, CHUNK=SORTED_CHUNK, LEVELS=LEVELS, **OPTIONS,
    )  # fmt: skip
    return cost, level, best
