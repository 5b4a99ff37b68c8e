"""What a worker process on a GPU settles once, and what it counts without waiting for the GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import log
from .config import SparseConfig
from .kernels import BlockIndices
from .kernels.block_indices import BLOCK, TILE
from .kernels.gpu.integers import cdiv
from .kernels.gpu.launch import check_fp8
from .kernels.paged_cache import FP8
from .planner import device_break_even
from .planner.adaptive import COLUMN_SHARE, MAX_COLUMNS, MIN_COLUMNS
from .planner.device import forget
from .planner.device_break_even import BreakEven
from .runtime import count_flagged, say_active
from .stats import STATS

logger = log.get_logger(__name__)

PLAN_BYTES = 20  # for each tile, head and block: scores, masks and lists at their largest
COLUMN_BYTES = 12  # for each tile, head and candidate column: lists as planned, clean and packed
# For each head and key: what it is worth as a column, its order, and a 64th of what rows give its
# block.
KEY_BYTES = 28
MOST_TIMERS = 4096


def workspace_bytes(chunk: int, longest: int, heads: int, head_size: int, vertical: int = 0) -> int:
    """Memory that planning a step of the longest contexts takes for a while, in bytes.

    An estimate from the tensors that are made, held to them by a test; it has not been compared
    with a GPU's count, and leaves out what torch's sorting takes inside.

    Args:
        vertical: the most columns of a head's fixed budget.
    """
    blocks = -(-longest // BLOCK)
    # Each sequence of a step has a last tile of its own.
    tiles = -(-chunk // TILE) + chunk // device_break_even.FEWEST_ROWS
    columns = max(min(max(longest // COLUMN_SHARE, MIN_COLUMNS), MAX_COLUMNS), vertical)
    of_tiles = tiles * (blocks * PLAN_BYTES + columns * COLUMN_BYTES)
    return heads * (of_tiles + longest * KEY_BYTES + blocks * head_size * 8)


class Counters:
    """Keys read and seconds taken, on the device until somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.read = torch.zeros((), dtype=torch.int64, device=device)
        self.flagged = torch.zeros(1, dtype=torch.int64, device=device)
        self.sharing = torch.zeros(1, dtype=torch.int64, device=device)
        self.causal = self.unseen = 0  # keys: known on the host
        self.timers: list[tuple[Any, Any, Any]] = []

    @contextlib.contextmanager
    def timed(self) -> Iterator[Callable[[], None]]:
        """Times what is launched inside; the callable marks where planning ends."""
        if not self.on_gpu or len(self.timers) >= MOST_TIMERS:
            yield lambda: None
            return
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3))
        events[0].record()
        yield events[1].record
        events[2].record()
        self.timers.append(events)

    def add(self, indices: BlockIndices, query_lens: list[int], seq_lens: list[int]) -> None:
        """Count what a call read, at the granularity of `BlockIndices.selected_keys`."""
        visible = unseen = 0
        for rows, keys in zip(query_lens, seq_lens, strict=True):
            computed, full = keys - rows, cdiv(rows, TILE) - 1  # the last tile sees every key
            visible += full * computed + TILE * full * (full + 1) // 2 + keys
            # Every list holds the block of its tile's last row, of which the rows see but a part.
            unseen += full * (-computed % BLOCK) + -keys % BLOCK
        self.read.add_(indices.block_offsets[-1], alpha=BLOCK)
        self.read.add_(indices.column_offsets[-1])
        self.unseen += unseen * indices.num_heads
        self.causal += visible * indices.num_heads

    @property
    def keys_read(self) -> int:
        """Waits for the device."""
        return int(self.read) - self.unseen

    def settle(self) -> None:
        """Move what is counted into STATS; waits for the device."""
        STATS.keys_read += self.keys_read
        self.read.zero_()
        count_flagged(self.flagged)
        STATS.shared_rows += int(self.sharing)
        self.sharing.zero_()
        STATS.keys_causal += self.causal
        self.causal = self.unseen = 0
        for begin, planned, end in self.timers:
            end.synchronize()
            STATS.index_seconds += begin.elapsed_time(planned) / 1e3
            STATS.attention_seconds += planned.elapsed_time(end) / 1e3
        self.timers.clear()


@functools.cache
def shared_counters(device: torch.device) -> Counters:
    """The counters of all layers of a process."""
    with torch.inference_mode(False):  # or else only steps could change them
        return Counters(device)


@functools.cache
def start(
    config: SparseConfig,
    *,
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    chunk: int,
    page: int,
    dense: device_break_even.Dense,
    device: torch.device,
    cache_dtype: torch.dtype | None = None,
    has_sinks: bool = False,
    of_first_rank: Callable[[Callable[[], BreakEven]], BreakEven] = lambda measure: measure(),
) -> BreakEven:
    """The break-even of layers of one shape; heads are this rank's, `chunk` is the most tokens of
    a step, `dense` is what runs below the break-even, `cache_dtype` what the cache holds (None:
    dtype). Compiles what serving will launch, and logs the start-up line.

    Nothing that it makes on the device outlives it: vLLM may free or empty, when it sleeps, the
    memory pool that it starts in.

    Args:
        of_first_rank: calls what it is given on the first tensor-parallel rank, and returns its
            result on all: ranks that went different ways would wait for each other in each layer.

    Raises:
        ValueError: an FP8 cache on a GPU that has none.
    """
    if cache_dtype == FP8:
        check_fp8(device)
    shape = (dtype, head_size, num_heads, num_kv_heads)
    device_break_even.warm_up(
        *shape, page=page, device=device, mean_correction=config.mean_correction,
        cache_dtype=cache_dtype, sinks=has_sinks,
    )  # fmt: skip
    if config.break_even is not None:
        found, source = BreakEven.given(config.break_even), "given"
    else:

        def of_rows(rows: int) -> int:
            where = (rows, page, device, dense)
            return device_break_even.break_even(*shape, *where, cache_dtype=cache_dtype)

        found = of_first_rank(lambda: device_break_even.break_evens(chunk, of_rows))
        source = "measured"
        logger.info("Break-even of chunks by rows: %s", found.line())
    forget()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    say_active(logger, config, found.tokens, source, f"Triton on {name}")
    return found
