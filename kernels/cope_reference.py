"""Attention with contextual positions (CoPE), in plain fp32 torch: what its kernels mean.

A key's position, seen from a query, is how many keys from it up to the query the query "counts":
the sum of gates in between. Positions are fractions, so that a position's embedding is
interpolated between two rows of a table.
"""

from __future__ import annotations

import torch

from .paged_cache import gather_keys
from .reference import weigh


def contextual_logits(logits: torch.Tensor, seen: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Logits of keys with what their positions add (arXiv 2405.18719, equations 3 to 5).

    Key j of query i stands at p_ij, the sum of sigmoid(logits_ik) over the keys k = j .. i that it
    sees, at most P - 1.

    Args:
        logits: fp32 [..., M, N], the scaled products of queries and keys, in order of the keys.
        seen: bool, broadcast to logits: which keys a query sees.
        z: fp32 [..., M, P], the scaled products of queries and the table's rows.

    Returns:
        fp32 [..., M, N]: logits + z at p, where p falls between two rows in proportion; -inf where
        a key is not seen.
    """
    gates = torch.sigmoid(logits).masked_fill(~seen, 0.0)
    # In fp64: of 100,000 gates that add up to little, fp32 sums would lose the last.
    last = z.shape[-1] - 1
    position = gates.double().flip(-1).cumsum(-1).flip(-1)
    # NaN becomes the last position: no index leaves the table.
    position = torch.where(position < last, position, last)
    below = position.floor()
    above = (below + 1).clamp(max=last)
    share = (position - below).float()
    added = z.gather(-1, below.long()) * (1 - share) + z.gather(-1, above.long()) * share
    return (logits + added).masked_fill(~seen, -torch.inf)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each sequence's last queries over all its cached keys, with CoPE.

    The logit of key j for query i is scale * q_i . (k_j + e[p_ij]), and a gate is
    sigmoid(scale * q_i . k_j): both scaled, as in the authors' code (`cope_attention` of
    facebookresearch/RAM), where the paper's formulas leave the scale out. Keys carry no position,
    so that the cache is that of any other attention.

    Args:
        q: [T, H, D], the sequences after another; the queries stand at the end of their sequence.
        k_cache, v_cache: [num_pages, Hkv, page, D], in q's dtype; H is a multiple of Hkv.
        block_table: int32 [S, pages], the pages of each sequence.
        query_start_loc: int32 [S + 1], first row of each sequence in q.
        seq_lens: int32 [S], keys of each sequence, its new ones included; may be 0.
        pos_emb: [P, D], in q's dtype: an embedding for each whole position from 0 to P - 1, one
            table for all heads.
        scale: factor on the logits.
        out: [T, H, D], written in place where given.

    Returns:
        out [T, H, D] in q's dtype, lse [T, H] fp32; 0 and -inf for a row without keys.

    Raises:
        ValueError: a table that does not fit the queries.
    """
    check_pos_emb(q, pos_emb)
    group = q.shape[1] // k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    starts = query_start_loc.tolist()
    for s, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[s], starts[s + 1])
        position = torch.arange(rows.start, rows.stop, device=q.device) - rows.stop + seq_len
        seen = torch.arange(seq_len, device=q.device) <= position[:, None]
        k = gather_keys(k_cache, block_table[s], seq_len)
        v = gather_keys(v_cache, block_table[s], seq_len)
        for head in range(q.shape[1]):
            query = q[rows, head].double()  # fp64 products, as in `reference.attend`
            logits = (query @ k[head // group].double().T).float() * scale
            z = (query @ pos_emb.double().T).float() * scale
            o, e = weigh(contextual_logits(logits, seen, z), v[head // group])
            out[rows, head] = o.to(out.dtype)
            lse[rows, head] = e
    return out, lse


def check_pos_emb(q: torch.Tensor, pos_emb: torch.Tensor) -> None:
    """Raises ValueError where a table of positions does not fit the queries."""
    if pos_emb.dim() != 2 or pos_emb.shape[1] != q.shape[-1] or pos_emb.dtype != q.dtype:
        raise ValueError(
            f"pos_emb: got {pos_emb.dtype} {tuple(pos_emb.shape)} for q of {q.dtype} and head size "
            f"{q.shape[-1]}; it must be [positions, {q.shape[-1]}] in q's dtype"
        )
    if not len(pos_emb):
        raise ValueError("pos_emb: has no positions; give at least one")
