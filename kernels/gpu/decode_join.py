"""How partial results of decode join: those of all splits, and one that is normalised."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _parts(
    partial_acc, partial_sum, all_slots, place, first, splits, is_row, is_d,
    ROWS: tl.constexpr, USED: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    D_PADDED: tl.constexpr,
):  # fmt: skip
    """(base [PARTS, USED], sum, weighted values [PARTS, USED, D_PADDED]) of some splits."""
    split = first + tl.arange(0, PARTS)
    r = tl.arange(0, USED)
    d = tl.arange(0, D_PADDED)
    there = (split < splits)[:, None] & is_row[None, :]
    part = (place * SPLITS + split)[:, None] * ROWS + r[None, :]
    # Other programs wrote them: .cg does not read this SM's own cache.
    base = tl.load(partial_sum + part, mask=there, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(partial_sum + all_slots + part, mask=there, other=0.0, cache_modifier=".cg")
    acc = tl.load(
        partial_acc + part[:, :, None] * D_PADDED + d[None, None, :],
        mask=there[:, :, None] & is_d[None, None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    return tl.where(total > 0, base, float("-inf")), total, acc


@triton.jit
def _join_splits(
    partial_acc, partial_sum, all_slots, place, splits, is_row, scale_log2, is_d,
    ROWS: tl.constexpr, USED: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    D_PADDED: tl.constexpr,
):  # fmt: skip
    """(base, sum, weighted values) of the rows over all splits.

    Of the ROWS of a part only the first USED hold any; is_row [USED]. Twice PARTS splits are read
    at once, and join PARTS results that have bases of their own until the end. One program does
    this while the others of its sequence are done, so that what it costs is how often it waits for
    reads, about 0.5 us each on an H100.
    """
    bases = tl.full([PARTS, USED], float("-inf"), tl.float32)
    totals = tl.zeros([PARTS, USED], tl.float32)
    accs = tl.zeros([PARTS, USED, D_PADDED], tl.float32)
    for first in tl.range(0, splits, 2 * PARTS):
        base, total, acc = _parts(
            partial_acc, partial_sum, all_slots, place, first, splits, is_row, is_d, ROWS, USED,
            SPLITS, PARTS, D_PADDED,
        )  # fmt: skip
        base2, total2, acc2 = _parts(
            partial_acc, partial_sum, all_slots, place, first + PARTS, splits, is_row, is_d, ROWS,
            USED, SPLITS, PARTS, D_PADDED,
        )  # fmt: skip
        top = tl.maximum(bases, tl.maximum(base, base2))
        finite = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.math.exp2((bases - finite) * scale_log2)
        weight = tl.math.exp2((base - finite) * scale_log2)
        weight2 = tl.math.exp2((base2 - finite) * scale_log2)
        totals = totals * shrink + total * weight + total2 * weight2
        accs = accs * shrink[:, :, None] + acc * weight[:, :, None] + acc2 * weight2[:, :, None]
        bases = top
    base = tl.max(bases, 0)
    finite = tl.where(base == float("-inf"), 0.0, base)
    weight = tl.math.exp2((bases - finite[None, :]) * scale_log2)
    total = tl.sum(totals * weight, 0)
    acc = tl.sum(accs * weight[:, :, None], 0)
    # The rows that are used, again and again.
    base = tl.reshape(tl.broadcast_to(base[None, :], [ROWS // USED, USED]), [ROWS])
    total = tl.reshape(tl.broadcast_to(total[None, :], [ROWS // USED, USED]), [ROWS])
    acc = tl.broadcast_to(acc[None, :, :], [ROWS // USED, USED, D_PADDED])
    return base, total, tl.reshape(acc, [ROWS, D_PADDED])


@triton.jit
def _join(base, total, acc, other_lse, other_out, scale_log2):
    """Add a part that is normalised: its lse [M], in the unit of the base, and out [M, D]."""
    own = tl.where(total > 0, base, float("-inf"))
    top = tl.maximum(own, other_lse)
    finite = tl.where(top == float("-inf"), 0.0, top)
    mine = tl.math.exp2((own - finite) * scale_log2)
    its = tl.math.exp2((other_lse - finite) * scale_log2)
    return finite, total * mine + its, acc * mine[:, None] + other_out * its[:, None]
