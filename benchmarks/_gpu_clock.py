"""How the benchmarks time work on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

L2_BYTES = 256 << 20


def seconds(works: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median GPU seconds of each, taking turns, the L2 cache emptied before each."""
    import torch

    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            if turn:  # the first warms up
                taken[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}
