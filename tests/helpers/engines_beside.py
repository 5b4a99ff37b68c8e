"""Engines of a test module that run beside each other.

Starting one takes one core for half a minute, nearly all of it imports in three processes.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

AT_ONCE = 2


def on_core(number: int) -> dict[str, str]:
    """The environment of an engine whose workers are to have one core, this one of those here."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)])}


def on_two_cores() -> dict[str, str]:
    """The environment of an engine of two ranks, each with a core of its own.

    vLLM binds one rank to a NUMA node and refuses two on one, unless it is told the cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


class Beside:
    """Runs what starts an engine, in threads, the workers of each on a core of their own."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(AT_ONCE):
            self._numbers.put(number)

    def start(self, run: Callable, *arguments, **more) -> Future:
        """`run` is `engine_run.run`, which ends in time, or calls it with the `env` it is given."""
        return self._pool.submit(self._run, run, arguments, more)

    def _run(self, run: Callable, arguments: tuple, more: dict):
        number = self._numbers.get_nowait()  # as many as threads
        try:
            return run(*arguments, env=on_core(number), **more)
        finally:
            self._numbers.put(number)


@contextmanager
def beside() -> Iterator[Beside]:
    """What has not begun when it ends does not begin."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            yield Beside(pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
