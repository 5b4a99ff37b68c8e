"""Rows' softmax denominators from those of parts of the keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import launch
from .launch import Config, Target, kernel, unspecialized

ROWS, PARTS = 64, 16
WARPS, STAGES = 4, 2


@triton.jit(**unspecialized(("splits",), ("tops", "sums", "lse")))
def _row_lse(
    tops,  # fp32 [h, splits, ROWS]
    sums,  # fp32 [h, splits, ROWS]
    lse,  # fp32 [h, ROWS]
    splits,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Of one head: log of the sum over all parts, -inf where there is nothing, NaN where one is."""
    head = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (head * splits + part)[:, None] * ROWS + m[None, :]
        there = (part < splits)[:, None]
        highest = tl.load(tops + at, mask=there, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(highest, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        part_sums = tl.load(sums + at, mask=there, other=0.0) * tl.exp(highest - safe[None, :])
        total = total * tl.exp(top - safe) + tl.sum(part_sums, 0)
        top = new_top
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(lse + head * ROWS + m, safe + tl.log(total))


@kernel(_row_lse)
def _configs(target: Target) -> Iterator[Config]:
    signature = {"tops": "*fp32", "sums": "*fp32", "lse": "*fp32", "splits": "i32"}
    yield Config("rows64", {"ROWS": ROWS, "PARTS": PARTS}, WARPS, STAGES, signature, True)


def row_lse(tops: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """fp32 [h, splits, 64] largest logits and sums of exponentials -> fp32 [h, 64]."""
    heads, splits, rows = tops.shape
    assert rows == ROWS, rows
    lse = tops.new_empty(heads, ROWS)
    options = launch.options(WARPS, STAGES)
    _row_lse[(heads,)](tops, sums, lse, splits, ROWS=ROWS, PARTS=PARTS, **options)
    return lse
