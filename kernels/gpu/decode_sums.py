"""The parts of the decode kernel: how many splits pay, and the sums over a range of keys in each
softmax mode."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .. import softmax_modes

_LOG2E = 1.4426950408889634
# The limits of the softmax modes, in powers of two.
HIGH = tl.constexpr(softmax_modes.HIGH * _LOG2E)
LOWEST_SUM = tl.constexpr(math.exp(softmax_modes.LOW))
GROWTH = tl.constexpr(softmax_modes.LAZY_GROWTH * _LOG2E)


@triton.jit
def _tiles_of_chunk(
    seq_lens, prefix_keys, num_seqs, window, programs_each, slots,
    SEQS: tl.constexpr, KEYS: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Tiles of KEYS keys that each split takes, such that the whole batch is done soonest.

    A wave of `slots` programs costs its tiles and about ten more to start and end; joining costs
    0.22 tiles a split. The same in every program, as all see the same lengths.
    """
    s = tl.arange(0, SEQS)
    lens = tl.load(seq_lens + s, mask=s < num_seqs, other=0)
    if PREFIX:  # read apart
        lens -= tl.load(prefix_keys + s, mask=s < num_seqs, other=0)
    tiles = tl.cdiv(tl.minimum(lens, window), KEYS)
    most = tl.max(tiles, 0).to(tl.float32)
    i = tl.arange(0, 16)
    splits = tl.ceil(tl.math.exp2(i.to(tl.float32) * 0.5))
    chunk = tl.maximum(tl.ceil(most / splits), 1.0)
    items = tl.sum(tl.ceil(tiles.to(tl.float32)[None, :] / chunk[:, None]), 1)
    waves = tl.ceil(items * programs_each / slots)
    cost = waves * (chunk + 10.0) + 0.22 * tl.ceil(most / chunk)
    best = tl.argmin(cost, 0)
    return tl.sum(tl.where(i == best, chunk, 0.0), 0).to(tl.int32)


@triton.jit
def _rows_of_keys(key, inside, table, kv_page, kv_row, PAGE: tl.constexpr):
    """Where the keys [N] of a sequence lie from their head's first: int64 [N] elements."""
    page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
    return page * kv_page + (key % PAGE).to(tl.int64) * kv_row


@triton.jit
def _sums(
    q_tile, k_base, v_base, table, kv_page, kv_row, position, first_tile, last_tile, seq_len,
    window, scale_log2, phi, is_d,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D_PADDED: tl.constexpr, PAGE: tl.constexpr, WIDE_P: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(base, highest logit, sum, weighted values) of the rows over some tiles of keys.

    Logits, bases and phi are in the unit of q . k, so that probabilities, which are
    exp2((logit - base) scale_log2), come from a difference that is exact. `phi` is the base of
    UNIFIED. The highest logit is known after UNIFIED, and after ONLINE, where it is the base.
    """
    n = tl.arange(0, KEYS)
    d = tl.arange(0, D_PADDED)
    acc = tl.zeros([ROWS, D_PADDED], tl.float32)
    base = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if MODE == 2:
        # Lane by lane until the end: nothing crosses lanes inside the loop.
        highest = tl.full([ROWS, KEYS], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS, KEYS], tl.float32)
    # Where a step's keys lie is looked up during the step before.
    key = first_tile * KEYS + n
    at = _rows_of_keys(key, key < seq_len, table, kv_page, kv_row, PAGE)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        key = tile * KEYS + n
        inside = key < seq_len
        k = tl.load(
            k_base + at[None, :] + d[:, None], mask=is_d[:, None] & inside[None, :], other=0.0
        )
        v = tl.load(
            v_base + at[:, None] + d[None, :], mask=is_d[None, :] & inside[:, None], other=0.0
        )
        at = _rows_of_keys(key + KEYS, key + KEYS < seq_len, table, kv_page, kv_row, PAGE)
        see = inside[None, :]
        if CAUSAL:
            distance = position[:, None] - key[None, :]
            see = see & (distance >= 0) & (distance < window)
        logit = tl.dot(q_tile, k.to(q_tile.dtype), input_precision="ieee")
        logit = tl.where(see, logit, float("-inf"))
        if MODE == 2:
            highest = tl.maximum(highest, logit)
            # What lies too high is cut, and seen at the end.
            p = tl.math.exp2(tl.minimum((logit - phi[:, None]) * scale_log2, HIGH))
            sums += p
        else:
            top = tl.max(logit, 1)
            if MODE == 1:
                grew = (top - base) * scale_log2 > GROWTH
                new = tl.where(grew, top, base)
            else:
                new = tl.maximum(base, top)
            # A row that has seen nothing yet: exp2(-inf - 0) is 0, -inf - -inf would be NaN.
            finite = tl.where(new == float("-inf"), 0.0, new)
            if MODE == 1:
                if tl.max(grew.to(tl.int32), 0) > 0:
                    shrink = tl.math.exp2((base - finite) * scale_log2)
                    total = total * shrink
                    acc = acc * shrink[:, None]
            else:
                shrink = tl.math.exp2((base - finite) * scale_log2)
                total = total * shrink
                acc = acc * shrink[:, None]
            base = new
            p = tl.math.exp2((logit - finite[:, None]) * scale_log2)
            total += tl.sum(p, 1)
        if WIDE_P:
            # exp(48) is beyond fp16, which tf32 holds exactly: the same digits, and fp32's range.
            acc = tl.dot(p, v.to(tl.float32), acc, input_precision="tf32")
        elif MODE == 2 and q_tile.dtype == tl.float32:
            acc = tl.dot(p, v.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(p.to(q_tile.dtype), v.to(q_tile.dtype), acc, input_precision="ieee")
    if MODE == 2:
        base = phi
        top_of = tl.max(highest, 1)
        total = tl.sum(sums, 1)
    else:
        top_of = base
    return base, top_of, total, acc
