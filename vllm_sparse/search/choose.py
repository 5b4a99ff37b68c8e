"""From scores and costs to one pattern for each head, and why it and no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_sparse.errors import UserError
from vllm_sparse.patterns import HeadPattern
from vllm_sparse.planner.base import MAX_COST

from .allot import allot
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
# Of a head's last 64 rows, with the default goal; of its worst 64 it is WORST times as much.
LAST = 0.03


@dataclass(frozen=True)
class Candidate:
    """One pattern in one head. `time` and `density` are shares of what dense costs and reads.

    `shares`, by prompt: its squared error as a share of what the layer's heads sum up to.
    """

    pattern: HeadPattern
    error: float
    worst: float
    last: float
    density: float
    time: float
    seconds: float
    shares: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.pattern.kind} {budget(self.pattern)}".strip()


@dataclass(frozen=True)
class Choice:
    """What a head got. `tied`: those it was preferred to at the same cost; `best`: the best
    candidate of each kind, and in `within` whether it may be taken."""

    chosen: Candidate
    tied: tuple[Candidate, ...]
    best: tuple[Candidate, ...]
    within: tuple[bool, ...]
    default: Candidate | None


class GoalError(UserError, ValueError):
    """A goal that says nothing or too much."""


@dataclass(frozen=True)
class Goal:
    """What is looked for. With neither number: the cheapest that is as right as the default.

    error: the cheapest whose error is at most this, in each head.
    budget: the least error within this share of a head's dense time.
    """

    error: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.error is not None and self.budget is not None:
            raise GoalError(
                f"error = {self.error}, budget = {self.budget}: give one of the two, an error "
                "bound or a time budget, or neither"
            )
        for name in ("error", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise GoalError(f"{name}: got {value}; allowed: above 0, at most 1")

    @property
    def by_layer(self) -> bool:
        """Whether the heads of a layer share one bound."""
        return self.error is None and self.budget is None

    def __str__(self) -> str:
        if self.by_layer:
            return (
                "the cheapest patterns with which no layer is less accurate than with the "
                f"adaptive default; of each head at most {LAST:.0%} over the last 64 rows, and "
                f"{WORST * LAST:.0%} over any other 64"
            )
        if self.error is not None:
            return (
                f"the cheapest pattern with an output error of at most {self.error:g} over a "
                f"prompt and over its last 64 rows, and {WORST * self.error:g} over any other 64"
            )
        return f"the least error within {self.budget:.0%} of a head's dense time"

    def meets(self, candidate: Candidate, default: Candidate | None = None) -> bool:
        """Whether a head may take it; by layer, as far as a head's own bounds go."""
        if self.budget is not None:
            return candidate.time <= self.budget
        if candidate.pattern.kind == "dense":
            return True
        if self.error is not None:
            return (
                max(candidate.error, candidate.last) <= self.error
                and candidate.worst <= WORST * self.error
                and candidate.time <= WORTH
            )
        if default is not None and candidate.pattern == default.pattern:
            return True
        worst = WORST * LAST
        # What covers a share of the mass looks at every prompt, as the default does. Counts do
        # not: where they miss something in a sample they miss more elsewhere.
        if default is not None and not candidate.pattern.fixed:
            worst = max(worst, default.worst)
        return candidate.last <= LAST and candidate.worst <= worst and candidate.time <= WORTH


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
    error, worst, last = (x.max(0) for x in (scores.whole, scores.worst, scores.last))
    shares = scores.shares
    return [
        [
            Candidate(
                pattern,
                float(error[i, head]),
                float(worst[i, head]),
                float(last[i, head]),
                float(density[i, head]),
                float(seconds[i, head] / dense),
                float(seconds[i, head]),
                tuple(shares[:, i, head].tolist()),
            )
            for i, pattern in enumerate(patterns)
        ]
        for head in range(error.shape[1])
    ]


def choose(heads: Sequence[Sequence[Candidate]], goal: Goal, default: HeadPattern) -> list[Choice]:
    """A pattern for each head of a layer, of its candidates, which are the same in all heads.

    Dense meets every error bound; within a budget that nothing meets, the cheapest is taken.
    """
    if not goal.by_layer:
        return [_choice(found, *_best(found, goal), goal, default) for found in heads]
    return [
        _choice(found, chosen, tied, goal, default)
        for found, (chosen, tied) in zip(heads, _by_layer(heads, goal, default), strict=True)
    ]


def _best(candidates: Sequence[Candidate], goal: Goal) -> tuple[Candidate, list[Candidate]]:
    """The best for one head alone, and those that tie with it."""
    meeting = [c for c in candidates if goal.meets(c)]
    if not meeting:
        meeting = [min(candidates, key=lambda c: c.time)]
    if goal.error is not None:
        least = min(c.seconds for c in meeting)
        tied = [c for c in meeting if c.seconds <= (1 + TIE) * least]
        tied.sort(key=_simplest)
    else:
        least = min(max(c.error, c.last) for c in meeting)
        tied = [c for c in meeting if max(c.error, c.last) <= least + 1e-4]
        tied.sort(key=lambda c: (c.seconds, ORDER.index(c.pattern.kind)))
    return tied[0], tied[1:]


def _by_layer(
    heads: Sequence[Sequence[Candidate]], goal: Goal, default: HeadPattern
) -> list[tuple[Candidate, list[Candidate]]]:
    """The cheapest for all heads together, and of what ties with it in a head the least wrong."""
    where = [c.pattern for c in heads[0]].index(default)
    seconds = np.array([[c.seconds for c in found] for found in heads])
    error = np.array([[c.shares for c in found] for found in heads])  # [H, C, P]
    allowed = np.array([[goal.meets(c, found[where]) for c in found] for found in heads])
    chosen, allowance = allot(seconds, error, allowed, where)
    left = allowance - error[np.arange(len(heads)), chosen].sum(0)
    result = []
    for head, found in enumerate(heads):
        now = int(chosen[head])
        tied = [
            i
            for i in np.flatnonzero(allowed[head])
            if abs(found[i].seconds - found[now].seconds) <= TIE * found[now].seconds
            and (i == now or (error[head, i] - error[head, now] <= left).all())
        ]
        tied.sort(key=lambda i: _simplest(found[i]))
        left -= error[head, tied[0]] - error[head, now]
        result.append((found[tied[0]], [found[i] for i in tied[1:]]))
    return result


def _simplest(c: Candidate) -> tuple[float, int, float]:
    """Of candidates that tie: the least error, what is simplest to plan, the cheapest."""
    return round(c.error, 3), ORDER.index(c.pattern.kind), c.seconds


def _choice(
    candidates: Sequence[Candidate],
    chosen: Candidate,
    tied: Sequence[Candidate],
    goal: Goal,
    default: HeadPattern,
) -> Choice:
    """With what it was preferred to: of each kind the best, whether or not it meets the goal."""
    standard = next((c for c in candidates if c.pattern == default), None)
    best, within = [], []
    for kind in ORDER:
        mine = [c for c in candidates if c.pattern.kind == kind]
        good = [c for c in mine if goal.meets(c, standard)]
        if kind == chosen.pattern.kind:
            best.append(chosen)
        elif good:
            best.append(min(good, key=lambda c: (c.seconds, c.error)))
        elif mine:
            best.append(min(mine, key=lambda c: (c.error, c.seconds)))
        else:
            continue
        within.append(bool(good))
    return Choice(chosen, tuple(tied), tuple(best), tuple(within), standard)
