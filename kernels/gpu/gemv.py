"""A linear layer with one to four rows on the plain cores of a GPU, its weights read once.

Each lane multiplies eight neighbours of a weight row with each row of activations and keeps one sum
of them in fp32; lanes meet only at the end. Tensor cores would have more to do with padding than
with rows, and a program that needs none can take four rows of weights: more programs than SMs,
also where the layer is small, without splitting K.

ImplA of FlashDecoding++ (arXiv 2311.01282, section 5), after FastGEMV.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..linear_reference import check
from .flat_gemm import SMS, WARPS, shown
from .integers import cdiv
from .launch import Config, Target, kernel, options, sms_of, target_of, unspecialized

MOST_ROWS = 4
TILE = 4096  # weights that a program reads at once: 8 KiB, four times 16 bytes a lane
STAGES = 4  # two or three tiles are on their way: with three programs an SM 48 KiB, 25 are needed
PROGRAMS_EACH_SM = 3  # at the least, where the layer has so many rows of weights
NEIGHBOURS = 8  # that are 16 bytes, which a lane reads at once


@triton.jit
def _tile_sums(w, x_at, at, k, EVEN_K: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """[BN, BK / NEIGHBOURS]: of a tile of weights [BN, BK] and a row of activations."""
    a = tl.load(x_at + at) if EVEN_K else tl.load(x_at + at, mask=at < k, other=0.0)
    products = w * a.to(tl.float32)[None, :]
    shape: tl.constexpr = [w.shape[0], w.shape[1] // NEIGHBOURS, NEIGHBOURS]
    return tl.sum(tl.reshape(products, shape), 2)


@triton.jit
def _store(acc, bias, out_at, column, is_column):
    total = tl.sum(acc, 1)
    if bias is not None:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_at + column, total.to(out_at.dtype.element_ty), mask=is_column)


@triton.jit(**unspecialized(("rows",)))
def _gemv(
    x,  # [rows, k]
    weight,  # [n, k]
    bias,  # [n], or None
    out,  # [rows, n]
    rows,
    n,
    k,
    x_row: tl.int64,
    w_row: tl.int64,
    out_row: tl.int64,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Groups of rows of the same weights are neighbours: all but the first find them in L2.
    groups = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) % groups
    column = tl.program_id(0) // groups * BN + tl.arange(0, BN)
    is_column = column < n
    # Weights beyond the last row are that row again, and not stored; so are rows of activations
    # of a last group that overlap the one before: each is computed the same there.
    w_at = weight + tl.minimum(column, n - 1).to(tl.int64)[:, None] * w_row
    first = tl.minimum(group * ROWS, rows - ROWS).to(tl.int64)
    x0 = x + first * x_row
    out0 = out + first * out_row
    key = tl.arange(0, BK)
    acc0 = tl.zeros([BN, BK // NEIGHBOURS], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for t in tl.range(0, tl.cdiv(k, BK), num_stages=STAGES):
        at = t * BK + key
        if EVEN_K:
            w = tl.load(w_at + at[None, :])
        else:
            w = tl.load(w_at + at[None, :], mask=(at < k)[None, :], other=0.0)
        w = w.to(tl.float32)
        acc0 += _tile_sums(w, x0, at, k, EVEN_K, NEIGHBOURS)
        if ROWS > 1:
            acc1 += _tile_sums(w, x0 + x_row, at, k, EVEN_K, NEIGHBOURS)
        if ROWS > 2:
            acc2 += _tile_sums(w, x0 + 2 * x_row, at, k, EVEN_K, NEIGHBOURS)
        if ROWS > 3:
            acc3 += _tile_sums(w, x0 + 3 * x_row, at, k, EVEN_K, NEIGHBOURS)
    _store(acc0, bias, out0, column, is_column)
    if ROWS > 1:
        _store(acc1, bias, out0 + out_row, column, is_column)
    if ROWS > 2:
        _store(acc2, bias, out0 + 2 * out_row, column, is_column)
    if ROWS > 3:
        _store(acc3, bias, out0 + 3 * out_row, column, is_column)


def constants(rows: int, n: int, k: int, sms: int) -> dict[str, object]:
    """The constants of a launch on a device with so many SMs."""
    bn = 16
    while bn > 4 and cdiv(n, bn) < PROGRAMS_EACH_SM * sms:
        bn //= 2
    bk = TILE // bn
    return {
        "ROWS": min(rows, MOST_ROWS),
        "BN": bn,
        "BK": bk,
        "EVEN_K": k % bk == 0,
        "NEIGHBOURS": NEIGHBOURS,
        "STAGES": STAGES,
    }


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `linear_reference.linear`; made for 1 to 4 rows, and right for any number.

    Raises:
        ValueError: arguments that do not fit together, see `linear_reference.check`.
    """
    out = check(x, weight, bias, out)
    (rows, k), n = x.shape, weight.shape[0]
    if not out.numel():
        return out
    target_of(x.device)  # raises for a device that no kernel is made for
    made = constants(rows, n, k, sms_of(x.device))
    programs = cdiv(n, made["BN"]) * cdiv(rows, made["ROWS"])
    _gemv[(programs,)](
        x, weight, bias, out, rows, n, k, x.stride(0), weight.stride(0), out.stride(0),
        **made, **options(WARPS, made["STAGES"]),
    )  # fmt: skip
    return out


SIGNATURE = {
    "rows": "i32", "n": "i32", "k": "i32", "x_row": "i64", "w_row": "i64", "out_row": "i64",
}  # fmt: skip
# As those of `flat_gemm`: three sizes of tiles, and a last tile that is not full.
SHOWN = (
    *((torch.bfloat16, rows, n, 4096, False) for rows in (1, 4) for n in (2048, 4096, 28672)),
    (torch.bfloat16, 2, 4096, 4096, False),
    (torch.bfloat16, 3, 4608, 3600, True),
    (torch.float16, 4, 4096, 4096, False),
)


@kernel(_gemv)
def configs(target: Target) -> Iterator[Config]:
    for dtype, rows, n, k, bias in SHOWN:
        yield shown(constants(rows, n, k, SMS), dtype, rows, n, k, bias, SIGNATURE)
