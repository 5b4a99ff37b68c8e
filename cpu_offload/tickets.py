"""What is asked of a pool and what it says of itself; and its answers without native kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import reference
from .host_store import HostStore


@dataclass(frozen=True)
class Ticket:
    """Attention that was asked for and is to be collected."""

    number: int
    layer: int
    q: torch.Tensor
    slots: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]


@dataclass(frozen=True)
class Capacity:
    """Of a pool; rows count once, however many layers they have."""

    pages: int
    free_pages: int  # idle ones, whose keys are still found, included
    page_rows: int
    page_bytes: int
    max_requests: int
    max_tokens: int


def answer_in_torch(store: HostStore, ticket: Ticket, out: torch.Tensor, lse: torch.Tensor) -> int:
    """Exact answers in plain torch; returns the rows read."""
    heads, kv_heads, read = out.shape[1], store.layout.kv_heads, 0
    group = heads // kv_heads
    for b, slot in enumerate(ticket.slots):
        first, last = ticket.first[b], max(ticket.first[b], ticket.last[b])
        k, v = store.read(slot, ticket.layer, first, last)
        for h in range(kv_heads):
            mine = slice(h * group, (h + 1) * group)
            o, e = reference.gathered_attention(
                ticket.q[b, mine].float(), k[:, h].float(), v[:, h].float(), None,
                store.shape.scale,
            )  # fmt: skip
            out[b, mine], lse[b, mine] = o.to(out.dtype), e
        read += (last - first) * kv_heads
    return read
