"""Processes that engines of tests run in, each the head of a group that is gone afterwards.

Importing vLLM takes one core for ten seconds. One process that has done so is kept, and an engine's
is forked from it, before any thread or device of its own has begun.

An engine that is stopped by a signal to its main process leaves EngineCore and workers running.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

TIMEOUT_S = 300
LOADED = ["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"]
SHOWN = 12000  # characters of a log, the last ones

_lock = threading.Lock()


class EngineFailed(AssertionError):
    """It ended with an error, or not in time."""


@dataclass(frozen=True)
class Answer:
    """What a function gave, or None where it failed, and what its process and its children said."""

    given: dict | None
    log: str

    def result(self) -> dict:
        """What it gave.

        Raises:
            EngineFailed: it gave nothing.
        """
        if self.given is None:
            raise EngineFailed(f"the engine failed:\n{self.log[-SHOWN:]}")
        return self.given


def answer(
    function: str, job: dict, folder: str | Path, env: dict[str, str], *, fresh: bool = False
) -> Answer:
    """Call `module:name` with a job, in a process of its own, in a folder, and with `env` besides.

    The folder may not be the repository's, whose folders would hide the installed packages.
    With `fresh` nothing of vLLM is imported before the module is.

    Raises:
        EngineFailed: it took over TIMEOUT_S.
    """
    with tempfile.TemporaryDirectory() as kept:
        log, result = Path(kept, "log"), Path(kept, "result")
        with _starting(fresh) as (context, environment):
            process = context.Process(
                target=_serve,
                args=(function, job, str(folder), environment | env, str(log), str(result)),
            )
            process.start()
        try:
            process.join(TIMEOUT_S)
            ended = process.exitcode is not None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # should it not have become the head of a group
            process.join()
        text = log.read_text(errors="replace") if log.exists() else ""
        if not ended:
            raise EngineFailed(f"the engine took over {TIMEOUT_S} s:\n{text[-SHOWN:]}")
        done = process.exitcode == 0
        return Answer(json.loads(result.read_text()) if done else None, text)


@contextlib.contextmanager
def _starting(fresh: bool) -> Iterator[tuple[BaseContext, dict[str, str]]]:
    """How to start a process, one at a time, and this one's environment as it is now."""
    with _lock:
        environment = dict(os.environ)
        # Before 3.11 Python has no way to keep its working folder out of what it imports.
        if fresh or sys.version_info < (3, 11):
            yield multiprocessing.get_context("spawn"), environment
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        os.environ["PYTHONSAFEPATH"] = "1"  # of the process that is kept
        try:
            yield context, environment
        finally:
            del os.environ["PYTHONSAFEPATH"]
            os.environ.update(environment)


def _serve(
    function: str, job: dict, folder: str, env: dict[str, str], log: str, result: str
) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    _bind(env)
    faulthandler.dump_traceback_later(TIMEOUT_S - 10)  # where it is, for whoever gives it up
    module, name = function.split(":")
    given = getattr(importlib.import_module(module), name)(job)
    Path(result).write_text(json.dumps(given))
    atexit._run_exitfuncs()  # a forked process ends without


def _bind(env: dict[str, str]) -> None:
    """Keep an engine of one process on its cores: vLLM binds workers that have a process alone.

    Two engines beside each other of two threads each take ten times as long as of one: threads of
    OpenMP spin while they wait.
    """
    cores = env.get("VLLM_CPU_OMP_THREADS_BIND", "")
    if env.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" and cores and "|" not in cores:
        import torch

        numbers = {int(core) for core in cores.split(",")}
        os.sched_setaffinity(0, numbers)
        torch.set_num_threads(len(numbers))
