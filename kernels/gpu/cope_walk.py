"""A walk over keys from the last to the first, which is how contextual positions (CoPE) are summed.

Per row it carries the sum of gates of the keys that came, those to the right. Once this reaches the
last position, every key that is left stands there, and attention goes on as any other's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_sums import _rows_of_keys


@triton.jit
def _gates(product, see, scale_log2):
    """Sigmoid of the logits; 0 for keys that are not seen."""
    return tl.where(see, 1.0 / (1.0 + tl.math.exp2(-product * scale_log2)), 0.0)


@triton.jit
def _sums_to_the_right(gates, ones):
    """Of gates [M, N] those from each key to the last: fp32 [M, N].

    A product with `ones` [N, N], which are there from the diagonal down. It stays where the logits
    are: a scan would have them put through shared memory, and each row's numbers in a whole warp.
    """
    if ones.dtype == tl.float32:
        return tl.dot(gates, ones, input_precision="ieee")
    # Two halves of fp16 hold 22 bits of a gate.
    high = gates.to(tl.float16)
    low = (gates - high.to(tl.float32)).to(tl.float16)
    return tl.dot(low, ones, tl.dot(high, ones))


@triton.jit
def _at_positions(gates, carry, z, z_row, last, ones):
    """What the positions of a tile of keys add to the products: fp32 [M, N].

    The rows' products with the table are at z + z_row [M]; the last position is `last`, and the
    product that follows is the same once more.
    """
    position = carry[:, None] + _sums_to_the_right(gates, ones)
    # Written so that a NaN goes to the last position, too: its row is in the table.
    position = tl.where(position < last, position, last)
    below = position.to(tl.int32)
    share = position - below.to(tl.float32)
    # Widened last, so that half as many bytes go from the logits' layout to that of loads.
    at = z + (z_row[:, None] + below).to(tl.int64)
    at_below = tl.load(at)
    at_above = tl.load(at + 1)
    return at_below * (1.0 - share) + at_above * share


@triton.jit
def _walk(
    q_tile, z, z_row, counts, carry, last, k_base, v_base, table, kv_page, kv_row, position,
    seen_by_all, first_tile, end_tile, seq_len, scale_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    PAGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(top, sum, weighted values) of the rows of q_tile [M, D] over some tiles of keys.

    Tops are in the unit of q . k, as z is. `counts` [M] are the rows that are there and see any
    key, `carry` [M] their gates to the right of these tiles; keys below `seen_by_all` are seen by
    all of them.
    """
    n = tl.arange(0, KEYS)
    d = tl.arange(0, D_PADDED)
    is_d = d < D
    # Before the loop, or registers hold them through it.
    ones = tl.where(n[:, None] >= n[None, :], 1.0, 0.0)
    ones = ones.to(tl.float32 if q_tile.dtype == tl.float32 else tl.float16)
    z_last = tl.load(z + z_row + last.to(tl.int32), mask=counts, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PADDED], tl.float32)
    lost = tl.zeros([ROWS], tl.float32)
    # Where a step's keys lie is looked up during the step before.
    key = (end_tile - 1) * KEYS + n
    at = _rows_of_keys(key, (key >= 0) & (key < seq_len), table, kv_page, kv_row, PAGE)
    for step in tl.range(0, end_tile - first_tile, num_stages=STAGES):
        start = (end_tile - 1 - step) * KEYS
        key = start + n
        inside = key < seq_len
        see_k, see_v = inside[None, :], inside[:, None]
        if D != D_PADDED:
            see_k, see_v = see_k & is_d[:, None], see_v & is_d[None, :]
        k = tl.load(k_base + at[None, :] + d[:, None], mask=see_k, other=0.0)
        v = tl.load(v_base + at[:, None] + d[None, :], mask=see_v, other=0.0)
        at = _rows_of_keys(key - KEYS, key >= KEYS, table, kv_page, kv_row, PAGE)
        moves = tl.max((counts & (carry < last)).to(tl.int32), 0)
        if (moves > 0) | (start + KEYS > seen_by_all):
            see = counts[:, None] & (key[None, :] <= position[:, None])
            gates = _gates(tl.dot(q_tile, k, input_precision="ieee"), see, scale_log2)
            added = _at_positions(gates, carry, z, z_row, last, ones)
            added = tl.where(see, added, float("-inf"))
            # With what the last sum rounded away (Kahan): little gates are many.
            more = tl.sum(gates, 1) - lost
            grown = carry + more
            lost = (grown - carry) - more
            carry = grown
        else:
            added = tl.broadcast_to(z_last[:, None], [ROWS, KEYS])
        # Once more where there were gates, as the product is not kept beside what positions take.
        logit = tl.dot(q_tile, k, added, input_precision="ieee")
        new_top = tl.maximum(top, tl.max(logit, 1))
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, -inf - -inf would be NaN.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2((logit - finite[:, None]) * scale_log2)
        shrink = tl.math.exp2((top - finite) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc
