"""How the partial softmaxes of decode are joined: the three modes, their limits, and what they
mean in plain fp32 torch.

online   a running maximum; every time it grows, what came before is rescaled
lazy     the same, but rescaled only when the maximum grew by more than LAZY_GROWTH
         (FlashAttention-4's conditional rescaling): exact, since any base serves
unified  one constant base phi for a head and no maximum at all, so that partial sums simply add
         (FlashDecoding++, arXiv 2311.01282, section 3)

unified is guarded both ways. A logit far above phi overflows; a row whose logits all lie far below
loses them to underflow, which no test for NaN notices. A row that is not proven to be inside is
computed again, online.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

Softmax = Literal["online", "lazy", "unified"]
MODES: tuple[str, ...] = get_args(Softmax)

# exp(x - phi) is kept with fp32's range of exponents, in every kernel and for every dtype. Above:
# 2^20 keys of exp(48) with values of 6e4 sum to 5e31, of the 3e38 there are. Below: keys that
# vanish lie 87.3 below phi, so 2^20 of them make at most exp(-25) of a row that passes.
HIGH = 48.0  # a row passes if no logit is further above phi,
LOW = -48.0  # and if its lse is no further below.
LAZY_GROWTH = 8 * math.log(2)  # p stays below 2^8, which fp16 holds without losing a digit


def check(softmax: str, phi: torch.Tensor | None, flagged: torch.Tensor | None, heads: int) -> None:
    """Raises ValueError for a mode that does not exist, a phi that does not go with it, or a count
    of flagged rows that is none."""
    if softmax not in MODES:
        raise ValueError(f"softmax: got {softmax!r}; allowed: {', '.join(MODES)}")
    if (softmax == "unified") != (phi is not None):
        raise ValueError(
            f"phi: {'missing' if phi is None else 'given'} with softmax {softmax!r}; 'unified' "
            "needs one for each query head, the others take none"
        )
    if phi is not None and (phi.dtype != torch.float32 or phi.shape != (heads,)):
        raise ValueError(
            f"phi: got {tuple(phi.shape)} {phi.dtype}; it must be float32 of one entry for each "
            f"of the {heads} query heads"
        )
    if flagged is not None and (flagged.dtype != torch.int64 or flagged.numel() != 1):
        raise ValueError(
            f"flagged: got {flagged.numel()} entries of {flagged.dtype}; give one int64"
        )


def attend(
    scores: torch.Tensor,
    v: torch.Tensor,
    softmax: Softmax,
    phi: float | None = None,
    *,
    block: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one head with a mode's own arithmetic, `block` keys at a time.

    Args:
        scores: fp32 [M, N] logits, -inf where a query does not see a key; v: [N, D].
        phi: the base of `unified`.

    Returns:
        out [M, D] and lse [M], 0 and -inf for a row that sees nothing; bool [M], the rows that
        left the window of phi and were computed again online (never one that sees nothing).
    """
    rows, keys = scores.shape
    num = torch.zeros(rows, v.shape[1], device=v.device)
    den = torch.zeros(rows, device=v.device)
    top = torch.full((rows,), -torch.inf, device=v.device)  # highest logit so far
    base = top.clone()
    growth = LAZY_GROWTH if softmax == "lazy" else 0.0
    for first in range(0, keys, block):
        x = scores[:, first : first + block]
        top = torch.maximum(top, x.amax(1))
        if softmax == "unified":
            p = torch.exp((x - phi).clamp(max=HIGH))
        else:
            new = torch.where(top > base + growth, top, base)
            finite = new.masked_fill(new.isinf(), 0.0)
            shrink = torch.exp(base - finite)
            num, den, base = num * shrink[:, None], den * shrink, new
            p = torch.exp(x - finite[:, None])
        num += p @ v[first : first + block].float()
        den += p.sum(1)
    if softmax == "unified":
        base = torch.full_like(top, phi)
    out = torch.where(den[:, None] > 0, num / den[:, None], 0.0)
    lse = torch.where(den > 0, base + torch.log(den), -torch.inf)
    flagged = torch.zeros(rows, dtype=torch.bool, device=v.device)
    if softmax == "unified":
        # Written so that a NaN does not pass.
        passes = (top - phi <= HIGH) & (den >= math.exp(LOW))
        flagged = ~passes & ~(scores == -torch.inf).all(1)
        if flagged.any():
            out[flagged], lse[flagged], _ = attend(scores[flagged], v, "online", block=block)
    return out, lse, flagged
