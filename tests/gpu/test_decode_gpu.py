"""The Triton split-KV decode against fp64 softmax, in its three modes."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_close, make_case
from gpu_cases import (
    ANY_DTYPE,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HAS_GPU,
    caches_to_device,
    to_device,
)
from regimes import FITS_ZERO, HUGE, REGIMES, count_outside, regime_case

from vllm_sparse.kernels import reference
from vllm_sparse.kernels.gpu import paged_decode as module
from vllm_sparse.kernels.gpu.paged_decode import (
    Workspace,
    most_splits,
    paged_decode,
)

DTYPES = [FLOAT32, FLOAT16, BFLOAT16]
MODES = ["online", "lazy", "unified"]


def run(case: Case, softmax: str = "online", phi=None, **more):
    """(out, lse) and the number of rows that were computed again."""
    on = caches_to_device(case)
    out = torch.full_like(on.q, torch.nan)
    flagged = to_device(torch.zeros(1, dtype=torch.int64))
    if softmax == "unified":
        phi = 0.0 if phi is None else phi
        if isinstance(phi, float):
            phi = torch.full((on.q.shape[1],), phi)
        phi = to_device(phi)
    more = {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
    got = paged_decode(
        on.q, on.k_cache, on.v_cache, on.block_table, on.seq_lens, scale=on.scale, out=out,
        softmax=softmax, phi=phi, flagged=flagged, query_start_loc=on.query_start_loc,
        max_query_len=max(case.query_lens), **more,
    )  # fmt: skip
    assert got[0].data_ptr() == out.data_ptr()
    assert not got[0].isnan().any()
    assert not got[1].isnan().any()
    return (got[0].cpu(), got[1].cpu()), int(flagged)


@pytest.fixture
def few_programs(monkeypatch):
    """A device so large that short sequences are split as long ones are."""
    monkeypatch.setattr(module, "_slots", lambda *args: 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax", MODES)
def test_lengths(softmax, dtype):
    lens = [1, 63, 64, 65, 111, 400]
    case = make_case([1] * len(lens), lens, dtype=dtype)
    got, flagged = run(case, softmax)
    assert_close(case, None, got)
    assert flagged == 0


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "page"),
    [
        pytest.param(*t, id="H{}-KV{}-D{}-page{}".format(*t))
        for t in [(4, 4, 64, 16), (8, 2, 128, 128), (6, 1, 96, 32), (5, 1, 80, 48), (3, 1, 256, 64)]
    ],
)
@pytest.mark.parametrize("softmax", ["online", "unified"])
def test_shapes(heads, kv_heads, head_size, page, softmax):
    case = make_case(
        [1, 1], [40, 333], heads=heads, kv_heads=kv_heads, head_size=head_size, page=page,
        dtype=ANY_DTYPE,
    )  # fmt: skip
    assert_close(case, None, run(case, softmax)[0])


@pytest.mark.parametrize("layout", ["head-major", "token-major"])
def test_layouts(layout):
    case = make_case([1, 1], [100, 7], layout=layout, dtype=ANY_DTYPE)
    assert_close(case, None, run(case)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(regime, dtype):
    lens = [1, 65, 200]
    case = regime_case(regime, [1] * len(lens), lens, dtype=dtype)
    logits = HUGE if "huge" in regime else 0.0
    everyone = case.q.shape[1] * len(lens)
    for softmax, phi, expected in (
        ("online", None, 0),
        ("lazy", None, 0),
        ("unified", REGIMES[regime], 0),
        ("unified", 0.0 if regime not in FITS_ZERO else 1e6, everyone),
        ("unified", -1e6, everyone),
    ):
        got, flagged = run(case, softmax, phi)
        assert_close(case, None, got, logits)
        assert flagged == expected, (softmax, phi)


@pytest.mark.parametrize("slots", [1, 100, 10000])
@pytest.mark.parametrize("spread", [1.0, 12.0, 30.0])
def test_the_guard_fires_exactly_where_it_should(spread, slots, monkeypatch):
    monkeypatch.setattr(module, "_slots", lambda *args: slots)
    case = make_case([1] * 3, [1, 80, 700], heads=8, kv_heads=2, seed=3, dtype=ANY_DTYPE)
    case.q.mul_(spread)
    phi = torch.linspace(-80, 90, 8)
    expected = count_outside(case, phi)
    assert 0 < expected < 24
    got, flagged = run(case, "unified", phi)
    assert_close(case, None, got, 8 * spread)
    assert flagged == expected


def test_a_part_that_vanishes_is_no_reason_to_flag(few_programs):
    case = regime_case("normal", [1], [1024], dtype=ANY_DTYPE)
    pages = case.block_table[0][:32].long()
    case.k_cache[pages, :, :, 0] = -400.0
    got, flagged = run(case, "unified", 0.0)
    assert_close(case, None, got, 400.0)
    assert flagged == 0


@pytest.mark.parametrize("slots", [1, 100])
@pytest.mark.parametrize("softmax", MODES)
def test_several_queries_a_sequence(softmax, slots, monkeypatch):
    monkeypatch.setattr(module, "_slots", lambda *args: slots)
    case = make_case([8, 1, 3], [300, 65, 3], heads=6, kv_heads=2, dtype=ANY_DTYPE)
    assert_close(case, None, run(case, softmax)[0])


def test_more_rows_than_a_program_takes(few_programs):
    case = make_case([8, 5], [100, 200], heads=32, kv_heads=2, dtype=ANY_DTYPE)
    got, flagged = run(case, "unified", -1e6)
    assert_close(case, None, got)
    assert flagged == 13 * 32


@pytest.mark.parametrize("softmax", MODES)
@pytest.mark.parametrize("window", [1, 20, 64, 130])
def test_windows(window, softmax, few_programs):
    case = make_case([1, 4, 8], [500, 70, 300], dtype=ANY_DTYPE)
    got, _ = run(case, softmax, window=window)
    phi = torch.zeros(4) if softmax == "unified" else None
    want = reference.paged_decode(
        case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, scale=case.scale,
        softmax=softmax, phi=phi, query_start_loc=case.query_start_loc, window=window,
    )  # fmt: skip
    tolerance = 4 * torch.finfo(ANY_DTYPE).eps
    torch.testing.assert_close(got[0], want[0], atol=4 * tolerance, rtol=0)
    torch.testing.assert_close(got[1], want[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("softmax", MODES)
def test_sinks(softmax, few_programs):
    case = make_case([1, 2, 1], [500, 70, 0], dtype=ANY_DTYPE)
    sinks = torch.tensor([0.0, 3.0, -50.0, 90.0])
    got, _ = run(case, softmax, sinks=sinks)
    phi = torch.zeros(4) if softmax == "unified" else None
    want = reference.paged_decode(
        case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, scale=case.scale,
        softmax=softmax, phi=phi, query_start_loc=case.query_start_loc, sinks=sinks,
    )  # fmt: skip
    tolerance = 4 * torch.finfo(ANY_DTYPE).eps
    torch.testing.assert_close(got[0], want[0], atol=4 * tolerance, rtol=0)
    torch.testing.assert_close(got[1], want[1], atol=2e-5, rtol=1e-5)


def test_a_sequence_without_keys_and_padding():
    case = make_case([1, 1, 1], [5, 40, 9], dtype=ANY_DTYPE)
    case.seq_lens[0] = 0
    # The last is padding, as vLLM captures graphs for more sequences than there are.
    case.query_start_loc[3] = 2
    case.seq_lens[2] = 0
    on = caches_to_device(case)
    out = torch.full_like(on.q, 7.0)
    out, lse = paged_decode(
        on.q, on.k_cache, on.v_cache, on.block_table, on.seq_lens, scale=on.scale, out=out,
        query_start_loc=on.query_start_loc, softmax="unified",
        phi=to_device(torch.zeros(4)),
    )  # fmt: skip
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all()
    assert (out[2] == 7.0).all()


def test_a_workspace_serves_launch_after_launch(few_programs):
    workspace = Workspace()
    for lens in ([900, 30], [1500, 700, 5], [64]):
        case = make_case([1] * len(lens), lens, dtype=ANY_DTYPE)
        assert_close(case, None, run(case, workspace=workspace)[0])
        assert not workspace._arrivals.any()


def test_one_range_takes_no_room(monkeypatch):
    """vLLM has measured memory by the time that a large batch is decoded."""
    monkeypatch.setattr(module, "_slots", lambda *args: 1)
    workspace = Workspace()
    case = make_case([1] * 4, [900, 30, 64, 5], dtype=ANY_DTYPE)
    assert_close(case, None, run(case, workspace=workspace)[0])
    assert workspace._floats.numel() == 0


def test_room_for_splits_follows_from_shapes_alone():
    assert most_splits(1, 4096, 8, 264) == 128
    assert most_splits(64, 4096, 8, 264) == 4
    assert most_splits(1, 3, 8, 264) == 4
    assert most_splits(1024, 4096, 8, 264) == 1


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: a graph is captured and replayed")
@pytest.mark.parametrize("softmax", MODES)
def test_a_captured_graph_follows_the_lengths(softmax):
    case = make_case([1, 1], [4000, 30], heads=8, kv_heads=2, dtype=ANY_DTYPE)
    on = caches_to_device(case)
    lens = on.seq_lens.clone()
    out = torch.empty_like(on.q)
    workspace = Workspace()
    phi = torch.zeros(8, device=on.q.device) if softmax == "unified" else None

    def step():
        paged_decode(
            on.q, on.k_cache, on.v_cache, on.block_table, on.seq_lens, scale=on.scale, out=out,
            softmax=softmax, phi=phi, workspace=workspace,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for first, second in ((4000, 30), (1, 1), (65, 20), (2500, 30)):
        on.seq_lens.copy_(torch.tensor([first, second]))
        graph.replay()
        case.seq_lens[:] = torch.tensor([first, second])
        want = reference.paged_decode(
            case.q, case.k_cache, case.v_cache, case.block_table, case.seq_lens, scale=case.scale
        )
        torch.testing.assert_close(out.cpu(), want[0], atol=4e-3, rtol=0)
    on.seq_lens.copy_(lens)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window: got 0"),
        ({"softmax": "unified", "phi": None}, "phi: missing"),
        ({"seq_lens": torch.tensor([40])}, "seq_lens: got torch.int64; it must be int32"),
        ({"flagged": torch.zeros(1)}, "give one int64"),
        ({"window": 3, "shared": torch.zeros(1, dtype=torch.int32)}, "leave one out"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    case = make_case([1], [40], dtype=ANY_DTYPE)
    on = caches_to_device(case)
    args = {"block_table": on.block_table, "seq_lens": on.seq_lens, "scale": 1.0, **change}
    args = {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(ValueError, match=message):
        paged_decode(on.q, on.k_cache, on.v_cache, **args)
