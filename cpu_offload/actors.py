"""Starts, watches and restarts those who answer beside a worker, as threads or local processes."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from . import numa
from .ring import Ring
from .worker import Server, Task

if TYPE_CHECKING:  # Ray's actors load this file, and no torch
    from .host_store import HostStore

logger = logging.getLogger("vllm_sparse.offload")

START_TIMEOUT = 60.0  # seconds in which an actor must have begun to serve
STOP_TIMEOUT = 5.0
LEAST_PAUSE, MOST_PAUSE = 0.1, 30.0  # seconds before a restart, doubled while it fails


class Handle:
    """One running actor."""

    pidfd = -1

    def alive(self) -> bool:
        raise NotImplementedError

    def stop(self) -> None:
        """End it; the ring is closing already. Returns when it has ended."""
        raise NotImplementedError


class ThreadHandle(Handle):
    def __init__(self, task: Task, address: int):
        self._server = Server(task, address)
        self._thread = threading.Thread(
            target=self._server.run, daemon=True, name=f"vllm-sparse-actor-{task.actor}"
        )
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._server.stop()
        self._thread.join(STOP_TIMEOUT)
        self._server.close()


class ProcessHandle(Handle):
    """A process of its own, which ends with the worker's, however that ends."""

    def __init__(self, task: Task):
        command = [sys.executable, "-m", "vllm_sparse.cpu_offload.worker", task.to_json()]
        # From "/": `-m` looks in the working directory first, and a checkout there has no kernels.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(int(task.source),), cwd="/"
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            os.close(self.pidfd)


class Actors:
    """As many actors as there are tasks; those that end are started again, in the background.

    Args:
        tasks: one for each.
        start: makes a handle of a task.
        beats: for each actor a number that grows while it serves.
        watch: told of each actor and the descriptor of its process.
    """

    def __init__(
        self, tasks: list[Task], start: Callable[[Task], Handle], beats: Callable[[int], int],
        watch: Callable[[int, int], None],
    ):  # fmt: skip
        self._tasks, self._start, self._beats, self._watch = tasks, start, beats, watch
        self._handles: list[Handle | None] = [None] * len(tasks)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._restarting: dict[int, threading.Thread] = {}
        self.restarts = 0
        try:
            for i in range(len(tasks)):
                self._begin(i)
        except BaseException:
            self.stop()
            raise

    def _begin(self, number: int) -> None:
        before = self._beats(number)
        handle = self._start(self._tasks[number])
        self._handles[number] = handle
        self._watch(number, handle.pidfd)
        end = time.monotonic() + START_TIMEOUT
        while self._beats(number) == before:
            if not handle.alive():
                raise RuntimeError(
                    f"actor {number} of the offload pool ended before it served; its own message "
                    "is above"
                )
            if time.monotonic() > end:
                raise TimeoutError(
                    f"actor {number} of the offload pool did not serve within {START_TIMEOUT:.0f} s"
                )
            time.sleep(0.002)

    def alive(self) -> int:
        """How many are running."""
        return sum(h is not None and h.alive() for h in self._handles)

    def ended(self, number: int) -> None:
        """Say that an actor is seen to have ended: it is not waited for, and started again."""
        self._watch(number, -1)
        with self._lock:
            if self._closing.is_set() or number in self._restarting:
                return
            thread = threading.Thread(
                target=self._restart, args=(number,), daemon=True,
                name=f"vllm-sparse-restart-{number}",
            )  # fmt: skip
            self._restarting[number] = thread
        logger.warning(
            "Actor %d of the offload pool has ended; the worker answers in its place until it is "
            "back.", number,
        )  # fmt: skip
        thread.start()

    def look(self) -> None:
        """Restart those that have ended since the last look."""
        for i, handle in enumerate(self._handles):
            if handle is not None and i not in self._restarting and not handle.alive():
                self.ended(i)

    def _restart(self, number: int) -> None:
        pause = LEAST_PAUSE
        while not self._closing.is_set():
            handle, self._handles[number] = self._handles[number], None
            if handle is not None:
                handle.stop()
            try:
                self._begin(number)
                self.restarts += 1
                logger.warning("Actor %d of the offload pool is back.", number)
                break
            except Exception as error:  # whatever it was, decoding goes on without
                logger.warning(
                    "Actor %d of the offload pool does not start: %s. Trying again in %.1f s.",
                    number, error, pause,
                )  # fmt: skip
            self._watch(number, -1)
            self._closing.wait(pause)
            pause = min(2 * pause, MOST_PAUSE)
        with self._lock:
            self._restarting.pop(number, None)

    def stop(self) -> None:
        """End all of them; the ring must be closing."""
        self._closing.set()
        for thread in list(self._restarting.values()):
            thread.join(START_TIMEOUT)
        for i, handle in enumerate(self._handles):
            if handle is not None:
                self._watch(i, -1)
                handle.stop()
            self._handles[i] = None


def shut_down(owner: int, ring: Ring | None, actors: Actors | None, store: HostStore) -> None:
    """End what a pool has started and give its memory back, in the process that made it alone: a
    child that was forked from it has the finalizers too, but the ring and the actors are not its
    own."""
    if os.getpid() != owner:
        return
    if ring is not None:
        ring.close()
    if actors is not None:
        actors.stop()
    store.close()


def spare_cpus() -> list[int]:
    """CPUs that the machine has and the calling thread is not bound to."""
    return sorted(granted() - bound())


def bound() -> set[int]:
    """CPUs that the calling thread is bound to."""
    return os.sched_getaffinity(0)


def granted() -> set[int]:
    """CPUs that this container may use: what a fresh child process could be given."""
    with contextlib.suppress(OSError), open("/proc/1/status") as file:
        for line in file:
            if line.startswith("Cpus_allowed_list:"):
                return numa.parse(line.split(":")[1])
    return set(range(os.cpu_count() or 1))


def tasks_for(task: Task, cpus: list[list[int]]) -> list[Task]:
    """The same task for each actor, on its own CPUs and the memory near them."""
    return [
        replace(task, actor=i, cpus=mine, memory=numa.memory_of(mine))
        for i, mine in enumerate(cpus)
    ]
