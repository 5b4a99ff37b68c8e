"""Which pattern a head gets from errors and costs."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_sparse.patterns import HeadPattern
from vllm_sparse.search.candidates import DEFAULT, DENSE, candidates, plan_class
from vllm_sparse.search.choose import Candidate, Goal, GoalError, choose, layer_candidates
from vllm_sparse.search.cost import PLANNED, Costs
from vllm_sparse.search.evaluate import Scores, causal_blocks

WINDOW = HeadPattern(kind="a_shape", sink=64, window=64)
BLOCKS = HeadPattern(kind="block_sparse", blocks=8)
COLUMNS = HeadPattern(kind="vertical_slash", vertical=64, slash=64)


def candidate(
    pattern: HeadPattern, error: float, time: float, worst: float = 0.0, last: float = 0.0
) -> Candidate:
    return Candidate(pattern, error, worst, last, density=time, time=time, seconds=time)


DENSE_ONE = candidate(DENSE, 0.0, 1.0)


def chosen(*found: Candidate, error: float | None = 0.03, budget: float | None = None) -> str:
    return choose([*found, DENSE_ONE], Goal(error, budget), DEFAULT).chosen.pattern.kind


def test_the_cheapest_within_the_bound_is_taken():
    assert chosen(candidate(WINDOW, 0.2, 0.1), candidate(BLOCKS, 0.02, 0.3)) == "block_sparse"
    assert chosen(candidate(WINDOW, 0.03, 0.1), candidate(BLOCKS, 0.02, 0.3)) == "a_shape"


def test_dense_where_none_meets_the_bound_or_all_that_do_cost_more():
    assert chosen(candidate(WINDOW, 0.04, 0.1)) == "dense"
    assert chosen(candidate(COLUMNS, 0.0, 1.2)) == "dense"
    assert chosen(candidate(COLUMNS, 0.001, 0.85)) == "dense"  # saves too little
    assert chosen(candidate(COLUMNS, 0.001, 0.75)) == "vertical_slash"


def test_an_error_in_a_few_rows_counts():
    few = candidate(WINDOW, 0.01, 0.1, worst=0.2)
    assert chosen(few, candidate(BLOCKS, 0.01, 0.3, worst=0.1)) == "block_sparse"
    # In the last rows, where questions stand, it counts for all.
    asked = candidate(WINDOW, 0.01, 0.1, worst=0.1, last=0.1)
    assert chosen(asked, candidate(BLOCKS, 0.01, 0.3, worst=0.1, last=0.02)) == "block_sparse"


def test_of_ties_the_least_error_and_then_the_simplest():
    tied = (candidate(COLUMNS, 0.0101, 0.101), candidate(WINDOW, 0.0104, 0.1))
    choice = choose([*tied, DENSE_ONE], Goal(), DEFAULT)
    assert choice.chosen.pattern == WINDOW
    assert [t.pattern for t in choice.tied] == [COLUMNS]
    assert chosen(candidate(COLUMNS, 0.001, 0.102), candidate(WINDOW, 0.02, 0.1)) == (
        "vertical_slash"
    )
    # 4% dearer is no tie.
    assert chosen(candidate(COLUMNS, 0.001, 0.104), candidate(WINDOW, 0.02, 0.1)) == "a_shape"


def test_within_a_budget_the_least_error():
    found = (candidate(WINDOW, 0.2, 0.1), candidate(BLOCKS, 0.1, 0.3), candidate(COLUMNS, 0, 0.6))
    assert chosen(*found, error=None, budget=0.4) == "block_sparse"
    assert chosen(*found, error=None, budget=0.7) == "vertical_slash"
    assert chosen(*found, error=None, budget=0.01) == "a_shape"  # the cheapest of all


@pytest.mark.parametrize("error, budget", [(None, None), (0.1, 0.1), (0, None), (None, 1.5)])
def test_a_goal_is_one_of_the_two_and_a_share(error, budget):
    with pytest.raises(GoalError):
        Goal(error, budget)


def test_time_is_everything_that_is_read_and_planned():
    costs = Costs(
        machine="m", tile=1.0, block=10.0, column=0.5,
        plan={plan_class(p): (100.0, 0.25) for p in PLANNED},
    )  # fmt: skip
    scores = Scores(
        error=np.array([[0.1, 0.2], [0, 0]]), worst=np.zeros((2, 2)), last=np.zeros((2, 2)),
        blocks=np.array([[30.0, 50.0], [136.0, 136.0]]), columns=np.array([[8.0, 0], [0, 0]]),
    )  # fmt: skip
    heads = layer_candidates(scores, [COLUMNS, DENSE], costs, [1024])
    assert causal_blocks(1024) == 136
    assert [h[0].seconds for h in heads] == [16 + 300 + 4 + 356, 16 + 500 + 356]
    assert heads[0][1].time == 1.0 and heads[0][1].density == 1.0
    assert heads[0][0].time == pytest.approx(676 / 1376)
    # 6K tokens are planned in two chunks, over 4096 and 6144 tokens of context.
    assert costs.planning(COLUMNS, 6144) == 200 + 0.25 * (4096 + 6144)


def test_candidates_fit_the_length_and_all_kinds_compete():
    for length in (256, 1024, 16384):
        found = candidates(length)
        assert found[-1] == DENSE and DEFAULT in found
        assert {p.kind for p in found} == {
            "a_shape", "vertical_slash", "block_sparse", "adaptive", "dense",
        }  # fmt: skip
        assert all((p.window or 0) <= length and (p.blocks or 0) * 64 <= length for p in found)
        assert len(set(found)) == len(found)
