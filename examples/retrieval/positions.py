"""What a head can make of RoPE: which pairs turn, and attention that depends on distance alone.

A head's dimensions form pairs (i, i + HEAD_DIM / 2), and pair i turns by ROPE_THETA^(-2i/HEAD_DIM)
radians per position. The base is huge, so the first FAST_PAIRS pairs tell positions apart at every
scale up to 128K tokens, and the others stay within a third of a radian over that whole length:
these carry content. With a constant key on the fast pairs, a query of amplitude a_i and phase
-theta_i * d gives the logit sum_i a_i cos(theta_i (distance - d)).
"""

from __future__ import annotations

import math

import torch

HEAD_DIM = 128
HALF = HEAD_DIM // 2
ROPE_THETA = 1e18
FAST_PAIRS = 20

THETA = ROPE_THETA ** (-torch.arange(FAST_PAIRS, dtype=torch.float64) / HALF)


def phases(distance: int) -> torch.Tensor:
    """cos and sin of every fast pair's turn over `distance` tokens: [2 * FAST_PAIRS]."""
    angle = THETA * distance
    return torch.cat([angle.cos(), angle.sin()]).float()


def sharp() -> torch.Tensor:
    """Amplitudes [FAST_PAIRS] that put more than 99% of the mass on one distance, up to 128K.

    The fastest pairs tell a distance from its neighbours, the slower ones from what is far away.
    """
    amplitude = torch.full((FAST_PAIRS,), 2.5)
    amplitude[:5] = torch.tensor([12.0, 8.0, 4.0, 3.0, 3.0])
    return amplitude


def recency(width: float, steepness: float = 3.0) -> torch.Tensor:
    """Amplitudes [FAST_PAIRS] of a logit that is flat over `width` tokens and then falls.

    Beyond the width it falls by about `steepness` for every doubling (more exactly, factor 1.9).
    """
    return torch.where(width * THETA <= 1, steepness, 0.0).float()


def log_mass(amplitude: torch.Tensor, length: int = 16384) -> float:
    """log sum over distances below `length` of exp(logit), for amplitudes [FAST_PAIRS]."""
    turn = torch.arange(length, dtype=torch.float64)[:, None] * THETA
    return float((turn.cos() @ amplitude.double()).logsumexp(0))


def odds(share: float) -> float:
    """log of share / (1 - share)."""
    return math.log(share / (1 - share))
