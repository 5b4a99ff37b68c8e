"""SimHash: sign bits of random projections, and how likely keys are to share buckets with a query.

A table's code is K sign bits. A key whose cosine with the query is c agrees with it in one bit
with probability p = 1 - acos(c) / pi (Charikar 2002), in a table with p^K, and in at least two of
L tables with u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1) (MagicPIG, arXiv:2410.16179, sec. 4).
"""

from __future__ import annotations

import functools
import math

import torch

ROWS = 8192  # keys that are projected at a time
INCLUSION_STEPS = 4096  # of the table of ln u; kInclusionSteps in csrc/gather.h
LEAST_PROBABILITY = 1e-30  # in place of 0, at a cosine of -1: such a key is never sampled


@functools.lru_cache(maxsize=8)  # one is 188 KB at head size 128
def directions(head_size: int, bits: int, tables: int, seed: int) -> torch.Tensor:
    """fp32 [D, L * K] standard normal; column t * K + k decides bit k of table t."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(head_size, tables * bits, generator=generator, dtype=torch.float32)


def hash_vectors(x: torch.Tensor, directions: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of vectors, on their own device: [H, n, D] -> int16 [H, L, n], K bits from bit 0 on."""
    powers = 2.0 ** torch.arange(bits, device=x.device, dtype=torch.float32)
    directions = directions.to(x.device)
    tables = directions.shape[1] // bits
    codes = torch.empty(x.shape[0], tables, x.shape[1], dtype=torch.int16, device=x.device)
    for first in range(0, x.shape[1], ROWS):
        part = x[:, first : first + ROWS].float()
        signs = (part @ directions > 0).float().unflatten(-1, (tables, bits))
        # Codes of 16 bits would not fit a signed short; there are at most 15.
        codes[:, :, first : first + ROWS] = (signs @ powers).to(torch.int16).transpose(1, 2)
    return codes


def inclusion_probability(cosine: torch.Tensor, bits: int, tables: int) -> torch.Tensor:
    """u of keys at these cosines, in float64: at least two of L tables of K bits collide."""
    p = 1 - torch.acos(cosine.double().clamp(-1, 1)) / math.pi
    x = p**bits
    u = 1 - (1 - x) ** tables - tables * x * (1 - x) ** (tables - 1)
    # The difference loses its digits where it is small; there it is all but its first two terms.
    pairs = tables * (tables - 1) / 2
    small = pairs * x**2 * (1 - 2 * (tables - 2) * x / 3)
    return torch.where(tables * x < 1e-4, small, u)


@functools.cache
def log_inclusion_table(bits: int, tables: int) -> torch.Tensor:
    """fp32 ln u at INCLUSION_STEPS + 1 even steps of the cosine from -1 to 1.

    Linear between them, the error of u stays below 0.1% wherever u is above 1e-7.
    """
    cosine = torch.linspace(-1, 1, INCLUSION_STEPS + 1, dtype=torch.float64)
    u = inclusion_probability(cosine, bits, tables)
    return u.clamp(min=LEAST_PROBABILITY).log().float()
