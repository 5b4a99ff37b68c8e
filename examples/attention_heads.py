"""Queries, keys and values of one head group, of distributions that are hard in different ways."""

from __future__ import annotations

import math

import torch

KINDS = ("tail", "flat", "peaked", "needles")


def synthetic_head(
    kind: str, n: int = 8192, d: int = 64, group: int = 4, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [group, d], k [n, 1, d], v [n, 1, d] of one KV head; logits of the tail are about N(0, 1).

    The group's queries have a cosine of 0.8 with each other, keys an offset that centring takes
    away, as in trained models. Kinds:

    * tail: half of the mass on 1/1000 of the keys, half on all others, whose values have a common
      part. What few keys hold says nothing of the rest.
    * flat: no key stands out, and values have a common part.
    * peaked: nearly all mass on 1/1000 of the keys.
    * needles: nearly all mass on 4 keys.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    base = torch.nn.functional.normalize(normal(d), dim=0)
    side = normal(group, d)
    side = torch.nn.functional.normalize(side - (side @ base)[:, None] * base, dim=1)
    q = math.sqrt(d) * (math.sqrt(0.8) * base + math.sqrt(0.2) * side)
    k = normal(n, d) + 2 * normal(d)
    v = 0.5 * normal(n, d) + normal(d)
    many = {"tail": max(n // 1000, 1), "flat": 0, "peaked": max(n // 1000, 1), "needles": 4}[kind]
    ratio = {"tail": 1.0, "flat": 1.0, "peaked": 20.0, "needles": 50.0}[kind]
    if many:
        special = torch.randperm(n, generator=g)[:many]
        mean = (q.mean(0) @ k.T) / math.sqrt(d)
        want = torch.logsumexp(mean, 0) + math.log(ratio / many)
        along = (q.mean(0) @ base) / math.sqrt(d)
        k[special] += (want - mean[special])[:, None] / along * base
        v[special] = normal(many, d) + normal(d)
    return q, k[:, None], v[:, None]
