"""Which CPUs and which memory an actor gets, on machines with several NUMA nodes and with one."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from pools import ask, fill, make_pool, queries

from vllm_sparse.cpu_offload import numa, worker
from vllm_sparse.kernels import cpu

native = pytest.mark.skipif(cpu.native_error() is not None, reason="needs the native kernels")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with these CPUs on each node."""

    def make(*lists: str) -> None:
        for number, cpus in enumerate(lists):
            folder = tmp_path / f"node{number}"
            folder.mkdir()
            (folder / "cpulist").write_text(cpus + "\n")
        monkeypatch.setattr(numa, "FOLDER", tmp_path)

    return make


def in_a_thread(work):
    """What work() gives in a thread of its own, whose policy ends with it."""
    got: list = []

    def run() -> None:
        try:
            got.append(work())
        except OSError as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    if isinstance(got[0], OSError):
        raise got[0]
    return got[0]


@pytest.fixture
def allowed():
    """A node that memory may come from, where the system lets itself be told."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next((x for x in status if x.startswith("Mems_allowed_list:")), "")
    nodes = numa.parse(line.partition(":")[2])
    try:
        in_a_thread(lambda: numa.bind(sorted(nodes)))
    except PermissionError:  # some containers
        pytest.skip("set_mempolicy is not allowed here")
    return min(nodes)


def test_lists_as_the_system_writes_them():
    assert numa.parse("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert numa.parse("\n") == set()


def test_nodes(machine):
    machine("0-3,8-11", "4-7,12-15", "")  # the last has memory alone
    assert numa.nodes() == {0: {0, 1, 2, 3, 8, 9, 10, 11}, 1: {4, 5, 6, 7, 12, 13, 14, 15}}
    assert numa.by_node([3, 4, 9, 99]) == [[3, 9], [4], [99]]
    assert numa.memory_of([3, 9]) == [0] and numa.memory_of([3, 4]) == [0, 1]
    assert numa.memory_of([]) == []


def test_this_machine_s_nodes_hold_this_thread_s_cpus():
    known = numa.nodes()
    assert not known or os.sched_getaffinity(0) <= set().union(*known.values())


@pytest.mark.parametrize(
    "cpus, actors, expected",
    [
        (range(2, 8), 2, [[2, 3], [4, 5, 6, 7]]),
        (range(8), 3, [[0, 2], [4, 5, 6, 7], [1, 3]]),
        (range(8), 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([1], 2, [[1], []]),
        ([], 2, [[], []]),
    ],
)
def test_actors_do_not_straddle_nodes(machine, cpus, actors, expected):
    machine("0-3", "4-7")
    assert numa.divide(cpus, actors) == expected


def test_without_nodes_cpus_are_dealt_out(machine):
    machine()
    assert numa.divide(range(5), 2) == [[0, 2, 4], [1, 3]]
    assert numa.by_node([1, 0]) == [[0, 1]]


def test_one_node_is_said_once_and_binds_nothing(machine, caplog):
    machine("0-3")
    numa._say_once.cache_clear()
    with caplog.at_level(logging.DEBUG, "vllm_sparse.offload"):
        assert numa.memory_of([0]) == numa.memory_of([1]) == []
    assert [r.getMessage() for r in caplog.records] == [
        "This machine has one NUMA node: actors' memory is not bound."
    ]


def test_memory_is_bound_as_the_kernel_says(allowed):
    def bound():
        before = numa.policy()
        numa.bind([allowed])
        inherited: list = []
        thread = threading.Thread(target=lambda: inherited.append(numa.policy()))
        thread.start()
        thread.join(20)
        inside = numa.policy()
        numa.bind([])
        return before, inside, inherited, numa.policy()

    here = numa.policy()
    _, inside, inherited, after = in_a_thread(bound)
    assert inside == (numa.BIND, [allowed]) and inherited == [inside]
    assert after == (numa.DEFAULT, [])
    assert numa.policy() == here  # of this thread


def test_a_node_that_is_not_there_is_an_error(allowed):
    with pytest.raises(OSError, match="Invalid argument"):
        in_a_thread(lambda: numa.bind([numa.MOST_NODES - 1]))


def test_an_unknown_machine_is_an_error(monkeypatch):
    monkeypatch.setattr(numa.platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="not known for vax"):
        numa.bind([0])


def policies(pid: int) -> set[str]:
    """From where a process's memory comes, by what the kernel says of its main thread; but for
    shared memory, such as the region, which has a policy of its own ("local")."""
    try:
        lines = Path(f"/proc/{pid}/numa_maps").read_text().splitlines()
    except OSError:
        pytest.skip("a kernel without numa_maps")
    return {line.split()[1] for line in lines} - {"local"}


@native
def test_an_actor_binds_itself(monkeypatch, allowed):
    cpus = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(numa, "nodes", lambda: {allowed: set(cpus[:1]), 999: {4095}})
    pool = make_pool(kind="process", actors=2, cpus=[cpus[:1], []])
    bound, free = (handle.pid for handle in pool._actors._handles)
    slot = fill(pool, "a", 500)
    ask(pool, 0, queries(1), [slot], [0], [500])
    assert policies(bound) == {f"bind:{allowed}"} and os.sched_getaffinity(bound) == {cpus[0]}
    assert policies(free) == policies(os.getpid())
    pool.shutdown()


@native
def test_an_actor_that_may_not_bind_says_so_and_serves(monkeypatch, capfd, allowed):
    cpus = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(numa, "nodes", lambda: {1000: set(cpus[:1]), 999: {4095}})
    pool = make_pool(kind="process", cpus=[cpus[:1]])
    slot = fill(pool, "a", 500)
    out, _ = ask(pool, 0, queries(1), [slot], [0], [500])
    assert torch.isfinite(out).all()
    pool.shutdown()
    said = capfd.readouterr().err
    assert "Actor 0 of the offload pool takes memory from any NUMA node instead of [1000]" in said


@native
def test_the_worker_s_own_threads_keep_their_policy(monkeypatch, allowed):
    cpus = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(numa, "nodes", lambda: {allowed: set(cpus[:1]), 999: {4095}})
    before, seen = numa.policy(), []
    settle = worker.Server._settle

    def settle_and_look(self):
        settle(self)
        seen.append((numa.policy(), os.sched_getaffinity(0)))

    monkeypatch.setattr(worker.Server, "_settle", settle_and_look)
    pool = make_pool(kind="thread", cpus=[cpus[:1]])
    assert seen == [((numa.BIND, [allowed]), {cpus[0]})]
    assert numa.policy() == before and sorted(os.sched_getaffinity(0)) == cpus
    pool.shutdown()
