"""A `vllm serve` that is stopped whatever happens: answer, error, Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds that a server has to end by itself.
GRACE_S = 12


class Server:
    """Runs `vllm serve CHECKPOINT ...` on a free local port, its output in a log file.

    Use it in a `with` statement, inside `ends_on_signals()`. `environment` is added to that of this
    process.
    """

    def __init__(
        self, checkpoint: Path, log: Path, *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.log = log
        self.arguments = arguments
        self.environment = dict(environment or {})
        self.url = ""
        self._seen: set[psutil.Process] = set()

    def command(self, port: int) -> list[str]:
        vllm = Path(sys.executable).with_name("vllm")
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return [str(vllm), "serve", str(self.checkpoint), *where, *self.arguments]

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }
        # It would overrule the size of the KV cache that is asked for.
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        with held_signals(), self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command(port),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, deadline_s: float) -> Iterator[float]:
        """Yields the seconds waited so far, about twice a second, until requests are answered."""
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with exit code {self.process.returncode}")
            if waited > deadline_s:
                raise ServerError(f"the server was not ready after {deadline_s:.0f} s")
            self._seen |= self._processes()
            if self._get("/health") is not None:
                return
            yield waited
            time.sleep(0.5)

    def tokens_in_cache(self) -> int | None:
        """How many tokens' KV the server held after its last step: how far a prefill has come."""
        text = self._get("/metrics") or ""
        usage = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", text, re.M)
        info = re.search(r"^vllm:cache_config_info\{(.*)\}", text, re.M)
        if not usage or not info:
            return None
        size = dict(re.findall(r'(\w+)="([^"]*)"', info[1]))
        try:
            return round(float(usage[1]) * int(size["num_gpu_blocks"]) * int(size["block_size"]))
        except (KeyError, ValueError):
            return None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self) -> None:
        """Ends the server with everything it started, and makes sure of it."""
        with held_signals():
            # One whose parent died is found by having been seen before.
            everything = self._seen | self._processes()
            # The first process ends the others in order; what is left after that is killed.
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
            everything |= self._processes()
            _still_running(everything, 2)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
            alive = _still_running(everything, GRACE_S)
        if alive:
            raise ServerError(f"these processes would not end: {[p.pid for p in alive]}")

    def _get(self, path: str) -> str | None:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as response:
                return response.read().decode()
        except OSError:
            return None

    def _processes(self) -> set[psutil.Process]:
        """The server's descendants, and whoever else is in the session that it leads."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid:
                    found.add(process)
        with contextlib.suppress(psutil.Error):
            found |= set(psutil.Process(self.process.pid).children(recursive=True))
        return found


class ServerError(RuntimeError):
    pass


def _still_running(processes: set[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Which of them run after at most this long. One that ended and that nobody waits for, as in
    a container without an init process, does not."""
    deadline = time.monotonic() + timeout_s
    while True:
        alive = [process for process in processes if runs(process)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.1)


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


_held: list[int] | None = None


def _on_signal(number: int, _frame: object) -> None:
    if _held is not None:
        _held.append(number)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise SystemExit(128 + number)


@contextlib.contextmanager
def ends_on_signals() -> Iterator[None]:
    """Within it, a signal that would end the program raises, so that `with` blocks end in order."""
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Within it, signals wait: nothing is half started or half stopped."""
    global _held
    outermost = _held is None
    if outermost:
        _held = []
    try:
        yield
    finally:
        if outermost:
            waiting, _held = _held, None
            if waiting:
                _on_signal(waiting[0], None)
