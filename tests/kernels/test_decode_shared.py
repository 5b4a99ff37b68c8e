"""Decode of sequences that begin with the same pages, which the native kernel reads once."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, make_case
from regimes import HUGE, REGIMES, count_outside, regime_case
from sharing import share_pages
from test_prefill import DTYPES

from vllm_sparse.kernels import cpu, paged_decode, shared_prefixes

MODES = ["online", "lazy", "unified"]

pytestmark = pytest.mark.skipif(cpu.isa() == "torch", reason="the native extension is not built")


def run(case, softmax="online", phi=0.0, fewest=64, members=16):
    """(out, lse), the rows that were computed again, and the keys that were shared."""
    shared = shared_prefixes(
        case.block_table, None, case.seq_lens, page=case.k_cache.shape[2], fewest=fewest,
        members=members,
    )  # fmt: skip
    flagged = torch.zeros(1, dtype=torch.int64)
    if softmax == "unified" and not isinstance(phi, torch.Tensor):
        phi = torch.full((case.q.shape[1],), phi)
    got = paged_decode(
        case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, scale=case.scale,
        out=torch.full_like(case.q, torch.nan), softmax=softmax,
        phi=phi if softmax == "unified" else None, flagged=flagged, shared=shared,
    )  # fmt: skip
    return got, int(flagged), shared.keys.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softmax", MODES)
def test_two_prefixes_and_a_stranger(isa, softmax, dtype):
    case = make_case([1] * 5, [300, 290, 217, 500, 260], dtype=dtype)
    share_pages(case, 0, [2], 13)
    share_pages(case, 1, [4], 16)
    got, flagged, keys = run(case, softmax)
    assert keys == [192, 256, 192, 0, 256]
    assert_close(case, None, got)
    assert flagged == 0


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "page", "seqs"),
    [(4, 4, 64, 16, 6), (8, 2, 128, 128, 19), (5, 1, 80, 48, 9), (7, 1, 256, 64, 16)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_shapes(heads, kv_heads, size, page, seqs, threads):
    lens = [2 * page + 137 + 3 * i for i in range(seqs)]
    case = make_case([1] * seqs, lens, heads=heads, kv_heads=kv_heads, head_size=size, page=page)
    share_pages(case, 0, list(range(1, seqs)), 2 + 128 // page)
    try:
        cpu.set_threads(threads)
        got, _, keys = run(case)
    finally:
        cpu.set_threads(1)
    assert min(keys) >= 64
    assert_close(case, None, got)


@pytest.mark.parametrize("threads", [1, 3])
def test_long_prefixes_are_cut_for_threads(threads):
    case = make_case([1] * 4, [9000, 9100, 8800, 40], heads=8, kv_heads=2)
    share_pages(case, 0, [1, 2], 8700 // 16)
    try:
        cpu.set_threads(threads)
        got, _, keys = run(case, "unified", fewest=512)
    finally:
        cpu.set_threads(1)
    assert keys == [8640] * 3 + [0]
    assert_close(case, None, got)


@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(isa, regime):
    case = regime_case(regime, [1] * 3, [150, 200, 90])
    share_pages(case, 0, [1], 8)
    logits = HUGE if "huge" in regime else 0.0
    for softmax, phi in (("online", 0.0), ("lazy", 0.0), ("unified", REGIMES[regime])):
        got, flagged, keys = run(case, softmax, phi)
        assert keys == [128, 128, 0]
        assert_close(case, None, got, logits)
        assert flagged == 0
    got, flagged, _ = run(case, "unified", -1e6)
    assert_close(case, None, got, logits)
    assert flagged == case.q.shape[1] * 3


@pytest.mark.parametrize("pages", [16, 130])
def test_rows_that_leave_phi_are_exact_and_counted_once(isa, pages):
    """One sequence of a tile is computed again where another is not; after 1,024 keys too."""
    lens = [16 * pages + 44, 16 * pages + 24, 90]
    case = make_case([1] * 3, lens, heads=8, kv_heads=2, seed=3)
    share_pages(case, 0, [1], pages)
    case.q[0].mul_(12.0)
    phi = torch.linspace(-80, 90, 8)
    expected = count_outside(case, phi)
    assert 0 < expected < 24
    got, flagged, keys = run(case, "unified", phi)
    assert keys == [16 * pages // 64 * 64] * 2 + [0]
    assert_close(case, None, got, 60.0)
    assert flagged == expected


def test_the_shared_keys_are_read_through_the_first_of_a_tile():
    case = make_case([1] * 3, [300, 310, 320])
    share_pages(case, 0, [1, 2], 16)
    shared = shared_prefixes(case.block_table, None, case.seq_lens, page=16, fewest=64)
    assert shared.keys.tolist() == [256] * 3
    given = (case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens)
    want = paged_decode(*given, scale=case.scale, shared=shared)
    assert_close(case, None, want)
    case.block_table[1:, :16] = case.block_table[0, 16]  # what only a second reading would see
    got = paged_decode(*given, scale=case.scale, shared=shared)
    assert torch.equal(got[0], want[0])


def broken(name):
    case = make_case([1] * 3, [300, 310, 320])
    share_pages(case, 0, [1], 16)
    shared = shared_prefixes(case.block_table, None, case.seq_lens, page=16, fewest=64)
    if name == "of another batch":
        case = make_case([1] * 2, [300, 310])
    elif name == "a tile's keys":
        shared.tile_keys[0] = 128
    elif name == "a sequence twice":
        shared.members[1, :2] = torch.tensor([0, 2])
        shared.tile_keys[1] = 64
    elif name == "a sequence beyond the batch":
        shared.members[0, 1] = 3
    elif name == "more keys than there are":
        case.seq_lens[0] = 200
    return case, shared


@pytest.mark.parametrize(
    "name",
    [
        "of another batch", "a tile's keys", "a sequence twice", "a sequence beyond the batch",
        "more keys than there are",
    ],
)  # fmt: skip
def test_what_does_not_fit_the_batch_is_refused(name):
    case, shared = broken(name)
    with pytest.raises(ValueError, match="shared_prefixes of the same batch"):
        paged_decode(
            case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens,
            scale=case.scale, shared=shared,
        )  # fmt: skip
