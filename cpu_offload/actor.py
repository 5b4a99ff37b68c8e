"""Ray as the control plane: actors that serve a worker's ring, on the worker's node.

A Ray call starts an actor, asks after it and ends it. What a step needs never passes through one:
an actor maps the worker's region and serves its ring, as a local process does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import select
import signal
import threading
from typing import Any

from .actors import STOP_TIMEOUT, Handle
from .worker import Server, Task

logger = logging.getLogger("vllm_sparse.offload")

NAMESPACE = "vllm-sparse"
CALL_TIMEOUT = 60.0  # seconds: the first actor waits for Ray to start a worker process


class OffloadActor:
    """What runs inside Ray: a thread that serves, and calls that say how it is."""

    def __init__(self, task: str):
        self._server = Server(Task.from_json(task))
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="vllm-sparse-actor")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.run()
        except Exception as error:
            self._error = repr(error)
            logger.exception("Actor %d of the offload pool ends.", self._server.task.actor)
            # The pool sees that a process has ended, and starts another; of a thread in it nobody
            # hears without a Ray call.
            os._exit(1)

    def about(self) -> dict[str, Any]:
        """Its process, node and CPUs."""
        return {
            "pid": os.getpid(),
            "serving": self._thread.is_alive(),
            "error": self._error,
            "cpus": sorted(os.sched_getaffinity(self._thread.native_id or 0)),
        }

    def stop(self) -> None:
        self._server.stop()


class RayHandle(Handle):
    """One Ray actor on this node."""

    def __init__(self, task: Task):
        ray = connect()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # No CPU is asked for: vLLM's worker and the cores of `task.cpus` are not Ray's to count.
        # Restarts are the pool's, which knows when the region is mapped again.
        remote = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=2)(OffloadActor)
        self._actor = remote.options(
            scheduling_strategy=here,
            name=f"offload-{task.owner}-{task.actor}-{os.urandom(4).hex()}",
        ).remote(task.to_json())
        self._ray = ray
        try:
            about = ray.get(self._actor.about.remote(), timeout=CALL_TIMEOUT)
            self.pid = about["pid"]
            self.pidfd = os.pidfd_open(self.pid)
        except BaseException:
            self._kill()  # it may begin later, and nobody would end it
            raise

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return not _is_zombie(self.pid)

    def stop(self) -> None:
        self._kill()
        if not self._has_ended():
            with contextlib.suppress(OSError):  # it ends now, or is another user's
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self._has_ended()
        with contextlib.suppress(OSError):
            os.close(self.pidfd)

    def _kill(self) -> None:
        with contextlib.suppress(Exception):  # it has ended, or Ray has
            self._ray.kill(self._actor)

    def _has_ended(self) -> bool:
        """Whether its process has, after no more than STOP_TIMEOUT."""
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        return bool(ended.poll(STOP_TIMEOUT * 1000))


def is_installed() -> bool:
    """Whether Ray can be imported; does not import it."""
    return importlib.util.find_spec("ray") is not None


def connect() -> Any:
    """Ray, connected: the cluster of RAY_ADDRESS, else one on this machine's loopback alone.

    Raises:
        ValueError: ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "kind: 'ray' needs Ray, which is not installed; run: pip install 'vllm-sparse[ray]', "
            "or use kind 'process'"
        ) from error
    if ray.is_initialized():
        return ray
    settings: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**settings)
        logger.info("Joined the Ray cluster at %s.", os.environ["RAY_ADDRESS"])
        return ray
    _on_loopback()
    ray.init(address="local", include_dashboard=False, **settings)
    where = ray.util.get_node_ip_address()
    if not where.startswith("127."):
        ray.shutdown()
        raise RuntimeError(
            f"Ray would have listened on {where}, which others can reach; start a cluster yourself "
            "and name it in RAY_ADDRESS, or use kind 'process'"
        )
    logger.info("Started a Ray cluster on this machine, on its loopback address alone.")
    return ray


def _on_loopback() -> None:
    """Let a cluster that is started here be one of this machine alone.

    Ray replaces 127.0.0.1 by an address that others reach, and listens on all of them, unless
    clusters over several machines are switched off: by default on macOS and Windows, elsewhere by
    this variable, which it reads when it is imported (tried with Ray 2.60).
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    with contextlib.suppress(ImportError):
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False


def start(task: Task) -> RayHandle:
    """A Ray actor that serves a task."""
    return RayHandle(task)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
