"""The scheduler's books of the host stores: never more than fits, the same keys as the workers'."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_sparse.cpu_offload.ledger import Ledger
from vllm_sparse.cpu_offload.mirror import HostKV
from vllm_sparse.cpu_offload.pool import Pool
from vllm_sparse.cpu_offload.step import Start, Step

ROWS = 16  # of a page
LAYERS = 3


def test_a_request_is_admitted_with_all_that_it_may_need():
    ledger = Ledger(10, ROWS, 8)
    assert ledger.fits(10 * ROWS) and not ledger.fits(10 * ROWS + 1)
    ledger.admit("a", 4 * ROWS)
    assert ledger.pages.free == 10 and ledger.promised == 4  # nothing is written yet
    assert ledger.fits(6 * ROWS) and not ledger.fits(7 * ROWS)
    ledger.append("a", ROWS + 1)
    assert ledger.pages.free == 8 and ledger.promised == 2
    assert ledger.fits(6 * ROWS) and not ledger.fits(7 * ROWS)
    ledger.close("a")
    assert ledger.promised == 0 and ledger.fits(10 * ROWS)


def test_there_are_only_so_many_slots():
    ledger = Ledger(10, ROWS, 2)
    ledger.admit("a", 1)
    ledger.admit("b", 1)
    assert not ledger.fits(1)
    ledger.close("a")
    assert ledger.fits(1)


def test_a_shared_prefix_counts_once():
    ledger = Ledger(4, ROWS, 8)
    ledger.admit("a", 3 * ROWS)
    ledger.append("a", 2 * ROWS)
    ledger.seal("a", 0, ["x", "y"])
    assert ledger.found(["x", "y", "z"]) == 2
    assert not ledger.fits(3 * ROWS)
    assert not ledger.fits(3 * ROWS, ["x"])
    assert ledger.fits(3 * ROWS, ["x", "y"])
    ledger.close("a")
    # Nobody holds them now: whoever takes them over takes two free pages.
    assert ledger.fits(4 * ROWS, ["x", "y"]) and not ledger.fits(5 * ROWS, ["x", "y"])
    ledger.forget()
    assert ledger.found(["x"]) == 0 and ledger.pages.free == 4


def test_asking_whether_it_fits_changes_nothing():
    ledger = Ledger(2, ROWS, 8)
    for name in "ab":
        ledger.admit(name, ROWS)
        ledger.append(name, ROWS)
        ledger.seal(name, 0, [name])
        ledger.close(name)
    ledger.fits(ROWS, ["a"])
    ledger.admit("c", ROWS)
    ledger.append("c", ROWS)  # takes the page that was used least recently
    assert ledger.found(["a"]) == 0 and ledger.found(["b"]) == 1


def test_a_page_that_others_hold_is_not_free_when_one_drops_it():
    ledger = Ledger(8, ROWS, 8)
    ledger.admit("a", 4 * ROWS)
    ledger.append("a", 3 * ROWS)
    ledger.seal("a", 0, ["x", "y", "z"])
    ledger.admit("b", 6 * ROWS, ["x", "y", "z"])
    assert ledger.pages.free == 5 and ledger.promised == 4
    ledger.forget()
    assert ledger.can_truncate("a", 2 * ROWS) and not ledger.can_truncate("a", ROWS)
    ledger.truncate("a", 2 * ROWS)
    assert ledger.pages.free == ledger.promised == 5
    assert not ledger.can_truncate("b", 0)
    ledger.close("a")
    assert ledger.can_truncate("b", 0)


def test_rows_in_the_middle_of_a_page_can_go():
    ledger = Ledger(4, ROWS, 8)
    ledger.admit("a", 4 * ROWS)
    ledger.append("a", 2 * ROWS + 1)
    ledger.truncate("a", 2 * ROWS - 1)
    assert ledger.pages.free == 2 == ledger.promised
    ledger.append("a", 2)
    assert ledger.held["a"].rows == 2 * ROWS + 1 and ledger.pages.free == 1 == ledger.promised


def test_steps_that_were_under_way_acknowledge_nothing_of_what_follows():
    ledger = Ledger(8, ROWS, 8)
    ledger.admit("a", 8 * ROWS)
    ledger.append("a", 4 * ROWS)
    ledger.number = 1
    ledger.append("a", ROWS)
    ledger.number = 2
    ledger.acknowledge(0, {"a": 4 * ROWS, "ended": 1})
    assert ledger.held["a"].acknowledged == 4 * ROWS
    ledger.forget()
    ledger.acknowledge(1, {"a": 5 * ROWS})
    assert ledger.held["a"].acknowledged == 0
    ledger.truncate("a", 0)
    ledger.append("a", ROWS)
    ledger.number = 3
    ledger.acknowledge(2, {"a": ROWS})
    assert ledger.held["a"].acknowledged == ROWS


def pool(layers: int, pages: int) -> Pool:
    shape = {"heads": 1, "kv_heads": 1, "head_size": 16, "dtype": torch.float32}
    return Pool(
        layers=layers, host_bytes=pages * layers * ROWS * 2 * 16 * 4, page_rows=ROWS,
        max_requests=8, max_tokens=1024, **shape,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_books_and_stores_agree_over_random_schedules(seed: int):
    """Arrivals, shared prefixes, preemptions, sessions, resets, ends: the store has what the ledger
    says, `HostKV` checks the number of free pages after each step, and what is promised is there.
    What a step has written is acknowledged when others are under way already."""
    rng = random.Random(seed)
    pages = rng.randint(6, 20)
    ledger = Ledger(pages, ROWS, 8)
    host = HostKV([0, 2], [1], pool(2, pages), pool(1, pages))
    texts = {}  # of every request that ever was: what stands at each position
    running: list[str] = []
    preempted: list[str] = []
    begin: list[str] = []  # those that hold nothing, and wait for room
    closed: list[str] = []
    acknowledged: list[tuple[int, dict[str, int]]] = []  # by steps that are under way
    rows_of = {}

    def kept() -> None:
        assert 0 <= ledger.promised <= ledger.pages.free

    def key(name: str, page: int) -> tuple:
        return tuple(texts[name][: (page + 1) * ROWS])

    for number in range(60):
        started: list[Start] = []
        for name in list(running):
            if rng.random() < 0.15:
                running.remove(name)
                if rng.random() < 0.5:
                    preempted.append(name)
                else:
                    ledger.close(name)
                    closed.append(name)
                kept()
        forget = rng.random() < 0.1
        if forget:
            if rng.random() < 0.7:
                preempted += running
                running.clear()
            ledger.forget()
            kept()
            if rng.random() < 0.5:  # else they see for themselves whether there is room
                for name in preempted:
                    ledger.close(name)
                    kept()
                closed += preempted
                begin += preempted
                preempted.clear()
        for name in list(running):
            # A session's turn ends: the last row, of a token that is not kept, goes.
            if rng.random() < 0.1 and rows_of[name] % ROWS:
                rows_of[name] -= 1
                ledger.truncate(name, rows_of[name])
                started.append(Start(name, rows_of[name], [], on_device=True))
                kept()
        for name in list(preempted):
            if rng.random() < 0.5:
                preempted.remove(name)
                rows = ledger.held[name].acknowledged // ROWS * ROWS
                if not ledger.can_truncate(name, rows):
                    ledger.close(name)
                    started.append(Start(name, 0, [], gone=True))
                    begin.append(name)
                    kept()
                    continue
                running.append(name)
                ledger.truncate(name, rows)
                rows_of[name] = rows
                started.append(Start(name, rows, []))
                kept()
        if rng.random() < 0.6:
            name = f"r{number}"
            donor = rng.choice([*texts, None])
            shared = texts[donor][: rng.randrange(len(texts[donor]))] if donor else []
            texts[name] = shared + [rng.randrange(1 << 30) for _ in range(rng.randint(1, 60))]
            begin.append(name)
        for name in list(begin):
            keys = [key(name, i) for i in range((len(texts[name]) - 1) // ROWS)]
            keys = keys[: ledger.found(keys)]
            if ledger.fits(len(texts[name]), keys):
                begin.remove(name)
                ledger.admit(name, len(texts[name]), keys)
                rows_of[name] = len(keys) * ROWS
                started.append(Start(name, rows_of[name], keys))
                running.append(name)
                kept()
        step = Step(number, forget=forget, closed=closed, started=started)
        closed = []
        for i, name in enumerate(running):
            new = min(rng.choice([1, 1, 5, 40]), len(texts[name]) - rows_of[name])
            if new == 0:
                continue
            step.rows[name] = rows_of[name], new
            step.tails[name] = (100 + i,)
            ledger.append(name, new)
            kept()
        for name, (before, new) in step.rows.items():
            names = [key(name, i) for i in range(before // ROWS, (before + new) // ROWS)]
            if names:
                step.keys[name] = names
                ledger.seal(name, before // ROWS, names)
                kept()
        ledger.number += 1
        step.free_pages = ledger.pages.free
        host.begin(step)
        order = list(step.rows)
        rng.shuffle(order)  # the worker's batch has an order of its own
        starts = [0]
        values = []
        for name in order:
            before, new = step.rows[name]
            starts.append(starts[-1] + new)
            values += texts[name][before : before + new]
            rows_of[name] = before + new
        tails = [step.tails[name][0] for name in order]
        assert host.requests(0, tails) == order
        for layer in (0, 1, 2):
            k = torch.tensor(values, dtype=torch.float32)[:, None, None].expand(-1, 1, 16) + layer
            host.append(layer, order, starts, k, -k)
        host.check()
        assert host.end() == {n: a + b for n, (a, b) in step.rows.items()}
        acknowledged.append((number, host.end()))
        while len(acknowledged) > rng.randrange(3):
            ledger.acknowledge(*acknowledged.pop(0))
            kept()
        # Every row of everyone is what stands there, in every layer.
        for name in running:
            for layer, place in host.places.items():
                slot = host.slots[name][place.store]
                k, v = host.pools[place.store].read(slot, place.layer, 0, rows_of[name])
                want = torch.tensor(texts[name][: rows_of[name]], dtype=torch.float32) + layer
                assert torch.equal(k[:, 0, 0], want)
                assert torch.equal(v[:, 0, 0], -want)


def test_a_fault_of_ours_is_said_and_not_served():
    host = HostKV([0], [], pool(1, 4), None)
    host.begin(Step(started=[Start("a", 0, [])], rows={"a": (0, 2)}, tails={"a": (5,)}))
    rows = torch.zeros(2, 1, 16)
    with pytest.raises(RuntimeError, match=r"gets 1 more, where the scheduler counts 0 and 2"):
        host.append(0, ["a"], [0, 1], rows, rows)
    host.append(0, ["a"], [0, 2], rows, rows)
    with pytest.raises(RuntimeError, match=r"has 2 rows .* counts 0 and 2"):
        host.append(0, ["a"], [0, 2], rows, rows)
    with pytest.raises(RuntimeError, match=r"\[3\] free pages, the scheduler counts 0"):
        host.check()
    with pytest.raises(RuntimeError, match=r"0 rows of a prefix .* counts on 16"):
        host.begin(Step(started=[Start("b", 16, ["x"])]))
