"""Exact attention of a few rows: what the selections are made from and validated on.

The rows of one KV head are scored at a time, in one buffer: at 16K keys, 4 query heads of 64 rows
make 16 MiB.
"""

from __future__ import annotations

import functools

import torch

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


class RowScorer:
    """Scores query rows against the keys of one KV head, in a buffer that is kept.

    The probabilities that it returns are valid until the next call.
    """

    def __init__(self, keys: torch.Tensor, scale: float, max_rows: int):
        """keys: [64 nb, D] of any of the KV heads; max_rows: rows x heads at once."""
        self.scale = scale
        shape = (max_rows, keys.shape[0])
        self._mass = WORKSPACE.empty("mass", shape, torch.float32, keys.device)
        self._scores = self._mass
        if keys.dtype != torch.float32:
            self._scores = WORKSPACE.empty("scores", shape, keys.dtype, keys.device)

    def attention(
        self, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Causal softmax: fp32 [R, g, 64 nb].

        Args:
            queries: [R, g, D], any dtype.
            keys: [64 nb, D].
            positions: int64 [R], the last key that each row sees.
        """
        rows, group, size = queries.shape
        flat = (queries.float() * self.scale).to(keys.dtype).reshape(rows * group, size)
        scores, mass = self._scores[: rows * group], self._mass[: rows * group]
        torch.mm(flat, keys.T, out=scores)
        # Only keys after the earliest row are hidden from any: a chunk's width at most. Adding
        # -inf takes a twentieth of the time that masked_fill does.
        hidden_from = int(positions.min()) + 1
        future = torch.arange(hidden_from, keys.shape[0], device=keys.device)
        bias = scores.new_zeros(rows, 1, len(future))
        bias.masked_fill_((future > positions[:, None])[:, None], -torch.inf)
        scores.view(rows, group, -1)[:, :, hidden_from:] += bias
        torch.softmax(scores, -1, dtype=torch.float32, out=mass)
        return mass.view(rows, group, -1)


def block_mass(mass: torch.Tensor) -> torch.Tensor:
    """Mass of each key block: [R, g, 64 nb] -> [R, g, nb]."""
    ones = mass.new_ones(BLOCK)
    return torch.mv(mass.view(-1, BLOCK), ones).view(*mass.shape[:2], -1)
