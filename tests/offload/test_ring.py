"""Questions and answers in shared memory: late threads, numbers that begin anew, stray writes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pools import ask, fill, make_pool, queries, some

from vllm_sparse.cpu_offload import ring, worker
from vllm_sparse.cpu_offload.host import StoreLost
from vllm_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.native_error() is not None, reason="needs the native kernels")

OUT, LSE = (1, 8, 64), (1, 8)


def test_a_late_thread_does_not_write_over_the_answer_of_another(monkeypatch):
    # Slow kernels, so that an item takes long enough to do all of this beside it.
    monkeypatch.setattr(
        worker.Task, "with_threads", lambda task, n: replace(task, threads=n, isa="generic")
    )
    rows, few = 300_000, 5000
    pool = make_pool(
        kind="process", threads=2, layers=1, kv_heads=1, sampler="vattention", deadline_s=0.01,
        sampler_options={"epsilon": 0.02}, max_tokens=rows, host_bytes=256 << 20, page_rows=256,
    )  # fmt: skip
    pool._ring.set_isa("generic")
    try:
        slots = [fill(pool, str(n), n, seed=n) for n in (rows, few)]
        q = queries(2)
        asked = [(0, q[b : b + 1], slots[b : b + 1], [0], [n]) for b, n in enumerate((rows, few))]
        start = time.monotonic()
        want = ask(pool, *asked[0])[0]
        takes = time.monotonic() - start
        later = ask(pool, *asked[1])
        (handle,) = pool._actors._handles
        out, lse = torch.empty(OUT), torch.empty(LSE)
        for turn in range(8):
            ticket = pool.submit(*asked[0])
            time.sleep(0.1 * takes)
            os.kill(handle.pid, signal.SIGSTOP)  # a thread is in the long item
            pool.collect(ticket, out, lse)
            assert torch.equal(out, want)
            pool.collect(pool.submit(*asked[1]), out, lse)
            ticket = pool.submit(*asked[1])  # in the slot of the long item, as item 0 too
            os.kill(handle.pid, signal.SIGCONT)
            # The other thread answers this at once, and the late one goes on with its item.
            time.sleep(takes * (0.1 + 0.05 * turn))
            pool.collect(ticket, out, lse)
            assert torch.equal(out, later[0]) and torch.equal(lse, later[1])
            time.sleep(takes * (1.0 - 0.05 * turn))  # until it has ended
        assert pool.stats()["items_rescued"] >= 4
    finally:
        pool._ring.set_isa("")
        pool.shutdown()


def test_many_threads_answer_and_are_started_again():
    pool = make_pool(kind="process", threads=5, actors=2)
    slots = [fill(pool, str(n), 1000 + n, seed=n) for n in range(8)]
    q = queries(8)
    last = [1000 + n for n in range(8)]
    want = ask(pool, 0, q, slots, [0] * 8, last)
    for turn in range(300):
        if turn in (50, 150):
            for handle in pool._actors._handles:
                if handle is not None:
                    os.kill(handle.pid, signal.SIGKILL)
        out, lse = ask(pool, turn % 2, q, slots, [0] * 8, last)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
        pool.look()
    pool.shutdown()


def test_no_actor_has_more_threads_than_there_is_memory_for():
    pool = make_pool(kind="thread", threads=10_000, max_tokens=256, max_requests=1)
    (handle,) = pool._actors._handles
    assert handle._server.task.threads == ring.MOST_THREADS
    slot = fill(pool, "a", 100)
    assert ask(pool, 0, queries(1), [slot], [0], [100])[0].isfinite().all()
    pool.shutdown()


@pytest.mark.parametrize("kind", ["inline", "process"])
def test_ticket_numbers_begin_anew(kind):
    pool = make_pool(kind=kind, deadline_s=10.0)
    slots = [fill(pool, str(n), 500 - 100 * n, seed=n) for n in range(2)]
    q = queries(2)
    asked = [(0, q[b : b + 1], slots[b : b + 1], [0], [500 - 100 * b]) for b in range(2)]
    want = [ask(pool, *a) for a in asked]
    published = ctypes.c_uint32.from_address(pool._ring._ring.memory)
    published.value = 0xFFFFFFFA
    numbers = []
    for _ in range(6):
        tickets = [pool.submit(*a) for a in asked]
        for ticket, (w, e) in zip(tickets, want, strict=True):
            out, lse = torch.empty(OUT), torch.empty(LSE)
            pool.collect(ticket, out, lse)
            assert torch.equal(out, w) and torch.equal(lse, e)
            numbers.append(ticket.number)
    assert numbers == [*range(0xFFFFFFFB, 1 << 32), *range(2, 9)]
    assert pool.stats()["items_rescued"] == 0
    pool.shutdown()


def test_an_open_ticket_is_not_written_over():
    pool = make_pool(layers=1)
    slots = [fill(pool, str(n), 500 - 100 * n, seed=n) for n in range(2)]
    q = queries(2)
    asked = [(0, q[b : b + 1], slots[b : b + 1], [0], [500 - 100 * b]) for b in range(2)]
    want = [ask(pool, *a)[0] for a in asked]
    first, second = (pool.submit(*a) for a in asked)
    out, lse = torch.empty(OUT), torch.empty(LSE)
    pool.collect(second, out, lse)
    assert torch.equal(out, want[1])
    with pytest.raises(RuntimeError, match="collect the ticket before the last one first"):
        pool.submit(*asked[1])
    pool.collect(first, out, lse)
    assert torch.equal(out, want[0])
    assert torch.equal(ask(pool, *asked[1])[0], want[1])
    pool.shutdown()


@pytest.mark.parametrize("kind", ["inline", "process"])
@pytest.mark.parametrize("sampler", ["exact", "topk", "vattention", "lsh"])
def test_a_page_number_that_is_none_loses_the_store(kind, sampler):
    pool = make_pool(kind=kind, sampler=sampler, layers=1)
    slot, other = fill(pool, "a", 5000), fill(pool, "b", 300)
    q = queries(1)
    want = ask(pool, 0, q, [slot], [0], [5000])
    table = pool.store._table
    for at, number in (
        (0, 0x7FFFFFFF),
        (5000 // 64, -1),
        (1, pool.capacity().pages),
        (40, -(2**31)),
    ):
        before, table[slot, at] = table[slot, at], number
        ticket = pool.submit(0, q, [slot], [0], [5000])
        time.sleep(0.1 if kind == "process" else 0.0)  # an actor looks at it first
        with pytest.raises(StoreLost, match="collect: the page lists"):
            pool.collect(ticket, torch.empty(OUT), torch.empty(LSE))
        # Nobody else's rows are asked for, and what lies before and behind is not looked at.
        assert ask(pool, 0, q, [other], [0], [300])[0].isfinite().all()
        table[slot, at] = before
        out, lse = ask(pool, 0, q, [slot], [0], [5000])
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    stats = pool.stats()
    assert stats["actors"] == (kind == "process") and stats["restarts"] == 0
    pool.shutdown()


@pytest.mark.parametrize("sampler", ["exact", "vattention"])
def test_nothing_is_written_to_a_page_that_is_none(sampler):
    pool = make_pool(sampler=sampler, layers=1)
    slot = fill(pool, "a", 128)
    pool.reserve(slot, 200)
    table = pool.store._table
    before = pool.part(0).clone()
    # The page that the rows go to, and the one whose mean it takes over.
    for at, number in ((2, 0x7FFFFFFF), (2, -1), (1, pool.capacity().pages)):
        kept, table[slot, at] = table[slot, at], number
        with pytest.raises(StoreLost, match="append: the page lists"):
            pool.append(slot, 0, *some(3))
        with pytest.raises(StoreLost, match="page lists"):
            pool.store.verify()
        table[slot, at] = kept
    assert torch.equal(pool.part(0), before) and pool.length(slot, 0) == 128
    pool.append(slot, 0, *some(3))
    assert pool.length(slot, 0) == 131
    pool.shutdown()


def test_a_question_that_was_written_over_loses_the_store():
    pool = make_pool(layers=1)
    slot = fill(pool, "a", 300)
    ticket = pool.submit(0, queries(1), [slot], [0], [300])
    memory = pool._ring._ring.memory
    asked = ctypes.string_at(memory, 1 << 16)
    last = asked.index((300).to_bytes(8, "little"))
    ctypes.c_int64.from_address(memory + last).value = 1 << 40
    with pytest.raises(StoreLost, match="questions in the region"):
        pool.collect(ticket, torch.empty(OUT), torch.empty(LSE))
    pool.shutdown()


FORKS = """
import os, sys, time
sys.path.insert(0, {helpers!r})
from pools import ask, fill, make_pool, queries
pool = make_pool(kind="process")
slot = fill(pool, "a", 1000)
child = os.fork()
if child == 0:
    sys.exit(0)  # with all finalizers
os.waitpid(child, 0)
time.sleep(0.5)
before, end = pool._ring.answered(0), time.monotonic() + 10
while pool._ring.answered(0) == before and time.monotonic() < end:
    ticket = pool.submit(0, queries(1), [slot], [0], [1000])
    time.sleep(0.01)
    import torch
    pool.collect(ticket, torch.empty(1, 8, 64), torch.empty(1, 8))
    pool.look()
print(pool.stats()["actors"], pool.stats()["restarts"], pool._ring.answered(0) > before)
pool.shutdown()
"""


def test_a_forked_child_that_ends_leaves_the_pool_alone():
    helpers = str(Path(__file__).parent.parent / "helpers")
    got = subprocess.run(
        [sys.executable, "-c", FORKS.format(helpers=helpers)], capture_output=True, text=True,
        cwd="/", timeout=100,
    )  # fmt: skip
    assert got.returncode == 0, got.stderr
    assert got.stdout.split() == ["1", "0", "True"], got.stderr
