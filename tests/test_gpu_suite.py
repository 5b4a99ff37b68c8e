"""benchmarks.gpu_suite without a GPU: given steps, deadlines, what is kept and what is said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bare pytest leaves the root out

from benchmarks import _form, _gpu_smoke, gpu_suite
from benchmarks._form import ROOT
from benchmarks._gpu_steps import STEPS, Step
from benchmarks._process import Child, stop_tree

WRITES = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks._form import Results, Row
results = Results(Path(sys.argv[1]), add=True)
results.add([Row.time({figure!r}, {{}}, 1.0, "peer", 2.0)])
print("wrote", {figure!r})
{then}
"""


def step(name: str, code: str, **changed) -> Step:
    given = {"share": 1.0, "most_s": 30.0, "least_s": 0.1, "beside": ()} | changed
    return Step(name, f"does {name}", ("-c", code, "{out}/rows.json"), **given)


def writes(figure: str, then: str = "") -> str:
    return WRITES.format(root=str(ROOT), figure=figure, then=then)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is said to be here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {
        "date": "2026-01-01", "minutes": 1, "note": None, "machine": {}, "versions": {"a": "1"},
        "gpu": {"name": "NVIDIA Test", "driver": "1.2"},
    }  # fmt: skip
    monkeypatch.setattr(gpu_suite, "about", lambda minutes, note: {**found, "note": note})
    return found


def saved(out: Path) -> dict:
    return json.loads((out / "suite.json").read_text())


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    assert gpu_suite.main(["--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr()
    assert said.err == gpu_suite.NEEDS_A_GPU + "\n" and not said.out
    assert not (tmp_path / "new").exists()


def test_a_failure_and_a_deadline_cost_no_other_step(gpu, tmp_path, capsys):
    table = [
        step("first", writes("a")),
        step("fails", writes("b", "print('\\x1b[31mno luck\\x1b[0m'); sys.exit(3)")),
        step("hangs", writes("c", "import time; print('slow', flush=True); time.sleep(60)"),
             most_s=6.0),
        step("last", writes("d")),
    ]  # fmt: skip
    begin = time.monotonic()
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "2", "--note", "x"], table) == 1
    assert time.monotonic() - begin < 50
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["figure"] for row in rows] == ["a", "b", "c", "d"]
    found = saved(tmp_path)
    assert found["gpu"]["name"] == "NVIDIA Test" and found["note"] == "x"
    steps = {one["name"]: one for one in found["steps"]}
    assert list(steps) == ["first", "fails", "hangs", "last"]
    assert [one["state"] for one in steps.values()] == ["passed", "failed", "stopped", "passed"]
    assert [one["rc"] for one in steps.values()] == [0, 3, 124, 0]
    assert steps["fails"]["said"] == "wrote b | no luck"
    assert steps["hangs"]["said"].endswith("slow") and 6 <= steps["hangs"]["seconds"] < 12
    log = (tmp_path / "suite.log").read_text()
    assert [log.index(f"===== {name}") for name in steps] == sorted(
        log.index(f"===== {name}") for name in steps
    )
    assert len(list(tmp_path.iterdir())) <= 8
    said = capsys.readouterr().out
    assert re.search(r"│ hangs\s+│ stopped", said) and re.search(
        r"^\s*d\s+1\s+2\s+s\s+2\s", said, re.M
    )
    assert "NVIDIA Test, driver 1.2" in said


def test_what_is_there_is_known_while_a_step_runs(gpu, tmp_path):
    code = "import sys; print(open(sys.argv[1].replace('rows', 'suite')).read())"
    assert gpu_suite.main(["--out", str(tmp_path)], [step("one", "1"), step("two", code)]) == 0
    printed = (tmp_path / "suite.log").read_text().split("===== two")[1]
    seen = json.loads(printed[printed.index("{") :])
    assert [(one["name"], one["state"]) for one in seen["steps"]] == [
        ("one", "passed"), ("two", "running"),
    ]  # fmt: skip


def test_steps_that_no_time_is_left_for_are_left_out_and_are_no_failure(gpu, tmp_path):
    table = [step("short", "1"), step("long", "1", least_s=1000.0), step("after", "1")]
    other = tmp_path / "new" / "other.json"
    assert gpu_suite.main(["--out", str(tmp_path), "--json", str(other)], table) == 0
    assert json.loads(other.read_text()) == saved(tmp_path)
    states = {one["name"]: (one["state"], one["rc"]) for one in saved(tmp_path)["steps"]}
    assert states == {"short": ("passed", 0), "long": ("left out", None), "after": ("passed", 0)}


def test_a_later_run_keeps_what_it_does_not_run_again(gpu, tmp_path, monkeypatch):
    table = [step("one", writes("a")), step("two", writes("b", "sys.exit(1)"))]
    assert gpu_suite.main(["--out", str(tmp_path)], table) == 1
    table[1] = step("two", writes("b"))
    assert gpu_suite.main(["--out", str(tmp_path), "--steps", "two"], table) == 0
    assert [one["state"] for one in saved(tmp_path)["steps"]] == ["passed", "passed"]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["figure"] for row in rows] == ["a", "b"]
    gpu["versions"]["a"] = "2"
    with pytest.raises(SystemExit, match="of another machine or other versions; give --out"):
        gpu_suite.main(["--out", str(tmp_path), "--steps", "two"], table)


def test_what_runs_beside_a_step_ends_with_it_and_does_not_count(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: gpu_suite.FEWEST_CORES)
    pid = tmp_path / "pid"
    waits = f"""
import os, pathlib, subprocess, sys, time
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(pid)!r}).write_text(str(os.getpid()) + " " + str(below.pid))
time.sleep(60)
"""
    sees = f"""
import pathlib, time
until = time.monotonic() + 20
while time.monotonic() < until and not pathlib.Path({str(pid)!r}).exists(): time.sleep(0.05)
"""
    beside = (("-c", waits), ("-c", "raise SystemExit(5)"))
    assert gpu_suite.main(["--out", str(tmp_path)], [step("one", sees, beside=beside)]) == 0
    for number in map(int, pid.read_text().split()):
        assert not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie"


def test_a_suite_that_is_ended_says_where_and_leaves_nothing_running(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch; torch.cuda.is_available = lambda: True
from benchmarks import gpu_suite; from benchmarks._gpu_steps import Step
gpu_suite.about = lambda minutes, note: {{"gpu": {{}}, "versions": {{}}}}
hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
codes = {{"one": "print(7)", "two": hangs}}
table = [Step(name, "", ("-c", code), 1.0, 50, 0) for name, code in codes.items()]
sys.exit(gpu_suite.main(["--out", {str(tmp_path)!r}], table))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        log, until = tmp_path / "suite.log", time.monotonic() + 60
        while time.monotonic() < until:
            tail = log.read_text().partition("===== two")[2] if log.exists() else ""
            if found := re.search(r"^(\d+)$", tail, re.M):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        stop_tree(process)
    assert not psutil.pid_exists(int(found[1]))
    states = [(one["state"], one["rc"]) for one in saved(tmp_path)["steps"]]
    assert states == [("passed", 0), ("stopped", None)]


def test_the_dry_mode_prints_commands_and_shares(capsys, tmp_path):
    assert gpu_suite.main(["--list", "--minutes", "8", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for one in STEPS:
        assert f"{one.name}: {one.about}" in said
        assert f"python {' '.join(one.arguments(tmp_path))}" in said
    assert "40 s of 480 s (20% of what is left, at most 40 s)" in said


@pytest.mark.parametrize(
    "argv, says", [(["--minutes", "0"], "--minutes: got 0"), (["--steps", "x"], "invalid choice")]
)
def test_bad_arguments_are_named(argv, says, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(argv)
    assert says in capsys.readouterr().err


def test_every_step_is_a_command_that_its_benchmark_takes():
    """Parsed, not run: an option that is not there would cost a whole session on a GPU."""
    from benchmarks import decode, gpu_break_even, gpu_engine, linear, prefill

    parsers = {
        "benchmarks.prefill": prefill, "benchmarks.decode": decode,
        "benchmarks.gpu_engine": gpu_engine, "benchmarks.gpu_break_even": gpu_break_even,
        "benchmarks.linear": linear,
    }  # fmt: skip
    out = Path("/results")
    commands = [c for one in STEPS for c in (one.arguments(out), *one.beside)]
    files, parsed = set(), 0
    for command in commands:
        if command[0] != "-m":
            assert (ROOT / command[0]).exists()
            continue
        assert (ROOT / (command[1].replace(".", "/") + ".py")).exists()
        if module := parsers.get(command[1]):
            options = module.parse(list(command[2:]))
            files |= {options.json} - {None}
            parsed += 1
    assert parsed > 10
    assert len({one.name for one in STEPS}) == len(STEPS)
    # With suite.json, suite.log and what is being written.
    assert len(files) + 3 <= 8
    for file in files:
        assert file.parent == out and re.fullmatch(r"[A-Za-z0-9._-]+", file.name)


def test_what_a_run_was_measured_with_is_said(monkeypatch):
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "X", 9, 0, 80 << 30, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = gpu_suite.about(8, "abc")
    assert found["gpu"]["name"] == "X" and found["gpu"]["capability"] == "9.0"
    assert {"torch", "python", "cuda", "vllm-sparse"} <= set(found["versions"])
    assert found["note"] == "abc" and found["date"].endswith("+00:00")
    assert set(found["machine"]) == set(_form.machine())
    json.dumps(found)


ECHO = """
import json, os, sys
replies = os.fdopen(int(sys.argv[1]), "w", buffering=1)
print("noise")
print(json.dumps({"hello": sys.argv[2]}), file=replies)
for line in sys.stdin:
    asked = json.loads(line)
    if asked == {"end": 1}:
        sys.exit(7)
    print(json.dumps(asked), file=replies)
"""


def test_a_child_answers_until_a_deadline_and_is_gone_afterwards(tmp_path, monkeypatch):
    (tmp_path / "echo_child.py").write_text(ECHO)
    soon = time.monotonic() + 30
    with Child("echo_child", "x", cwd=tmp_path) as child:
        assert child.hear(soon) == {"hello": "x"}
        big = {"text": "y" * 200_000}
        assert child.ask(big, soon) == big
        with pytest.raises(TimeoutError, match="no answer in time"):
            child.hear(time.monotonic() + 0.2)
        with pytest.raises(EOFError, match="ended with status 7"):
            child.ask({"end": 1}, soon)
    with Child("echo_child", "x", cwd=tmp_path) as child:
        assert child.hear(soon) == {"hello": "x"}
    assert child.process.poll() is not None


def test_the_table_leaves_out_what_would_bury_the_rest():
    shown = ("decode_online_vs_sdpa_x", "decode_lazy_vs_online_x", "decode_lazy_vs_best_gpu_all",
             "prefill_8k_layer0", "decode_stream_x")  # fmt: skip
    assert not any(re.match(gpu_suite.UNSHOWN, figure) for figure in shown)
    hidden = ("decode_lazy_vs_sdpa_x", "decode_unified_vs_vllm_triton_attention_x")
    assert all(re.match(gpu_suite.UNSHOWN, figure) for figure in hidden)


def test_a_break_even_is_of_the_kernel_that_serving_takes(monkeypatch):
    from benchmarks import gpu_break_even
    from vllm_sparse import cuda_dense
    from vllm_sparse.planner import break_even, device_break_even

    asked = []

    def measure(*where):
        asked.append(where)
        yield 4096, 1.5
        yield 8192, 0.75

    def settled(*where, cache):
        assert where == asked[-1][:-1] and not cache.exists()
        return found

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_dense, "flash_for", lambda *shape: None)
    monkeypatch.setattr(device_break_even, "measure", measure)
    monkeypatch.setattr(device_break_even, "break_even", settled)
    options = gpu_break_even.parse(["--chunk", "2048"])
    found = 6144
    rows = {row.figure: row for row in gpu_break_even.rows_of("32/8", options)}
    assert rows["break_even_32_8_4k"].ours == pytest.approx(1.0)
    assert rows["break_even_32_8_8k"].ours == pytest.approx(2.0)
    assert (rows["break_even_32_8"].ours, rows["break_even_32_8"].unit) == (6144.0, "tokens")
    assert rows["break_even_32_8"].case["dense"] == "triton_dense"
    assert asked[0][:6] == (torch.bfloat16, 128, 32, 8, 2048, 16)
    found = break_even.NEVER
    *_, last = gpu_break_even.rows_of("8/2", options)
    assert last.ours is None and last.case["failed"] == "sparse is never worth it"


@pytest.mark.parametrize("has", [{"pytest", "xdist", "pytest_timeout"}, {"pytest"}])
def test_the_smoke_step_uses_the_cores_where_it_can(has, monkeypatch, capsys):
    monkeypatch.setattr(_gpu_smoke, "_has", lambda package: package in has)
    given = " ".join(_gpu_smoke.arguments(16))
    assert ("-n 12" in given and "--timeout=60" in given) == ("xdist" in has)
    assert ("pytest-xdist is not installed" in capsys.readouterr().out) == ("xdist" not in has)


def test_a_file_that_cannot_be_imported_does_not_cost_the_others(monkeypatch, capsys):
    asked = []

    def main(given, plugins):
        asked.append(given)
        if any("test_broken" in one for one in given):
            return 4
        plugins[0].pytest_runtest_logreport(None)
        return 0

    monkeypatch.setattr(pytest, "main", main)
    monkeypatch.setattr(_gpu_smoke, "CHOICE", {"test_a": ("x", "y"), "test_broken": ("z",)})
    assert _gpu_smoke.run(_gpu_smoke.CHOICE, ["-v"]) == 4
    assert asked[1:] == [
        ["tests/gpu/test_a.py::x", "tests/gpu/test_a.py::y", "-v"],
        ["tests/gpu/test_broken.py::z", "-v"],
    ]  # fmt: skip
    assert "file by file" in capsys.readouterr().out
    assert _gpu_smoke.run(["test_a"], []) == 0 and len(asked) == 4


def test_the_smoke_step_without_pytest_or_a_gpu_is_told():
    code = "import sys; from benchmarks import _gpu_smoke as s; {}; sys.exit(s.main())"
    gone = "s._has = lambda package: False"
    for change, status, says in (
        (gone, 1, _gpu_smoke.NEEDS_PYTEST), ("import torch; torch.cuda.is_available = bool", 2,
                                             _gpu_smoke.NEEDS_A_GPU),
    ):  # fmt: skip
        command = [sys.executable, "-c", code.format(change)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == status and done.stderr.splitlines()[-1] == says


def test_every_test_of_the_smoke_step_is_there():
    """A name that is gone would keep pytest from running any of them."""
    wanted = [one for file in _gpu_smoke.CHOICE for one in _gpu_smoke.tests(file)]
    assert len(set(wanted)) == len(wanted) > 50
    own = Path(sys.executable).with_name("pytest")
    done = subprocess.run(
        [own, "--collect-only", "-q", "-p", "no:cacheprovider", *wanted],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(ids) > len(wanted)
    for dtype in ("bf16", "fp16"):
        assert sum(dtype in one for one in ids) > 20
