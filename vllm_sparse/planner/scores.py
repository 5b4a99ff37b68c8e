"""Exact attention of a few rows: what the selections are made from and validated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparse.kernels import RowScores, block_means, gather_keys, row_scores


@dataclass(frozen=True)
class Keys:
    """One sequence's keys in the paged cache, and the questions that planning has for them."""

    cache: torch.Tensor  # [num_pages, Hkv, page, D]
    table: torch.Tensor  # int32 [P]
    length: int
    scale: float
    k_scale: torch.Tensor | None = None  # of caches that the GPU's kernels read

    @property
    def heads(self) -> int:
        return self.cache.shape[1]

    def score(
        self, queries: torch.Tensor, positions: torch.Tensor, heads: torch.Tensor, **wanted: Any
    ) -> RowScores:
        """The exact attention of queries [R, H, D], reduced: see `reference.row_scores`."""
        where = (self.cache, self.table, positions, heads, self.length)
        return row_scores(queries, *where, scale=self.scale, **wanted)

    def attention(
        self, queries: torch.Tensor, positions: torch.Tensor, kv_head: int
    ) -> torch.Tensor:
        """All of it, fp32 [R, g, n], for queries [R, g, D] of one KV head's heads."""
        keys = gather_keys(self.cache[:, kv_head, None], self.table, self.length, self.k_scale)[0]
        logits = queries.float() * self.scale @ keys.float().T
        hidden = torch.arange(self.length, device=logits.device) > positions[:, None]
        return torch.softmax(logits.masked_fill_(hidden[:, None], -torch.inf), -1)

    def block_means(self, kv_heads: torch.Tensor) -> torch.Tensor:
        """Mean key of each block, fp32 [h, nb, D], of KV heads [h]; they may repeat."""
        wanted = kv_heads.tolist()
        distinct = sorted(set(wanted))
        means = block_means(self.cache, self.table, self.length, torch.tensor(distinct))
        return means[torch.tensor([distinct.index(head) for head in wanted], device=means.device)]
