"""From which context length on the sparse path is clearly faster than the dense one, here.

Measured once, at the first start, and kept in the user's cache folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from vllm_sparse import __version__
from vllm_sparse.kept import keep, kept, kept_file, processor
from vllm_sparse.kernels import cpu, sparse_prefill
from vllm_sparse.patterns import ADAPTIVE

from .plan import plan_prefill

NEVER = 1 << 30  # tokens; longer than any context
STEP = 256  # a measured break-even is a multiple of this
# Below the first, nearly every block is in some row's window, and both paths are alike but for
# noise.
LENGTHS = (1024, 2048, 4096, 8192)
# What sparse may take of the dense time to be worth it: where it saves little, a model whose heads
# are not so sparse as the ones measured here would pay for planning in vain.
WORTH = 2 / 3
CHUNK = 4096  # rows planned at a time where the caller does not say
MAX_HEADS = 8  # measured at once: both paths cost in proportion to the heads
PAGE = 64


def break_even(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    threads: int,
    *,
    chunk: int = CHUNK,
    budget: float = 2.0,
    cache: Path | None = None,
) -> int:
    """Tokens of context from which sparse prefill is worth it; NEVER where it never is.

    Args:
        num_heads, num_kv_heads: of this process, so a tensor-parallel rank's own.
        threads: of the kernels' pool, which the caller has sized.
        chunk: most rows of a prefill step. Planning weighs more on short ones: in bf16 on a CPU
            with matrix units, 1024 rows at a time do not pay before 15K tokens.
        budget: seconds that measuring may take.
        cache: file to keep the results in; default: in the user's cache folder.
    """
    cache = cache_file() if cache is None else cache
    machine = f"{processor()}, {cpu.isa()}, {threads} threads"
    form = f"{dtype}, {num_heads}/{num_kv_heads} heads of {head_size}, chunk {chunk}"
    key = f"{machine}, {form}, {__version__}"
    shape = (dtype, head_size, num_heads, num_kv_heads)
    return settled(cache, key, lambda: measure(*shape, threads, budget, chunk))


def measure(
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    threads: int,
    budget: float,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, float]]:
    """(context length, sparse time / what is worth it), lengths ascending, until one is below 1.

    Stops as well before a length that the rest of the budget would not last for.
    """
    group = num_heads // num_kv_heads
    kv_heads = max(1, min(num_kv_heads, MAX_HEADS // group))
    # The budget counts as what is measured does: on a busy machine it lasts for as many lengths.
    clock = _clock(threads)
    begin = clock()
    spent = 0.0  # on the last length
    for length in LENGTHS:
        now = clock()
        # The next length costs up to four times the last one.
        if now - begin + 4 * spent > budget:
            return
        sparse, dense = _paths(dtype, head_size, group * kv_heads, kv_heads, length, chunk)
        # Each once to warm up, then interleaved; the shorter of two is the less disturbed.
        sparse(), dense()
        times = [(_timed(sparse, threads), _timed(dense, threads)) for _ in range(2)]
        ratio = min(s for s, _ in times) / (WORTH * min(d for _, d in times))
        yield length, ratio
        if ratio < 1:
            return
        spent = clock() - now


def crossing(ratios: list[tuple[int, float]]) -> int:
    """The length at which the ratio passes 1: a power law through the two nearest points.

    Beyond the last point the law of the last two is trusted up to four times its length.
    """
    if not ratios:
        return NEVER
    (length, ratio), *before = ratios[::-1]
    if not before:
        # Faster at the shortest length already; nothing says from where on.
        return _rounded(length) if ratio < 1 else NEVER
    shorter, worse = before[0]
    slope = math.log(ratio / worse) / math.log(length / shorter)
    if slope >= 0:
        return NEVER
    at = length * math.exp(-math.log(ratio) / slope)
    return _rounded(at) if at <= 4 * length else NEVER


def _rounded(tokens: float) -> int:
    return math.ceil(tokens / STEP) * STEP


def _timed(run: Callable[[], object], threads: int) -> float:
    clock = _clock(threads)
    begin = clock()
    run()
    return clock() - begin


def _clock(threads: int) -> Callable[[], float]:
    """The result is kept for good, so one thread's is taken in CPU seconds: they are the same on a
    busy machine."""
    return time.thread_time if threads == 1 else time.perf_counter


def problem(
    dtype: torch.dtype,
    head_size: int,
    heads: int,
    kv_heads: int,
    length: int,
    chunk: int,
    page: int = PAGE,
) -> tuple[torch.Tensor, ...]:
    """(q, k_cache, v_cache, block table, query starts, lengths): the last `chunk` of `length`
    tokens.

    Three heads of four rest on a sink and on near tokens, as most heads of a trained model do.
    The fourth attends keys all over the place: it is planned in vain, which the others must pay.
    """
    # The device and the types are spelled out: torch's defaults may be a GPU and a model's type.
    on_cpu = {"device": "cpu"}
    rng = torch.Generator().manual_seed(length)
    pages = -(-length // page)
    position = torch.arange(pages * page, dtype=torch.float64, **on_cpu)[:, None]
    # Pairs that turn once in 8 to 8192 tokens give a logit that falls by 3 for each doubling of
    # the distance; the last pair of dimensions is left to the sink.
    pairs = head_size // 2 - 1
    turns = torch.arange(pairs, dtype=torch.float64, **on_cpu) / pairs
    angle = position / 8 * 1024**-turns
    turned = torch.cat([angle.cos(), angle.sin()], 1).float()
    turned = torch.nn.functional.pad(turned, (0, head_size - 2 * pairs))
    scale = head_size**-0.5
    keys = turned.clone()
    keys[0] = 0
    keys[0, -1] = 1.0
    query = turned[length - min(chunk, length) : length] * (30 / pairs / scale)
    query[:, -1] = 30 / scale
    q = query[:, None].repeat(1, heads, 1)
    scattered = q[:, 3::4]
    noise = {"generator": rng, "dtype": torch.float32, **on_cpu}
    scattered.copy_(torch.randn(scattered.shape, **noise) * 4)
    q = q.to(dtype)
    k_cache = keys.view(pages, 1, page, head_size).expand(-1, kv_heads, -1, -1)
    k_cache = k_cache.to(dtype).contiguous()
    v_cache = torch.randn(k_cache.shape, **noise).to(dtype)
    return (
        q,
        k_cache,
        v_cache,
        torch.arange(pages, dtype=torch.int32, **on_cpu)[None],
        torch.tensor([0, len(q)], dtype=torch.int32, **on_cpu),
        torch.tensor([length], dtype=torch.int32, **on_cpu),
    )


def _paths(
    dtype: torch.dtype, head_size: int, heads: int, kv_heads: int, length: int, chunk: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The sparse and the dense path over a `problem`."""
    q, k_cache, v_cache, *where = problem(dtype, head_size, heads, kv_heads, length, chunk)
    scale = head_size**-0.5

    def dense() -> object:
        return sparse_prefill(q, k_cache, v_cache, *where, None, scale=scale)

    def sparse() -> object:
        indices = plan_prefill(q, k_cache, *where, [ADAPTIVE] * heads, scale=scale, coverage=0.95)
        return sparse_prefill(q, k_cache, v_cache, *where, indices, scale=scale)

    return sparse, dense


def cache_file() -> Path:
    """Where break-evens are kept."""
    return kept_file("break_even")


def settled(path: Path, key: str, measure: Callable[[], Iterable[tuple[int, float]]]) -> int:
    """The break-even kept under a key, or else the crossing of what is measured, kept then, unless
    one length alone was measured and says nothing of longer ones."""
    value = kept(path).get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= NEVER:
        return value
    points = list(measure())
    tokens = crossing(points)
    if tokens < NEVER or len(points) > 1:
        keep(path, key, tokens)
    return tokens
