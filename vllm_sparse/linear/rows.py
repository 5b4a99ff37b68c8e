"""A layer's inputs of any shape, as rows."""

from __future__ import annotations

from collections.abc import Callable

import torch


def by_rows(x: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `multiply` makes of [M, K], whose rows are whole in memory, for x [..., K]."""
    rows = x.reshape(-1, x.shape[-1])
    out = multiply(rows if rows.stride(-1) == 1 else rows.contiguous())
    return out.view(*x.shape[:-1], out.shape[-1])
