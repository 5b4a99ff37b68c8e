"""The prefill kernel with contextual positions (CoPE): a tile of one head's rows over its keys.

A program takes one query head, where those of a KV head would share what they read: heads reach the
last position at different keys, and a tile leaves the slow part of its walk with its last row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .cope_walk import _walk
from .integers import next_power_of_2
from .launch import DTYPES, HEAD_SIZES, SERVING_DTYPES, Config, Target, kernel, unspecialized

ROWS = 64
# What changes from step to step compiles no code of its own.
STEP_NUMBERS = ("positions", "table_row", "num_seqs", "num_heads")
STEP_TENSORS = ("z", "lse", "block_table", "query_start_loc", "seq_lens")


@triton.jit
def _sequence_of_slot(slot, query_start_loc, num_seqs, ROWS: tl.constexpr):
    """The sequence that a tile belongs to, num_seqs beyond the last.

    Those of sequence s begin at slot start // ROWS + s, which leaves room for a tile that is not
    full in each.
    """
    found = slot * 0
    for at in range(0, num_seqs, 64):
        s = at + tl.arange(0, 64)
        end = tl.load(query_start_loc + 1 + s, mask=s < num_seqs, other=0)
        found += tl.sum(((end // ROWS + s + 1 <= slot) & (s < num_seqs)).to(tl.int32), 0)
    return found


@triton.jit(**unspecialized(STEP_NUMBERS, STEP_TENSORS))
def _cope_prefill(
    q,  # [T, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    v_cache,
    z,  # fp32 [T, H, positions + 1], products of queries and the table, the last one twice
    out,  # [T, H, D]
    lse,  # fp32 [T, H]
    block_table,  # i32 [S, pages]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    scale,
    positions,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head_stride: tl.int64,
    kv_row: tl.int64,
    out_row: tl.int64,
    out_head: tl.int64,
    table_row,
    num_seqs,
    num_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The last tiles of a sequence have the most keys: begin with them.
    slot = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0)
    sequence = _sequence_of_slot(slot, query_start_loc, num_seqs, ROWS)
    if sequence >= num_seqs:
        return
    begin = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - begin
    first = (slot - begin // ROWS - sequence) * ROWS
    if first >= query_len:
        return
    seq_len = tl.load(seq_lens + sequence)

    m = first + tl.arange(0, ROWS)
    is_row = m < query_len
    position = seq_len - query_len + m
    token = (begin + m).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    is_d = d < D
    is_out = is_row[:, None] & is_d[None, :]
    q_base = q + head.to(tl.int64) * q_head
    q_tile = tl.load(q_base + token[:, None] * q_row + d[None, :], mask=is_out, other=0.0)

    kv_head = (head // GROUP).to(tl.int64)
    at = token * num_heads + head
    end = seq_len - query_len + tl.minimum(first + ROWS, query_len)  # keys that any row sees
    z_token = num_heads * (positions + 1)
    z_at = (begin + first).to(tl.int64) * z_token + head * (positions + 1)
    z_row = tl.where(is_row, m - first, 0) * z_token
    scale_log2 = scale * 1.4426950408889634
    top, total, acc = _walk(
        q_tile, z + z_at, z_row, is_row & (position >= 0), tl.zeros([ROWS], tl.float32),
        (positions - 1).to(tl.float32), k_cache + kv_head * kv_head_stride,
        v_cache + kv_head * kv_head_stride, block_table + sequence.to(tl.int64) * table_row,
        kv_page, kv_row, position, seq_len - query_len + first + 1, 0, tl.cdiv(end, KEYS), seq_len,
        scale_log2, ROWS, KEYS, D, D_PADDED, PAGE, STAGES,
    )  # fmt: skip
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    natural = top * scale + tl.math.log2(tl.where(some, total, 1.0)) / 1.4426950408889634
    tl.store(
        out + token[:, None] * out_row + head.to(tl.int64) * out_head + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=is_out,
    )
    tl.store(lse + at, tl.where(some, natural, float("-inf")), mask=is_row)


SIGNATURE = {
    "z": "*fp32", "lse": "*fp32", "block_table": "*i32", "query_start_loc": "*i32",
    "seq_lens": "*i32", "scale": "fp32", "positions": "i32", "table_row": "i32", "num_seqs": "i32",
    "num_heads": "i32",
}  # fmt: skip
STRIDES = (
    "q_row", "q_head", "kv_page", "kv_head_stride", "kv_row", "out_row", "out_head",
)  # fmt: skip
PAGE = 16  # tokens, vLLM's default on GPUs


def constants(target: Target, head_size: int, *, group: int, page: int) -> dict[str, object]:
    """The constants of a launch; head_size, group and page are the model's and vLLM's."""
    padded = next_power_of_2(head_size)
    return {
        "GROUP": group,
        "D": head_size,
        "D_PADDED": padded,
        "PAGE": page,
        "ROWS": ROWS,
        # With 64 it spills on sm_90: 344 bytes with head size 64, 724 with 128 (84 with 8 warps);
        # 32 of head size 256 spill 16.
        "KEYS": 32 if padded <= 128 else 16,
        "STAGES": 2 if target.backend == "cuda" else 1,
    }


def warps(head_size: int) -> int:
    """With 4 head size 128 spills 80 bytes on sm_90."""
    return 4 if head_size <= 64 else 8


def shown() -> Iterator[tuple[torch.dtype, int]]:
    """(dtype, head size) of the configurations that stand for all."""
    for dtype in SERVING_DTYPES:
        for head_size in HEAD_SIZES:
            # float16 compiles to the same code but for the types: one head size shows it.
            if dtype is torch.bfloat16 or head_size == 128:
                yield dtype, head_size


def signature_of(dtype: torch.dtype, types: dict[str, str]) -> tuple[dict, frozenset[str]]:
    """(signature, aligned arguments) of a kernel with these types beside those of its tensors."""
    tensors = dict.fromkeys(("q", "k_cache", "v_cache", "out"), f"*{DTYPES[dtype]}")
    made = types | dict.fromkeys(STRIDES, "i64") | tensors
    return made, frozenset((*tensors, *STRIDES))


@kernel(_cope_prefill)
def configs(target: Target) -> Iterator[Config]:
    for dtype, head_size in shown():
        made = constants(target, head_size, group=4, page=PAGE)
        signature, aligned = signature_of(dtype, SIGNATURE)
        yield Config(
            f"{DTYPES[dtype]}-d{head_size}", made, warps(head_size), made["STAGES"], signature,
            serving=True, aligned=aligned,
        )  # fmt: skip
