"""benchmarks.linear on the CPU, at a size that takes no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bare pytest leaves the root out

from benchmarks import decode, linear
from benchmarks._form import Row
from vllm_sparse.kernels import cpu

SMALL = ["--shapes", "70x96", "40x64", "--batches", "1", "5", "--dtypes", "float32",
         "--rounds", "1"]  # fmt: skip
LAYERS = ("70x96_m1", "70x96_m5", "40x64_m1", "40x64_m5")


@pytest.fixture
def run(tmp_path, monkeypatch):
    import torch

    threads, own = torch.get_num_threads(), cpu.num_threads()
    monkeypatch.setattr(decode, "SHORTEST_S", 0.001)
    # Three copies of the larger layer's weights: each takes its turn also where they are this few.
    monkeypatch.setattr(linear, "COPIES_BYTES", 3 * 70 * 96 * 4)

    def with_arguments(*more: str) -> tuple[int, dict[str, dict]]:
        path = tmp_path / "rows.json"
        status = linear.main([*SMALL, *more, "--json", str(path)])
        rows = json.loads(path.read_text())["rows"]
        return status, {row["figure"]: row for row in rows}

    yield with_arguments
    torch.set_num_threads(threads)
    cpu.set_threads(own)


@pytest.fixture
def change(monkeypatch):
    """Replaces what some of them compute: by name, a function of (x, what was right)."""

    def changed(**works) -> None:
        right = linear.Layer._cpu

        def wrong(self):
            ours, them = right(self)
            theirs = {"vllm": linear.VLLM["cpu"], "stream": linear.STREAM}
            for name, other in works.items():
                name = theirs.get(name, name)
                them[name] = lambda x, work=them[name], other=other: other(x, work)
            return ours, them

        monkeypatch.setattr(linear.Layer, "_cpu", wrong)

    return changed


def test_each_layer_has_every_peer(run):
    status, rows = run()
    assert status == 0
    expected = {}
    for layer in LAYERS:
        name = f"linear_cpu_{layer}_float32"
        expected |= {name: linear.VLLM["cpu"], f"{name}_vs_torch": linear.TORCH,
                     f"{name}_stream": linear.STREAM}  # fmt: skip
    expected |= {f"linear_cpu_all_m{m}_float32": None for m in (1, 5)}
    assert {figure: row["peer"] for figure, row in rows.items()} == expected
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in rows.values())
    row = rows["linear_cpu_70x96_m5_float32"]
    case = {name: row["case"][name] for name in ("m", "n", "k", "dtype", "threads", "kernels")}
    assert case == {"m": 5, "n": 70, "k": 96, "dtype": "float32", "threads": 1,
                    "kernels": cpu.isa()}  # fmt: skip
    assert row["unit"] == "us" and row["error"] < 1e-6
    rate = rows["linear_cpu_70x96_m5_float32_stream"]
    assert rate["ours"] == pytest.approx(70 * 96 * 4 / row["ours"] / 1e3)
    ratios = [rows[f"linear_cpu_{layer}_float32"]["ratio"] for layer in LAYERS[1::2]]
    together = rows["linear_cpu_all_m5_float32"]
    assert together["ours"] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
    assert together["case"]["least"] == pytest.approx(min(ratios), abs=1e-3)


def test_bfloat16_is_the_dtype_that_figures_do_not_name(run):
    status, rows = run("--dtypes", "bfloat16", "--shapes", "40x64", "--batches", "2")
    assert status == 0
    assert list(rows) == [f"linear_cpu_40x64_m2{end}" for end in ("", "_vs_torch", "_stream")]
    assert all(0 < row["error"] < 0.01 for row in rows.values())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda x, work: work(x) * 1.01, "off by "),
        (lambda x, work: work(x) * float("nan"), "off by nan"),
        (lambda x, work: work(x[:, :0]), "ValueError: x: got shape"),
    ],
)
def test_what_is_wrong_is_not_timed(run, change, capsys, wrong, says):
    timed = []
    change(cpu=wrong, vllm=lambda x, work: timed.append(len(x)) or work(x))
    status, rows = run()
    assert status == 1 and timed
    assert list(rows) == [f"linear_cpu_{layer}_float32" for layer in LAYERS]
    for row in rows.values():
        assert (row["ours"], row["theirs"], row["ratio"], row["peer"]) == (None,) * 4
        assert says in row["case"]["failed"]
    assert "4 rows, 4 of them failed" in capsys.readouterr().out


def test_one_wrong_shape_does_not_cost_the_others(run, change):
    change(cpu=lambda x, work: work(x) + (len(x) == 5 and x.shape[1] == 96))
    status, rows = run()
    assert status == 1
    failed = [figure for figure, row in rows.items() if row["ours"] is None]
    assert failed == ["linear_cpu_70x96_m5_float32"]
    assert rows["linear_cpu_70x96_m1_float32"]["ratio"] > 0
    # A mean needs two layers.
    assert "linear_cpu_all_m1_float32" in rows and "linear_cpu_all_m5_float32" not in rows


def test_a_peer_that_is_wrong_or_fails_has_no_row(run, change, capsys):
    def fails(x, work):
        raise RuntimeError("no such\nlibrary")

    change(vllm=lambda x, work: work(x) + 1, stream=fails)
    status, rows = run()
    assert status == 0
    assert list(rows) == [f"linear_cpu_{layer}_float32_vs_torch" for layer in LAYERS]
    said = capsys.readouterr().out
    assert f"{linear.VLLM['cpu']} at 70x96_m1_float32: ValueError: off by" in said
    assert f"{linear.STREAM} at 70x96_m1_float32: RuntimeError: no such library" in said


def test_a_mean_is_of_the_faster_kernel_of_each_layer():
    peer = linear.VLLM["cuda"]

    def row(kernel: str, n: int, ratio: float, m: int = 1, peer: str = peer) -> Row:
        case = {"m": m, "n": n, "k": 8, "dtype": "bfloat16"}
        return Row.time(f"linear_{kernel}_{n}x8_m{m}", case, 1.0, peer, ratio, unit="us")

    rows = [row("gemv", 4, 1.0), row("flat_gemm", 4, 2.0), row("gemv", 5, 0.5),
            row("flat_gemm", 5, 0.25), row("flat_gemm", 4, 9.0, m=8),
            row("gemv", 5, 100.0, peer=linear.STREAM),
            Row.failed("linear_gemv_6x8_m1", {"m": 1}, "off", peer=None, unit="us")]  # fmt: skip
    (only,) = linear.together(rows)
    assert only.figure == "linear_cuda_all_m1" and only.ours == pytest.approx(1.0)
    assert only.case["layers"] == "4x8, 5x8" and only.case["peer"] == peer
    assert (only.case["least"], only.case["least_at"]) == (0.5, "5x8")


def test_what_is_measured_if_nothing_is_said():
    options = linear.parse([])
    assert options.shapes == [shape for layers in linear.MODELS.values() for shape in layers]
    assert options.batches == [1, 2, 4, 8, 16, 32, 64, 128, 512]
    assert options.dtypes == ["bfloat16", "float32"]
    options = linear.parse(["--device", "cuda", "--models", "Llama-3.1-8B"])
    assert options.shapes == list(linear.MODELS["Llama-3.1-8B"])
    assert options.batches[-1] == 64 and options.dtypes == ["bfloat16"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--shapes", "70"], "--shapes: got '70'; give NxK"),
        (["--shapes", "0x96"], "--shapes: got '0x96'; give NxK"),
        (["--batches", "1", "0"], "--batches, --compiled: got [0]; give 1 or more"),
        (["--device", "cuda", "--compiled", "0"], "--batches, --compiled: got [0]"),
        (["--compiled", "1"], "--compiled: it is a peer on GPUs; add --device cuda"),
        (["--device", "cuda", "--dtypes", "float32"], "--dtypes: float32 is for CPUs"),
        (["--models", "GPT-2"], "--models: invalid choice"),
    ],
)
def test_bad_arguments_are_named(argv, says, capsys):
    with pytest.raises(SystemExit):
        linear.parse(argv)
    assert says in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_told(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert linear.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == linear.NEEDS_A_GPU + "\n"
