"""Attention of a chunk's last rows, summed over columns and over diagonals of tokens.

What fixed budgets of vertical-slash are spent by (MInference, arXiv:2407.02490, section 3.2). A
program has 64 distances, and so 127 keys for 64 rows; the nearer half of its 128 keys are its
columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import launch
from .block_sums import block_mass
from .launch import Config, Target, kernel
from .scored_rows import ROWS, configs, launch_arguments, load_rows, logits


@triton.jit(
    **launch.unspecialized(
        ("seq_len", "num_rows"), ("table", "heads", "lse", "by_column", "by_distance", "k_scale")
    )
)
def _line_sums(
    q,  # [R, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    table,  # i32 [P]
    heads,  # i64 [h]
    lse,  # fp32 [h, 64]
    by_column,  # fp32 [h, n]
    by_distance,  # fp32 [h, n]
    seq_len,
    num_rows,
    k_scale,  # fp32 [1]: a key is what is stored times this; None: 1
    scale,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head: tl.int64,
    kv_row: tl.int64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Of one head: 64 distances and 64 columns. The rows are the sequence's last."""
    number = tl.program_id(1).to(tl.int64)
    head = tl.load(heads + number)
    m = tl.arange(0, 64)
    position = seq_len - num_rows + m
    q_tile = load_rows(q, head, m, m < num_rows, q_row, q_head, D, D_PADDED)
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    nearest = tl.program_id(0) * 64  # distance
    c = tl.arange(0, 128)
    key = seq_len - nearest - 128 + c
    inside = (key >= 0) & (key < seq_len)
    s = logits(
        q_tile, k_cache + head // GROUP * kv_head, table, tl.where(inside, key, 0), inside,
        kv_page, kv_row, scale, D, D_PADDED, PAGE,
    )  # fmt: skip
    row_lse = tl.load(lse + number * 64 + m, mask=m < num_rows, other=0.0)
    sees = inside[None, :] & (key[None, :] <= position[:, None]) & (m < num_rows)[:, None]
    p = tl.where(sees, tl.exp(s - row_lse[:, None]), 0.0)
    tl.store(by_column + number * seq_len + key, tl.sum(p, 0), mask=inside & (c >= 64))
    t = tl.arange(0, 64)
    # Row m's key at distance nearest + t.
    at = 128 - num_rows + m[:, None] - t[None, :]
    along = tl.gather(p, tl.maximum(tl.minimum(at, 127), 0), 1)
    total = tl.sum(tl.where((m < num_rows)[:, None], along, 0.0), 0)
    distance = nearest + t
    tl.store(by_distance + number * seq_len + distance, total, mask=distance < seq_len)


@kernel(_line_sums)
def _line_configs(target: Target) -> Iterator[Config]:
    yield from configs(target, dict.fromkeys(("lse", "by_column", "by_distance"), "*fp32"))


def line_sums(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    heads: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the rows of their causal attention.

    Args:
        q: [R <= 64, H, D], queries of the sequence's last R positions.
        k_cache: [pages, Hkv, page, D]; block_table: int32 [P] of the sequence.
        heads: int64 [h], the query heads that are wanted.

    Returns:
        fp32 [h, n] of each key, fp32 [h, n] of each distance back from a row's own position.
    """
    rows, wanted = q.shape[0], heads.numel()
    assert 0 < rows <= ROWS, rows
    positions = torch.arange(seq_len - rows, seq_len, device=q.device)
    where = (q, k_cache, block_table, positions, heads, seq_len)
    lse = block_mass(*where, scale=scale, k_scale=k_scale).lse
    scales, strides, options = launch_arguments(q, k_cache, scale, k_scale)
    by_column, by_distance = lse.new_empty(2, wanted, seq_len)
    _line_sums[(-(-seq_len // 64), wanted)](
        q, k_cache, block_table, heads, lse, by_column, by_distance, seq_len, rows, *scales,
        *strides, **options,
    )  # fmt: skip
    return by_column, by_distance
