"""Sparse prefill on a GPU: the signature of `reference.sparse_prefill` over the Triton kernels."""

from __future__ import annotations

import torch

from ..block_indices import BLOCK, TILE, BlockIndices
from ..left_out import check_window
from ..paged_cache import FP8
from . import launch, left_out, pack_tiles, prefill_tile

NO_WINDOW = 1 << 30
_ON = "{name}: is on {got}, q on {device}; give all tensors on one device"


def sparse_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    indices: BlockIndices | None,
    *,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    mean_correction: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.sparse_prefill`: same arguments, same meaning.

    The host reads nothing from the device: what it launches follows from shapes alone.

    Raises:
        ValueError: arguments that do not fit together, or that the kernel does not take: scale
            must be positive, the keys' and values' strides the same, pages a multiple of 16.
    """
    check_window(mean_correction, window)
    out = check(q, k_cache, v_cache, out, indices, scale)
    scales = launch.scales(q.device, k_scale, v_scale)
    check_sequences(q, block_table, query_start_loc, seq_lens)
    heads, head_size = q.shape[1:]
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not q.shape[0]:
        return out, lse
    if sinks is not None:
        sinks = sinks.float().contiguous()
    target = launch.target_of(q.device)
    constants = prefill_tile.constants(
        target, head_size, group=heads // k_cache.shape[1], page=k_cache.shape[2],
        dense=indices is None, sinks=sinks is not None,
    )  # fmt: skip
    window = NO_WINDOW if window is None else window
    offsets = _tile_and_pair_offsets(query_start_loc)
    lists = None if indices is None else _clean(indices, offsets[0], seq_lens)
    packed = _pack(constants, q, query_start_loc, seq_lens, lists, offsets, window)
    warps, stages = prefill_tile.warps_and_stages(target, head_size, k_cache.dtype)
    records, order, starts, entries, columns = packed
    programs = records.shape[0]
    prefill_tile._sparse_prefill[(programs,)](
        q, k_cache, v_cache, out, lse, lse if sinks is None else sinks, block_table,
        query_start_loc, seq_lens, records, order, starts[0], entries, starts[1], columns,
        *scales, scale * prefill_tile._LOG2E, window,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], out.stride(0), out.stride(1),
        block_table.stride(0), heads,
        **constants, **launch.options(warps, stages),
    )  # fmt: skip
    if mean_correction and lists is not None:
        left_out.add_means(
            q, k_cache, v_cache, out, lse, block_table, query_start_loc, seq_lens, offsets[0],
            lists, scale, scales,
        )  # fmt: skip
    return out, lse


def _tile_and_pair_offsets(query_start_loc: torch.Tensor) -> torch.Tensor:
    """int32 [2, S + 1]: the first tile of each sequence, and the first two of tiles."""
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    offsets = query_start_loc.new_zeros(2, query_start_loc.numel())
    tiles = (query_lens + TILE - 1) // TILE
    torch.cumsum(torch.stack([tiles, (tiles + 1) // 2]), 1, out=offsets[:, 1:])
    return offsets


def _clean(
    indices: BlockIndices, tile_offsets: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Block offsets, blocks, column offsets, columns: see `pack_tiles._clean_lists`."""
    given = (
        indices.block_offsets, indices.blocks, indices.column_offsets, indices.columns,
    )  # fmt: skip
    lists = [x.contiguous() for x in given]
    clean = [torch.empty_like(lists[1]), torch.empty_like(lists[3])]
    rows = lists[0].numel() - 1
    pack_tiles._clean_lists[(rows,)](
        *lists, *clean, tile_offsets, seq_lens, seq_lens.numel(), indices.num_heads,
        CHUNK=pack_tiles.CHUNK, **launch.options(pack_tiles.WARPS, 2),
    )  # fmt: skip
    return lists[0], clean[0], lists[2], clean[1]


def _pack(
    constants: dict,
    q: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    lists: tuple[torch.Tensor, ...] | None,
    offsets: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(records, order, offsets [2, programs], entries, columns): see `pack_tiles`.

    As many programs as there could be: those beyond the last tile end at once.
    """
    heads, num_seqs = q.shape[1], seq_lens.numel()
    group = constants["GROUP"]
    # Rows in twos of tiles; a sequence has at most one that is not full.
    pairs = q.shape[0] // (2 * TILE) + num_seqs
    squares = pairs * (heads // group) * -(-group // 2)
    tile_offsets, pair_offsets = offsets
    options = launch.options(pack_tiles.WARPS, 2)
    chunk = {"CHUNK": pack_tiles.CHUNK}
    dense = lists is None
    lists = (query_start_loc,) * 4 if lists is None else lists  # not read where dense
    records = query_start_loc.new_empty(2 * squares, prefill_tile.RECORD)
    counts = query_start_loc.new_empty(2, 2 * squares)
    pack_tiles._count_tiles[(squares,)](
        pair_offsets, tile_offsets, query_start_loc, seq_lens, *lists, records, counts, window,
        num_seqs, heads, squares,
        GROUP=group, EACH=max(constants["KEYS"] // BLOCK, 1), DENSE=dense, **chunk, **options,
    )  # fmt: skip
    if dense:
        return records, counts, counts, query_start_loc, query_start_loc
    starts = counts.cumsum(1, dtype=torch.int32) - counts
    entries, columns = (torch.empty_like(x) for x in (lists[1], lists[3]))
    order = torch.empty_like(counts[0])
    pack_tiles._fill_tiles[(2 * squares,)](
        records, counts, order, starts, tile_offsets, query_start_loc, seq_lens, *lists, entries,
        columns, window, heads, 2 * squares, PLACE_CHUNK=pack_tiles.PLACE_CHUNK, **chunk, **options,
    )  # fmt: skip
    return records, order, starts, entries, columns


def check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor | None,
    indices: BlockIndices | None,
    scale: float,
) -> torch.Tensor:
    """The output's tensor; raises ValueError where the kernel does not take these."""
    heads, head_size = q.shape[1:]
    kv_heads, page = k_cache.shape[1:3]
    # float32 on the CPU is for the interpreter.
    dtypes = launch.SERVING_DTYPES if not q.is_cpu else tuple(launch.DTYPES)[:3]
    cached = k_cache.dtype
    if q.dtype not in dtypes or cached not in (q.dtype, FP8) or v_cache.dtype != cached:
        raise ValueError(
            f"dtypes: got q {q.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}; "
            f"give one of {', '.join(map(str, dtypes))} for all three, or {FP8} for both caches"
        )
    if cached == FP8:
        launch.check_fp8(q.device)
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != head_size:
        raise ValueError(
            f"caches: got k {tuple(k_cache.shape)}, v {tuple(v_cache.shape)} for head size "
            f"{head_size}; both must be [pages, kv_heads, page, {head_size}]"
        )
    if k_cache.stride() != v_cache.stride():
        raise ValueError(
            f"caches: got strides k {k_cache.stride()}, v {v_cache.stride()}; they must be the "
            "same, as those of two halves of one cache are"
        )
    if heads % kv_heads:
        raise ValueError(
            f"heads: got {heads} query heads and {kv_heads} KV heads; query heads must be a "
            "multiple of KV heads"
        )
    if page % 16:
        raise ValueError(f"caches: got pages of {page} tokens; a page must be a multiple of 16")
    if head_size % 16 or not 16 <= head_size <= 256:
        raise ValueError(f"q: got head size {head_size}; it must be a multiple of 16, at most 256")
    if not scale > 0:
        raise ValueError(f"scale: got {scale}; it must be positive")
    if indices is not None and indices.num_heads != heads:
        raise ValueError(
            f"indices: made for {indices.num_heads} query heads, q has {heads}; plan with the "
            "same heads"
        )
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(
            f"out: got {tuple(out.shape)} {out.dtype}, it must be {tuple(q.shape)} {q.dtype}"
        )
    for name, tensor in (("q", q), ("k_cache", k_cache), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: the last dimension has stride {tensor.stride(-1)}; it must be 1 "
                "(use .contiguous())"
            )
        if tensor.device != q.device:
            raise ValueError(_ON.format(name=name, got=tensor.device, device=q.device))
    return out


def check_sequences(
    q: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Raises ValueError where what tells the sequences does not fit."""
    for name, tensor in (
        ("block_table", block_table), ("query_start_loc", query_start_loc), ("seq_lens", seq_lens),
    ):  # fmt: skip
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1 or tensor.device != q.device:
            raise ValueError(
                f"{name}: got {tensor.dtype} with strides {tensor.stride()} on {tensor.device}; "
                f"give contiguous int32 on {q.device}"
            )
    num_seqs = seq_lens.numel()
    if query_start_loc.numel() != num_seqs + 1:
        raise ValueError(
            f"query_start_loc: got {query_start_loc.numel()} entries for {num_seqs} sequences; "
            "it needs one more than there are sequences"
        )
