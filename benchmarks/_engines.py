"""vLLM engines of a benchmark, of which nothing remains when it ends."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._form import ROOT

SHUTDOWN_S = 30
PEER = "vLLM's CPU backend"
# Largest difference of a first token's log-probability that passes.
TOLERANCE = 0.1
# A worker polls for a second after its last step: the next one has its core to itself after that.
QUIET_S = 1.2

Logprobs = dict[int, float]  # of a first token, by token


def checkpoint(kind: str) -> Path:
    """The folder of a retrieval model, built where it is missing."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), kind], check=True)
    return ROOT / "checkpoints" / kind


def logprobs_of(output: Any) -> Logprobs:
    """The first token's, of what vLLM gave for a prompt."""
    return {token: lp.logprob for token, lp in output.logprobs[0].items()}


def difference(ours: list[Logprobs], theirs: list[Logprobs]) -> float:
    """The largest, of the tokens that both name, prompt by prompt; infinity where they name no
    common one, or one is not finite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        found = [abs(a[token] - b[token]) for token in a.keys() & b.keys()]
        if not found or not all(map(math.isfinite, found)):
            return math.inf
        worst = max(worst, *found)
    return worst


def unlike(error: float) -> str | None:
    """Why engines that differ by so much are not timed, or None."""
    if error <= TOLERANCE:
        return None
    return f"the first token's log-probability differs by more than {TOLERANCE}"


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
