"""benchmarks.cope on the CPU, at a size that takes no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bare pytest leaves the root out

from benchmarks import cope
from vllm_sparse.kernels import cpu

SMALL = ["--lengths", "256", "--chunk", "128", "--rounds", "1", "--dtypes", "float32"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    import torch

    threads = torch.get_num_threads()

    def with_arguments(*more: str) -> tuple[int, list[dict]]:
        path = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["cope", *SMALL, *more, "--json", str(path)])
        status = cope.main()
        return status, json.loads(path.read_text())["rows"]

    yield with_arguments
    torch.set_num_threads(threads)
    cpu.set_threads(threads)


def test_each_case_has_both_peers(run):
    status, rows = run()
    assert status == 0
    peers = {row["figure"]: row["peer"] for row in rows if not row["figure"].endswith("_memory")}
    expected = {}
    for kind in cope.KINDS:
        for part in ("prefill", "decode"):
            name = f"cope_cpu_{part}_256_{kind}_float32"
            expected |= {f"{name}_plain": cope.PLAIN, name: cope.WRITTEN_OUT}
    assert peers == expected
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in rows)
    assert {row["case"]["rows"] for row in rows} == {128, 1}


def test_the_kinds_are_what_they_claim():
    import torch

    positions = {}
    for kind in cope.KINDS:
        problem = cope.Problem(2048, 1, torch.float32, kind, "cpu")
        q, k = problem.q[0, 0], problem.caches[0][:, 0].flatten(0, 1)
        positions[kind] = torch.sigmoid(k @ q * problem.scale).sum()
    assert positions["seldom"] < 0.1 and positions["half"] > 10 * cope.POSITIONS


def test_what_is_wrong_is_not_timed(run, monkeypatch):
    right = cope.Problem.ours
    monkeypatch.setattr(cope.Problem, "ours", lambda self: right(self) * 1.01)
    status, rows = run()
    assert status == 1
    assert rows and all(row["ours"] is None and "off by" in row["case"]["failed"] for row in rows)
    assert not any(row["figure"].endswith(("_plain", "_memory")) for row in rows)


def test_lengths_are_whole_pages(run):
    with pytest.raises(SystemExit):
        run("--lengths", "200")
