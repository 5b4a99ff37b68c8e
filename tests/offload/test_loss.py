"""A host store that cannot be relied on any more is noticed, given up and made anew."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from pools import ask, fill, make_pool, queries

from vllm_sparse.cpu_offload import host_store, mirror, ring
from vllm_sparse.cpu_offload.host import StoreLost
from vllm_sparse.cpu_offload.mirror import HostKV
from vllm_sparse.cpu_offload.step import Start, Step
from vllm_sparse.kernels import cpu

native = pytest.mark.skipif(cpu.native_error() is not None, reason="needs the native kernels")


@native
def test_a_region_keeps_its_length():
    pool = make_pool(kind="process")
    slot = fill(pool, "a", 500)
    q = queries(1)
    want = ask(pool, 0, q, [slot], [0], [500])[0]
    path, size = pool.store.region.path, pool.store.region.nbytes
    for nbytes in (0, size - 4096, size + 4096):
        with pytest.raises(PermissionError):
            os.truncate(path, nbytes)
    assert os.stat(path).st_size == size
    assert torch.equal(ask(pool, 0, q, [slot], [0], [500])[0], want)
    pool.shutdown()


@native
def test_what_another_process_writes_over_the_tables_is_noticed():
    pool = make_pool(kind="process")
    slots = [fill(pool, name, 500) for name in "abc"]
    pool.close_request(slots[1])
    store = pool.store
    store.verify()

    def write(at: int, data: bytes) -> bytes:
        with open(store.region.path, "r+b", buffering=0) as file:
            file.seek(at)
            before = file.read(len(data))
            file.seek(at)
            file.write(data)
        return before

    pages = store.shape.table_at
    width = 4 * store.shape.max_pages
    for at, data, what in (
        (0, b"x", "the head"),
        (len(host_store.HEAD) - 1, b"x", "the head"),
        (pages + slots[0] * width, b"\x77", "the page lists"),
        (pages + slots[2] * width + width - 1, b"\x77", "the page lists"),
    ):
        before = write(at, data)
        with pytest.raises(StoreLost, match=what):
            store.verify()
        write(at, before)
        store.verify()
    pool.shutdown()


@native
def test_kernels_without_memory_lose_the_store(monkeypatch):
    pool = make_pool()
    slot = fill(pool, "a", 100)
    ticket = pool.submit(0, queries(1), [slot], [0], [100])
    monkeypatch.setattr(ring.load(pool.store.file), "vllm_sparse_ring_collect", lambda *a: 1)
    with pytest.raises(StoreLost, match="collect: out of memory"):
        pool.collect(ticket, torch.empty(1, 8, 64), torch.empty(1, 8))
    monkeypatch.setattr(ring.load(pool.store.file), "vllm_sparse_host_append", lambda *a: 1)
    rows = torch.zeros(1, 2, 64)
    with pytest.raises(StoreLost, match="append: out of memory"):
        pool.append(slot, 0, rows, rows)
    pool.shutdown()


def run_step(host: HostKV, request: str, rows: int, new: int) -> dict[str, int]:
    """A step that writes rows of one request, as the layers and the connector run it."""
    started = [Start(request, rows, [])] if request not in host.slots else []
    step = Step(
        started=started, rows={request: (rows, new)}, tails={request: (7,)},
        free_pages=host.pool.capacity().pages - -(-(rows + new) // 64),
    )  # fmt: skip
    host.begin(step)
    for layer in host.places if host.lost is None else ():
        host.append(layer, [request], [0, new], *torch.ones(2, new, 2, 64))
    host.check()
    return host.end()


def make_pools() -> list:
    return [make_pool(layers=n, host_bytes=n << 20) for n in (2, 1)]


def spoil(host: HostKV) -> None:
    host.pools[-1].store._memory[:1] = 0


def test_a_lost_store_is_said_once_and_renewed(caplog):
    host = HostKV([0, 2], [1], *make_pools())
    assert run_step(host, "a", 0, 10) == {"a": 10}
    ask(host.pool, 0, queries(1), [host.slots["a"][0]], [0], [10])
    read = host.totals()[0]["rows_read"]
    assert read == 20
    spoil(host)
    with caplog.at_level(logging.ERROR, "vllm_sparse.offload"):
        for _ in range(3):  # steps that were under way
            host.begin(Step(rows={"a": (10, 1)}, tails={"a": (7,)}))
            host.check()
            assert host.end() == {}
    assert [r.getMessage() for r in caplog.records] == [
        "The host store is lost: the head of the region was overwritten. Every request is computed "
        "again; 1 had rows there."
    ]
    before = host.pools
    host.renew(make_pools)
    assert host.lost is None and host.slots == {} and host.pools[0] is not before[0]
    assert run_step(host, "a", 0, 11) == {"a": 11}
    ask(host.pool, 0, queries(1), [host.slots["a"][0]], [0], [11])
    counters = host.totals()[0]
    assert counters["regions_lost"] == 1
    assert counters["rows_read"] == read + 22  # counters never fall
    host.shutdown()


def test_a_store_that_was_not_lost_is_emptied_and_kept():
    host = HostKV([0, 2], [1], *make_pools())
    run_step(host, "a", 0, 70)
    host.pool.name(host.slots["a"][0], 0, ["key"])
    before = host.pools
    assert host.pool.has(["key"]) == 1
    host.renew(make_pools)
    assert host.pools is before and host.slots == {} and host.pool.has(["key"]) == 0
    for pool in host.pools:
        capacity = pool.capacity()
        assert capacity.free_pages == capacity.pages
    assert run_step(host, "a", 0, 11) == {"a": 11}
    assert "regions_lost" not in host.totals()[0]
    host.shutdown()


def test_losses_without_end_are_an_error(monkeypatch):
    host = HostKV([0, 2], [1], *make_pools())
    now = 0.0
    monkeypatch.setattr(mirror.time, "monotonic", lambda: now)
    for _ in range(2 * mirror.MOST_LOSSES):
        spoil(host)
        host.verify()
        host.renew(make_pools)
        now += mirror.LOSSES_WITHIN / mirror.MOST_LOSSES  # as often as it may be
    now -= 1.5 * mirror.LOSSES_WITHIN / mirror.MOST_LOSSES
    spoil(host)
    with pytest.raises(RuntimeError, match="lost for the 4th time within 60 minutes: the head of"):
        host.verify()
    host.shutdown()


def test_a_new_store_that_finds_no_room_is_an_error_that_names_both():
    host = HostKV([0, 2], [1], *make_pools())
    spoil(host)
    host.verify()

    def no_room():
        raise MemoryError("host memory: no room")

    with pytest.raises(RuntimeError, match=r"lost \(the head .*\), and there is no new one: host"):
        host.renew(no_room)
    host.shutdown()
