"""What sampled attention means: plain torch, one head at a time, in the dtype that it is given.

Also what runs where the native extension could not be built.
"""

from __future__ import annotations

import torch


def gathered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_prob: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over sampled rows: the softmax of `q . k * scale - log_prob`.

    A row that was sampled with probability u counts 1 / u times, so numerator and denominator
    are unbiased estimates of those over all rows (MagicPIG, arXiv:2410.16179, eq. 5-7).

    Args:
        q: [G, D]; k, v: [R, D], the sampled rows; a row that is given twice counts twice.
        log_prob: [R], natural logarithm of each row's inclusion probability; None: all ones.

    Returns:
        out [G, D] and lse [G] (natural logarithm). Without rows: out 0, lse -inf.
    """
    logits = (q @ k.T) * scale
    if log_prob is not None:
        logits = logits - log_prob
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse.isinf(), 0.0)[:, None])
    return weights @ v, lse


def mean_direction(q: torch.Tensor) -> torch.Tensor:
    """The unit vector along the mean of the unit queries: [..., G, D] -> [..., D]; 0 for 0."""
    unit = torch.nn.functional.normalize(q, dim=-1, eps=1e-38)
    return torch.nn.functional.normalize(unit.sum(-2), dim=-1, eps=1e-38)


def lsh_hits(query_codes: torch.Tensor, key_codes: torch.Tensor) -> torch.Tensor:
    """In how many tables each key shares the query's bucket: [L], [L, n] -> int64 [n]."""
    return (query_codes[:, None] == key_codes).sum(0)
