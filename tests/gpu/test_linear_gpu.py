"""The Triton linear layers, GEMV and flat GEMM, against the reference."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import ANY_DTYPE, BFLOAT16, DEVICE, FLOAT16, FLOAT32, HAS_GPU, to_device

from vllm_sparse.kernels import linear_reference
from vllm_sparse.kernels.gpu import flat_gemm as module
from vllm_sparse.kernels.gpu import gemv as gemv_module
from vllm_sparse.kernels.gpu import launch
from vllm_sparse.kernels.gpu.flat_gemm import flat_gemm
from vllm_sparse.kernels.gpu.gemv import gemv
from vllm_sparse.kernels.gpu.paged_decode import Workspace

DTYPES = [FLOAT32, FLOAT16, BFLOAT16]
KERNELS = [gemv, flat_gemm]
ROWS = [0, 1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 65]
WEIGHTS = [(1, 1), (8, 15), (63, 17), (64, 16), (65, 64), (130, 111), (64, 2000)]


def problem(m, n, k, *, dtype=ANY_DTYPE, bias=True, pad=0):
    """x, weight, bias and an output of NaN; rows are `pad` apart, with NaN in between."""
    generator = torch.Generator().manual_seed(1000 * m + 10 * n + k)

    def rows(count, size):
        wide = torch.full((count, size + pad), torch.nan, dtype=dtype)
        wide[:, :size] = torch.randn(count, size, generator=generator)
        return wide[:, :size]

    x, weight = rows(m, k), rows(n, k)
    added = torch.randn(n, generator=generator).to(dtype) if bias else None
    out = torch.full((m, n + pad), torch.nan, dtype=dtype)[:, :n]
    return x, weight, added, out


def run(kernel, x, weight, bias, out, **more):
    on = to_device(out)
    got = kernel(to_device(x), to_device(weight), to_device(bias), out=on, **more)
    assert got.data_ptr() == on.data_ptr()
    return got.cpu()


def assert_right(x, weight, bias, got) -> None:
    """|out - fp32| <= 2 |torch in the same dtype - fp32| + rounding.

    Rounding: of sums of K products in fp32, in another order than torch's, and of the output.
    """
    want = linear_reference.linear(
        x.float(), weight.float(), None if bias is None else bias.float()
    )
    torchs = torch.nn.functional.linear(x, weight, bias)
    assert got.shape == want.shape and got.dtype == x.dtype and not got.isnan().any()
    if not want.numel():
        return
    largest = want.abs().max().item()
    sums = (x.float().abs() @ weight.float().abs().T).max().item()
    allowed = 2 * (torchs.float() - want).abs().max().item()
    allowed += 4 * torch.finfo(torch.float32).eps * sums
    if x.dtype != torch.float32:
        allowed += torch.finfo(x.dtype).eps / 2 * largest
    error = (got.float() - want).abs().max().item()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows(kernel, m, dtype):
    n = 130 if m <= 9 or kernel is flat_gemm else 18  # GEMV takes four rows a program
    given = problem(m, n, 111, dtype=dtype, bias=m % 2 == 0)
    assert_right(*given[:3], run(kernel, *given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_weights(kernel, n, k, dtype):
    for m, bias in ((1, True), (9, False)):
        given = problem(m, n, k, dtype=dtype, bias=bias)
        assert_right(*given[:3], run(kernel, *given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1024, 1000])
@pytest.mark.parametrize("m", [3, 7])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_wider_tensors(kernel, m, k, dtype):
    """Whole blocks of K without masks, and a last one with; what lies between rows is NaN."""
    for pad in (1, 16):
        x, weight, bias, out = problem(m, 70, k, dtype=dtype, pad=pad)
        got = run(kernel, x, weight, bias, out)
        assert_right(x, weight, bias, got)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_beside_the_output_is_written(kernel):
    x, weight, bias, _ = problem(5, 65, 64)
    wide = to_device(torch.full((7, 70), 7.0, dtype=x.dtype))
    kernel(to_device(x), to_device(weight), to_device(bias), out=wide[1:6, 2:67])
    assert_right(x, weight, bias, wide[1:6, 2:67].cpu())
    wide[1:6, 2:67] = 7.0
    assert (wide == 7.0).all()


def test_each_size_of_a_gemv_tile(monkeypatch):
    """16, 8 and 4 rows of weights, which larger layers have and small devices."""
    for sms, bn in ((1, 16), (4, 8), (132, 4)):
        monkeypatch.setattr(gemv_module, "sms_of", lambda device, sms=sms: sms)
        assert gemv_module.constants(2, 130, 300, sms)["BN"] == bn
        for m in (1, 6):
            given = problem(m, 130, 300)
            assert_right(*given[:3], run(gemv, *given))


def test_wide_tiles_of_a_flat_gemm(monkeypatch):
    monkeypatch.setattr(module, "sms_of", lambda device: 2)
    for m in (2, 20, 70):
        made = module.constants(launch.target_of(DEVICE), ANY_DTYPE, m, 200, 300, 2)
        assert made["BN"] == 128
        given = problem(m, 200, 300)
        assert_right(*given[:3], run(flat_gemm, *given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(("m", "k"), [(2, 640), (65, 600)])
def test_splits(m, k, splits, dtype):
    """As many as are asked for, or as there are tiles of K; each launch gives the same bits, and
    leaves no arrivals behind, also where the workspace was larger before."""
    workspace = Workspace()
    workspace.take(1 << 20, 64, DEVICE)[0].fill_(torch.nan)
    given = problem(m, 130, k, dtype=dtype)
    first = run(flat_gemm, *given, splits=splits, workspace=workspace)
    assert_right(*given[:3], first)
    again = run(flat_gemm, *given, splits=splits, workspace=workspace)
    assert torch.equal(first, again)
    assert (workspace.take(1, 1, DEVICE)[1] == 0).all()


def test_rows_do_not_depend_on_their_neighbours():
    """A row of NaN stays alone, and rows of one batch size have the same bits in another."""
    for kernel, m in ((gemv, 4), (flat_gemm, 7)):
        x, weight, bias, out = problem(m, 65, 300)
        clean = run(kernel, x, weight, bias, out)
        x[2, 7] = torch.nan
        got = run(kernel, x, weight, bias, out)
        bad = torch.zeros_like(got, dtype=torch.bool)
        bad[2] = True
        assert torch.equal(got.isnan(), bad)
        assert torch.equal(got[3:], clean[3:])


def test_the_shared_workspace_has_room_for_any_launch():
    """It never grows, so that captured graphs keep its addresses."""
    target = launch.TARGETS["sm_90"]
    for sms in (1, 78, 108, 132, 148):
        room = module.PROGRAMS_EACH_SM * sms
        for m in (1, 8, 9, 33, 64, 65, 1000):
            for n in (1, 64, 65, 1000, 4096, 6144, 8448, 16384, 16896, 28672, 128256):
                for k in (1, 64, 2048, 4096, 14336, 53248):
                    made = module.constants(target, torch.bfloat16, m, n, k, sms)
                    tiles = -(-m // made["BM"]) * -(-n // made["BN"])
                    k_tiles = -(-k // made["BK"])
                    splits = module.splits_of(tiles, k_tiles, made["BM"], made["BK"], sms)
                    assert 1 <= splits <= k_tiles
                    if splits > 1:
                        assert tiles * splits <= room
                        assert made["BM"] * made["BN"] <= module.MOST_ROWS * module.COLUMNS


@pytest.mark.parametrize(
    ("m", "n", "k", "tile", "splits"),
    [
        (8, 28672, 4096, (8, 128, 64), 1),
        (1, 4096, 4096, (8, 64, 128), 4),
        (16, 6144, 4096, (16, 64, 128), 2),
        (64, 4096, 14336, (64, 64, 64), 4),
        (16, 2048, 8192, (16, 64, 128), 8),
        (33, 1024, 1024, (64, 64, 64), 1),
        (300, 4096, 4096, (64, 64, 64), 1),
    ],
)  # fmt: skip
def test_tiles_and_splits_on_an_h100(m, n, k, tile, splits):
    made = module.constants(launch.TARGETS["sm_90"], torch.bfloat16, m, n, k, 132)
    assert (made["BM"], made["BN"], made["BK"]) == tile
    tiles = -(-m // tile[0]) * -(-n // tile[1])
    assert module.splits_of(tiles, -(-k // tile[2]), tile[0], tile[2], 132) == splits


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: a graph is captured and replayed")
@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_a_captured_graph_follows_the_activations(m):
    x, weight, bias, out = map(to_device, problem(m, 2048, 4096))
    kernels = [gemv, flat_gemm] if m <= 4 else [flat_gemm]
    for kernel in kernels:
        kernel(x, weight, bias, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel(x, weight, bias, out=out)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert_right(x.cpu(), weight.cpu(), bias.cpu(), out.cpu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, r"weight: got shape \(8, 16\) for x \(2, 7\)"),
        ({"x": torch.zeros(2, 3, 16)}, r"x: got shape \(2, 3, 16\); give \[M, K\]"),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(8, 0)}, "K of at least 1"),
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "x: got torch.float64; give one of"),
        ({"weight": torch.zeros(8, 16, dtype=torch.bfloat16)}, "weight: got torch.bfloat16"),
        ({"weight": torch.zeros(16, 8).T}, "weight: the last dimension has stride 8"),
        ({"bias": torch.zeros(7)}, r"bias: got shape \(7,\) .* it must be \[8\]"),
        ({"out": torch.zeros(2, 7)}, r"out: got shape \(2, 7\); it must be \[2, 8\]"),
        ({"out": torch.zeros(2, 8, dtype=torch.float16)}, "out: got torch.float16"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    given = {"x": torch.zeros(2, 16), "weight": torch.zeros(8, 16)} | change
    for kernel in (gemv, flat_gemm, linear_reference.linear):
        with pytest.raises(ValueError, match=message):
            kernel(**given)


def test_no_split_is_an_error():
    with pytest.raises(ValueError, match="splits: got 0"):
        flat_gemm(torch.zeros(1, 16), torch.zeros(8, 16), splits=0)
