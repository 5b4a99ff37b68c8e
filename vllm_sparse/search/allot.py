"""How the heads of a layer share out the error that the adaptive default makes in it.

An error bound of each head's own is the same for heads that matter and heads that do not. What
the next layer sees is the output of all heads together, so the default goal bounds that: the
cheapest patterns with which it is no less accurate than with the default.
"""

from __future__ import annotations

import numpy as np

# Of the default's error. Other prompts are a little different, and the default adapts to them.
MARGIN = 0.8
# Below this relative error of a layer nothing is told apart: float32 sums differ by 1e-6.
FLOOR = 1e-4


def allot(
    seconds: np.ndarray, error: np.ndarray, allowed: np.ndarray, default: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest candidate for each head within the error that the layer may make.

    Args:
        seconds: [H, C], what each candidate costs in each head.
        error: [H, C, P], its squared error in each prompt, as a share of the layer's sum of
            squares: summed over the heads and rooted it is the layer's relative error.
        allowed: [H, C], candidates that may be taken; in each head one of them without error.
        default: which candidate the adaptive default is.

    Returns:
        (chosen [H], allowance [P]): candidates by head, and the most that the chosen ones' errors
        may sum up to in each prompt. A layer that would be slower than with the default keeps it.
    """
    before = error[:, default].sum(0)
    allowance = np.maximum(MARGIN**2 * before, FLOOR**2)
    chosen = _at_a_price(seconds, error, allowed, allowance)
    _spend_rest(chosen, seconds, error, allowed, allowance)
    heads = np.arange(len(seconds))
    if seconds[heads, chosen].sum() >= seconds[:, default].sum():
        return np.full(len(seconds), default), np.maximum(before, allowance)
    return chosen, allowance


def fits(chosen: np.ndarray, error: np.ndarray, allowance: np.ndarray) -> bool:
    """Whether the heads' errors [H, C, P] sum up to no more than the allowance [P]."""
    return bool((error[np.arange(len(chosen)), chosen].sum(0) <= allowance).all())


def _at_a_price(
    seconds: np.ndarray, error: np.ndarray, allowed: np.ndarray, allowance: np.ndarray
) -> np.ndarray:
    """Each head takes what is cheapest when error costs too: the least price at which all fit."""
    spent = (error / allowance).sum(2)

    def take(price: float) -> np.ndarray:
        return np.where(allowed, seconds + price * spent, np.inf).argmin(1)

    # At no price the cheapest, at the highest what makes no error.
    if fits(cheapest := take(0.0), error, allowance):
        return cheapest
    low, high = np.log(1e-9 * seconds.max()), np.log(1e9 * seconds.max())
    best = np.where(allowed, spent, np.inf).argmin(1)
    for _ in range(60):
        middle = (low + high) / 2
        if fits(found := take(float(np.exp(middle))), error, allowance):
            best, high = found, middle
        else:
            low = middle
    return best


def _spend_rest(
    chosen: np.ndarray,
    seconds: np.ndarray,
    error: np.ndarray,
    allowed: np.ndarray,
    allowance: np.ndarray,
) -> None:
    """One price for all leaves some of the allowance: spend it where that saves the most."""
    heads = np.arange(len(chosen))
    while True:
        now = error[heads, chosen]
        rest = allowance - now.sum(0)
        saved = seconds[heads, chosen][:, None] - seconds
        possible = allowed & (saved > 0) & ((error - now[:, None]) <= rest).all(2)
        if not possible.any():
            return
        head, candidate = np.unravel_index(np.where(possible, saved, 0).argmax(), saved.shape)
        chosen[head] = candidate
