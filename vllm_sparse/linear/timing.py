"""Times the implementations of a linear layer against each other, once for a shape and machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_sparse import __version__
from vllm_sparse.kept import keep, kept, kept_file

from .choice import ROWS, Choice

# A layer for x [M, K], of weights that were given to what made it.
Run = Callable[[torch.Tensor], object]

# Decode reads each weight once a token, and no cache holds a model's: so many bytes of weights take
# turns, four times a cache of 32 MiB.
TOGETHER_BYTES = 128 << 20
ROUNDS = 2

# What this process has read or measured, as kept, by file and key: a model has many layers of one
# shape, and the file may not be writable.
_here: dict[tuple[Path, str], Any] = {}


def cache_file() -> Path:
    """Where choices are kept."""
    return kept_file("linear")


def settled(
    key: str, known: Sequence[str], measure: Callable[[], Choice], cache: Path | None = None
) -> tuple[Choice, str]:
    """The choice kept under a key, or else what is measured, kept then; and which of both.

    Args:
        key: machine, shape and types; this package's version is added to it.
        known: names that a choice may have.
    """
    path = cache_file() if cache is None else cache
    key = f"{key}, {__version__}"
    if (path, key) not in _here:
        _here[path, key] = kept(path).get(key)
    choice = Choice.from_kept(_here[path, key], known)
    if choice is not None:
        return choice, "kept"
    choice = measure()
    _here[path, key] = choice.to_keep()
    keep(path, key, _here[path, key])
    return choice, "measured"


def copies(weight: torch.Tensor) -> list[torch.Tensor]:
    """TOGETHER_BYTES of weights like these: some copies, or as many rows as that is."""
    row = weight.shape[1] * weight.itemsize
    part = weight[: max(TOGETHER_BYTES // row, 1)]
    return [part.clone() for _ in range(max(TOGETHER_BYTES // (len(part) * row), 1))]


def choose(
    implementations: Mapping[str, Sequence[Run]],
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    clock: Callable[[Callable[[], None]], float],
    most_rows: Mapping[str, int] | None = None,
) -> Choice:
    """The fastest by rows.

    Args:
        implementations: for each name what runs it over each of `copies`.
        clock: seconds that a call takes.
        most_rows: above which one is not tried.
    """
    times: dict[str, list[float | None]] = {name: [] for name in implementations}
    for rows in ROWS:
        # Types are spelled out: torch's default may be the model's.
        x = torch.ones(rows, num_inputs, dtype=torch.float32, device=device).to(dtype)
        found: dict[str, list[float]] = {}
        for turn in range(ROUNDS + 1):
            for name, runs in implementations.items():
                if rows <= (most_rows or {}).get(name, rows):
                    seconds = clock(lambda runs=runs: _each(runs, x))  # noqa: B023
                    if turn:  # the first warms up
                        found.setdefault(name, []).append(seconds)
        for name in implementations:
            times[name].append(min(found[name]) if name in found else None)
    return Choice.of_times(times)


def _each(runs: Sequence[Run], x: torch.Tensor) -> None:
    for run in runs:
        run(x)


def cpu_seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def gpu_seconds(run: Callable[[], None]) -> float:
    """Of a captured graph, as decode runs: what launching costs the host does not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and lets libraries make what cannot be made during a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
