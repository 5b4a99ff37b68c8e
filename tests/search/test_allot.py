"""How a layer's heads share out an error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse.search.allot import FLOOR, MARGIN, allot, fits

DENSE, DEFAULT = -1, 0


def layer(seed: int, heads: int, candidates: int, prompts: int):
    """(seconds, error, allowed) in which dearer candidates tend to be less wrong."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(0.05, 1.0, (heads, candidates))
    error = rng.uniform(0, 0.02, (heads, candidates, prompts)) * (1 - seconds)[..., None] ** 4
    allowed = rng.random((heads, candidates)) < 0.8
    seconds[:, DENSE], error[:, DENSE] = 1.0, 0.0
    allowed[:, [DEFAULT, DENSE]] = True
    return seconds, error, allowed


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6), heads=st.integers(1, 6), candidates=st.integers(2, 8),
    prompts=st.integers(1, 4),
)  # fmt: skip
def test_never_more_wrong_nor_slower_than_the_default(seed, heads, candidates, prompts):
    seconds, error, allowed = layer(seed, heads, candidates, prompts)
    chosen, allowance = allot(seconds, error, allowed, DEFAULT)
    everyone = np.arange(heads)
    assert allowed[everyone, chosen].all() and fits(chosen, error, allowance)
    assert seconds[everyone, chosen].sum() <= seconds[:, DEFAULT].sum() + 1e-12
    before = error[:, DEFAULT].sum(0)
    assert (error[everyone, chosen].sum(0) <= np.maximum(before, FLOOR**2) + 1e-12).all()


def test_it_is_near_the_best_of_all_there_are():
    ratios = []
    for seed in range(40):
        seconds, error, allowed = layer(seed, 4, 6, 2)
        chosen, _ = allot(seconds, error, allowed, DEFAULT)
        allowance = np.maximum(MARGIN**2 * error[:, DEFAULT].sum(0), FLOOR**2)
        everyone = np.arange(4)
        best = min(
            seconds[everyone, list(found)].sum()
            for found in itertools.product(range(6), repeat=4)
            if allowed[everyone, list(found)].all() and fits(np.array(found), error, allowance)
        )
        best = min(best, seconds[:, DEFAULT].sum())
        ratios.append(seconds[everyone, chosen].sum() / best)
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) < 1.05 and max(ratios) < 1.35


def test_a_head_that_matters_less_is_cruder():
    # Two heads, (default, cheap, dense); the second contributes a hundredth.
    seconds = np.array([[0.5, 0.1, 1.0]] * 2)
    error = np.array([[0.04, 0.03, 0.0], [0.0001, 0.0002, 0.0]])[..., None]
    chosen, allowance = allot(seconds, error, np.ones((2, 3), bool), 0)
    assert allowance == pytest.approx([0.0401])
    # The first may not be cheap, for it alone is over the allowance; dense and cheap cost 1.1, the
    # default in both 1.0, which stays.
    assert chosen.tolist() == [0, 0]
    seconds[0, 2] = 0.8
    chosen, _ = allot(seconds, error, np.ones((2, 3), bool), 0)
    assert chosen.tolist() == [2, 1]
