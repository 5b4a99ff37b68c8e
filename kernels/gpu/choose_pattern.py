"""Each head's cheapest pattern, and the blocks and columns of the tiles before a chunk's last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .body_mass import OPTIONS, STAGES, WARPS
from .launch import Config, Target, kernel, unspecialized
from .search_threshold import gap_below, limits

DENSE, WINDOW, COLUMNS, BLOCKS = 0, 1, 2, 3
MASK_CHUNK = 512
_WINDOW, _COLUMNS, _BLOCKS = (tl.constexpr(x) for x in (WINDOW, COLUMNS, BLOCKS))


class Found(NamedTuple):
    """What the searches found for h heads; costs are keys that a tile reads, inf for none."""

    dense: torch.Tensor  # u8 [h]: reads everything whatever else was found
    window_cost: torch.Tensor  # fp32 [h]
    offset: torch.Tensor  # i32 [h]: last block offset of the window
    columns_cost: torch.Tensor
    level: torch.Tensor  # i32 [h, 3, nb + M]
    budget: torch.Tensor  # i32 [h]
    blocks_cost: torch.Tensor
    limit: torch.Tensor  # i32 [h]
    score: torch.Tensor  # fp32 [h, T, nb]
    tops: torch.Tensor  # fp32 [h, body]


class Allowed(NamedTuple):
    """Which patterns a head may have, and when they pay (keys that a tile reads)."""

    kinds: torch.Tensor  # u8 [h, 3]: window, columns, blocks
    narrow: float  # a window up to this is taken without looking at columns
    good: float  # whoever reads at most this is not asked for blocks
    most: float  # from this on a head reads everything


@triton.jit(
    **unspecialized(
        numbers=("narrow", "good", "most"),
        pointers=(
            "dense", "window_cost", "columns_cost", "blocks_cost", "kinds", "choice",
        ),
    )
)  # fmt: skip
def _choose_pattern(
    dense,
    window_cost,
    columns_cost,
    blocks_cost,
    kinds,
    choice,  # i32 [h]
    narrow,
    good,
    most,
):
    head = tl.program_id(0)
    infinite = float("inf")
    window = tl.load(window_cost + head)
    window = tl.where(tl.load(kinds + head * 3) != 0, window, infinite)
    columns = tl.load(columns_cost + head)
    looked = (tl.load(kinds + head * 3 + 1) != 0) & (window > narrow)
    columns = tl.where(looked, columns, infinite)
    cost = tl.minimum(window, columns)
    chosen = tl.where(window <= columns, _WINDOW, _COLUMNS)
    blocks = tl.load(blocks_cost + head)
    open_ = (tl.load(kinds + head * 3 + 2) != 0) & (cost > good)
    blocks = tl.where(open_, blocks, infinite)
    chosen = tl.where(blocks < cost, _BLOCKS, chosen)
    pays = (tl.minimum(cost, blocks) < most) & (tl.load(dense + head) == 0)
    tl.store(choice + head, tl.where(pays, chosen, 0))


@triton.jit(
    **unspecialized(
        numbers=(
            "num_blocks", "num_columns", "num_heads", "num_rows", "tiles", "top", "body",
        ),
        pointers=(
            "choice", "bad", "offset", "level", "budget", "limit", "limits", "score", "tops",
            "sorted_columns", "order_of", "heads", "mask", "position",
        ),
    )
)  # fmt: skip
def _write_body(
    choice,  # i32 [h]
    bad,  # u8 [h, R]: rows at the chunk's end whose mass is not finite
    offset,  # i32 [h]
    level,  # i32 [h, 3, nb + M]
    budget,  # i32 [h]
    limit,  # i32 [h]
    limits,  # fp32
    score,  # fp32 [h, T, nb]
    tops,  # fp32 [h, body]
    sorted_columns,  # i32 [h, M]
    order_of,  # i32 [h, M]
    heads,  # i64 [h]
    mask,  # u8 [T, H, nb]
    position,  # i32 [h, M]
    num_rows,
    num_blocks,
    num_columns,
    num_heads,
    tiles,
    top,
    body,
    CHUNK: tl.constexpr,
):
    """Of one head: a tile's blocks, or its columns after the last tile."""
    number, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r = tl.arange(0, 64)
    lost = tl.max(tl.load(bad + number * num_rows + r, mask=r < num_rows, other=0).to(tl.int32), 0)
    chosen = tl.where(lost != 0, 0, tl.load(choice + number))
    bought = tl.load(budget + number)
    levels = level + (number * 3 + 2) * (num_blocks + num_columns)
    if tile == body:
        for first in range(0, num_columns, CHUNK):
            i = first + tl.arange(0, CHUNK)
            inside = i < num_columns
            column = tl.load(sorted_columns + number * num_columns + i, mask=inside, other=-1)
            place = tl.load(order_of + number * num_columns + i, mask=inside, other=0)
            taken = tl.load(levels + num_blocks + place, mask=inside, other=0) <= bought
            column = tl.where(taken & (i * 0 + chosen == _COLUMNS), column, -1)
            tl.store(position + number * num_columns + i, column, mask=inside)
    else:
        last = top + tile
        row = (tile * num_heads).to(tl.int64) + tl.load(heads + number)
        widest = tl.load(offset + number)
        reach = tl.load(limits + tl.maximum(tl.load(limit + number), 0))
        best = tl.load(tops + number * body + tile)
        of_tile = score + (number * tiles + tile) * num_blocks
        for first in range(0, num_blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            sees = block <= last
            back = last - block
            pattern = block * 0 + chosen
            keep = (pattern == 0) | ((block == 0) | (back == 1) | (back == 0))
            keep = keep | ((pattern == _WINDOW) & (back <= widest))
            there = sees & (pattern == _COLUMNS)
            keep = keep | (there & (tl.load(levels + back, mask=there, other=0) <= bought))
            there = sees & (pattern == _BLOCKS)
            x = tl.load(of_tile + block, mask=there, other=0.0)
            keep = keep | (there & (gap_below(x, best, there) <= reach))
            value = (keep & sees).to(tl.uint8)
            tl.store(mask + row * num_blocks + block, value, mask=block < num_blocks)


@kernel(_choose_pattern)
def _choose_configs(target: Target) -> Iterator[Config]:
    costs = dict.fromkeys(("window_cost", "columns_cost", "blocks_cost"), "*fp32")
    limits = dict.fromkeys(("narrow", "good", "most"), "fp32")
    signature = {"dense": "*u8", **costs, "kinds": "*u8", "choice": "*i32", **limits}
    yield Config("heads", {}, 1, STAGES, signature, True)


@kernel(_write_body)
def _write_configs(target: Target) -> Iterator[Config]:
    signature = {
        "choice": "*i32", "bad": "*u8", "offset": "*i32", "level": "*i32", "budget": "*i32",
        "limit": "*i32", "limits": "*fp32", "score": "*fp32", "tops": "*fp32",
        "sorted_columns": "*i32", "order_of": "*i32", "heads": "*i64", "mask": "*u8",
        "position": "*i32",
    } | dict.fromkeys(
        ("num_rows", "num_blocks", "num_columns", "num_heads", "tiles", "top", "body"), "i32"
    )  # fmt: skip
    yield Config("tiles", {"CHUNK": MASK_CHUNK}, WARPS, STAGES, signature, True)


def choose_pattern(found: Found, allowed: Allowed) -> torch.Tensor:
    """int32 [h]: DENSE, WINDOW, COLUMNS or BLOCKS."""
    choice = torch.empty_like(found.offset)
    _choose_pattern[choice.shape](
        found.dense, found.window_cost, found.columns_cost, found.blocks_cost, allowed.kinds,
        choice, float(allowed.narrow), float(allowed.good), float(allowed.most), num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    return choice


def write_body(
    found: Found,
    choice: torch.Tensor,
    bad: torch.Tensor,
    columns: tuple[torch.Tensor, torch.Tensor],
    heads: torch.Tensor,
    blocks: torch.Tensor,
    *,
    top: int,
) -> torch.Tensor:
    """Write what the tiles before the last read into `blocks`, bool [T, H, nb].

    Args:
        choice: of `choose_pattern`.
        bad: uint8 [h, R], rows for whose sake a head reads everything where they are not 0.
        columns: of `sort_columns`.
        heads: int64 [h], whose blocks these are.
        top: block of the last row of the first tile.

    Returns:
        int32 [h, M]: the columns that all those tiles read, ascending where not -1.
    """
    tiles, num_heads, num_blocks = blocks.shape
    body, width = tiles - 1, columns[0].shape[1]
    position = torch.empty_like(columns[0])
    _write_body[(heads.numel(), body + 1)](
        choice, bad, found.offset, found.level, found.budget, found.limit,
        limits(blocks.device), found.score, found.tops, *columns, heads,
        blocks.view(torch.uint8), position, bad.shape[1], num_blocks, width, num_heads,
        found.score.shape[1], top, body, CHUNK=MASK_CHUNK, **OPTIONS,
    )  # fmt: skip
    return position


__all__ = [
    "BLOCKS",
    "COLUMNS",
    "DENSE",
    "WINDOW",
    "Allowed",
    "Found",
    "choose_pattern",
    "write_body",
]
