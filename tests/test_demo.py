"""The demo's verdict, and that its servers end whatever happens. The demo itself is `make demo`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import psutil
import pytest
import server
from retrieval.prompts import needle_prompt

from vllm_sparse.stats import Stats

EXAMPLES = Path(demo.__file__).parent
ACTIVE = "(Worker pid=1) INFO [runtime.py:1] Sparse attention active: coverage 0.95, ...\n"
STATS = Stats(
    prefill_tokens=16384, sparse_chunks=4, keys_read=200, keys_causal=1000, attention_seconds=1.0
)


def outcome(name: str, seconds: float, right: bool = True, log: str = "") -> demo.Outcome:
    return demo.Outcome(name, ["arrow ."], [right], [seconds], log)


@pytest.fixture
def questions():
    return [needle_prompt(200)]


def test_all_is_well(questions, capsys):
    log = f"{ACTIVE}(Worker pid=1) INFO 11-22 [stats.py:1] {STATS.line()}\nmore\n"
    sparse = outcome("sparse", 1.0, log=log)
    assert demo.report(sparse, outcome("dense", 2.0), questions) == []
    assert sparse.density == 0.2
    printed = capsys.readouterr().out
    assert "Density: 20.0%" in printed and "Sparse attention active: coverage 0.95" in printed
    assert "1.00 s" in printed and "2.00 s" in printed


@pytest.mark.parametrize(
    "change, says",
    [
        ({"sparse": {"right": False}}, "sparse answer is wrong"),
        ({"dense": {"right": False}}, "vLLM's own backend is wrong"),
        ({"sparse": {"seconds": 2.0}}, "2.00 s"),
        ({"sparse": {"log": STATS.line()}}, "not active"),
        ({"sparse": {"log": ACTIVE}}, "no sparse prefill"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_each_thing_that_may_be_wrong_is_told(questions, change, says):
    given = {
        "sparse": {"seconds": 1.0, "log": ACTIVE + STATS.line()} | change.get("sparse", {}),
        "dense": {"seconds": 2.0} | change.get("dense", {}),
    }
    (wrong,) = demo.report(
        outcome("sparse", **given["sparse"]), outcome("dense", **given["dense"]), questions
    )
    assert says in wrong


def test_the_warm_up_is_not_counted():
    warm_up = Stats(prefill_tokens=3000, sparse_chunks=1, keys_read=90, keys_causal=100).line()
    both = demo.Outcome("sparse", log=f"{warm_up}\n{STATS.line()}\n", warm_up_ends=len(warm_up))
    assert both.density == 0.2


# A server that never gets ready, with a child in its session and one in a session of its own.
# All three ignore SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    for own in (False, True):
        subprocess.Popen([sys.executable, __file__, "child"], start_new_session=own)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    monkeypatch.setattr(server.Server, "command", lambda self, port: [sys.executable, str(script)])
    monkeypatch.setattr(server, "GRACE_S", 1)
    return server.Server(tmp_path, tmp_path / "server.log")


def family(process: subprocess.Popen, size: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = psutil.Process(process.pid).children(recursive=True)
        if len(found) >= size:
            return [psutil.Process(process.pid), *found]
        time.sleep(0.1)
    raise AssertionError("the children did not start")


def test_a_server_ends_with_everything_it_started(stubborn):
    with pytest.raises(ZeroDivisionError), stubborn:
        processes = family(stubborn.process, 2)
        while stubborn.log_text().count("up") < 3:
            time.sleep(0.1)
        raise ZeroDivisionError
    assert not any(server.runs(process) for process in processes)


def test_a_server_that_is_never_ready_or_dies_is_told(stubborn):
    with stubborn:
        processes = family(stubborn.process, 2)
        with pytest.raises(server.ServerError, match="not ready after 1 s"):
            list(stubborn.wait_until_ready(1))
        stubborn.process.kill()
        stubborn.process.wait()
        with pytest.raises(server.ServerError, match="ended with exit code -9"):
            list(stubborn.wait_until_ready(60))
    assert not any(server.runs(process) for process in processes)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_too(tmp_path, number, code):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    main = tmp_path / "main.py"
    main.write_text(
        f"""
import sys, time, pathlib
sys.path.insert(0, {str(EXAMPLES)!r})
import server
server.GRACE_S = 1
server.Server.command = lambda self, port: [sys.executable, {str(script)!r}]
try:
    with server.ends_on_signals(), server.Server(pathlib.Path("x"), pathlib.Path("server.log")):
        time.sleep(600)
except KeyboardInterrupt:
    sys.exit(130)
"""
    )
    process = subprocess.Popen([sys.executable, str(main)], cwd=tmp_path)
    processes = family(process, 3)
    os.kill(process.pid, number)
    # A second one does not keep the first one's work from being done.
    time.sleep(0.3)
    os.kill(process.pid, number)
    assert process.wait(60) == code
    assert not any(server.runs(p) for p in processes[1:])
