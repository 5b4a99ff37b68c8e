"""What a handle does of a Ray actor that does not serve, start or end; without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from vllm_sparse.cpu_offload import actor
from vllm_sparse.cpu_offload.worker import Task

TASK = Task(
    owner=os.getpid(), source="", shape={}, ring_at=0, file="", max_batch=1, actors=1, actor=0,
    spin_s=0.0, cpus=[],
)  # fmt: skip
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


class Ray(ModuleType):
    """As much of Ray as a handle calls; its actor is a process that does nothing."""

    def __init__(self, about: dict | Exception):
        super().__init__("ray")
        self.about = about
        self.killed = []
        self.kill = self.killed.append

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: "here")

    def remote(self, **options):
        made = SimpleNamespace(about=SimpleNamespace(remote=lambda: None))
        remote = SimpleNamespace(remote=lambda task: made)
        return lambda kind: SimpleNamespace(options=lambda **options: remote)

    def get(self, call, timeout: float):
        if isinstance(self.about, Exception):
            raise self.about
        return self.about


@pytest.fixture
def start(monkeypatch):
    """Makes a handle of a Ray that answers so."""

    def start(about: dict | Exception) -> tuple[Ray, actor.RayHandle | None]:
        ray, strategies = Ray(about), ModuleType("strategies")
        strategies.NodeAffinitySchedulingStrategy = lambda *arguments, **more: None
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
        monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
        try:
            return ray, actor.start(TASK)
        except Exception as error:
            assert error is about or isinstance(error, ProcessLookupError)
            return ray, None

    return start


@pytest.fixture
def process():
    made = subprocess.Popen([sys.executable, "-c", STUBBORN])
    yield made
    made.kill()
    made.wait()


def test_an_actor_that_does_not_serve_any_more_ends(monkeypatch):
    class Server:
        def __init__(self, task: Task):
            self.task = task

        def run(self) -> None:
            raise MemoryError("no room for the kernel's scratch buffers")

    codes = []
    monkeypatch.setattr(actor, "Server", Server)
    monkeypatch.setattr(actor, "os", SimpleNamespace(_exit=codes.append))
    made = actor.OffloadActor(TASK.to_json())
    made._thread.join(10)
    assert codes == [1]


def test_a_handle_sees_that_its_process_has_ended(start, process):
    _, handle = start({"pid": process.pid})
    assert handle.alive()
    process.kill()
    assert handle._has_ended() and not handle.alive()
    handle.stop()


def test_an_actor_that_does_not_start_in_time_is_killed(start):
    ray, handle = start(TimeoutError("Get timed out"))
    assert handle is None and len(ray.killed) == 1


def test_an_actor_that_ended_before_it_was_watched_is_killed(start, process):
    process.kill()
    process.wait()
    ray, handle = start({"pid": process.pid})
    assert handle is None and len(ray.killed) == 1


def test_stop_waits_for_the_end(start, process, monkeypatch):
    ray, handle = start({"pid": process.pid})
    ray.kill = lambda made: subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"])
    began = time.monotonic()
    handle.stop()
    assert process.poll() is not None
    assert time.monotonic() - began < actor.STOP_TIMEOUT


def test_stop_ends_a_process_that_ray_does_not(start, process, monkeypatch):
    monkeypatch.setattr(actor, "STOP_TIMEOUT", 0.2)
    ray, handle = start({"pid": process.pid})
    pidfd = handle.pidfd
    handle.stop()
    assert process.poll() is not None and len(ray.killed) == 1
    with pytest.raises(OSError):
        os.fstat(pidfd)
