"""Exact attention of a few rows: what the selections are made from and validated on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vllm_sparse.kernels import RowScores, row_scores
from vllm_sparse.kernels.block_indices import BLOCK

from .workspace import WORKSPACE


@functools.cache
def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that queries and keys of `dtype` are multiplied in.

    bf16 where the CPU has matrix units for it: 2.0 instead of 7.4 ms for 256 rows of 16K keys.
    Rounded scores move a row's covered mass by up to 0.3%, as the rounding of q and k themselves
    does. Elsewhere fp32.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    fast = dtype == torch.bfloat16 and capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def cached_keys(k_cache: torch.Tensor, block_table_row: torch.Tensor, length: int) -> torch.Tensor:
    """One sequence's keys, with zeros up to a whole number of blocks: [Hkv, 64 nb, D].

    Valid until the next call. Each KV head's pages are copied straight to where they belong: 1.5
    ms for 16 MiB, against 3.5 where gathering and transposing are two copies.
    """
    _, kv_heads, page, size = k_cache.shape
    pages = block_table_row[: -(-length // page)].long()
    padded = -(-length // BLOCK) * BLOCK
    shape = (kv_heads, max(padded, len(pages) * page), size)
    keys = WORKSPACE.empty("keys", shape, k_cache.dtype, k_cache.device)
    for head in range(kv_heads):
        rows = keys[head, : len(pages) * page].unflatten(0, (len(pages), page))
        torch.index_select(k_cache[:, head], 0, pages, out=rows)
    keys = keys[:, :padded].to(score_dtype(k_cache.dtype))
    keys[:, length:] = 0.0  # a page's rows after the last key hold anything
    return keys


@dataclass(frozen=True)
class Keys:
    """One sequence's keys in the paged cache, and the questions that planning has for them."""

    cache: torch.Tensor  # [num_pages, Hkv, page, D]
    table: torch.Tensor  # int32 [P]
    length: int
    scale: float

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
        logits = queries.float() * self.scale @ self.gathered[kv_head, : self.length].float().T
        hidden = torch.arange(self.length, device=logits.device) > positions[:, None]
        return torch.softmax(logits.masked_fill_(hidden[:, None], -torch.inf), -1)

    @cached_property
    def gathered(self) -> torch.Tensor:
        """[Hkv, 64 nb, D]: see `cached_keys`."""
        return cached_keys(self.cache, self.table, self.length)
