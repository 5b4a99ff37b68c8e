"""Six kinds of logits that softmax arithmetic goes wrong on, as cases over a paged cache."""

from __future__ import annotations

import torch
from cases import Case, make_case, oracle

from vllm_sparse.kernels.softmax_modes import HIGH, LOW

HUGE = 2.0**15  # fp16 still holds it, and bf16 has it
# The phi that fits each kind; 0 fits those whose logits are ordinary.
REGIMES = {
    "normal": 0.0,
    "huge-positive": HUGE,
    "huge-negative": -HUGE,
    "all-equal": 0.0,
    "one-dominates": 180.0,
    "denormal": 0.0,
}
FITS_ZERO = {"normal", "all-equal", "denormal"}


def regime_case(regime: str, query_lens: list[int], seq_lens: list[int], **shape) -> Case:
    """A case of head size 64 whose logits are of this kind."""
    case = make_case(query_lens, seq_lens, head_size=64, **shape)
    generator = torch.Generator().manual_seed(1)
    q, k = case.q, case.k_cache
    # The logit is the key's dimension 0 and a little of the others. The scale is 1, as torch in
    # fp16, by which errors are judged, has no product of 8 and 2^15.
    case.scale = 1.0
    # Large ones are of nothing else: the order of a sum of 64 moves them by some last digits.
    q.mul_(0.1 if regime == "normal" else 0.0)
    q[..., 0] = 1.0
    page = k.shape[2]
    for s, n in enumerate(seq_lens):
        position = torch.arange(n)
        pages = case.block_table[s][position // page].long()
        noise = torch.randn(n, k.shape[1], generator=generator)
        if regime == "huge-positive":
            wanted = HUGE + noise
        elif regime == "huge-negative":
            wanted = -HUGE + noise
        elif regime == "all-equal":
            wanted = torch.full_like(noise, 5.0)
        elif regime == "one-dominates":
            wanted = noise
            if n:
                wanted[n // 3] = 200.0
        elif regime == "denormal":
            smallest = torch.finfo(k.dtype).smallest_normal
            wanted = noise * smallest / 4
        else:
            wanted = noise
        k[pages, :, position % page, 0] = wanted.to(k.dtype)
    return case


def count_outside(case: Case, phi: torch.Tensor) -> int:
    """Rows (query x head) that leave the window of phi fp32 [H], from fp64 logits."""
    total = 0
    page, group = case.k_cache.shape[2], case.q.shape[1] // case.k_cache.shape[1]
    _, lse = oracle(case, None)
    for s, m in enumerate(case.query_lens):
        n, begin = int(case.seq_lens[s]), int(case.query_start_loc[s])
        position = torch.arange(n)
        pages = case.block_table[s][position // page].long()
        k = case.k_cache[pages, :, position % page].double()
        for i in range(m):
            seen = k[: n - m + 1 + i]
            for head in range(case.q.shape[1]):
                scores = seen[:, head // group] @ case.q[begin + i, head].double() * case.scale
                if len(scores):
                    high = float(scores.max() - phi[head])
                    total += high > HIGH or float(lse[begin + i, head] - phi[head]) < LOW
    return total
