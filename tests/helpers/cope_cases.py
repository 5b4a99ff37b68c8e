"""What attention with contextual positions means, written apart from `kernels.cope_reference`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case


def table(positions: int, head_size: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """A table whose neighbours differ by much: [positions, head_size]."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(positions, head_size, generator=generator)).to(dtype)


def cope_meaning(pos_emb: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """For `cases.assert_close`: attention whose keys have their position's embedding added.

    Positions come from sums of the gates that begin at the first key. Products are made in the
    dtype asked for, sums of gates never in less than fp32.
    """

    def meaning(case: Case, _indices, dtype: torch.dtype = torch.float64):
        sums = torch.promote_types(dtype, torch.float32)
        heads, page = case.q.shape[1], case.k_cache.shape[2]
        group = heads // case.k_cache.shape[1]
        out = torch.zeros(case.q.shape, dtype=dtype)
        lse = torch.full(case.q.shape[:2], -torch.inf, dtype=torch.float64)
        last = len(pos_emb) - 1
        for s, rows in enumerate(case.query_lens):
            n, begin = int(case.seq_lens[s]), int(case.query_start_loc[s])
            if n == 0:
                continue
            key = torch.arange(n)
            pages = case.block_table[s][key // page].long()
            seen = key <= (torch.arange(rows) + n - rows)[:, None]
            for head in range(heads):
                k = case.k_cache[pages, head // group, key % page].to(dtype)
                v = case.v_cache[pages, head // group, key % page].to(dtype)
                q = case.q[begin : begin + rows, head].to(dtype)
                gates = torch.sigmoid((q @ k.T).to(sums) * case.scale) * seen
                upto = gates.cumsum(-1)
                position = (upto[:, -1:] - upto + gates).clamp(0, last)
                low = position.floor().long()
                z = (q @ pos_emb.to(dtype).T).to(sums)
                scores = (q @ k.T).to(sums) + torch.lerp(
                    z.gather(1, low), z.gather(1, (low + 1).clamp(max=last)), position - low
                )
                scores = (scores * case.scale).masked_fill(~seen, -torch.inf)
                some = seen.any(-1)
                p = torch.softmax(scores[some], -1).to(dtype)
                out[begin : begin + rows, head][some] = p @ v
                lse[begin : begin + rows, head] = torch.logsumexp(scores.double(), -1)
        return out, lse

    return meaning
