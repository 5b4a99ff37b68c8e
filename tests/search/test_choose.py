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
    return Candidate(
        pattern, error, worst, last, density=time, time=time, seconds=time, shares=(error**2,)
    )


DENSE_ONE = candidate(DENSE, 0.0, 1.0)


def chosen(*found: Candidate, error: float | None = 0.03, budget: float | None = None) -> str:
    (choice,) = choose([[*found, DENSE_ONE]], Goal(error, budget), DEFAULT)
    return choice.chosen.pattern.kind


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
    (choice,) = choose([[*tied, DENSE_ONE]], Goal(0.03), DEFAULT)
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


@pytest.mark.parametrize("error, budget", [(0.1, 0.1), (0, None), (None, 1.5)])
def test_a_goal_is_one_of_the_two_at_most_and_a_share(error, budget):
    with pytest.raises(GoalError):
        Goal(error, budget)


def test_time_is_everything_that_is_read_and_planned():
    costs = Costs(
        machine="m", tile=1.0, block=10.0, column=0.5,
        plan={plan_class(p): (100.0, 0.25) for p in PLANNED},
    )  # fmt: skip
    scores = Scores(
        whole=np.array([[[0.1, 0.2], [0, 0]]]), worst=np.zeros((1, 2, 2)),
        last=np.zeros((1, 2, 2)), norm=np.array([[1.0, 3.0]]),
        blocks=np.array([[30.0, 50.0], [136.0, 136.0]]), columns=np.array([[8.0, 0], [0, 0]]),
    )  # fmt: skip
    heads = layer_candidates(scores, [COLUMNS, DENSE], costs, [1024])
    assert causal_blocks(1024) == 136
    assert [h[0].seconds for h in heads] == [16 + 300 + 4 + 356, 16 + 500 + 356]
    assert heads[0][1].time == 1.0 and heads[0][1].density == 1.0
    assert heads[0][0].time == pytest.approx(676 / 1376)
    assert heads[0][0].shares == pytest.approx((0.1**2 / 4,))
    assert heads[1][0].shares == pytest.approx((0.2**2 * 3 / 4,))
    # 6K tokens are planned in two chunks, over 4096 and 6144 tokens of context.
    assert costs.planning(COLUMNS, 6144) == 200 + 0.25 * (4096 + 6144)


def layer(*found: Candidate, heads: int = 2) -> list[str]:
    """Kinds for heads that are alike, with the default goal; the default errs by 10% each."""
    default = candidate(DEFAULT, 0.1, 0.5, worst=0.3)
    choices = choose([[*found, default, DENSE_ONE]] * heads, Goal(), DEFAULT)
    return [c.chosen.pattern.kind for c in choices]


def test_heads_share_what_the_default_is_wrong_by():
    # 2 x 0.1 squared is 0.02, of which 0.64 may be used: 0.0128.
    assert layer(candidate(WINDOW, 0.08, 0.1)) == ["a_shape"] * 2
    assert sorted(layer(candidate(WINDOW, 0.11, 0.1), candidate(COLUMNS, 0.02, 0.3))) == [
        "a_shape", "vertical_slash",
    ]  # fmt: skip
    # Too wrong for both: dense would cost more than the default, which stays.
    assert layer(candidate(WINDOW, 0.2, 0.1)) == ["adaptive"] * 2


def test_a_head_has_bounds_of_its_own():
    good = candidate(WINDOW, 0.05, 0.1, worst=0.18, last=0.03)
    assert layer(good) == ["a_shape"] * 2
    assert layer(candidate(WINDOW, 0.05, 0.1, last=0.031)) == ["adaptive"] * 2
    # A count may be less wrong in its worst rows than what looks at the prompt.
    assert layer(candidate(WINDOW, 0.05, 0.1, worst=0.25)) == ["adaptive"] * 2
    looking = HeadPattern(kind="a_shape", coverage=0.9)
    assert layer(candidate(looking, 0.05, 0.1, worst=0.25)) == ["a_shape"] * 2
    assert layer(candidate(looking, 0.05, 0.1, worst=0.31)) == ["adaptive"] * 2


def test_candidates_fit_the_length_and_all_kinds_compete():
    for length in (256, 1024, 16384):
        found = candidates(length)
        assert found[-1] == DENSE and DEFAULT in found
        assert {p.kind for p in found} == {
            "a_shape", "vertical_slash", "block_sparse", "adaptive", "dense",
        }  # fmt: skip
        assert all((p.window or 0) <= length and (p.blocks or 0) * 64 <= length for p in found)
        assert len(set(found)) == len(found)
