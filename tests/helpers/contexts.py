"""Contexts in host memory, and the heads that sampled attention is judged by."""

from __future__ import annotations

import torch

from vllm_sparse.cpu_offload import Context, KVStore


def make_context(
    length: int,
    *,
    kv_heads: int = 2,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    segment_rows: int = 64,
    seed: int = 0,
    samplers: tuple = (),
) -> Context:
    """Random rows in segments that lie in the buffer in reverse order, between NaN."""
    row = 2 * head_size * dtype.itemsize + 8
    count = -(-length // segment_rows) + 1
    buffer = torch.full((count * (segment_rows * kv_heads * row + 64) + 64,), 0xFF).byte()
    store = KVStore(
        buffer, kv_heads=kv_heads, head_size=head_size, dtype=dtype, segment_rows=segment_rows
    )
    store._free.reverse()
    generator = torch.Generator().manual_seed(seed)
    context = Context(store, samplers=samplers)
    k, v = torch.randn(2, length, kv_heads, head_size, generator=generator)
    context.append(k, v)
    return context


def queries(context: Context, tokens: int = 1, group: int = 4, seed: int = 1) -> torch.Tensor:
    """fp32 [T, kv_heads, 1, G, D], numbers that the context's dtype holds."""
    store = context.store
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, store.kv_heads, 1, group, store.head_size, generator=generator)
    return q if store.dtype == torch.int8 else q.to(store.dtype).float()
