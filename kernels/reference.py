"""What every kernel means: plain fp32 torch, one query tile at a time.

Also what runs where the native extension could not be built: it is right, and indifferent to speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import left_out, softmax_modes
from .block_indices import BLOCK, TILE, BlockIndices, num_tiles
from .paged_cache import check_scales, gather_keys
from .paged_cache import write_kv as write_kv


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one head over given keys, in fp32.

    Args:
        q: [M, D]; k, v: [N, D]; mask: bool [M, N], True where a query sees a key.

    Returns:
        out [M, D] and lse [M] (natural logarithm). A query that sees nothing: out 0, lse -inf.
    """
    # A product of fp32 rounds as the CPU's library pleases: logits of 700 came out 7e-5 off, one
    # more than their last digit, on an AMD EPYC.
    scores = (q.double() @ k.double().T).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return weigh(scores, v)


def weigh(logits: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` from its logits on: fp32 [M, N], -inf where a query does not see a key."""
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse[:, None].masked_fill(lse[:, None].isinf(), 0.0))
    return p @ v.float(), lse


def add_sink(
    out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A result [..., D], [...] with one more logit in its softmax, which has no value."""
    return merge(out, lse, torch.zeros_like(out), sink.float().expand_as(lse))


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two partial results over disjoint keys: out [..., D], lse [...] fp32."""
    lse = torch.logaddexp(lse_a, lse_b)
    top = lse.masked_fill(lse.isinf(), 0.0)
    weight_a = torch.exp(lse_a - top).unsqueeze(-1)
    weight_b = torch.exp(lse_b - top).unsqueeze(-1)
    return (weight_a * out_a.float() + weight_b * out_b.float()).to(out_a.dtype), lse


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
    """Causal attention of each sequence's new queries over the selected cached keys.

    The keys of the chunk itself must be in the cache already. Query `i` of a sequence with `n`
    keys and `m` new queries stands at position `n - m + i` and sees keys up to itself.

    Args:
        q: [T, H, D], the sequences after another.
        k_cache, v_cache: [num_pages, Hkv, page, D], in q's dtype or FP8 (`paged_cache`); H is a
            multiple of Hkv.
        block_table: int32 [S, P], the pages of each sequence.
        query_start_loc: int32 [S + 1], first row of each sequence in q.
        seq_lens: int32 [S], keys of each sequence, its new ones included.
        indices: what each query tile reads; None for every causal key.
        scale: factor on the logits.
        window: a query sees its own key and the `window - 1` before it; None: all before it.
        sinks: fp32 [H], a logit of each head that takes part in every softmax without a value.
        mean_correction: blocks that a tile leaves out take part by their mean key and value, see
            `left_out.attend_means`; for selections whose columns do not repeat, and no window.
        k_scale, v_scale: fp32, one element each: a key is what is stored times k_scale, a value
            what is stored times v_scale; positive. None: 1.
        out: [T, H, D], written in place where given.

    Returns:
        out [T, H, D] in q's dtype, lse [T, H] fp32; 0 and -inf where nothing is selected (with
        sinks: 0 and the sink).

    Raises:
        ValueError: mean correction with a window, or a scale that is not one number.
    """
    left_out.check_window(mean_correction, window)
    check_scales(q.device, k_scale=k_scale, v_scale=v_scale)
    heads, group = q.shape[1], q.shape[1] // k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    starts = query_start_loc.tolist()
    tile0 = 0
    for s, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        k = gather_keys(k_cache, block_table[s], seq_len, k_scale)
        v = gather_keys(v_cache, block_table[s], seq_len, v_scale)
        for tile in range(num_tiles(end - begin)):
            rows = slice(begin + tile * TILE, min(begin + (tile + 1) * TILE, end))
            position = torch.arange(rows.start, rows.stop, device=q.device) - end + seq_len
            for head in range(heads):
                keys = left_out.selected(indices, (tile0 + tile) * heads + head, seq_len, q.device)
                distance = position[:, None] - keys[None, :]
                mask = (distance >= 0) & (distance < (seq_len if window is None else window))
                kv = head // group
                o, e = attend(q[rows, head], k[kv][keys], v[kv][keys], mask, scale)
                if mean_correction:
                    means = left_out.attend_means(
                        q[rows, head], k[kv], v[kv], keys, int(position[0]), scale
                    )
                    o, e = merge(o, e, *means)
                if sinks is not None:
                    o, e = add_sink(o, e, sinks[head])
                out[rows, head] = o.to(out.dtype)
                lse[rows, head] = e
        tile0 += num_tiles(end - begin)
    return out, lse


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    softmax: softmax_modes.Softmax = "online",
    phi: torch.Tensor | None = None,
    flagged: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of each sequence's last few queries over all its cached keys.

    Args:
        q: [T, H, D]; k_cache, v_cache: [num_pages, Hkv, page, D].
        block_table: int32 [S, P]; seq_lens: int32 [S], may be 0.
        scale: factor on the logits.
        out: [T, H, D], written in place where given.
        softmax: how partial sums are joined, see `softmax_modes`; the result is the same.
        phi: fp32 [H], with `unified` alone.
        flagged: int64 [1]; the rows (query x head) that left the window of phi and were computed
            again are added to it.
        query_start_loc: int32 [S + 1], first row of each sequence in q; None: one row each. The
            queries stand at the end of their sequence, and see keys up to themselves.
        window: a query sees so many keys, itself included; None: all.
        sinks: fp32 [H], a logit beside those of the keys, whose value is 0; it counts in the lse.
        k_scale, v_scale: as in `sparse_prefill`.

    Returns:
        out [T, H, D] in q's dtype, lse [T, H] fp32; 0 and -inf for a row without keys or sink.
    """
    softmax_modes.check(softmax, phi, flagged, q.shape[1])
    check_scales(q.device, k_scale=k_scale, v_scale=v_scale)
    group = q.shape[1] // k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    lens = seq_lens.tolist()
    starts = range(len(lens) + 1) if query_start_loc is None else query_start_loc.tolist()
    for s, seq_len in enumerate(lens):
        rows = slice(starts[s], starts[s + 1])
        position = torch.arange(rows.start, rows.stop, device=q.device) - rows.stop + seq_len
        key = torch.arange(seq_len, device=q.device)
        hidden = key > position[:, None]
        if window is not None:
            hidden |= key <= position[:, None] - window
        k = gather_keys(k_cache, block_table[s], seq_len, k_scale)
        v = gather_keys(v_cache, block_table[s], seq_len, v_scale)
        for head in range(q.shape[1]):
            # fp64 products, as in `attend`.
            scores = q[rows, head].double() @ k[head // group].double().T
            scores = (scores.float() * scale).masked_fill(hidden, -torch.inf)
            base = None if phi is None else float(phi[head])
            o, e, redone = softmax_modes.attend(scores, v[head // group], softmax, base)
            if sinks is not None:
                o, e = add_sink(o, e, sinks[head])
            out[rows, head] = o.to(out.dtype)
            lse[rows, head] = e
            if flagged is not None:
                flagged += redone.sum()
    return out, lse


class RowScores(NamedTuple):
    """Attention mass of a few rows: see `row_scores`."""

    blocks: torch.Tensor  # fp32 [h, R, nb]
    squares: torch.Tensor | None  # fp32 [h, R, nb]
    columns: torch.Tensor  # int64 [h, M]
    column_mass: torch.Tensor  # fp32 [h, R, M]


def row_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    heads: torch.Tensor,
    seq_len: int,
    *,
    scale: float,
    base_from: torch.Tensor | None = None,
    squares: bool = False,
    columns: int = 0,
    by_heaviest: bool = False,
    k_scale: torch.Tensor | None = None,
) -> RowScores:
    """Where the exact attention of a few rows of one sequence lies: in which blocks, which keys.

    A row's mass sums to 1 over the keys that it sees. What a key is worth as a column is its mass
    over all rows but the heaviest: a key that one row alone attends is no column, and would rank
    before any true diagonal, whose mass a column shares with 63 other keys.

    Args:
        q: [R <= 64, H, D]; k_cache: [num_pages, Hkv, page, D], H a multiple of Hkv.
        block_table: int32 [P], the sequence's pages; seq_len: its keys.
        positions: int64 [R], the last key that each row sees; negative: it sees none.
        heads: int64 [h], the query heads to look at, those of a KV head together.
        scale: factor on the logits.
        base_from: int64 [R]. Block 0 and the blocks from this one on are the row's base: read
            anyway, so that their keys are worth nothing as columns of the row.
        squares: give the sum of squares over the keys of each block as well.
        columns: how many columns M of each head to give, the most worth first; at most `seq_len`.
        by_heaviest: a column is worth its mass in its heaviest row instead.
        k_scale: as in `sparse_prefill`.

    Returns:
        blocks [h, R, nb]: mass of each block, all NaN in a row with a logit that is not finite.
        squares: [h, R, nb], where asked for.
        columns [h, M] and column_mass [h, R, M], the mass of each of them outside the row's base;
        anything (but keys of the sequence) for a head with such a row.
    """
    check_row_scores(q, k_cache, positions, base_from, seq_len, columns)
    blocks = -(-seq_len // BLOCK)
    group = q.shape[1] // k_cache.shape[1]
    k = gather_keys(k_cache, block_table, seq_len, k_scale)[heads // group].float()
    seen = torch.arange(seq_len, device=q.device) <= positions[:, None]
    scores = torch.einsum("rhd,hnd->hrn", q[:, heads].float() * scale, k)
    scores.masked_fill_(~seen, -torch.inf)
    finite = (scores.isfinite() | ~seen).all(-1, keepdim=True)
    mass = torch.softmax(scores.masked_fill(~finite, 0.0), -1)
    mass = mass.masked_fill(~seen, 0.0).masked_fill(~finite, torch.nan)
    padded = torch.nn.functional.pad(mass, (0, blocks * BLOCK - seq_len)).unflatten(-1, (-1, BLOCK))
    if base_from is not None:
        block = torch.arange(seq_len, device=q.device) // BLOCK
        mass = mass.masked_fill((block == 0) | (block >= base_from[:, None]), 0.0)
    worth = mass.amax(1) if mass.shape[1] else mass.sum(1)
    if not by_heaviest:
        worth = mass.sum(1) - worth
    top = worth.nan_to_num(nan=0.0).topk(columns).indices
    return RowScores(
        padded.sum(-1),
        padded.square().sum(-1) if squares else None,
        top,
        mass.gather(2, top[:, None].expand(-1, mass.shape[1], -1)),
    )


def block_means(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: int,
    heads: torch.Tensor,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean key of each block of one sequence.

    Args:
        k_cache: [num_pages, Hkv, page, D]; block_table: int32 [P]; heads: int64 [h] KV heads.
        k_scale: as in `sparse_prefill`.

    Returns:
        fp32 [h, nb, D]; the last block's mean is that of the keys it has.
    """
    keys = gather_keys(k_cache, block_table, seq_len, k_scale)[heads].float()
    blocks = [part.mean(1) for part in keys.split(BLOCK, 1)] if seq_len else []
    return torch.stack(blocks, 1) if blocks else keys


def tile_means(q: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Mean query of each tile of a chunk.

    Args:
        q: [Tq, H, D]; heads: int64 [h] query heads.

    Returns:
        fp32 [h, T, D]; the last tile's mean is that of the rows it has.
    """
    tiles = [part.mean(0) for part in q[:, heads].float().split(TILE)] if len(q) else []
    return torch.stack(tiles, 1) if tiles else q.new_zeros(heads.numel(), 0, q.shape[2]).float()


# Levels of mass: 16 to an octave, by the top bits of the float, and how many are told apart.
MASS_SHIFT = 19
MASS_LEVELS = 17 * 16


def heaviest(mass: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """The heaviest entries of each row whose sum reaches `need`; near ties come together.

    Entries come by levels, of which the next holds at least 4% less. An even row is one level, and
    is taken whole rather than `need` of it.

    Args:
        mass: fp32 [h, R, nb], negative entries count as 0; need: fp32 [h, R].

    Returns:
        bool [h, R, nb]; nothing where need <= 0, everything where it cannot be reached.
    """
    mass = mass.clamp(min=0.0)
    level = mass.contiguous().view(torch.int32) >> MASS_SHIFT
    below = (level.amax(-1, keepdim=True) - level).clamp_(max=MASS_LEVELS - 1).long()
    held = mass.new_zeros(*mass.shape[:2], MASS_LEVELS).scatter_add_(2, below, mass).cumsum(-1)
    # Levels up to the first that reaches the need: as many as do not reach it, and one more.
    last = (held < need[..., None]).sum(-1, keepdim=True)
    return (below <= last) & (need > 0)[..., None]


def index_lists(
    mask: torch.Tensor, columns: torch.Tensor | None, last_key: torch.Tensor
) -> BlockIndices:
    """One sequence's lists, without what causality hides and without columns in chosen blocks.

    Args:
        mask: bool [T, H, nb], blocks of each tile and head.
        columns: int32 [T, H, M], ascending where not negative; negative entries are no column.
        last_key: int64 [T], the last key that a row of the tile sees.
    """
    block = torch.arange(mask.shape[2], device=mask.device)
    mask = mask & (block <= (last_key // BLOCK)[:, None])[:, None]
    if columns is None:
        return BlockIndices.from_masks(mask)
    keep = ~mask.gather(2, (columns // BLOCK).clamp(min=0).long())
    keep &= (columns >= 0) & (columns <= last_key[:, None, None])
    counts = keep.sum(-1, dtype=torch.int32).flatten()
    offsets = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return BlockIndices.from_masks(mask, offsets, columns[keep])


def check_row_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    positions: torch.Tensor,
    base_from: torch.Tensor | None,
    seq_len: int,
    columns: int,
) -> None:
    """Raises ValueError for arguments of `row_scores` that do not fit together."""
    rows = q.shape[0]
    if rows > TILE:
        raise ValueError(f"q: got {rows} rows; give at most {TILE}")
    if positions.numel() != rows or (base_from is not None and base_from.numel() != rows):
        raise ValueError(
            f"positions, base_from: got {positions.numel()} and "
            f"{None if base_from is None else base_from.numel()} entries for {rows} rows of q; "
            "give one for each row"
        )
    if not 0 <= columns <= seq_len:
        raise ValueError(f"columns: got {columns}; allowed: 0 to the {seq_len} keys there are")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(
            f"heads: got {q.shape[1]} query heads and {k_cache.shape[1]} KV heads; query heads "
            "must be a multiple of KV heads"
        )
