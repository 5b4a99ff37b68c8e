"""The three softmax modes of decode: equal results over all kinds of logits, and a guard that
fires exactly where it should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import assert_close, make_case, oracle
from regimes import FITS_ZERO, HUGE, REGIMES, count_outside, regime_case
from test_decode import decode  # noqa: F401  (a fixture)
from test_prefill import DTYPES

from vllm_sparse.kernels import cpu, reference, softmax_modes

LENS = [1, 63, 64, 65, 111, 2000]


def run(decode, case, softmax: str, phi: float | torch.Tensor | None = None):  # noqa: F811
    """(out, lse) and the number of rows that were computed again."""
    out = torch.full_like(case.q, torch.nan)
    flagged = torch.zeros(1, dtype=torch.int64)
    if isinstance(phi, float):
        phi = torch.full((case.q.shape[1],), phi)
    got = decode(
        case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, scale=case.scale,
        out=out, softmax=softmax, phi=phi, flagged=flagged,
    )  # fmt: skip
    assert not got[0].isnan().any()
    assert not got[1].isnan().any()
    return got, int(flagged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(decode, regime, dtype):  # noqa: F811
    case = regime_case(regime, [1] * len(LENS), LENS, dtype=dtype)
    logits = HUGE if "huge" in regime else 0.0
    for softmax, phi in (("online", None), ("lazy", None), ("unified", REGIMES[regime])):
        online, flagged = run(decode, case, softmax, phi)
        assert_close(case, None, online, logits)
        assert flagged == 0, softmax
    # A phi that does not fit is counted for every row, and changes nothing.
    everyone = case.q.shape[1] * len(LENS)
    largest = float(case.v_cache.float().nan_to_num().abs().max())
    rounding = {"rtol": 0, "atol": 2 * torch.finfo(dtype).eps * largest}
    for phi in (0.0, 1e6, -1e6):
        got, flagged = run(decode, case, "unified", phi)
        assert flagged == (0 if phi == 0.0 and regime in FITS_ZERO else everyone), phi
        torch.testing.assert_close(got[0], online[0], **rounding)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("spread", [1.0, 12.0, 30.0])
def test_the_guard_fires_exactly_where_it_should(decode, spread, threads):  # noqa: F811
    """Over heads whose phi lies anywhere, also where the keys are split over threads."""
    case = make_case([1] * 4, [1, 80, 3000, 9000], heads=8, kv_heads=2, seed=3)
    case.q.mul_(spread)
    phi = torch.linspace(-80, 90, 8)
    expected = count_outside(case, phi)
    assert 0 < expected < 32
    cpu.set_threads(threads)
    try:
        got, flagged = run(decode, case, "unified", phi)
    finally:
        cpu.set_threads(1)
    assert_close(case, None, got, 8 * spread)
    assert flagged == expected


def test_one_row_that_leaves_is_one_that_is_counted(decode):  # noqa: F811
    case = regime_case("normal", [1, 1], [500, 700])
    case.q[1, 3, 0] = 40.0  # head 3 of sequence 1: its highest logit is over 48
    got, flagged = run(decode, case, "unified", 0.0)
    assert_close(case, None, got, 200.0)
    assert flagged == 1
    run(decode, case, "unified", 0.0)


def test_a_part_that_vanishes_is_no_reason_to_flag():
    """Half of the keys far below phi and half inside: the row's own sum is what counts."""
    case = regime_case("normal", [1], [8192])
    pages = case.block_table[0][:256].long()
    case.k_cache[pages, :, :, 0] = -400.0
    cpu.set_threads(3)
    try:
        got, flagged = run(cpu.paged_decode, case, "unified", 0.0)
    finally:
        cpu.set_threads(1)
    assert_close(case, None, got, 400.0)
    assert flagged == 0


def test_a_sequence_without_keys_is_not_flagged(decode):  # noqa: F811
    case = make_case([1, 1], [5, 40])
    case.seq_lens[0] = 0
    (out, lse), flagged = run(decode, case, "unified", 0.0)
    assert flagged == 0
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()


def test_the_count_is_added_to_what_was_there(decode):  # noqa: F811
    case = make_case([1], [40])
    flagged = torch.tensor([7])
    decode(
        case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, scale=case.scale,
        softmax="unified", phi=torch.full((4,), 1e6), flagged=flagged,
    )  # fmt: skip
    assert int(flagged) == 7 + 4


@pytest.mark.parametrize("softmax", softmax_modes.MODES)
def test_several_queries_windows_and_sinks(softmax):
    """The reference alone: what the GPU kernel is held to."""
    case = make_case([3, 1, 8], [100, 5, 300])
    phi = torch.zeros(4) if softmax == "unified" else None
    options = {"softmax": softmax, "phi": phi, "query_start_loc": case.query_start_loc}
    args = (case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens)
    out, lse = reference.paged_decode(*args, scale=case.scale, **options)
    assert_close(case, None, (out, lse))
    sinks = torch.tensor([0.0, 3.0, -50.0, 9.0])
    with_sinks = reference.paged_decode(*args, scale=case.scale, sinks=sinks, **options)
    weight = torch.sigmoid(lse - sinks)[..., None]
    torch.testing.assert_close(with_sinks[0], out * weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(with_sinks[1], torch.logaddexp(lse, sinks.expand_as(lse)))
    window = 20
    windowed, _ = reference.paged_decode(*args, scale=case.scale, window=window, **options)
    for s, (m, n) in enumerate(zip(case.query_lens, case.seq_lens.tolist(), strict=True)):
        k = reference.gather_keys(case.k_cache, case.block_table[s], n)
        v = reference.gather_keys(case.v_cache, case.block_table[s], n)
        for i in range(m):
            row, last = int(case.query_start_loc[s]) + i, n - m + i + 1
            keys = slice(max(0, last - window), last)
            want, _ = reference.attend(
                case.q[row, 1][None], k[0, keys], v[0, keys], None, case.scale
            )
            torch.testing.assert_close(windowed[row, 1], want[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"softmax": "fast"}, "softmax: got 'fast'; allowed: online, lazy, unified"),
        ({"softmax": "unified", "phi": None}, "phi: missing with softmax 'unified'"),
        ({"softmax": "online"}, "phi: given with softmax 'online'"),
        ({"phi": torch.zeros(3)}, "one entry for each of the 4 query heads"),
        ({"phi": torch.zeros(4, dtype=torch.float64)}, "must be float32"),
    ],
)
def test_what_does_not_fit_is_an_error(decode, change, message):  # noqa: F811
    case = make_case([1], [40])
    options = {"softmax": "unified", "phi": torch.zeros(4), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        decode(
            case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, scale=1.0,
            **options,
        )  # fmt: skip


def test_the_native_kernel_has_the_same_limits():
    header = Path(__file__).parents[2] / "kernels" / "csrc" / "decode_softmax.h"
    found = dict(re.findall(r"constexpr float (k\w+) = (-?[\d.]+)f;", header.read_text()))
    assert float(found["kUnifiedHigh"]) == softmax_modes.HIGH
    assert float(found["kUnifiedLow"]) == softmax_modes.LOW
    assert float(found["kLazyGrowth"]) == pytest.approx(softmax_modes.LAZY_GROWTH, rel=1e-7)


def test_the_oracle_of_the_guard_is_no_constant():
    case = make_case([1], [40])
    assert count_outside(case, torch.zeros(4)) == 0
    assert count_outside(case, torch.tensor([0.0, 1e3, 0.0, -1e3])) == 2
    assert oracle(case, None)[1].isfinite().all()
