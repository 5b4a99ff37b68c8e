"""Decode with contextual positions (CoPE): the rows of a KV head over a range of a sequence's keys.

A position counts the keys to the right, which other programs have. So there are two launches: the
first sums each row's gates over each range of keys ("split"), the second begins its walk over a
range with the sums of those to the right. Ranges are chosen as in `split_decode`, and parts are
joined as there by the program that arrives last; the first launch sets the counters.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .cope_tile import PAGE, SIGNATURE, STEP_NUMBERS, STEP_TENSORS, shown, signature_of
from .cope_walk import _gates, _walk
from .decode_join import _join_splits
from .decode_sums import _rows_of_keys, _tiles_of_chunk
from .integers import cdiv, next_power_of_2
from .launch import DTYPES, Config, Target, kernel, unspecialized
from .split_decode import JOINED, max_rows

EVERY_KEY = tl.constexpr(1 << 30)
NUMBERS = ("table_row", "num_seqs", "slots")


@triton.jit
def _range_of_split(
    query_start_loc, seq_lens, num_seqs, slots,
    GROUP: tl.constexpr, ROWS: tl.constexpr, ROW_TILES: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, SEQS: tl.constexpr,
):  # fmt: skip
    """(first tile of keys, end, splits) of this program; 0 splits where it has no rows.

    A program without keys has split 0, if any.
    """
    sequence = tl.program_id(1)
    seq_len = tl.load(seq_lens + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - tl.load(query_start_loc + sequence)
    chunk = _tiles_of_chunk(
        seq_lens, seq_lens, num_seqs, EVERY_KEY, tl.num_programs(0), slots, SEQS, KEYS, False
    )
    tiles = tl.cdiv(seq_len, KEYS)
    chunk = tl.maximum(chunk, tl.cdiv(tiles, SPLITS))
    splits = tl.maximum(tl.cdiv(tiles, chunk), 1)
    first_token = tl.program_id(0) % ROW_TILES * ROWS // GROUP
    splits = tl.where(first_token < query_len, splits, 0)  # padding
    first = tl.program_id(2) * chunk
    return first, tl.minimum(first + chunk, tiles), splits


@triton.jit
def _rows_of_program(
    q, query_start_loc, seq_len, q_row, q_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, ROW_TILES: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr,
):  # fmt: skip
    """(q [M, D], rows of the batch [M], heads [M], whether they are there [M], positions [M])."""
    begin = tl.load(query_start_loc + tl.program_id(1))
    query_len = tl.load(query_start_loc + tl.program_id(1) + 1) - begin
    r = tl.program_id(0) % ROW_TILES * ROWS + tl.arange(0, ROWS)
    token = r // GROUP
    head = tl.program_id(0) // ROW_TILES * GROUP + r % GROUP
    is_row = token < query_len
    row = (begin + token).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    q_tile = tl.load(
        q + row[:, None] * q_row + head.to(tl.int64)[:, None] * q_head + d[None, :],
        mask=is_row[:, None] & (d < D)[None, :],
        other=0.0,
    )
    return q_tile, row, head, is_row, seq_len - query_len + token


@triton.jit(**unspecialized(NUMBERS, STEP_TENSORS[1:]))
def _cope_gate_sums(
    q,  # [T, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    block_table,  # i32 [S, pages]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    gate_sums,  # fp32 [S, tiles, SPLITS, ROWS]
    arrivals,  # i32 [S, tiles], becomes 0
    scale,
    slots,
    num_seqs,
    q_row: tl.int64,
    q_head: tl.int64,
    kv_page: tl.int64,
    kv_head_stride: tl.int64,
    kv_row: tl.int64,
    table_row,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    SEQS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of one split but the first, which no other is to the left of."""
    sequence, split = tl.program_id(1), tl.program_id(2)
    place = (sequence * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    if split == 0:
        tl.store(arrivals + place, 0)
        return
    first, end, splits = _range_of_split(
        query_start_loc, seq_lens, num_seqs, slots, GROUP, ROWS, ROW_TILES, KEYS, SPLITS, SEQS
    )
    if split >= splits:
        return
    seq_len = tl.load(seq_lens + sequence)
    q_tile, _, _, is_row, position = _rows_of_program(
        q, query_start_loc, seq_len, q_row, q_head, GROUP, ROWS, ROW_TILES, D, D_PADDED
    )
    kv_head = (tl.program_id(0) // ROW_TILES).to(tl.int64)
    k_base = k_cache + kv_head * kv_head_stride
    table = block_table + sequence.to(tl.int64) * table_row
    n = tl.arange(0, KEYS)
    d = tl.arange(0, D_PADDED)
    is_d = d < D
    # Lane by lane until the end.
    sums = tl.zeros([ROWS, KEYS], tl.float32)
    key = first * KEYS + n
    at = _rows_of_keys(key, key < seq_len, table, kv_page, kv_row, PAGE)
    for tile in tl.range(first, end, num_stages=STAGES):
        key = tile * KEYS + n
        inside = key < seq_len
        k = tl.load(
            k_base + at[None, :] + d[:, None], mask=is_d[:, None] & inside[None, :], other=0.0
        )
        at = _rows_of_keys(key + KEYS, key + KEYS < seq_len, table, kv_page, kv_row, PAGE)
        logit = tl.dot(q_tile, k, input_precision="ieee")
        see = is_row[:, None] & (key[None, :] <= position[:, None])
        sums += _gates(logit, see, scale * 1.4426950408889634)
    slot = (place * SPLITS + split) * ROWS + tl.arange(0, ROWS)
    tl.store(gate_sums + slot, tl.sum(sums, 1))


@triton.jit(**unspecialized((*STEP_NUMBERS, "slots"), STEP_TENSORS))
def _cope_decode(
    q,  # [T, H, D]
    k_cache,  # [pages, Hkv, PAGE, D]
    v_cache,
    z,  # fp32 [T, H, positions + 1], products of queries and the table, the last one twice
    out,  # [T, H, D]
    lse,  # fp32 [T, H]
    block_table,  # i32 [S, pages]
    query_start_loc,  # i32 [S + 1]
    seq_lens,  # i32 [S]
    gate_sums,  # fp32 [S, tiles, SPLITS, ROWS], but those of the first split
    partial_acc,  # fp32 [S, tiles, SPLITS, ROWS, D_PADDED]
    partial_sum,  # fp32 [2, S, tiles, SPLITS, ROWS], bases and sums
    arrivals,  # i32 [S, tiles], 0 before
    scale,
    slots,
    positions,
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
    SPLITS: tl.constexpr,
    SEQS: tl.constexpr,
    STAGES: tl.constexpr,
    USED: tl.constexpr,
    PARTS: tl.constexpr,
):
    sequence, split = tl.program_id(1), tl.program_id(2)
    first, end, splits = _range_of_split(
        query_start_loc, seq_lens, num_seqs, slots, GROUP, ROWS, ROW_TILES, KEYS, SPLITS, SEQS
    )
    if split >= splits:
        return
    seq_len = tl.load(seq_lens + sequence)
    q_tile, row, head, is_row, position = _rows_of_program(
        q, query_start_loc, seq_len, q_row, q_head, GROUP, ROWS, ROW_TILES, D, D_PADDED
    )
    kv_head = (tl.program_id(0) // ROW_TILES).to(tl.int64)
    place = (sequence * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    is_d = d < D
    r = tl.arange(0, ROWS)
    scale_log2 = scale * 1.4426950408889634
    carry = tl.zeros([ROWS], tl.float32)
    for right in range(split + 1, splits):
        carry += tl.load(gate_sums + (place * SPLITS + right) * ROWS + r)
    at = row * num_heads + head
    # The rows of the tile's first token see the fewest keys.
    first_token = tl.program_id(0) % ROW_TILES * ROWS // GROUP
    begin = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - begin
    z_row = ((row - begin).to(tl.int32) * num_heads + head) * (positions + 1)
    z_row = tl.where(is_row, z_row, 0)
    z_at = begin.to(tl.int64) * (num_heads * (positions + 1))
    base, total, acc = _walk(
        q_tile, z + z_at, z_row, is_row & (position >= 0), carry,
        (positions - 1).to(tl.float32), k_cache + kv_head * kv_head_stride,
        v_cache + kv_head * kv_head_stride, block_table + sequence.to(tl.int64) * table_row,
        kv_page, kv_row, position, seq_len - query_len + first_token + 1, first, end, seq_len,
        scale_log2, ROWS, KEYS, D, D_PADDED, PAGE, STAGES,
    )  # fmt: skip

    is_out = is_row[:, None] & is_d[None, :]
    last = 0
    if splits > 1:
        slot = (place * SPLITS + split) * ROWS + r
        all_slots = (tl.num_programs(1) * tl.num_programs(0) * SPLITS * ROWS).to(tl.int64)
        tl.store(partial_acc + slot[:, None] * D_PADDED + d[None, :], acc, mask=is_out)
        tl.store(partial_sum + slot, base)
        tl.store(partial_sum + all_slots + slot, total)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        arrived = tl.atomic_add(arrivals + place, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            last = 1
            u = tl.arange(0, USED)
            used = (tl.program_id(0) % ROW_TILES * ROWS + u) // GROUP < query_len
            base, total, acc = _join_splits(
                partial_acc, partial_sum, all_slots, place, splits, used, scale_log2, is_d, ROWS,
                USED, SPLITS, PARTS, D_PADDED,
            )  # fmt: skip
    else:
        last = 1

    if last == 1:
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        natural = base * scale + tl.math.log2(tl.where(some, total, 1.0)) / 1.4426950408889634
        tl.store(
            out + row[:, None] * out_row + head.to(tl.int64)[:, None] * out_head + d[None, :],
            acc.to(out.dtype.element_ty),
            mask=is_out,
        )
        tl.store(lse + at, tl.where(some, natural, float("-inf")), mask=is_row)


def constants(
    target: Target, head_size: int, *, group: int, page: int, tokens: int, splits: int, seqs: int
) -> dict[str, object]:
    """The constants of both launches for up to `tokens` query rows a sequence."""
    padded = next_power_of_2(head_size)
    rows = max(_used(head_size, group, tokens), 16)
    # With head size 256, 32 rows and as many keys spill 208 bytes on sm_90.
    keys = 64 if padded <= 128 else 512 // rows
    return {
        "GROUP": group,
        "D": head_size,
        "D_PADDED": padded,
        "PAGE": page,
        "KEYS": keys,
        "ROWS": rows,
        "ROW_TILES": cdiv(group * tokens, rows),
        "SPLITS": splits,
        "SEQS": next_power_of_2(seqs),
        "STAGES": 3 if target.backend == "cuda" else 1,
    }


def joining(
    target: Target, head_size: int, *, group: int, tokens: int, warps: int
) -> dict[str, int]:
    """What the second launch is told beside: of how many rows it joins how many parts at once."""
    used = _used(head_size, group, tokens)
    padded = next_power_of_2(head_size)
    parts = min(max(JOINED * target.warp_size * warps // (used * padded), 1), 8)
    return {"USED": used, "PARTS": parts}


def _used(head_size: int, group: int, tokens: int) -> int:
    return min(next_power_of_2(group * tokens), max_rows(head_size))


def warps(rows: int) -> int:
    return 4 if rows == 16 else 8


SPLIT_TYPES = {"gate_sums": "*fp32", "arrivals": "*i32", "slots": "i32"}
SUM_SIGNATURE = {k: v for k, v in SIGNATURE.items() if k not in ("z", "lse", "positions")}
DECODE_SIGNATURE = SIGNATURE | {"partial_acc": "*fp32", "partial_sum": "*fp32"}
# (name, tokens a sequence)
FORMS = (("", 1), ("-8tokens", 8))


def _configs(target: Target, types: dict[str, str], decodes: bool) -> Iterator[Config]:
    for dtype, head_size in shown():
        for form, tokens in FORMS:
            made = constants(
                target, head_size, group=4, page=PAGE, tokens=tokens, splits=64, seqs=8
            )
            each = warps(made["ROWS"])
            stages = made["STAGES"]
            if decodes:
                made |= joining(target, head_size, group=4, tokens=tokens, warps=each)
            signature, aligned = signature_of(dtype, types | SPLIT_TYPES)
            yield Config(
                f"{DTYPES[dtype]}-d{head_size}{form}", made, each, stages, signature,
                serving=True, aligned=aligned | {"gate_sums", "partial_acc", "partial_sum"},
            )  # fmt: skip


@kernel(_cope_gate_sums)
def sum_configs(target: Target) -> Iterator[Config]:
    return _configs(target, SUM_SIGNATURE, False)


@kernel(_cope_decode)
def configs(target: Target) -> Iterator[Config]:
    return _configs(target, DECODE_SIGNATURE, True)
