"""Processes of a benchmark that must end in time, and everything that they started with them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STOP_S = 5.0  # from asking a process to end to killing it


def stop_tree(process: subprocess.Popen, wait_s: float = STOP_S) -> None:
    """Ends a process and all that it started; returns when they are gone."""
    import psutil

    try:
        parent = psutil.Process(process.pid)
        tree = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        tree = []
    for one in tree:
        _quietly(one.terminate)
    _, alive = psutil.wait_procs(tree, timeout=wait_s)
    for one in alive:
        _quietly(one.kill)
    psutil.wait_procs(alive, timeout=wait_s)
    process.wait()


def _quietly(end) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        end()


class Child:
    """A process that answers lines of JSON with lines of JSON, each until a deadline.

    It runs `python -m MODULE FD ARGUMENTS...` and answers through file descriptor FD, as what it
    prints is for people. Use it in a `with`: nothing of it remains.
    """

    def __init__(self, module: str, *arguments: str, cwd: Path) -> None:
        self._replies, theirs = os.pipe()
        self._buffer = b""
        command = [sys.executable, "-m", module, str(theirs), *arguments]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=(theirs,), cwd=cwd, text=True
            )
        except BaseException:
            os.close(self._replies)
            raise
        finally:
            os.close(theirs)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._replies)
        stop_tree(self.process)
        self.process.stdin.close()

    def ask(self, question: dict[str, Any], until: float) -> dict[str, Any]:
        """See `hear`; raises BrokenPipeError where the process is gone."""
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.hear(until)

    def hear(self, until: float) -> dict[str, Any]:
        """The next line.

        Raises:
            TimeoutError: none came before `time.monotonic()` was `until`.
            EOFError: the process ended.
        """
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise TimeoutError("no answer in time")
            got = os.read(self._replies, 1 << 16)
            if not got:
                raise EOFError(f"the process ended with status {self.process.wait()}")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)
