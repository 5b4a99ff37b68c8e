"""Prefixes that sequences share: found on the GPU as on the CPU, and read once."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, make_case
from gpu_cases import ANY_DTYPE, BFLOAT16, FLOAT16, FLOAT32, caches_to_device, to_device
from regimes import HUGE, REGIMES, count_outside, regime_case
from sharing import batch, random_batch, share_pages

from vllm_sparse.kernels import shared_prefix as on_host
from vllm_sparse.kernels.gpu import paged_decode as module
from vllm_sparse.kernels.gpu.paged_decode import Workspace, members_of, paged_decode
from vllm_sparse.kernels.gpu.shared_prefix import Room, shared_prefixes

MODES = ["online", "lazy", "unified"]
HEADS, KV_HEADS, SIZE, PAGE = 4, 2, 64, 16
MEMBERS = members_of(HEADS // KV_HEADS, SIZE, 2)


def assert_as_on_the_cpu(given, page: int, members: int, into=None) -> on_host.SharedPrefixes:
    options = {"page": page, "members": members, "fewest": 64}
    want = on_host.shared_prefixes(*given, **options)
    got = shared_prefixes(*map(to_device, given), **options, into=into)
    for name in ("keys", "tile_keys", "members"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    return want


@pytest.mark.parametrize("page", [16, 128])
def test_found_as_on_the_cpu(page):
    shared = 0
    for seed in range(12):
        for seqs in (2, 3, 11, 40):
            given = random_batch(seqs, page, seed)
            want = assert_as_on_the_cpu(given, page, members=(4, 16)[seed % 2])
            shared += int((want.keys > 0).sum())
    assert shared > 200


def test_long_prefixes_and_more_of_them_than_there_is_room_for():
    assert_as_on_the_cpu(batch([(0, 5000 // PAGE, 6000)] * 3), PAGE, 4)
    assert_as_on_the_cpu(batch([(i // 2, 8, 200) for i in range(34)]), PAGE, 16)
    assert_as_on_the_cpu(batch([(0, 8, 200)]), PAGE, 16)


def test_room_is_kept_from_step_to_step():
    """Nothing of a step is left for the next one, at the same address."""
    device = to_device(torch.zeros(1)).device
    room = Room(40, 16, device)
    at = room.of(8).members.data_ptr()
    for seed, seqs in enumerate((40, 8, 3, 33, 8, 1)):
        assert_as_on_the_cpu(random_batch(seqs, PAGE, seed), PAGE, 16, room)
    assert room.of(8).members.data_ptr() == at


@pytest.fixture(params=[100, 10000], ids=["few-programs", "many-programs"])
def programs(request, monkeypatch):
    """A device so small or so large that sequences are split otherwise."""
    monkeypatch.setattr(module, "_slots", lambda *args: request.param)


def run(case, softmax="online", phi=0.0, fewest=64, **more):
    """(out, lse), the rows that were computed again, and the keys that were shared."""
    on = caches_to_device(case)
    where = (on.block_table, on.query_start_loc, on.seq_lens)
    heads, size = case.q.shape[1:]
    members = members_of(heads // case.k_cache.shape[1], size, max(case.query_lens))
    shared = shared_prefixes(*where, page=case.k_cache.shape[2], members=members, fewest=fewest)
    flagged = to_device(torch.zeros(1, dtype=torch.int64))
    if softmax == "unified":
        phi = phi if isinstance(phi, torch.Tensor) else torch.full((heads,), phi)
        more["phi"] = to_device(phi)
    out = torch.full_like(on.q, torch.nan)
    # Of a sequence that shares nothing, nothing is read here.
    got = paged_decode(
        on.q, on.k_cache, on.v_cache, on.block_table, on.seq_lens, scale=on.scale, out=out,
        softmax=softmax, flagged=flagged, query_start_loc=on.query_start_loc,
        max_query_len=max(case.query_lens), shared=shared, **more,
    )  # fmt: skip
    return (got[0].cpu(), got[1].cpu()), int(flagged), shared.keys.tolist()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("softmax", MODES)
def test_two_prefixes_and_a_stranger(softmax, dtype, programs):
    case = make_case([1, 2, 1, 2, 1], [300, 290, 217, 500, 260], dtype=dtype)
    share_pages(case, 0, [2], 13)
    share_pages(case, 1, [4], 16)
    got, flagged, keys = run(case, softmax)
    assert keys == [192, 256, 192, 0, 256]
    assert_close(case, None, got)
    assert flagged == 0


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "seqs"),
    [(4, 4, 64, 6), (8, 2, 128, 19), (5, 1, 80, 9), (6, 1, 96, 5), (4, 2, 256, 18), (16, 1, 64, 5)],
)
def test_shapes(heads, kv_heads, size, seqs):
    """Tiles with and without room to spare, head sizes that are padded, and groups of 5."""
    lens = [130 + 3 * i for i in range(seqs)]
    case = make_case(
        [1] * seqs, lens, heads=heads, kv_heads=kv_heads, head_size=size, dtype=ANY_DTYPE
    )
    share_pages(case, 0, list(range(1, seqs)), 8)
    got, _, keys = run(case)
    most = members_of(heads // kv_heads, size)
    assert keys == [128] * (seqs if seqs % most != 1 else seqs - 1) + [0] * (seqs % most == 1)
    assert_close(case, None, got)


def test_padding_and_unwritten_rows():
    """A graph's batch is padded with sequences of no rows; NaN lies wherever nothing is written."""
    case = make_case([1, 1, 0, 0], [200, 210, 0, 0], dtype=ANY_DTYPE)
    share_pages(case, 0, [1, 2, 3], 8)
    got, _, keys = run(case)
    assert keys == [128, 128, 0, 0]
    assert_close(case, None, got)


@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(regime):
    case = regime_case(regime, [1] * 3, [150, 200, 90], dtype=ANY_DTYPE)
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


def test_rows_that_leave_phi_in_one_part_only(programs):
    """In the shared part or after it: exact all the same, and counted once."""
    case = make_case([1, 1, 1], [300, 280, 90], heads=8, kv_heads=2, seed=3, dtype=ANY_DTYPE)
    share_pages(case, 0, [1], 16)
    case.q.mul_(12.0)
    phi = torch.linspace(-80, 90, 8)
    expected = count_outside(case, phi)
    assert 0 < expected < 24
    got, flagged, keys = run(case, "unified", phi)
    assert keys == [256, 256, 0]
    assert_close(case, None, got, 60.0)
    assert flagged == expected


def test_sinks(programs):
    case = make_case([1, 1], [200, 260], dtype=ANY_DTYPE)
    share_pages(case, 0, [1], 10)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    plain, _, keys = run(case)
    assert keys == [128, 128]
    (out, lse), _, _ = run(case, sinks=to_device(sinks))
    want = torch.logaddexp(plain[1], sinks)
    torch.testing.assert_close(lse, want, rtol=1e-5, atol=1e-5)
    shrunk = plain[0].float() * (plain[1] - want).exp()[..., None]
    torch.testing.assert_close(out.float(), shrunk, rtol=2e-3, atol=2e-3)


def test_a_workspace_is_left_clean(programs):
    workspace = Workspace()
    for lens in ([900, 930, 30], [1500, 700, 705], [64, 64, 64]):
        case = make_case([1] * 3, lens, dtype=ANY_DTYPE)
        share_pages(case, 1, [2], max(lens[1] // PAGE - 8, 0))
        assert_close(case, None, run(case, workspace=workspace)[0])
        assert not workspace._arrivals.any()


def test_the_shared_keys_are_read_once(monkeypatch):
    """The launch over sequences begins where the shared keys end: it never asks for their pages."""
    case = make_case([1, 1, 1], [300, 310, 320], dtype=ANY_DTYPE)
    share_pages(case, 0, [1, 2], 16)
    want, _, keys = run(case)
    assert keys == [256] * 3
    assert_close(case, None, want)
    # Only the first of a tile lends its pages: the others' can be anything.
    real = shared_prefixes

    def then_break_the_tables(table, *args, **more):
        found = real(table, *args, **more)
        table[1:, :16] = table[0, 16]
        return found

    monkeypatch.setitem(run.__globals__, "shared_prefixes", then_break_the_tables)
    got, _, _ = run(case)
    assert torch.equal(got[0], want[0])


def test_a_window_shares_nothing():
    case = make_case([1, 1], [200, 210], dtype=ANY_DTYPE)
    with pytest.raises(ValueError, match="only where there is no window"):
        run(case, window=64)
