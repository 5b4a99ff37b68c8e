"""From which context length on sparse prefill pays on this GPU; see `break_even`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_sparse import __version__
from vllm_sparse.kernels.block_indices import BLOCK
from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill
from vllm_sparse.kernels.paged_cache import FP8
from vllm_sparse.patterns import ADAPTIVE, HeadPattern

from .adaptive import MAX_COLUMNS, PROBE_FROM
from .break_even import NEVER, WORTH, cache_file, problem, settled
from .device import plan_on_device

Dense = Callable[..., object]

LENGTHS = (4096, 8192, 16384, 32768, 65536)
# Tokens: more than a plan takes for short; so many that it probes with rows of their own; and so
# many that the last rows' columns are found in fewer blocks than there are.
WARM_UP = (1024, PROBE_FROM + 1, MAX_COLUMNS * BLOCK + 1)
# What planning reads follows from the keys, and dense attention's work from rows x keys: both grow
# alike with the context, and no length makes up for few rows. So fewer rows are measured as well.
FEWEST_ROWS = 256
# Fixed budgets ask kernels of their own.
FIXED = HeadPattern(kind="vertical_slash", vertical=1, slash=1)


@dataclass(frozen=True)
class BreakEven:
    """From which context on sparse prefill is worth it, by the rows of a chunk.

    steps: (rows, tokens), the most rows first: what was measured with so many rows holds for more.
    """

    steps: tuple[tuple[int, int], ...]

    @classmethod
    def given(cls, tokens: int) -> BreakEven:
        """The same for all chunks, as a user asks for it."""
        return cls(((0, tokens),))

    @property
    def tokens(self) -> int:
        """For the longest chunks; NEVER where it never is."""
        return self.steps[0][1]

    def pays(self, rows: int, seq_len: int) -> bool:
        """Whether to read sparsely in a chunk of so many rows at the end of `seq_len` tokens."""
        return any(rows >= fewest and seq_len >= tokens for fewest, tokens in self.steps)

    def line(self) -> str:
        """For people."""
        return ", ".join(
            f"{rows} rows: {'never' if tokens >= NEVER else f'{tokens} tokens'}"
            for rows, tokens in self.steps
        )


NEVER_PAYS = BreakEven.given(NEVER)


def break_evens(chunk: int, of_rows: Callable[[int], int]) -> BreakEven:
    """Of chunks of up to `chunk` rows, given what is found for a number of rows."""
    steps = [(chunk, of_rows(chunk))]
    while steps[-1][1] < NEVER and steps[-1][0] >= 2 * FEWEST_ROWS:
        rows = steps[-1][0] // 2
        steps.append((rows, of_rows(rows)))
    return BreakEven(tuple(steps))


def warm_up(
    dtype: torch.dtype, head_size: int, num_heads: int, num_kv_heads: int, *, page: int,
    device: torch.device, mean_correction: bool = False, cache_dtype: torch.dtype | None = None,
    sinks: bool = False,
) -> None:  # fmt: skip
    """Compile every kernel in the forms that layers of this shape will launch it in."""
    shape = (dtype, head_size, num_heads, num_kv_heads)
    where = (page, device, sparse_prefill)
    forms = {"mean_correction": mean_correction, "cache_dtype": cache_dtype, "sinks": sinks}
    short = WARM_UP[0]
    for pattern, length in (*((ADAPTIVE, n) for n in WARM_UP), (FIXED, short)):
        paths(*shape, length, short // 2 + 1, *where, pattern=pattern, **forms)[0]()


def break_even(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    chunk: int,
    page: int,
    device: torch.device,
    dense: Dense,
    *,
    cache_dtype: torch.dtype | None = None,
    budget: float = 2.0,
    cache: Path | None = None,
) -> int:
    """Tokens of context from which sparse prefill is worth it; NEVER where it never is.

    Args:
        dense: what runs below it, as `reference.sparse_prefill` without indices.
        cache_dtype: what the cache holds, with scales where it is FP8; None: `dtype`.
    """
    cache = cache_file() if cache is None else cache
    name = torch.cuda.get_device_name(device)
    shape = f"{dtype}, {num_heads}/{num_kv_heads} heads of {head_size}, chunk {chunk}, page {page}"
    if cache_dtype not in (None, dtype):
        shape += f", cache {cache_dtype}"
    key = f"{name}, {shape}, against {dense.__name__}, {__version__}"
    given = (dtype, head_size, num_heads, num_kv_heads, chunk, page, device, dense, budget)
    return settled(cache, key, lambda: measure(*given, cache_dtype))


def measure(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    chunk: int,
    page: int,
    device: torch.device,
    dense: Dense,
    budget: float,
    cache_dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, float]]:
    """(context length, sparse time / what is worth it), until one is below 1 or time is up.

    `budget` is of seconds that the two paths run, without what making their inputs takes.
    """
    total = spent = 0.0
    for length in LENGTHS:
        if total + 4 * spent > budget:
            return
        shape = (dtype, head_size, num_heads, num_kv_heads)
        where = (page, device, dense)
        sparse, other = paths(*shape, length, chunk, *where, cache_dtype=cache_dtype)
        sparse(), other()
        times = [(_timed(sparse), _timed(other)) for _ in range(3)]
        ratio = min(s for s, _ in times) / (WORTH * min(d for _, d in times))
        yield length, ratio
        if ratio < 1:
            return
        spent = sum(s + d for s, d in times)
        total += spent


def paths(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    length: int,
    chunk: int,
    page: int,
    device: torch.device,
    dense: Dense,
    *,
    mean_correction: bool = False,
    cache_dtype: torch.dtype | None = None,
    sinks: bool = False,
    pattern: HeadPattern = ADAPTIVE,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The sparse and the dense path over the last `chunk` of `length` tokens; only the sparse one
    has sinks, and this pattern in all heads."""
    made = problem(dtype, head_size, num_heads, num_kv_heads, length, chunk, page)
    q, k_cache, v_cache, *where = (x.to(device) for x in made)
    both = torch.cat([k_cache, v_cache], -1).to(cache_dtype or dtype)
    caches = both.chunk(2, -1)
    # Types are spelled out: torch's default may be the model's.
    fp32 = {"dtype": torch.float32, "device": device}
    scales = {}
    if both.dtype == FP8:
        scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones((), **fp32))
    k_scale = scales.get("k_scale")
    rows, scale = q.shape[0], head_size**-0.5
    sink = torch.zeros(num_heads, **fp32) if sinks else None

    def other() -> object:
        return dense(q, *caches, *where, None, scale=scale, **scales)

    def sparse() -> object:
        indices = plan_on_device(
            q, caches[0], where[0], [rows], [length], (pattern,) * num_heads, scale=scale,
            coverage=0.95, k_scale=k_scale,
        )  # fmt: skip
        return sparse_prefill(
            q, *caches, *where, indices, scale=scale, mean_correction=mean_correction, sinks=sink,
            **scales,
        )  # fmt: skip

    return sparse, other


def _timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
