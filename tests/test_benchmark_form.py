"""The one form of the benchmarks' results."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import load

ROOT = Path(__file__).resolve().parent.parent

form = load("benchmarks/_form.py")
Row, publish, require_editable = form.Row, form.publish, form.require_editable
KEYS = ["figure", "case", "ours", "peer", "theirs", "unit", "ratio", "error"]


def test_a_file_has_machine_versions_and_rows_of_eight_keys(tmp_path, capsys):
    rows = [
        Row.time("ttft_16k", {"tokens": 16384}, 2.0, "vLLM", 5.0, error=1e-6),
        Row.rate("gflops", {"dtype": "float32"}, 90.0, "torch", 60.0, unit="GFLOP/s"),
        Row.share("density", {"tokens": 16384}, 0.2),
    ]
    publish(rows, tmp_path / "new" / "result.json")
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert list(result) == ["machine", "versions", "rows"]
    assert [list(row) for row in result["rows"]] == [KEYS] * 3
    assert [row["ratio"] for row in result["rows"]] == [2.5, 1.5, 0.2]
    assert result["rows"][2]["peer"] is None and result["rows"][2]["theirs"] is None
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("ttft_16k", "2.50", "tokens 16384", "vLLM", "GFLOP/s"))


@pytest.mark.parametrize("error", [0.5, math.nan, math.inf, None])
def test_a_row_that_failed_its_check_has_no_time(error):
    row = Row.time("ttft_1k", {"tokens": 1024}, 1.0, "vLLM", 2.0, error=error, failed="2 wrong")
    assert (row.ours, row.theirs, row.ratio) == (None, None, None)
    assert row.case == {"tokens": 1024, "failed": "2 wrong"}
    assert row.error == (0.5 if error == 0.5 else None)
    assert "2 wrong" in json.dumps(publish([row])["rows"])


@pytest.mark.parametrize(
    "change",
    [{"figure": "TTFT 1k"}, {"unit": ""}, {"ours": math.nan}, {"ratio": math.inf}, {"ours": None}],
)
def test_a_row_that_says_nothing_is_refused(change):
    given = dict(
        figure="x", case={}, ours=1.0, peer="p", theirs=2.0, unit="s", ratio=2.0, error=None
    )
    with pytest.raises(ValueError):
        Row(**(given | change))


def test_a_figure_stands_in_one_row_only():
    row = Row.share("density", {}, 0.1)
    with pytest.raises(ValueError, match="density"):
        publish([row, row])


def test_rows_are_in_the_file_as_they_come_and_others_stay(tmp_path, monkeypatch):
    file = tmp_path / "result.json"

    def figures() -> dict[str, float]:
        return {row["figure"]: row["ours"] for row in json.loads(file.read_text())["rows"]}

    results = form.Results(file)
    assert figures() == {}

    def rows():
        yield Row.share("a", {}, 0.1)
        assert figures() == {"a": 0.1}
        yield Row.share("b", {}, 0.2)

    results.add(rows())
    assert figures() == {"a": 0.1, "b": 0.2} and not results.failed
    with pytest.raises(ValueError, match="more than one row: a"):
        results.add([Row.share("a", {}, 0.3)])
    again = form.Results(file, add=True)
    again.add([Row.share("b", {}, 0.5), Row.failed("c", {}, "wrong", peer=None, unit="s")])
    assert figures() == {"a": 0.1, "b": 0.5, "c": None} and again.failed
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    monkeypatch.setattr(form, "versions", lambda: {"python": "2.7"})
    with pytest.raises(ValueError, match="another machine or other versions"):
        form.Results(file, add=True)
    form.Results(file)
    assert figures() == {}


def test_machine_and_versions_say_where_and_with_what():
    machine, versions = form.machine(), form.versions()
    assert machine["cpu"] and machine["cores"] >= machine["cores_allowed"] >= 1
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "vllm-sparse" in versions and "torch" in versions
    json.dumps([machine, versions], allow_nan=False)


def test_every_benchmark_takes_a_file_and_tells_its_options():
    parser = form.arguments("Something.\n\nMore.")
    assert parser.parse_args(["--json", "a.json"]).json == Path("a.json")
    for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{path.stem}", "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert "--json FILE" in done.stdout


def test_it_refuses_an_install_that_is_not_this_checkout(tmp_path):
    require_editable()
    with pytest.raises(SystemExit, match="editable install") as ended:
        require_editable(tmp_path)
    assert "\n" not in str(ended.value)
    # A checkout that is not installed, seen from within, is what a wheel install looks like.
    for folder in ("benchmarks", "vllm_sparse"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pyc*"))
    code = "from benchmarks._form import require_editable; require_editable()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "editable" in done.stderr
