"""benchmarks.shared_prefix on the CPU, at a size that takes no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bare pytest leaves the root out

from benchmarks import shared_prefix
from vllm_sparse.kernels import cpu

SMALL = ["--parts", "cpu", "--batches", "2", "--prefixes", "1024", "--own", "128",
         "--dtypes", "float32", "--rounds", "1"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    import torch

    threads = torch.get_num_threads()

    def with_arguments(*more: str) -> tuple[int, list[dict]]:
        path = tmp_path / "rows.json"
        command = ["shared_prefix", *SMALL, *more, "--json", str(path)]
        monkeypatch.setattr(sys, "argv", command)
        status = shared_prefix.main()
        return status, json.loads(path.read_text())["rows"]

    yield with_arguments
    torch.set_num_threads(threads)
    cpu.set_threads(threads)


def test_a_row_for_what_is_shared_for_the_search_and_for_nothing_shared(run):
    status, rows = run()
    assert status == 0
    figures = {row["figure"]: row for row in rows}
    name = "cpu_b2_1024_float32"
    assert list(figures) == [
        f"shared_prefix_{name}", f"shared_prefix_{name}_find",
        f"shared_prefix_none_{name}", f"shared_prefix_none_{name}_find",
    ]  # fmt: skip
    keys = {figure: row["case"]["shared_keys"] for figure, row in figures.items()}
    assert set(keys.values()) == {0, 2 * 1024}
    assert all(bool(keys[figure]) == ("none" not in figure) for figure in keys)
    for figure, row in figures.items():
        assert row["ours"] > 0 and row["ratio"] > 0
        assert (row["error"] is None) == figure.endswith("_find")
    assert figures[f"shared_prefix_{name}"]["peer"] == shared_prefix.APART


def test_what_is_wrong_is_not_timed(run, monkeypatch):
    right = shared_prefix.Batch.decoder

    def off(self, shared):
        decode = right(self, shared)
        return decode if shared is None else lambda: decode() + 1

    monkeypatch.setattr(shared_prefix.Batch, "decoder", off)
    monkeypatch.setattr(shared_prefix, "on_cpu", lambda *_: pytest.fail("timed"))
    status, rows = run("--tokens", "0")
    assert status == 1
    assert [row["ours"] for row in rows] == [None]
    assert rows[0]["error"] > 1 and rows[0]["case"]["failed"].startswith("off by ")


def test_keys_that_are_no_whole_pages_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--own", "100")
    assert "--prefixes, --own: got [100]; give multiples of 128" in capsys.readouterr().err
