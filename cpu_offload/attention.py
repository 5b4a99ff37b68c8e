"""Attention of new queries over a context in host memory, read whole or by a sample."""

from __future__ import annotations

import torch

from . import native
from .context import Context
from .samplers import LSH, Exact, Proposal, Sampler, TopK, Uniform
from .store import MAX_SEGMENT_ROWS, KVStore, allocate
from .vattention import VAttention

SAMPLERS = {"lsh": LSH, "vattention": VAttention, "topk": TopK, "uniform": Uniform, "exact": Exact}


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sampler: str | Sampler = "lsh",
    rows: int | None = None,
    seed: int = 0,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of queries over keys and values, from a sample of them.

    Stores and indexes the rows first: for many queries over the same keys, keep a `Context` and
    ask it with `gather`.

    Args:
        q: [H, D] of one token, or [T, H, D]; all tokens see all keys.
        k, v: [N, Hkv, D] on any device, N may be 0; H is a multiple of Hkv.
        sampler: "lsh", "vattention", "topk", "uniform", "exact", or a sampler with options.
        rows: the most rows that a KV head attends to (a query head, where the sampler is not
            `shared`); None: what the sampler holds right, for "lsh" its collisions, for
            "vattention" what its error bound needs. "topk" and "uniform" need it.
        seed: of everything random.
        scale: factor on the logits; None: D^-0.5.
        dtype: how rows are kept: None for that of k; torch.int8 with a scale for each row.

    Returns:
        out like q; lse fp32 [(T,) H], natural logarithm, an estimate as well; rows_read int64
        [(T,) Hkv], rows whose keys or values were read, all of a KV head's samples together: more
        than `rows` for "topk", which reads all keys to choose, and for "lsh" where more collided.
        Where nothing was sampled: out 0, lse -inf.

    Raises:
        ValueError: shapes that do not fit, a key or value that is not finite, an unknown sampler.
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {sampler!r}; use one of {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[sampler](seed=seed)
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"k, v: got {tuple(k.shape)}, {tuple(v.shape)}; give [N, Hkv, D] for both")
    dtype = k.dtype if dtype is None else dtype
    heads, size = k.shape[1:]
    fitting = max(16, 1 << max(len(k) - 1, 0).bit_length())
    segment_rows = min(fitting, MAX_SEGMENT_ROWS)
    count = max(1, -(-len(k) // segment_rows))
    row_bytes = 2 * size * dtype.itemsize + 8
    store = KVStore(
        allocate(count * (heads * segment_rows * row_bytes + 64) + 64),
        kv_heads=heads, head_size=size, dtype=dtype, segment_rows=segment_rows,
    )  # fmt: skip
    with Context(store, samplers=[sampler]) as context:
        context.append(k, v)
        return gather(q, context, sampler, rows, seed, scale=scale)


def gather(
    q: torch.Tensor,
    context: Context,
    sampler: Sampler,
    rows: int | None = None,
    seed: int = 0,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of queries over a context; arguments and results as in `attend`."""
    heads, size = context.store.kv_heads, context.store.head_size
    if q.dim() not in (2, 3) or q.shape[-1] != size or q.shape[-2] % heads or not q.shape[-2]:
        raise ValueError(
            f"q: got {tuple(q.shape)}; give [H, {size}] or [T, H, {size}] with H a multiple of "
            f"{heads} KV heads"
        )
    if rows is not None and rows < 0:
        raise ValueError(f"rows: got {rows}; give 0 or more, or None")
    if not bool(torch.isfinite(q).all()):
        raise ValueError("q: holds numbers that are not finite; attention for them is not defined")
    scale = size**-0.5 if scale is None else scale
    tokens = q.shape[0] if q.dim() == 3 else 1
    grouped = q.detach().float().cpu().reshape(tokens, heads, 1, -1, size).contiguous()
    if not sampler.shared:
        grouped = grouped.transpose(2, 3).contiguous()
    proposal = sampler.propose(context, grouped, rows, scale=scale, seed=seed)
    out, lse = native.gather(
        context, grouped, proposal.rows, proposal.log_prob, proposal.counts, scale=scale
    )
    read = _rows_read(proposal).view(tokens, heads, -1).sum(-1)
    return (
        out.reshape(q.shape).to(q.dtype).to(q.device),
        lse.reshape(q.shape[:-1]).to(q.device),
        read if q.dim() == 3 else read[0],
    )


def _rows_read(proposal: Proposal) -> torch.Tensor:
    """int64 [items]; rows that were looked at to find others count, too."""
    if proposal.looked_at is None:
        return proposal.counts
    return torch.maximum(proposal.counts, proposal.looked_at)
