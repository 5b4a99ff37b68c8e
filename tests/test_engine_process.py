"""The processes of engines: what they give, what they say, and that nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import engine_process
import psutil
import pytest
import torch
from engine_process import EngineFailed, answer

HERE = Path(__file__).stem
COMMAND = "import time; time.sleep(600)"
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def state(job: dict) -> dict:
    print("said on stdout", flush=True)
    os.system("echo said by a child >&2")
    return {
        "job": job, "folder": os.getcwd(), "cores": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "vllm": "vllm.v1.engine.core" in sys.modules,
        "safe": os.environ.get("PYTHONSAFEPATH"), "given": os.environ.get("GIVEN"),
        "late": os.environ.get("SET_LATE"),
    }  # fmt: skip


def fails(job: dict) -> dict:
    raise ValueError("no such engine")


def never_ends(job: dict) -> dict:
    child = subprocess.Popen([sys.executable, "-c", COMMAND])
    Path(job["file"]).write_text(str(child.pid))
    time.sleep(600)
    return {}


@pytest.mark.parametrize("fresh", [False, True])
def test_what_it_gives_and_what_it_runs_in(fresh, tmp_path, monkeypatch):
    answer(f"{HERE}:state", {}, tmp_path, {})  # from now on a process is kept
    monkeypatch.setenv("SET_LATE", "set")
    core = max(os.sched_getaffinity(0))
    env = {"GIVEN": "it", "VLLM_CPU_OMP_THREADS_BIND": str(core), **ONE_PROCESS}
    answered = answer(f"{HERE}:state", {"a": 1}, tmp_path, env, fresh=fresh)
    forked = not fresh and sys.version_info >= (3, 11)
    assert answered.result() == {
        "job": {"a": 1}, "folder": str(tmp_path), "cores": [core], "threads": 1, "vllm": forked,
        "safe": os.environ.get("PYTHONSAFEPATH"), "given": "it", "late": "set",
    }  # fmt: skip
    assert {"said on stdout", "said by a child"} <= set(answered.log.splitlines())
    assert "GIVEN" not in os.environ


def test_workers_of_their_own_are_left_to_vllm_to_bind(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    for env in (
        {"VLLM_CPU_OMP_THREADS_BIND": str(cores[0])},
        {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}", **ONE_PROCESS},
    ):
        assert answer(f"{HERE}:state", {}, tmp_path, env).result()["cores"] == cores


def test_what_fails_gives_nothing_and_says_why(tmp_path):
    answered = answer(f"{HERE}:fails", {}, tmp_path, {})
    assert answered.given is None and "ValueError: no such engine" in answered.log
    with pytest.raises(EngineFailed, match="no such engine"):
        answered.result()


def test_what_takes_too_long_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_process, "TIMEOUT_S", 8)
    file = tmp_path / "child"
    with pytest.raises(EngineFailed, match="took over 8 s"):
        answer(f"{HERE}:never_ends", {"file": str(file)}, tmp_path, {})
    child = int(file.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)
