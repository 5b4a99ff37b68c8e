"""Pools over small random contexts, and what they should answer."""

from __future__ import annotations

import torch

from vllm_sparse.cpu_offload import reference
from vllm_sparse.cpu_offload.pool import Pool

KV_HEADS, SIZE, HEADS = 2, 64, 8


def make_pool(**changes) -> Pool:
    settings = dict(
        layers=2, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float32,
        host_bytes=64 << 20, max_requests=8, max_tokens=8192, page_rows=64,
    )  # fmt: skip
    return Pool(**{**settings, **changes})


def some(n: int, seed: int = 0, kv_heads: int = KV_HEADS, size: int = SIZE):
    return torch.randn(2, n, kv_heads, size, generator=torch.Generator().manual_seed(seed))


def queries(count: int, seed: int = 9, heads: int = HEADS, size: int = SIZE) -> torch.Tensor:
    return 2 * torch.randn(count, heads, size, generator=torch.Generator().manual_seed(seed))


def fill(pool: Pool, name: str, rows: int, seed: int = 0, keys=()) -> int:
    """A request with the same random rows in every layer."""
    slot = pool.open(name)
    kv_heads, size = pool.layout.kv_heads, pool.layout.head_size
    for layer in range(pool.layout.layers):
        pool.append(slot, layer, *some(rows, seed, kv_heads, size), keys=keys)
    return slot


def ask(pool: Pool, layer: int, q: torch.Tensor, slots, first, last):
    out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full(q.shape[:2], torch.nan)
    pool.collect(pool.submit(layer, q, slots, first, last), out, lse)
    return out, lse


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
    """One token's attention [heads, D], [heads] over rows [n, kv_heads, D]."""
    group = q.shape[0] // k.shape[1]
    pairs = [
        reference.gathered_attention(
            q[h : h + 1].double(), k[:, h // group].double(), v[:, h // group].double(), None, scale
        )
        for h in range(q.shape[0])
    ]
    return torch.cat([o for o, _ in pairs]), torch.cat([e for _, e in pairs])
