"""Attention with contextual positions (CoPE) on a GPU: `cope_tile` and `cope_split` launched."""

from __future__ import annotations

import torch

from ..cope_reference import check_pos_emb
from . import cope_split, cope_tile, launch, paged_decode
from .integers import cdiv
from .sparse_prefill import check, check_sequences

# Up to so many new tokens a sequence are decoded: a key is read once for all of them.
MOST_DECODED = 8
MOST_PRODUCTS = 1 << 31  # of a tile's rows with the table, which the kernels count in 32 bits


def cope_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    pos_emb: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    max_query_len: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `cope_reference.cope_attention`; beside it:

    Args:
        max_query_len: the most rows that a sequence has in q, by which it is decided how they are
            computed; None: as many as q has.

    The host reads nothing from the device. Beside the result it takes T * H * (4 positions + 4 D)
    bytes, the queries in fp32 and their products with the table.

    Raises:
        ValueError: arguments that do not fit together, or that the kernels do not take: scale must
            be positive, the keys' and values' strides the same, pages a multiple of 16.
    """
    check_pos_emb(q, pos_emb)
    out = check(q, k_cache, v_cache, out, None, scale)
    check_sequences(q, block_table, query_start_loc, seq_lens)
    if k_cache.dtype != q.dtype:
        raise ValueError(
            f"k_cache: got {k_cache.dtype} for q of {q.dtype}; contextual positions are not read "
            "over FP8 caches, use --kv-cache-dtype auto"
        )
    if pos_emb.device != q.device:
        raise ValueError(f"pos_emb: is on {pos_emb.device}, q on {q.device}; give both on one")
    room = MOST_PRODUCTS // (cope_tile.ROWS * q.shape[1]) - 2
    if len(pos_emb) > room:
        raise ValueError(
            f"pos_emb: got {len(pos_emb):,} positions; with {q.shape[1]} query heads give at most "
            f"{room:,}"
        )
    if max_query_len is not None and max_query_len < 1:
        raise ValueError(f"max_query_len: got {max_query_len}; give 1 or more, or None")
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not q.shape[0] or not seq_lens.numel():
        return out, lse
    most = min(q.shape[0], max_query_len or q.shape[0])
    # Products of 16-bit numbers are exact in fp32, also where torch multiplies in TF32.
    # The last one twice: what lies above a position is one further, always.
    z = q.float() @ torch.cat([pos_emb, pos_emb[-1:]]).float().T
    run = _decode if most <= MOST_DECODED else _prefill
    run(q, k_cache, v_cache, z, out, lse, block_table, query_start_loc, seq_lens, scale, most)
    return out, lse


def _prefill(
    q, k_cache, v_cache, z, out, lse, block_table, query_start_loc, seq_lens, scale, most
) -> None:
    (tokens, heads, head_size), seqs = q.shape, seq_lens.numel()
    positions = z.shape[2] - 1
    target = launch.target_of(q.device)
    made = cope_tile.constants(
        target, head_size, group=heads // k_cache.shape[1], page=k_cache.shape[2]
    )
    cope_tile._cope_prefill[(heads, tokens // made["ROWS"] + seqs)](
        q, k_cache, v_cache, z, out, lse, block_table, query_start_loc, seq_lens, scale,
        positions, q.stride(0), q.stride(1), *k_cache.stride()[:3], out.stride(0), out.stride(1),
        block_table.stride(0), seqs, heads,
        **made, **launch.options(cope_tile.warps(head_size), made["STAGES"]),
    )  # fmt: skip


def _decode(
    q, k_cache, v_cache, z, out, lse, block_table, query_start_loc, seq_lens, scale, most
) -> None:
    (_, heads, head_size), seqs = q.shape, seq_lens.numel()
    positions = z.shape[2] - 1
    kv_heads, page = k_cache.shape[1:3]
    group = heads // kv_heads
    target = launch.target_of(q.device)
    made = cope_split.constants(
        target, head_size, group=group, page=page, tokens=most, splits=1, seqs=seqs
    )
    each, rows = kv_heads * made["ROW_TILES"], made["ROWS"]
    warps = cope_split.warps(rows)
    slots = paged_decode._slots(q.device, warps)
    key_tiles = cdiv(block_table.shape[1] * page, made["KEYS"])
    splits = made["SPLITS"] = paged_decode.most_splits(made["SEQS"], key_tiles, each, slots)
    floats = z.new_empty(seqs * each * splits * rows * (made["D_PADDED"] + 3))
    sums, bases, acc = floats.split(
        [x * seqs * each * splits * rows for x in (1, 2, made["D_PADDED"])]
    )
    arrivals = seq_lens.new_empty(seqs * each)
    grid = (each, seqs, splits)
    q_strides, kv_strides = q.stride()[:2], k_cache.stride()[:3]
    options = launch.options(warps, made["STAGES"])
    if splits > 1:
        cope_split._cope_gate_sums[grid](
            q, k_cache, block_table, query_start_loc, seq_lens, sums, arrivals, scale, slots, seqs,
            *q_strides, *kv_strides, block_table.stride(0), **made, **options,
        )  # fmt: skip
    joins = cope_split.joining(target, head_size, group=group, tokens=most, warps=warps)
    cope_split._cope_decode[grid](
        q, k_cache, v_cache, z, out, lse, block_table, query_start_loc, seq_lens, sums, acc, bases,
        arrivals, scale, slots, positions, seqs, *q_strides, *kv_strides, out.stride(0),
        out.stride(1), block_table.stride(0), heads, **made, **joins, **options,
    )  # fmt: skip
