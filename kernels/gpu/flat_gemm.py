"""Flat GEMM: a linear layer with up to 64 rows, on tensor cores, its weights read once.

The operands are swapped: the rows of the weights are the M side of the multiplication, and those
of the activations its N side, which needs no more than 8. Loads are several tiles ahead of what is
multiplied. Where the weights have too few rows for all SMs, K is split as well; the program that
arrives last at an output tile's counter adds the parts, in the order of K whoever comes last, so
that the result is the same each time. No second launch.

FlashDecoding++ (arXiv 2311.01282, section 4: padding to 8, B_N by parallelism, two buffers).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl

from ..linear_reference import check
from .integers import cdiv, next_power_of_2
from .launch import (
    DTYPES,
    SERVING_DTYPES,
    Config,
    Target,
    kernel,
    options,
    sms_of,
    target_of,
    unspecialized,
)
from .paged_decode import Workspace

# The N side of tl.dot: Triton 3.9 takes any, and the instructions that it makes of 16-bit numbers
# have 8 at the least: mma.m16n8k16 (sm_80), wgmma.m64n8k16 (sm_90), tcgen05.mma (sm_100). On gfx942
# v_mfma_f32_16x16x16 has 16; for 8 Triton takes the much smaller 4x4x4.
LEAST_ROWS = {"cuda": 8, "hip": 16}
MOST_ROWS = 64
WARPS = 4  # one warpgroup, whose wgmma takes 64 rows of weights
COLUMNS = 64  # of an output tile, where K is split
JOINED = 4  # parts that the last program reads at once
PROGRAMS_EACH_SM = 2  # by shared memory, see `stages`
# What one more part costs the program that adds them, in tiles of K: its share of a read out of L2,
# 0.25 us, where an SM reads a tile of 16 KiB in 0.45 us (4.8 TB/s by 132).
JOIN = 0.5


@triton.jit(**unspecialized(("rows", "splits", "chunk")))
def _flat_gemm(
    x,  # [rows, k]
    weight,  # [n, k]
    bias,  # [n], or None
    out,  # [rows, n]
    partial,  # fp32 [tiles, splits, BN, BM]
    arrivals,  # i32 [tiles], 0 before and after
    rows,
    n,
    k,
    splits,
    chunk,  # tiles of K of a split; the last may have fewer, none has none
    x_row: tl.int64,
    w_row: tl.int64,
    out_row: tl.int64,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Row tiles of the same weights are neighbours: all but the first find them in L2.
    row_tiles = tl.cdiv(rows, BM)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = (tile % row_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    column = (tile // row_tiles) * BN + tl.arange(0, BN)
    is_row = row < rows
    # Weights beyond the last row are that row again, and not stored: no mask in the loop.
    w_at = weight + tl.minimum(column, n - 1).to(tl.int64)[:, None] * w_row
    x_at = x + row[None, :] * x_row
    key = tl.arange(0, BK)
    acc = tl.zeros([BN, BM], tl.float32)
    first = split * chunk
    for t in tl.range(first, tl.minimum(first + chunk, tl.cdiv(k, BK)), num_stages=STAGES):
        at = t * BK + key
        if EVEN_K:
            w = tl.load(w_at + at[None, :])
            a = tl.load(x_at + at[:, None], mask=is_row[None, :], other=0.0)
        else:
            w = tl.load(w_at + at[None, :], mask=(at < k)[None, :], other=0.0)
            a = tl.load(x_at + at[:, None], mask=is_row[None, :] & (at < k)[:, None], other=0.0)
        acc = tl.dot(w, a, acc, input_precision="ieee")

    last = 0
    if splits > 1:
        slot = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        parts = partial + tile.to(tl.int64) * splits * (BN * BM)
        tl.store(parts + split * (BN * BM) + slot, acc)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            last = 1
            tl.store(arrivals + tile, 0)
            acc = tl.zeros([BN, BM], tl.float32)
            for begin in tl.range(0, splits, PARTS):
                for i in tl.static_range(PARTS):
                    # Other programs wrote them: .cg does not read this SM's own cache.
                    acc += tl.load(
                        parts + (begin + i) * (BN * BM) + slot,
                        mask=slot < tl.where(begin + i < splits, BN * BM, 0), other=0.0,
                        cache_modifier=".cg",
                    )  # fmt: skip
    else:
        last = 1

    if last == 1:
        is_column = column < n
        if bias is not None:
            acc += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out + row[None, :] * out_row + column[:, None],
            acc.to(out.dtype.element_ty),
            mask=is_row[None, :] & is_column[:, None],
        )


def constants(
    target: Target, dtype: torch.dtype, rows: int, n: int, k: int, sms: int
) -> dict[str, object]:
    """The constants of a launch: tiles of an output [rows, n], on a device with so many SMs.

    B_N as the paper has it: as many programs as SMs, or up to twice as many; where 128 columns
    leave some idle, 64, and then `splits`. Larger tiles read the activations out of L2 less often.
    """
    least = LEAST_ROWS[target.backend]
    bm = min(max(next_power_of_2(rows), least), MOST_ROWS)
    bn = 2 * COLUMNS if cdiv(n, 2 * COLUMNS) >= sms else COLUMNS
    # 128 bytes of each row of weights at the least, and up to 24 KiB of a tile of K.
    bk = 128 if bn == COLUMNS and bm <= 32 and target.backend == "cuda" else 64
    if dtype == torch.float32:
        bk //= 2
    size = (bn + bm) * bk * dtype.itemsize
    return {
        "BM": bm,
        "BN": bn,
        "BK": bk,
        "EVEN_K": k % bk == 0,
        "PARTS": JOINED,
        "STAGES": stages(target, size),
    }


def stages(target: Target, tile_bytes: int) -> int:
    """Tiles in shared memory, of which one is multiplied and the others are on their way.

    Four of 18 to 24 KiB, and two programs an SM: an SM's share of 4.8 TB/s is hidden behind some
    25 KiB that are on their way (700 ns).
    """
    if target.backend == "hip":
        return 2
    return max(min(target.shared_bytes // (PROGRAMS_EACH_SM * tile_bytes), 4), 2)


def splits_of(tiles: int, k_tiles: int, bm: int, bk: int, sms: int) -> int:
    """Into how many parts K is cut, for so many output tiles.

    The paper's rule, N / B_N of one to two programs an SM: where the tiles are that many they are
    enough; where they are fewer, parts of K make them up to two. Of the numbers of parts that keep
    to it, that one is taken whose longest part and whose adding up are shortest together.
    """
    if tiles >= sms:
        return 1
    # Parts are 8 bytes of fp32, written and read, for each 2 K bytes of weights: a quarter at most.
    most = min(k_tiles, PROGRAMS_EACH_SM * sms // tiles, max(k_tiles * bk // (16 * bm), 1))
    return min(range(1, most + 1), key=lambda s: cdiv(k_tiles, s) + JOIN * (s - 1))


@cache
def shared_workspace(device: torch.device) -> Workspace:
    """The workspace of all layers of a process, which run after another.

    It is made with room for any launch: captured graphs keep its addresses.
    """
    workspace = Workspace()
    programs = PROGRAMS_EACH_SM * sms_of(device)
    workspace.take(programs * MOST_ROWS * COLUMNS, programs, device)  # 4 MiB on an H100
    return workspace


def flat_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    splits: int | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """See `linear_reference.linear`; made for 5 to 64 rows, and right for any number.

    Args:
        splits: into how many parts K is cut, at most as many as it has tiles; None: by `splits_of`.
        workspace: of the stream that it runs on; None: `shared_workspace`, of one stream at a time,
            which is to be called once before a graph is captured.

    Raises:
        ValueError: arguments that do not fit together, see `linear_reference.check`; splits < 1.
    """
    out = check(x, weight, bias, out)
    if splits is not None and splits < 1:
        raise ValueError(f"splits: got {splits}; give 1 or more, or None")
    (rows, k), n = x.shape, weight.shape[0]
    if not out.numel():
        return out
    target, sms = target_of(x.device), sms_of(x.device)
    made = constants(target, x.dtype, rows, n, k, sms)
    tiles = cdiv(rows, made["BM"]) * cdiv(n, made["BN"])
    k_tiles = cdiv(k, made["BK"])
    if splits is None:
        splits = splits_of(tiles, k_tiles, made["BM"], made["BK"], sms)
    chunk = cdiv(k_tiles, min(splits, k_tiles))
    splits = cdiv(k_tiles, chunk)  # none is empty
    floats, arrivals = out, out  # not touched without splits
    if splits > 1:
        workspace = workspace or shared_workspace(x.device)
        size = tiles * splits * made["BM"] * made["BN"]
        floats, arrivals = workspace.take(size, tiles, x.device)
    _flat_gemm[(tiles, splits)](
        x, weight, bias, out, floats, arrivals, rows, n, k, splits, chunk,
        x.stride(0), weight.stride(0), out.stride(0),
        **made, **options(WARPS, made["STAGES"]),
    )  # fmt: skip
    return out


SIGNATURE = {
    "partial": "*fp32", "arrivals": "*i32", "rows": "i32", "n": "i32", "k": "i32",
    "splits": "i32", "chunk": "i32", "x_row": "i64", "w_row": "i64", "out_row": "i64",
}  # fmt: skip
NEVER_ALIGNED = ("rows", "splits", "chunk")
SMS = 132  # of an H100 or H200, which the configurations are for
# (dtype, rows, n, k, bias): o and gate_up of Llama-3-8B and Qwen3-8B, which float16 compiles
# to the same code; qkv of Qwen2.5-7B has a bias; down of Llama-2-7B, over four GPUs, ends
# in half a tile.
SHOWN = (
    *((torch.bfloat16, rows, n, 4096, False) for n in (4096, 28672) for rows in (8, 16, 32, 64)),
    (torch.float16, 16, 4096, 4096, False),
    (torch.bfloat16, 16, 4608, 3584, True),
    (torch.bfloat16, 16, 4096, 2752, False),
)


def shown(
    made: dict[str, object],
    dtype: torch.dtype,
    rows: int,
    n: int,
    k: int,
    bias: bool,
    numbers: dict[str, str],
) -> Config:
    """The Config of a launch of either kernel."""
    signature = numbers | dict.fromkeys(("x", "weight", "out"), f"*{DTYPES[dtype]}")
    if bias:
        signature["bias"] = signature["x"]
    else:
        made = made | {"bias": None}
    name = f"{DTYPES[dtype]}-m{rows}-{n}x{k}" + ("-bias" if bias else "")
    return Config(
        name, made, WARPS, made["STAGES"], signature, serving=dtype in SERVING_DTYPES,
        aligned=frozenset(signature) - set(NEVER_ALIGNED),
    )  # fmt: skip


@kernel(_flat_gemm)
def configs(target: Target) -> Iterator[Config]:
    for dtype, rows, n, k, bias in SHOWN:
        made = constants(target, dtype, rows, n, k, SMS)
        yield shown(made, dtype, rows, n, k, bias, SIGNATURE)
