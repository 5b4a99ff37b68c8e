"""Which keys a tile reads and which blocks it leaves out, in plain torch, for `reference`."""

from __future__ import annotations

import math

import torch

from .block_indices import BLOCK, BlockIndices


def check_window(mean_correction: bool, window: int | None) -> None:
    """Raises ValueError where mean correction is asked for beside a window."""
    if mean_correction and window is not None:
        raise ValueError(
            f"mean_correction: given with a window of {window}; keys before a window are not left "
            "out but unseen, leave one of the two out"
        )


def selected(
    indices: BlockIndices | None, row: int, seq_len: int, device: torch.device
) -> torch.Tensor:
    """int64 positions that list row `row` selects, within the sequence."""
    if indices is None:
        return torch.arange(seq_len, device=device)
    first, last = indices.block_offsets[row : row + 2].tolist()
    blocks = indices.blocks[first:last].long()
    blocks = blocks[(blocks >= 0) & (blocks * BLOCK < seq_len)]
    keys = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten()
    first, last = indices.column_offsets[row : row + 2].tolist()
    keys = torch.cat([keys, indices.columns[first:last].long()])
    return keys[(keys >= 0) & (keys < seq_len)]


def attend_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    first_query: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean correction of one head's tile: the blocks that it leaves out, by their means, in fp32.

    Of block b let R be the keys that the tile does not read, n how many they are, and k', v' the
    means of their keys and values. They take part in the softmax of query q as n keys k' with the
    values v', so with the weight n exp(scale q.k') in its numerator and denominator, where exact
    attention has the sum of exp(scale q.k) over R. As exp is convex, the former is never more
    than the latter: a corrected lse lies between the uncorrected and the exact one.

    Only blocks count that lie wholly at or before the tile's first query, of which every row of
    the tile sees every key. Of later ones, nothing is added: the selections that planners make hold
    them, and a mean of keys of which a row may see but a part is no mean of what it sees.

    Source: FlashPrefill V2 (github.com/qhfan/FlashPrefillv2), whose selections know no single
    columns, so that R is the whole block there.

    Args:
        q: [M, D], the tile's rows; k, v: [N, D], the sequence's keys and values.
        keys: int64 positions that the tile reads, as `selected` gives them.
        first_query: position of the tile's first row.
        scale: factor on the logits.

    Returns:
        out [M, D] and lse [M], to be merged with those of the keys that are read; 0 and -inf
        where no block is left out.
    """
    blocks = (first_query + 1) // BLOCK
    rest = torch.ones(len(k), dtype=torch.bool, device=q.device)
    rest[keys] = False
    rest = rest[: blocks * BLOCK].view(blocks, BLOCK, 1)
    count = rest.sum(1)  # [blocks, 1]
    some = count[:, 0] > 0
    if not some.any():
        return torch.zeros_like(q, dtype=torch.float32), q.new_full(
            (len(q),), -math.inf, dtype=torch.float32
        )
    mean_k, mean_v = (
        (
            x[: blocks * BLOCK].float().view(blocks, BLOCK, -1).masked_fill(~rest, 0.0).sum(1)
            / count
        )[some]
        for x in (k, v)
    )
    # fp64 products, as in `reference.attend`.
    scores = (q.double() @ mean_k.double().T).float() * scale + count[some, 0].log()
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse[:, None]) @ mean_v, lse
