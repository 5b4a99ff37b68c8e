"""What a pattern costs on this machine: measured once, kept in the user's cache folder.

A head's prefill time is modelled as `tile` for each tile of 64 rows, `block` for each block of
keys that a tile reads, `column` for each single key, and planning, which is a line in the length
of the context for each chunk. All of it is measured with this package's own kernels, on the
model's own shape and type, in CPU seconds of one thread: they are the same on a busy machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_sparse import __version__
from vllm_sparse.kept import keep, kept, kept_file, processor
from vllm_sparse.kernels import BlockIndices, cpu, sparse_prefill
from vllm_sparse.kernels.block_indices import BLOCK, TILE
from vllm_sparse.patterns import HeadPattern
from vllm_sparse.planner import plan_prefill

from .candidates import plan_class

logger = logging.getLogger("vllm_sparse.search")

CHUNK = 4096  # rows planned at a time; vLLM's own default is 2048 to 8192 by machine
PAGE = 64
MAX_HEADS = 16  # measured at once: costs are in proportion to the heads
ROWS, CONTEXT = 1024, 8192  # of the attention that is timed
# One of each class of planning; what it costs hardly depends on the numbers.
PLANNED = (
    HeadPattern(kind="a_shape", sink=64, window=1024),
    HeadPattern(kind="vertical_slash", vertical=512, slash=256),
    HeadPattern(kind="block_sparse", blocks=32),
    *(
        HeadPattern(kind=kind, coverage=0.95)
        for kind in ("a_shape", "vertical_slash", "block_sparse", "adaptive")
    ),
)
PLAN_LENGTHS = (4096, 16384)
REPEATS = 3

Seconds = Field(ge=0, lt=1e6, allow_inf_nan=False)


class Costs(BaseModel):
    """Seconds, for one head. `plan` holds (at no context, for each token of it), by class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: str = Field(max_length=512)
    tile: float = Seconds
    block: float = Seconds
    column: float = Seconds
    plan: dict[str, tuple[float, float]]

    def planning(self, pattern: HeadPattern, length: int, chunk: int = CHUNK) -> float:
        """Seconds to plan a prompt of `length` tokens, chunk by chunk."""
        if pattern.kind == "dense":
            return 0.0
        fixed, each = self.plan[plan_class(pattern)]
        ends = [*range(chunk, length, chunk), length]
        return sum(max(fixed + each * end, 0.0) for end in ends)

    def reading(self, tiles: int, blocks: Any, columns: Any) -> Any:
        """Seconds to read so many blocks and columns, counted over the tiles."""
        return self.tile * tiles + self.block * blocks + self.column * columns


def machine_costs(
    heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, cache: Path | None = None
) -> Costs:
    """The costs for layers of this shape: from the cache file, else measured in half a minute."""
    cache = kept_file("costs") if cache is None else cache
    machine = f"{processor()}, {cpu.isa()}"
    key = f"{machine}, {dtype}, {heads}/{kv_heads} heads of {head_size}, {__version__}"
    try:
        known = kept(cache)
        if key in known:
            return Costs.model_validate(known[key])
    except ValidationError as error:
        logger.warning("%s holds costs that are not ours, and is measured again: %s", cache, error)
    costs = measure(heads, kv_heads, head_size, dtype, machine)
    if not keep(cache, key, costs.model_dump(mode="json")):
        logger.warning("The costs are not kept in %s, and will differ next time", cache)
    return costs


def measure(heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, machine: str) -> Costs:
    """Time this package's kernels on random inputs of the shape."""
    group = heads // kv_heads
    kv_heads = max(1, min(kv_heads, MAX_HEADS // group))
    heads = group * kv_heads
    before = cpu.num_threads(), torch.get_num_threads()
    cpu.set_threads(1)
    torch.set_num_threads(1)
    try:
        longest = max(*PLAN_LENGTHS, CONTEXT)
        rng = torch.Generator().manual_seed(0)
        # Peaked enough that keys differ in worth, and no few of them hold everything.
        q = (2 * torch.randn(CHUNK, heads, head_size, generator=rng)).to(dtype)
        shape = (longest // PAGE, kv_heads, PAGE, head_size)
        k, v = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
        tile, block, column = _attention(q[:ROWS], k, v, rng)
        plan = {plan_class(p): _planning(q, k, p) for p in PLANNED}
    finally:
        cpu.set_threads(before[0])
        torch.set_num_threads(before[1])
    return Costs(machine=machine, tile=tile, block=block, column=column, plan=plan)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rng: torch.Generator
) -> tuple[float, float, float]:
    """(tile, block, column) seconds for one head: least squares over selections of many sizes."""
    rows, heads, _ = q.shape
    tiles, blocks = rows // TILE, CONTEXT // BLOCK
    cases, times = [], []
    for density, columns in ((0.02, 0), (0.1, 0), (0.4, 0), (0.02, 256), (0.1, 1024)):
        mask = torch.rand(tiles, heads, blocks, generator=rng) < density
        # Columns stand outside the selected blocks: the first half of the context is theirs.
        if columns:
            mask[..., : blocks // 2] = False
        order = torch.randperm(CONTEXT // 2, generator=rng)[:columns].sort().values
        flat = order.to(torch.int32).repeat(tiles * heads)
        offsets = torch.arange(tiles * heads + 1, dtype=torch.int32) * columns
        indices = BlockIndices.from_masks(mask, offsets, flat)
        where = _where(rows, CONTEXT)
        times.append(_seconds(lambda i=indices, w=where: sparse_prefill(q, k, v, *w, i, scale=0.1)))
        cases.append((tiles * heads, int(mask.sum()), tiles * heads * columns))
    # Shares of each time, so that the short ones count as much as the long ones.
    matrix = torch.tensor(cases, dtype=torch.float64) / torch.tensor(times)[:, None]
    solved = torch.linalg.lstsq(matrix, torch.ones(len(times), 1, dtype=torch.float64)).solution
    tile, block, column = solved.clamp(min=0)[:, 0].tolist()
    return tile, block, column


def _planning(q: torch.Tensor, k: torch.Tensor, pattern: HeadPattern) -> tuple[float, float]:
    """(seconds at no context, seconds for each token of it) for one head and chunk."""
    heads = q.shape[1]
    seconds = [
        _seconds(
            lambda n=length: plan_prefill(
                q, k, *_where(len(q), n), [pattern] * heads, scale=0.1, coverage=0.95
            )
        )
        / heads
        for length in PLAN_LENGTHS
    ]
    each = max((seconds[1] - seconds[0]) / (PLAN_LENGTHS[1] - PLAN_LENGTHS[0]), 0.0)
    return max(seconds[0] - each * PLAN_LENGTHS[0], 0.0), each


def _where(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block table, query starts and sequence lengths of one sequence."""
    return (
        torch.arange(-(-length // PAGE), dtype=torch.int32)[None],
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
    )


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return min(times)
