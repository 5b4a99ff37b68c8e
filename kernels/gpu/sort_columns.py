"""A head's candidate columns in ascending order, and where each was among the candidates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .body_mass import COUNTS, OPTIONS, STAGES, WARPS
from .launch import Config, Target, kernel

CHUNK = 64  # columns of a program, and those that they are compared with at once


@triton.jit(**COUNTS)
def _sort_columns(
    columns,  # i64 [h, M], each once
    kept,  # i32 [h, M]: ascending
    order_of,  # i32 [h, M]: the candidate that each was
    num_columns,
    CHUNK: tl.constexpr,
):
    """Of one head and some columns: a column's place is how many are before it."""
    row = tl.program_id(0).to(tl.int64) * num_columns
    i = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = i < num_columns
    column = tl.load(columns + row + i, mask=inside, other=0).to(tl.int32)
    place = tl.zeros([CHUNK], tl.int32)
    for first in range(0, num_columns, CHUNK):
        j = first + tl.arange(0, CHUNK)
        other = tl.load(columns + row + j, mask=j < num_columns, other=2147483647).to(tl.int32)
        place += tl.sum((other[None, :] < column[:, None]).to(tl.int32), 1)
    tl.store(kept + row + place, column, mask=inside)
    tl.store(order_of + row + place, i, mask=inside)


@kernel(_sort_columns)
def _configs(target: Target) -> Iterator[Config]:
    signature = {"columns": "*i64", "kept": "*i32", "order_of": "*i32", "num_columns": "i32"}
    yield Config("columns", {"CHUNK": CHUNK}, WARPS, STAGES, signature, True)


def sort_columns(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [h, M], each once -> ascending, and the places they had: int32 [h, M]."""
    heads, width = columns.shape
    kept = columns.new_empty(heads, width, dtype=torch.int32)
    order = torch.empty_like(kept)
    if columns.numel():
        programs = (heads, -(-width // CHUNK))
        _sort_columns[programs](columns.contiguous(), kept, order, width, CHUNK=CHUNK, **OPTIONS)
    return kept, order
