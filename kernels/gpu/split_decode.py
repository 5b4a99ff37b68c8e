"""The decode kernel: the query heads of one KV head over a range of one sequence's keys.

A program takes up to 64 rows (query heads of a KV head x the sequence's new tokens) and one of the
ranges ("splits") that the keys are cut into. How many there are is computed on the device from the
lengths, so that a captured graph stays right as they grow. The program that arrives last at a
sequence's counter joins the partial results; no second launch. The three softmax modes are those
of `kernels/softmax_modes.py`: a split that leaves the window of phi is computed again, online, by
the program that has it.

Split-KV: FlashDecoding (Dao et al. 2023); the constant maximum: FlashDecoding++ (arXiv 2311.01282,
section 3); the cost of a number of splits has the form of FlashInfer pull request 4904.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .decode_join import _join, _join_splits
from .decode_sums import HIGH, LOWEST_SUM, _sums, _tiles_of_chunk
from .integers import cdiv, next_power_of_2
from .launch import (
    DTYPES,
    HEAD_SIZES,
    SERVING_DTYPES,
    Config,
    Target,
    caches,
    kernel,
    named,
    scale_types,
    unspecialized,
)

MAX_SPLITS = 128
MAX_ROWS = 64
JOINED = 32  # numbers of partial results that a thread of the last program joins at once
ONLINE, LAZY, UNIFIED = range(3)  # as softmax_modes.MODES has them


# What changes from step to step compiles no code of its own; a batch's tensors may be parts of a
# step's, which begin anywhere.
STEP_NUMBERS = ("window", "slots", "num_seqs", "table_row")
STEP_TENSORS = (
    "prefix_lse", "prefix_top", "prefix_keys", "members", "block_table", "query_start_loc",
    "seq_lens",
)  # fmt: skip


@triton.jit(**unspecialized(STEP_NUMBERS, ("k_scale", "v_scale", *STEP_TENSORS)))
def _split_decode(
    q,  # [T, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    v_cache,
    out,  # [T, H, D]
    lse,  # fp32 [T, H]
    sinks,  # fp32 [H]
    phi,  # fp32 [H]
    flagged,  # i64 [1]
    prefix_out,  # fp32 [T, H, D], attention over the first keys, of which each sequence has
    prefix_lse,  # fp32 [T, H]
    prefix_top,  # fp32 [T, H], how far above phi, in powers of two
    prefix_keys,  # i32 [S]
    members,  # i32 [Z, MEMBERS], sequences of a tile
    block_table,  # i32 [S, pages]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S], or of the tiles, [Z]
    partial_acc,  # fp32 [S, tiles, splits, ROWS, D_PADDED]
    partial_sum,  # fp32 [2, S, tiles, splits, ROWS], bases and sums
    arrivals,  # i32 [S, tiles], 0 before and after
    k_scale,  # fp32 [1]: a key is what is stored times this; None: 1
    v_scale,
    scale,
    window,
    slots,
    num_seqs,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head_stride: tl.int64,
    kv_row: tl.int64,
    out_row: tl.int64,
    out_head: tl.int64,
    table_row,
    num_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    USED: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    SEQS: tl.constexpr,
    MODE: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOKENS: tl.constexpr,
    SINKS: tl.constexpr,
    PREFIX: tl.constexpr,
    WIDE_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Splits that are not used end at once; being the last, they hold up none that are.
    kv_head = tl.program_id(0) // ROW_TILES
    row_tile = tl.program_id(0) % ROW_TILES
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens + sequence)
    r = tl.arange(0, ROWS)
    first_key = 0
    prefix = 0
    if MEMBERS:  # up to TOKENS rows of each sequence of a tile, all of which see all of these keys
        if seq_len == 0:  # no tile
            return
        member = r // (GROUP * TOKENS)
        which = tl.load(members + sequence * MEMBERS + member, mask=member < MEMBERS, other=-1)
        begin = tl.load(query_start_loc + which, mask=which >= 0, other=0)
        query_len = tl.load(query_start_loc + which + 1, mask=which >= 0, other=0) - begin
        token = r // GROUP % TOKENS
        # Its pages are those of the first of them.
        table = block_table + tl.load(members + sequence * MEMBERS).to(tl.int64) * table_row
    else:
        begin = tl.load(query_start_loc + sequence)
        query_len = tl.load(query_start_loc + sequence + 1) - begin
        first_token = row_tile * ROWS // GROUP
        if first_token >= query_len:  # padding
            return
        token = (row_tile * ROWS + r) // GROUP
        table = block_table + sequence.to(tl.int64) * table_row
        first_key = tl.maximum(seq_len - query_len + first_token - window + 1, 0)
        if PREFIX:
            prefix = tl.load(prefix_keys + sequence)
            first_key = tl.maximum(first_key, prefix)
    chunk = _tiles_of_chunk(
        seq_lens, prefix_keys, num_seqs, window, tl.num_programs(0), slots, SEQS, KEYS, PREFIX
    )
    tile0 = first_key // KEYS
    tiles = tl.maximum(tl.cdiv(seq_len, KEYS) - tile0, 0)
    chunk = tl.maximum(chunk, tl.cdiv(tiles, SPLITS))
    splits = tl.maximum(tl.cdiv(tiles, chunk), 1)
    if split >= splits:
        return

    head = kv_head * GROUP + (row_tile * ROWS + r) % GROUP
    is_row = token < query_len
    position = seq_len - query_len + token
    row = (begin + token).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    is_d = d < D
    is_out = is_row[:, None] & is_d[None, :]
    q_tile = tl.load(
        q + row[:, None] * q_row + head.to(tl.int64)[:, None] * q_head + d[None, :],
        mask=is_out,
        other=0.0,
    )
    # Bases are in the unit of q . stored key: with the keys' own scale they are logits.
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    base_of = tl.zeros([ROWS], tl.float32)
    if MODE == 2:
        base_of = tl.load(phi + head, mask=is_row, other=0.0) / scale
    k_base = k_cache + kv_head.to(tl.int64) * kv_head_stride
    v_base = v_cache + kv_head.to(tl.int64) * kv_head_stride
    scale_log2 = scale * 1.4426950408889634
    begin_tile = tile0 + split * chunk
    end_tile = tl.minimum(begin_tile + chunk, tile0 + tiles)

    base, top, total, acc = _sums(
        q_tile, k_base, v_base, table, kv_page, kv_row, position, begin_tile, end_tile, seq_len,
        window, scale_log2, base_of, is_d, MODE, MEMBERS == 0, ROWS, KEYS, D_PADDED, PAGE, WIDE_P,
        STAGES,
    )  # fmt: skip
    if MODE == 2:
        # Written so that a NaN does not pass.
        passes = ((top - base_of) * scale_log2 <= HIGH) & (total >= LOWEST_SUM)
        passes = passes | (top == float("-inf")) | (is_row == 0)
        if tl.min(passes.to(tl.int32), 0) == 0:
            base, top, total, acc = _sums(
                q_tile, k_base, v_base, table, kv_page, kv_row, position, begin_tile, end_tile,
                seq_len, window, scale_log2, base_of, is_d, 0, MEMBERS == 0, ROWS, KEYS, D_PADDED,
                PAGE, False, 1,
            )  # fmt: skip

    last = 0
    if splits > 1:
        place = (sequence * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        slot = (place * SPLITS + split) * ROWS + r
        all_slots = (tl.num_programs(1) * tl.num_programs(0) * SPLITS * ROWS).to(tl.int64)
        tl.store(partial_acc + slot[:, None] * D_PADDED + d[None, :], acc, mask=is_out)
        tl.store(partial_sum + slot, base)
        tl.store(partial_sum + all_slots + slot, total)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        arrived = tl.atomic_add(arrivals + place, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            last = 1
            tl.store(arrivals + place, 0)
            u = tl.arange(0, USED)
            used = is_row if MEMBERS else (row_tile * ROWS + u) // GROUP < query_len
            base, total, acc = _join_splits(
                partial_acc, partial_sum, all_slots, place, splits, used, scale_log2, is_d, ROWS,
                USED, SPLITS, PARTS, D_PADDED,
            )  # fmt: skip
    else:
        last = 1

    if last == 1:
        if v_scale is not None:
            acc = acc * tl.load(v_scale)
        at = row * num_heads + head
        # Over the whole row, however its keys were split: how far above phi, and how much in all.
        excess = (base - base_of) * scale_log2
        unified_sum = total * tl.math.exp2(tl.minimum(excess, 115.0))
        unified_sum = tl.where(total > 0, unified_sum, 0.0)
        if PREFIX:
            # Of a sequence that shares none there is nothing to read.
            shares = is_row & (prefix + r * 0 > 0)
            its_lse = tl.load(prefix_lse + at, mask=shares, other=float("-inf")) / scale
            its = tl.load(
                prefix_out + at[:, None] * D + d[None, :],
                mask=shares[:, None] & is_d[None, :], other=0.0,
            )  # fmt: skip
            if MODE == 2:
                its_top = tl.load(prefix_top + at, mask=shares, other=float("-inf"))
                excess = tl.maximum(excess, its_top)
                above = (its_lse - base_of) * scale_log2
                unified_sum += tl.math.exp2(tl.minimum(above, 115.0))
            base, total, acc = _join(base, total, acc, its_lse, its, scale_log2)
        if MODE == 2:
            if MEMBERS:  # judged with the rest of the row
                tl.store(prefix_top + at, excess, mask=is_row)
            else:
                left = (excess > HIGH) | (unified_sum < LOWEST_SUM)
                left = left & (total > 0) & is_row
                count = tl.sum(left.to(tl.int64), 0)
                if count > 0:
                    tl.atomic_add(flagged, count)
        if SINKS:
            sink = tl.load(sinks + head, mask=is_row, other=0.0) / scale
            base, total, acc = _join(base, total, acc, sink, tl.zeros_like(acc), scale_log2)
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        natural = base * scale
        natural += tl.math.log2(tl.where(some, total, 1.0)) / 1.4426950408889634
        natural = tl.where(some, natural, float("-inf"))
        tl.store(
            out + row[:, None] * out_row + head.to(tl.int64)[:, None] * out_head + d[None, :],
            acc.to(out.dtype.element_ty),
            mask=is_out,
        )
        tl.store(lse + at, natural, mask=is_row)


SIGNATURE = {
    "lse": "*fp32", "sinks": "*fp32", "phi": "*fp32", "flagged": "*i64", "prefix_out": "*fp32",
    "prefix_lse": "*fp32", "prefix_top": "*fp32", "prefix_keys": "*i32", "members": "*i32",
    "block_table": "*i32", "query_start_loc": "*i32", "seq_lens": "*i32", "partial_acc": "*fp32",
    "partial_sum": "*fp32", "arrivals": "*i32", "scale": "fp32", "window": "i32", "slots": "i32",
    "num_seqs": "i32", "table_row": "i32", "num_heads": "i32",
}  # fmt: skip
STRIDES = (
    "q_row", "q_head", "kv_page", "kv_head_stride", "kv_row", "out_row", "out_head",
)  # fmt: skip
PAGE = 16  # tokens, vLLM's default on GPUs


def max_rows(head_size: int) -> int:
    """Most rows of a program: 64 of 256 accumulators spill 72 bytes on sm_90."""
    return MAX_ROWS if next_power_of_2(head_size) <= 128 else MAX_ROWS // 2


def constants(
    target: Target,
    dtype: torch.dtype,
    head_size: int,
    *,
    group: int,
    page: int,
    tokens: int,
    splits: int,
    seqs: int,
    mode: int,
    members: int = 0,
    sinks: bool = False,
    prefix: bool = False,
) -> dict[str, object]:
    """The constants of a launch for up to `tokens` query rows a sequence.

    members: sequences whose rows a program takes, of a launch over shared prefixes; 0: it is one
    over sequences.
    """
    padded = next_power_of_2(head_size)
    keys = 64 if padded <= 128 else 32
    if target.backend == "hip" and mode == UNIFIED:
        keys //= 2  # 64 spill 36 to 224 bytes on gfx942
    rows = group * tokens * max(members, 1)
    most = max_rows(head_size)
    assert rows <= most or not members, (rows, most)
    used = min(next_power_of_2(rows), most)
    rows = max(used, 16)
    if members:  # few launches, of many rows
        used = rows
    warps, stages = warps_and_stages(target, rows, mode)
    parts = min(max(JOINED * target.warp_size * warps // (used * padded), 1), 8)
    return {
        "GROUP": group,
        "D": head_size,
        "D_PADDED": padded,
        "PAGE": page,
        "KEYS": keys,
        "ROWS": rows,
        "ROW_TILES": 1 if members else cdiv(group * tokens, rows),
        "USED": used,
        "SPLITS": splits,
        "PARTS": parts,
        "SEQS": next_power_of_2(seqs),
        "MODE": mode,
        "MEMBERS": members,
        "TOKENS": tokens if members else 1,
        "SINKS": sinks,
        "PREFIX": prefix,
        "WIDE_P": mode == UNIFIED and dtype == torch.float16,
        "STAGES": stages,
    }


def warps_and_stages(target: Target, rows: int, mode: int) -> tuple[int, int]:
    """Keys and values of three steps in flight: 96 KiB at head size 128."""
    # With four, unified's lanes and the loop that computes again spill 56 bytes on sm_90.
    warps = 4 if rows == 16 and mode != UNIFIED else 8
    return warps, 3 if target.backend == "cuda" else 1


# (name, tokens a sequence, softmax mode, more)
FORMS = (
    ("online", 1, ONLINE, {}),
    ("lazy", 1, LAZY, {}),
    ("unified", 1, UNIFIED, {}),
    ("online-8tokens", 8, ONLINE, {}),
    ("unified-8tokens", 8, UNIFIED, {}),
    ("prefix", 1, ONLINE, {}),
    ("suffix", 1, ONLINE, {"prefix": True}),
    ("sinks", 1, ONLINE, {"sinks": True}),
)
_EVERY = tuple(form for form, *_ in FORMS)
SHOWN = {
    (torch.bfloat16, 64): ("online", "unified", "sinks"),  # gpt-oss has sinks and 64
    (torch.bfloat16, 96): ("online", "unified"),
    (torch.bfloat16, 128): _EVERY,
    (torch.bfloat16, 256): ("online", "unified", "unified-8tokens", "prefix"),
    (torch.float16, 128): ("online", "unified"),
}


def _shown(target: Target) -> Iterator[tuple]:
    """(queries, cache, head size, *form) of the configurations that stand for all."""
    # The other head sizes and float16 compile to the same code but for sizes and types: some
    # forms show them.
    for (dtype, head_size), forms in SHOWN.items():
        assert dtype in SERVING_DTYPES and head_size in HEAD_SIZES
        for cache in caches(target, dtype):
            yield from ((dtype, cache, head_size, *form) for form in FORMS if form[0] in forms)


@kernel(_split_decode)
def configs(target: Target) -> Iterator[Config]:
    for dtype, cache, head_size, form, tokens, mode, more in _shown(target):
        if form == "prefix":
            more = {"members": max_rows(head_size) // 4}
        made = constants(
            target, dtype, head_size, group=4, page=PAGE, tokens=tokens, splits=64, seqs=8,
            mode=mode, **more,
        )  # fmt: skip
        warps, stages = warps_and_stages(target, made["ROWS"], mode)
        scales, no_scales = scale_types(cache, "k_scale", "v_scale")
        signature = SIGNATURE | dict.fromkeys(STRIDES, "i64")
        signature |= dict.fromkeys(("q", "out"), f"*{DTYPES[dtype]}")
        signature |= dict.fromkeys(("k_cache", "v_cache"), f"*{DTYPES[cache]}")
        if form == "prefix":
            signature["out"] = "*fp32"
        aligned = (k for k, kind in signature.items() if kind.startswith("*") or k in STRIDES)
        aligned = set(aligned) - set(STEP_TENSORS)
        yield Config(
            f"{named(dtype, cache)}-d{head_size}-{form}", made | no_scales, warps, stages,
            signature | scales, serving=True, aligned=frozenset(aligned),
        )  # fmt: skip
