"""Who answers beside a vLLM worker: a process, or a thread, that serves the ring of its region.

Loads no torch. Run as a module it is a process: `python -m vllm_sparse.cpu_offload.worker JSON`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import sys
import threading

from . import numa
from .host import HostShape
from .region import Attached
from .ring import MOST_THREADS, Ring

logger = logging.getLogger("vllm_sparse.offload")

TURN = 0.2  # seconds of serving between looks at whether to go on


@dataclasses.dataclass(frozen=True)
class Task:
    """What an answering process needs to know; plain data."""

    owner: int  # process whose region it is, and with which this one ends
    source: int | str  # descriptor of the region, or its path
    shape: dict
    ring_at: int
    file: str
    max_batch: int
    actors: int
    actor: int
    spin_s: float
    cpus: list[int]  # to run on; empty: where the system puts it
    threads: int = 1
    isa: str = ""
    memory: list[int] = dataclasses.field(default_factory=list)  # nodes of these CPUs; empty: any

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def with_threads(self, threads: int) -> Task:
        return dataclasses.replace(self, threads=min(threads, MOST_THREADS))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))


class Server:
    """Serves a task's ring until it closes, its owner ends, or `stop` is called.

    Args:
        address: of the region, where this process has it already.
    """

    def __init__(self, task: Task, address: int | None = None):
        self.task = task
        # Opened first: if the owner is gone already, so is the number.
        self._owner = os.pidfd_open(task.owner)
        self.region = Attached(task.source) if address is None else None
        self.ring = Ring(
            HostShape(**task.shape), address or self.region.address, task.ring_at, file=task.file,
            max_batch=task.max_batch, actors=task.actors, spin_s=task.spin_s,
        )  # fmt: skip
        if task.isa:
            self.ring.set_isa(task.isa)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Serve with all threads; returns when it is over."""
        self._settle()
        self.ring.start(self.task.actor)
        others = [
            threading.Thread(target=self._serve, args=(i,), daemon=True, name=f"vllm-sparse-{i}")
            for i in range(1, self.task.threads)
        ]
        for thread in others:
            thread.start()
        try:
            self._serve(0)
        finally:
            # Where this one fails the actor is started again, which must not find others serving.
            self._stopped.set()
            for thread in others:
                thread.join()

    def _settle(self) -> None:
        """Put this thread, and those that it starts, on the task's CPUs and memory."""
        if self.task.cpus:
            with contextlib.suppress(OSError):  # a CPU that the container does not grant
                os.sched_setaffinity(0, self.task.cpus)
        if self.task.memory:
            try:
                numa.bind(self.task.memory)
            except OSError as error:
                logger.warning(
                    "Actor %d of the offload pool takes memory from any NUMA node instead of %s: "
                    "%s.", self.task.actor, self.task.memory, error,
                )  # fmt: skip

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        """Give back the descriptor of the owner's process."""
        os.close(self._owner)

    def _serve(self, thread: int) -> None:
        while not self._stopped.is_set() and not self._orphaned():
            if not self.ring.serve(self.task.actor, thread, TURN):
                return

    def _orphaned(self) -> bool:
        return bool(select.select([self._owner], [], [], 0)[0])


def main() -> int:
    task = Task.from_json(sys.argv[1])
    # Ctrl-C is for the owner, who ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = Server(task)
    except ProcessLookupError:
        return 0  # the owner is gone
    threading.Thread(target=_end_with, args=(task.owner,), daemon=True).start()
    server.run()
    return 0


def _end_with(owner: int) -> None:
    """End at once with the owner, whatever the others are doing."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(owner)], [], [])
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
