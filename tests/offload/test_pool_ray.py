"""Ray actors as answerers; skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from pools import ask, fill, make_pool, queries

from vllm_sparse.cpu_offload import actor
from vllm_sparse.kernels import cpu


def test_a_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-sparse\[ray\]'"):
        make_pool(kind="ray")


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    if cpu.native_error() is not None:
        pytest.skip("needs the native kernels")
    before = {k: os.environ.get(k) for k in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    os.environ.pop("RAY_ADDRESS", None)
    actor.connect()
    yield ray
    ray.shutdown()
    for key, value in before.items():
        if value is not None:
            os.environ[key] = value


def test_ray_actors_answer_die_and_come_back(cluster):
    pool = make_pool(kind="ray", actors=2, sampler="lsh")
    slots = [fill(pool, str(i), 5000, seed=i) for i in range(4)]
    q = queries(4)
    inline = make_pool(sampler="lsh")
    same = [fill(inline, str(i), 5000, seed=i) for i in range(4)]
    want = ask(inline, 1, q, same, [3] * 4, [4900] * 4)
    for _ in range(20):
        out, lse = ask(pool, 1, q, slots, [3] * 4, [4900] * 4)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert pool.stats()["items_own"] < pool.stats()["items"]
    handles = pool._actors._handles
    assert len({h.pid for h in handles}) == 2 and os.getpid() not in {h.pid for h in handles}
    about = cluster.get(handles[0]._actor.about.remote())
    assert about["serving"] and about["error"] is None
    worst, end = 0.0, time.monotonic() + 60
    os.kill(handles[0].pid, signal.SIGKILL)
    while pool.stats()["restarts"] < 1:
        assert time.monotonic() < end
        start = time.monotonic()
        out, lse = ask(pool, 1, q, slots, [3] * 4, [4900] * 4)
        worst = max(worst, time.monotonic() - start)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
        pool.look()
    assert worst < 2.0
    left = [h.pid for h in pool._actors._handles]
    pool.shutdown()
    inline.shutdown()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < end
        time.sleep(0.05)


def listening(table: str) -> dict[str, str]:
    """Inode -> address of the sockets of /proc/net/TABLE that listen."""
    lines = [line.split() for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    return {fields[9]: fields[1].rpartition(":")[0] for fields in lines if fields[3] == "0A"}


def test_the_local_cluster_listens_on_loopback_alone(cluster):
    addresses = {**listening("tcp"), **listening("tcp6")}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"/ray/core/" not in command and not command.startswith(b"ray::"):
                continue
            for link in (process / "fd").iterdir():
                name = os.readlink(link)
                if name.startswith("socket:["):
                    found.add(addresses.get(name[8:-1]))
        except OSError:
            continue
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    found.discard(None)
    assert found and found <= loopback
    assert os.environ.get("RAY_AUTH_MODE") != "disabled"
