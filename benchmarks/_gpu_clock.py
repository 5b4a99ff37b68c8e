"""How the benchmarks time work on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

L2_BYTES = 256 << 20
FEWEST = 3  # repeats that a median is of, however long they take
# How often 256 MiB are zeroed before a work, for the host to get ahead of the GPU: 70 us each at
# 4 TB/s. LITTLE hides Python's part of one launch, 20 to 100 us, and AHEAD that of 60.
LITTLE, AHEAD = 4, 128


@dataclass(frozen=True)
class Taken:
    """Medians of one work: GPU seconds, and the host's for launching it."""

    seconds: float
    host: float


def seconds(
    works: dict[str, Callable], repeats: int, most_s: float = float("inf")
) -> dict[str, float]:
    """Median GPU seconds of each, taking turns, the L2 cache emptied before each."""
    return {name: taken.seconds for name, taken in measured(works, repeats, most_s).items()}


def measured(
    works: dict[str, Callable], repeats: int, most_s: float = float("inf"), *, ahead: int = LITTLE
) -> dict[str, Taken]:
    """Each work's Taken, taking turns, the L2 cache emptied before each.

    Args:
        repeats: of each, after one that warms up. Fewer, but FEWEST, once `most_s` are over.
        ahead: how often the cache is emptied before. With LITTLE the GPU waits for what takes many
            launches; with AHEAD everything is launched when it begins.
    """
    import torch

    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    started = time.perf_counter()
    for turn in range(repeats + 1):
        if turn > min(repeats, FEWEST) and time.perf_counter() - started > most_s:
            break
        for name, work in works.items():
            for _ in range(ahead):
                flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launching = time.perf_counter()
            work()
            launched = time.perf_counter() - launching
            end.record()
            end.synchronize()
            if turn:  # the first warms up
                taken[name].append((begin.elapsed_time(end) / 1e3, launched))
    return {
        name: Taken(*(statistics.median(column) for column in zip(*times, strict=True)))
        for name, times in taken.items()
    }
