"""The connector's scheduler's side, asked in the order in which vLLM's scheduler asks it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_sparse.cpu_offload.connector.messages import Acknowledged
from vllm_sparse.cpu_offload.connector.scheduler import SchedulerSide
from vllm_sparse.cpu_offload.step import Step

ROWS = 256  # of a page
LONGEST = 10 * ROWS


class Side:
    """It, and vLLM's books of requests: what a step is to compute counts when it is scheduled."""

    def __init__(self, pages: int):
        spec = SimpleNamespace(block_size=128)
        self.side = SchedulerSide(
            SimpleNamespace(
                model_config=SimpleNamespace(max_model_len=LONGEST),
                cache_config=SimpleNamespace(enable_prefix_caching=True),
            ),
            SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]),
        )
        self.side.set_stores([(pages, ROWS, 8)])
        self.side.hash_rows = ROWS
        self.side.manager = SimpleNamespace(get_block_ids=lambda request: (list(range(100)),))
        self.ledger = self.side.ledger

    def matched(self, request) -> int | None:
        rows = self.side.matched(request, 0)
        self.balanced()
        return rows

    def step(self, **scheduled: tuple) -> Step:
        """`scheduled`: request, rows that it finds, and new ones; by any name."""
        cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
        new = {}
        for request, found, count in scheduled.values():
            self.side.allocated(request, found)
            self.balanced()
            request.num_computed_tokens = request.num_computed_tokens or found
            cached.req_ids.append(request.request_id)
            cached.num_computed_tokens.append(request.num_computed_tokens)
            new[request.request_id] = count
            request.num_computed_tokens += count
        step = self.side.step(
            SimpleNamespace(
                scheduled_cached_reqs=cached, scheduled_new_reqs=[], num_scheduled_tokens=new
            )
        )
        self.balanced()
        return step

    def done(self, step: Step) -> None:
        rows = {request: before + new for request, (before, new) in step.rows.items()}
        self.side.acknowledge(step.number, rows)

    def balanced(self) -> None:
        assert 0 <= self.ledger.promised <= self.ledger.pages.free


def ask(name: str, pages: int, *, tokens: int = 0, resumable: bool = False) -> SimpleNamespace:
    """A request of so many pages and one token, which begins as all others do."""
    return SimpleNamespace(
        request_id=name, num_tokens=pages * ROWS + 1, num_prompt_tokens=pages * ROWS + 1,
        max_tokens=tokens, num_computed_tokens=0, resumable=resumable,
        skip_reading_prefix_cache=False, block_hashes=[bytes([n]) for n in range(pages)],
    )  # fmt: skip


def goes_on(side: Side, request, count: int) -> Step:
    """A step of one request that runs."""
    cached = SimpleNamespace(
        req_ids=[request.request_id], num_computed_tokens=[request.num_computed_tokens]
    )
    request.num_computed_tokens += count
    return side.side.step(
        SimpleNamespace(
            scheduled_cached_reqs=cached, scheduled_new_reqs=[],
            num_scheduled_tokens={request.request_id: count},
        )
    )  # fmt: skip


@pytest.mark.parametrize("how", ["told", "sees"])
def test_after_a_reset_nobody_has_more_than_there_is_room_for(how: str):
    """Two that share 6 pages want 8 each of 12 when those are forgotten: one waits."""
    side = Side(pages=12)
    a, b = ask("a", 6, tokens=2 * ROWS - 1), ask("b", 6, tokens=2 * ROWS - 1)
    assert side.matched(a) == 0
    side.done(side.step(a=(a, 0, 6 * ROWS)))
    assert side.matched(b) == 6 * ROWS
    side.done(side.step(b=(b, 6 * ROWS, 1)))
    assert side.ledger.pages.free == 5
    if how == "told":  # vLLM has preempted both by then
        a.num_computed_tokens = b.num_computed_tokens = 0
    side.side.reset_cache()
    a.num_computed_tokens = b.num_computed_tokens = 0
    side.balanced()
    assert side.side.forget
    assert (side.side.closed == ["a", "b"]) == (how == "told")
    if how == "sees":
        assert side.matched(a) is None  # it holds nothing any more, so that b can go on
        assert [(s.request, s.gone) for s in side.side.started] == [("a", True)]
        a, b = b, a
    assert side.matched(a) == 0
    step = side.step(a=(a, 0, 7 * ROWS))
    assert [s.request for s in step.started if not s.gone] == [a.request_id]
    assert side.matched(b) == 6 * ROWS  # what the other has written since
    side.step(b=(b, 6 * ROWS, ROWS))
    goes_on(side, a, ROWS)
    goes_on(side, b, ROWS)
    side.balanced()
    assert side.ledger.promised == 0 and side.ledger.pages.free == 2


def test_a_step_that_was_under_way_brings_no_row_of_old_weights_back():
    side = Side(pages=20)
    request = ask("a", 6)
    assert side.matched(request) == 0
    side.done(side.step(a=(request, 0, 4 * ROWS)))
    under_way = goes_on(side, request, ROWS)
    request.num_computed_tokens = 0  # preempted
    assert side.side.matched(request, 0) == 4 * ROWS
    side.side.reset_cache()
    side.done(under_way)
    assert side.matched(request) == 0
    step = side.step(a=(request, 0, ROWS))
    side.done(under_way)
    assert side.side.acknowledged("a") == 0
    side.done(step)
    assert side.side.acknowledged("a") == ROWS


def test_one_that_runs_through_a_reset_does_not_count_steps_before_it():
    side = Side(pages=20)
    request = ask("a", 6)
    under_way = side.step(a=(request, 0, 4 * ROWS))
    side.side.reset_cache()
    side.done(under_way)
    assert side.side.acknowledged("a") == 0
    assert goes_on(side, request, 2 * ROWS).keys == {}  # they follow from rows of old weights
    request.num_computed_tokens = 0  # preempted later
    assert side.matched(request) == 0
    assert len(side.step(a=(request, 0, 6 * ROWS)).keys["a"]) == 6


def test_of_several_workers_the_earliest_step_counts():
    both = Acknowledged({"a": 3, "b": 1}, number=7).aggregate(Acknowledged({"a": 2}, True, 6))
    assert (both.rows, both.lost, both.number) == ({"a": 2}, True, 6)


def test_a_session_goes_on_where_it_is():
    side = Side(pages=20)
    session, other = ask("s", 2, resumable=True), ask("o", 2, tokens=8 * ROWS - 1)
    assert side.matched(session) == 0
    side.done(side.step(s=(session, 0, 2 * ROWS + 1)))
    # All that it may ever be asked is promised: no input of it has to wait for room.
    assert side.ledger.promised == 7
    side.done(goes_on(side, session, 1))
    assert side.matched(other) == 2 * ROWS
    assert side.ledger.promised + side.ledger.pages.free == 24
    # vLLM does not ask what the host has: the device has it. One row was computed too many.
    under_way = goes_on(side, session, 1)
    session.num_computed_tokens -= 1
    rows = session.num_computed_tokens
    step = side.step(s=(session, 0, ROWS))
    (start,) = step.started
    assert (start.request, start.rows, start.on_device, start.blocks) == ("s", rows, True, ())
    assert step.rows == {"s": (rows, ROWS)}
    side.done(under_way)
    assert side.side.acknowledged("s") == rows
    side.done(step)
    assert side.side.acknowledged("s") == rows + ROWS
    # Without a row too many there is nothing to cut.
    step = side.step(s=(session, 0, 10))
    assert step.started == [] and step.rows == {"s": (rows + ROWS, 10)}
