"""vLLM engines of a benchmark, of which nothing remains when it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks._form import ROOT

SHUTDOWN_S = 30


def checkpoint(kind: str) -> Path:
    """The folder of a retrieval model, built where it is missing."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), kind], check=True)
    return ROOT / "checkpoints" / kind


@contextmanager
def ended_together() -> Iterator[list]:
    """Yields a list for `LLM`s that are started in it; ends them, and every process of theirs."""
    import psutil

    before = set(psutil.Process().children(recursive=True))
    started: list = []
    # A SIGTERM that ends this process at once would leave the engines running.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield started
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        left = set(psutil.Process().children(recursive=True)) - before
        for llm in started:
            llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)
        _, alive = psutil.wait_procs(left, timeout=15)
        for process in alive:
            process.kill()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def import_examples() -> None:
    """Let `retrieval` be imported, which makes prompts."""
    _import_from(ROOT / "examples")


def import_test_helpers() -> None:
    """Let what drives engines step by step be imported, and tiny random models."""
    _import_from(ROOT / "tests" / "helpers")


def _import_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
