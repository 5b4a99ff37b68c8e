"""The GPU part of benchmarks.decode, on the CPU: what it measures, checks and leaves out."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from gpu_cases import HAS_GPU

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bare pytest leaves the root out

from benchmarks import _decode_gpu, decode
from benchmarks._decode_gpu import FLASH_3, STREAM, TRITON, Problem
from benchmarks._form import Row
from vllm_sparse.kernels.gpu import paged_decode

TIMES = {"online": 2e-6, "lazy": 4e-6, "unified": 1e-6, TRITON: 6e-6, FLASH_3: 3e-6, STREAM: 1e-6}


def exact(p: Problem):
    def run():
        out = torch.empty_like(p.q)
        for sequence in range(p.batch):
            k, v = (x.float() for x in p.rows(sequence))
            q = p.q[sequence].float().view(p.kv_heads, -1, _decode_gpu.HEAD_SIZE)
            p_ = torch.softmax(q @ k.transpose(1, 2) * p.scale, -1)
            out[sequence] = (p_ @ v).view(p.num_heads, -1)
        return out

    return run


def not_here(p: Problem):
    raise ImportError("no such\nlibrary")


@pytest.fixture
def measured(monkeypatch):
    """On the CPU in float16, without graphs, with times that are given; small heads."""
    monkeypatch.setattr(_decode_gpu, "DEVICE", "cuda" if HAS_GPU else "cpu")
    monkeypatch.setattr(_decode_gpu, "DTYPE", "bfloat16" if HAS_GPU else "float16")
    if not HAS_GPU:  # the interpreter takes its time for each program
        monkeypatch.setattr(paged_decode, "_slots", lambda *device: 4)
    monkeypatch.setattr(_decode_gpu, "HEADS", {"32/8": (2, 1)})
    monkeypatch.setattr(_decode_gpu, "graphed", lambda run: (run, run()))
    monkeypatch.setattr(_decode_gpu, "seconds", lambda works, n: {x: TIMES[x] for x in works})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    peers = {TRITON: exact, FLASH_3: exact, "FlashInfer": not_here,
             "SDPA": lambda p: lambda: torch.zeros_like(p.q)}  # fmt: skip
    monkeypatch.setattr(_decode_gpu, "PEERS", peers)

    def rows(**changed) -> dict[str, Row]:
        given = {"heads": ["32/8"], "batches": [2], "contexts": [2048], "tokens": None,
                 "cache": "auto", "rounds": 1}  # fmt: skip
        return {row.figure: row for row in _decode_gpu.gpu_rows(Namespace(**given | changed))}

    return rows


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_modes_are_compared_with_the_peers_that_are_right(cache, measured, capsys):
    rows = measured(cache=cache)
    tail = "gpu_32_8_b2_2k" + ("_fp8" if cache == "fp8" else "")
    assert {row.case["cache"] for row in rows.values()} == {cache}
    row = rows[f"decode_online_vs_vllm_triton_attention_{tail}"]
    assert row.ratio == pytest.approx(3.0) and row.peer == TRITON and row.error < 4e-3
    row = rows[f"decode_online_vs_flashattention_3_{tail}"]
    assert row.ratio == pytest.approx(1.5)
    assert row.peer == (FLASH_3 if cache == "auto" else f"{FLASH_3} (16 bits)")
    assert rows[f"decode_unified_vs_online_{tail}"].ratio == pytest.approx(2.0)
    of_cache = 2 * 2048 * 256 * (1 if cache == "fp8" else 2)
    stream = rows[f"decode_stream_{tail}"]
    assert stream.ours == pytest.approx(of_cache / 2e-6 / 1e9) and stream.ratio == 0.5
    assert not any("flashinfer" in figure or "sdpa" in figure for figure in rows)
    said = capsys.readouterr().out
    assert "FlashInfer at 2 x 2048: ImportError: no such library" in said
    assert "SDPA at 2 x 2048: the error is" in said


def test_contexts_are_summed_up_by_geometric_means_and_the_least(measured, monkeypatch):
    times = iter([TIMES, {**TIMES, "online": 1e-6}])

    def seconds(works, n):
        found = next(times)
        return {name: found[name] for name in works}

    monkeypatch.setattr(_decode_gpu, "seconds", seconds)
    rows = measured(batches=[1], contexts=[1024, 2048, 4096], tokens=2048)
    row = rows["decode_online_vs_triton_gpu_32_8_b1_all"]
    assert row.ours == pytest.approx((3.0 * 6.0) ** 0.5)
    assert row.case["contexts"] == "1k, 2k"
    assert (row.case["least"], row.case["least_at"]) == (pytest.approx(3.0), 1024)
    best = rows["decode_online_vs_best_gpu_32_8_b1_all"]
    assert best.ours == pytest.approx((1.5 * 3.0) ** 0.5) and best.case["peers"] == FLASH_3


def test_a_mode_that_is_wrong_or_fails_has_no_time(measured, monkeypatch):
    right = _decode_gpu.ours

    def ours(p, softmax, phi=None, flagged=None):
        if softmax == "lazy":
            raise RuntimeError("no code")
        run = right(p, softmax, None if phi is None else phi + 1e6, flagged)
        return (lambda: run() + 1) if softmax == "online" else run

    monkeypatch.setattr(_decode_gpu, "ours", ours)
    rows = measured()
    failed = {figure.split("_")[1]: row.case["failed"] for figure, row in rows.items()}
    assert all(row.ours is None for row in rows.values())
    assert failed["online"].startswith("the error is")
    assert failed["lazy"] == "RuntimeError: no code"
    assert "rows left the window of phi" in failed["unified"]


def test_a_cell_that_fails_does_not_cost_the_others(measured, monkeypatch):
    truth = Problem.truth

    def no_room(p):
        if p.context == 1024:
            raise torch.OutOfMemoryError("no room")
        return truth(p)

    monkeypatch.setattr(Problem, "truth", no_room)
    rows = measured(contexts=[1024, 2048])
    assert rows["decode_gpu_32_8_b2_1k"].case["failed"] == "OutOfMemoryError: no room"
    assert "decode_stream_gpu_32_8_b2_2k" in rows


@pytest.mark.skipif(HAS_GPU, reason="here is a GPU")
def test_the_gpus_part_without_a_gpu_is_told(capsys, monkeypatch):
    assert decode.main(["--parts", "gpu"]) == 2
    assert capsys.readouterr().err == decode.NEEDS_A_GPU + "\n"


def test_parts_follow_the_machine(monkeypatch, tmp_path):
    asked = []
    row = Row.share("decode_x", {}, 0.5)
    monkeypatch.setattr(decode, "cpu_rows", lambda options: asked.append("cpu") or [])
    monkeypatch.setattr(
        _decode_gpu, "gpu_rows", lambda options: asked.append(options.contexts) or [row]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = tmp_path / "x.json"
    assert decode.main(["--contexts", "4096", "--json", str(file)]) == 0
    assert asked == [[4096]] and "decode_x" in file.read_text()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode.main([]) == 0
    assert asked[1:] == ["cpu"]


@pytest.mark.parametrize(
    "argv, says",
    [(["--contexts", "100"], "--contexts: got"), (["--batches", "0"], "--batches: got")],
)
def test_bad_arguments_are_named(argv, says, capsys):
    with pytest.raises(SystemExit):
        decode.parse(argv)
    assert says in capsys.readouterr().err
