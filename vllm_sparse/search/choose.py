"""From scores and costs to one pattern for each head, and why it and no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_sparse.errors import UserError
from vllm_sparse.patterns import HeadPattern
from vllm_sparse.planner.base import MAX_COST

from .candidates import ORDER, budget
from .cost import Costs
from .evaluate import Scores, causal_blocks

# Two costs that differ by less were not measured finely enough to tell them apart.
TIE = 0.03
# The worst tile of 64 rows may be so many times as wrong as a whole prompt; the last one, where a
# question stands, may not. They are a few rows of a long prompt, and an error in these is hidden by
# the others.
WORST = 6.0
# What costs more than this share of dense is not worth its error; the planner's own limit.
WORTH = MAX_COST


@dataclass(frozen=True)
class Candidate:
    """One pattern in one head. `time` and `density` are shares of what dense costs and reads."""

    pattern: HeadPattern
    error: float
    worst: float
    last: float
    density: float
    time: float
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.pattern.kind} {budget(self.pattern)}".strip()


@dataclass(frozen=True)
class Choice:
    """What a head got. `tied`: those it was preferred to at the same cost; `best`: the best
    candidate of each kind, whether or not it meets the bound."""

    chosen: Candidate
    tied: tuple[Candidate, ...]
    best: tuple[Candidate, ...]
    default: Candidate | None
    meeting: int  # candidates within the bound or budget


class GoalError(UserError, ValueError):
    """A goal that says nothing or too much."""


@dataclass(frozen=True)
class Goal:
    """Cheapest with an error of at most `error`, or least error within `budget` of dense time."""

    error: float | None = 0.03
    budget: float | None = None

    def __post_init__(self) -> None:
        if (self.error is None) == (self.budget is None):
            raise GoalError(
                f"error = {self.error}, budget = {self.budget}: give one of the two, an error "
                "bound or a time budget"
            )
        for name in ("error", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise GoalError(f"{name}: got {value}; allowed: above 0, at most 1")

    def __str__(self) -> str:
        if self.error is not None:
            return (
                f"the cheapest pattern with an output error of at most {self.error:g} over a "
                f"prompt and over its last 64 rows, and {WORST * self.error:g} over any other 64"
            )
        return f"the least error within {self.budget:.0%} of a head's dense time"

    def meets(self, candidate: Candidate) -> bool:
        if self.error is not None:
            return candidate.pattern.kind == "dense" or (
                max(candidate.error, candidate.last) <= self.error
                and candidate.worst <= WORST * self.error
                and candidate.time <= WORTH
            )
        return candidate.time <= self.budget


def layer_candidates(
    scores: Scores, patterns: Sequence[HeadPattern], costs: Costs, lengths: Sequence[int]
) -> list[list[Candidate]]:
    """[head][candidate] of a layer, from its scores over prompts of these lengths."""
    tiles = sum(-(-length // 64) for length in lengths)
    causal = sum(causal_blocks(length) for length in lengths)
    dense = costs.reading(tiles, causal, 0.0)
    planning = [sum(costs.planning(p, n) for n in lengths) for p in patterns]
    seconds = costs.reading(tiles, scores.blocks, scores.columns) + np.array(planning)[:, None]
    density = (scores.blocks + scores.columns / 64) / causal
    return [
        [
            Candidate(
                pattern,
                float(scores.error[i, head]),
                float(scores.worst[i, head]),
                float(scores.last[i, head]),
                float(density[i, head]),
                float(seconds[i, head] / dense),
                float(seconds[i, head]),
            )
            for i, pattern in enumerate(patterns)
        ]
        for head in range(scores.error.shape[1])
    ]


def choose(candidates: Sequence[Candidate], goal: Goal, default: HeadPattern) -> Choice:
    """The head's pattern. Dense meets every error bound; within a budget that nothing meets, the
    cheapest is taken."""
    meeting = [c for c in candidates if goal.meets(c)]
    if not meeting:
        meeting = [min(candidates, key=lambda c: c.time)]
    if goal.error is not None:
        least = min(c.seconds for c in meeting)
        tied = [c for c in meeting if c.seconds <= (1 + TIE) * least]
    else:
        least = min(max(c.error, c.last) for c in meeting)
        tied = [c for c in meeting if max(c.error, c.last) <= least + 1e-4]
    if goal.error is not None:
        tied.sort(key=lambda c: (round(c.error, 3), ORDER.index(c.pattern.kind), c.seconds))
    else:
        tied.sort(key=lambda c: (c.seconds, ORDER.index(c.pattern.kind)))
    best = []
    for kind in ORDER:
        mine = [c for c in candidates if c.pattern.kind == kind]
        good = [c for c in mine if goal.meets(c)]
        if good:
            best.append(min(good, key=lambda c: (c.seconds, c.error)))
        elif mine:
            best.append(min(mine, key=lambda c: (c.error, c.seconds)))
    return Choice(
        chosen=tied[0],
        tied=tuple(tied[1:]),
        best=tuple(best),
        default=next((c for c in candidates if c.pattern == default), None),
        meeting=len(meeting),
    )
