"""Heavy blocks and a sample of the rest, as large as an error bound needs (vAttention, 2025).

The blocks that summaries of 16 rows show to be heavy are read whole; the other rows are sampled
evenly. The sample is as large as the central limit theorem says is needed to keep numerator and
denominator of the attention each within their share of epsilon. Beyond the paper's own code, which
bounds the denominator alone, one-sidedly, and scores every key for it: both are bounded here, from
what was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from . import native
from .context import Context
from .samplers import Proposal, Sampler, Uniform, stratified
from .store import KVStore, Segment

BLOCK = 16
KEY: Hashable = "block summaries"
# What is always sampled first: fewer rows say too little of the spread of the others.
LEAST_SAMPLE = 256
LEAST_BLOCKS = 32  # that are read whole where no budget is set
ROUNDS = 4  # in which the sample may grow
# By more than asked for, as the estimate that asked is one itself.
MARGIN = 1.2


class Summaries:
    """Of the full blocks of a segment: the largest and the smallest key in each dimension, int8.

    264 bytes a block of 16 rows at head size 128. What they say of a block is the most that any of
    its logits can be (Quest, arXiv:2406.10774): means take as much, and do not show a key that
    stands out among fifteen others.
    """

    def __init__(self, store: KVStore):
        blocks = store.segment_rows // BLOCK
        self.bounds = native.Int8Keys(store.kv_heads, blocks, 2 * store.head_size)

    def update(self, store: KVStore, segment: Segment) -> None:
        known, full = self.bounds.count, segment.length // BLOCK
        if full > known:
            keys = store.keys(segment, known * BLOCK)[:, : (full - known) * BLOCK]
            blocks = keys.unflatten(1, (-1, BLOCK))
            self.bounds.append(torch.cat([blocks.amax(2), blocks.amin(2)], -1))

    @property
    def nbytes(self) -> int:
        heads, _, size = self.bounds.rows.shape
        return heads * self.bounds.count * (size + 8)


@dataclass(frozen=True)
class VAttention(Sampler):
    """Heavy blocks and an even sample of the other rows.

    With a budget of rows, half of them go to heavy blocks; of less than two blocks all are sampled
    evenly. Without one, `heavy` says how much is
    read whole, and the relative error of each head's output (in the Euclidean norm) is above
    `epsilon` with a probability of at most `delta`, as far as the central limit theorem holds:
    rows of great weight that neither summaries nor the first sample show are not foreseen.

    Args:
        epsilon, delta: above 0, below 1.
        heavy: share of the rows that heavy blocks may take.
    """

    epsilon: float = 0.1
    delta: float = 0.05
    heavy: float = 0.02

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name}: got {value}; give a number between 0 and 1")
        if not 0.0 <= self.heavy <= 1.0:
            raise ValueError(f"heavy: got {self.heavy}; give a share from 0 to 1")

    def extend(self, store, segment, keys):
        del keys
        self.index(store, segment)

    def index(self, store: KVStore, segment: Segment) -> Summaries:
        """The segment's summaries, made from the store's rows as far as they are missing."""
        if KEY not in segment.indexes:
            segment.indexes[KEY] = Summaries(store)
        segment.indexes[KEY].update(store, segment)
        return segment.indexes[KEY]

    def index_bytes(self, context):
        return sum(self.index(context.store, s).nbytes for s in context.segments)

    def propose(self, context, q, rows, *, scale, seed=0):
        if rows is not None and rows < 2 * BLOCK:  # a block and the last rows would be all of it
            return Uniform(self.shared, self.seed).propose(context, q, rows, scale=scale, seed=seed)
        blocks = context.length // BLOCK
        last = torch.arange(blocks * BLOCK, context.length)  # of a block that is not full yet
        if rows is None:
            heavy = max(math.ceil(self.heavy * blocks), LEAST_BLOCKS)
        else:
            heavy = max(rows - len(last), 0) // 2 // BLOCK
        heavy = min(heavy, blocks)
        generator = self.generator(seed)
        chosen = self._heavy_blocks(context, q, heavy, scale)
        certain = (chosen[..., None] * BLOCK + torch.arange(BLOCK)).flatten(1)
        certain = torch.cat([certain, last.expand(len(certain), -1)], 1)
        rest = Rest(chosen, (blocks - heavy) * BLOCK)
        if rows is not None:
            certain = certain[:, :rows]
            count = min(rows - certain.shape[1], rest.total)
            return _proposal([*certain], [*rest.draw(count, generator)], rest.total)
        samples = [
            self._sample(context, head, queries, certain[i], rest.of(i), scale, generator)
            for i, (head, queries) in enumerate(
                zip(native.kv_heads(q).tolist(), q.flatten(0, 2), strict=True)
            )
        ]
        return _proposal([*certain], samples, rest.total)

    def _heavy_blocks(
        self, context: Context, q: torch.Tensor, count: int, scale: float
    ) -> torch.Tensor:
        """int64 [items, count] ascending: where the group's heads together expect most mass.

        A block's is judged by the most that its logits can be.
        """
        if count == 0:
            return torch.empty(q.shape[:3].numel(), 0, dtype=torch.int64)
        bounds = [self.index(context.store, s).bounds for s in context.segments]
        scaled = q * scale
        both = torch.cat([scaled.clamp(min=0.0), scaled.clamp(max=0.0)], -1)
        mass = native.scores_of(bounds, both).softmax(-1).sum(1)
        return mass.topk(count, sorted=False).indices.sort(-1).values

    def _sample(
        self, context: Context, kv_head: int, q: torch.Tensor, certain: torch.Tensor, rest: Rest,
        scale: float, generator: torch.Generator,
    ) -> torch.Tensor:  # fmt: skip
        """Rows of the rest for one item, q [G, D]: what the bound needs, all if that is most."""
        sampled = rest.draw(min(LEAST_SAMPLE, rest.total), generator)[0]
        weigh = Weights(q * scale, *context.rows(kv_head, certain))
        for _ in range(ROUNDS):
            need = self._need(weigh, *context.rows(kv_head, sampled), rest.total)
            if need <= len(sampled):
                break
            if 2 * need > rest.total:
                return rest.draw(rest.total, generator)[0]
            more = math.ceil(MARGIN * need) - len(sampled)
            sampled = torch.cat([sampled, rest.draw(more, generator)[0]])
        return sampled

    def _need(self, weigh: Weights, k: torch.Tensor, v: torch.Tensor, total: int) -> float:
        """Rows that must be sampled for the bound to hold, by the spread of those that were.

        With numerator and denominator both within e of theirs, the output is within
        2 e / (1 - e), which is epsilon at e = epsilon / (2 + epsilon). Each may fail with
        delta / 2, to either side.
        """
        if not total:
            return 0.0
        e = self.epsilon / (2 + self.epsilon)
        z = NormalDist().inv_cdf(1 - self.delta / 4)
        weights = weigh.of(k)  # [G, b]
        mean = (weights @ v) / len(v)
        square = (weights.square() @ v.square().sum(-1)) / len(v) - mean.square().sum(-1)
        numerator = (weigh.numerator + total * mean).norm(dim=-1)
        denominator = weigh.denominator + total * weights.mean(-1)
        spread = torch.maximum(
            square.clamp(min=0.0).sqrt() / numerator, weights.std(-1) / denominator
        )
        need = (z * total * spread / e).square().amax()
        return float(need) if bool(need.isfinite()) else math.inf


class Weights:
    """exp(q . k - base) of rows, and their sums over the rows that are read for certain."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        self.q = q
        logits = q @ k.T
        self.base = logits.amax(-1, keepdim=True) if len(k) else q.new_zeros(len(q), 1)
        weights = (logits - self.base).exp()
        self.denominator, self.numerator = weights.sum(-1), weights @ v

    def of(self, k: torch.Tensor) -> torch.Tensor:
        """[G, n]."""
        return (self.q @ k.T - self.base).exp()


class Rest:
    """The rows outside the chosen blocks [items, B] of a context's full blocks."""

    def __init__(self, chosen: torch.Tensor, total: int):
        self.total = total
        self._chosen = chosen
        # Counted without the chosen blocks, each of these rows has a chosen block before it.
        self._jumps = (chosen - torch.arange(chosen.shape[1])) * BLOCK

    def of(self, item: int) -> Rest:
        return Rest(self._chosen[item : item + 1], self.total)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """int64 [items, count]: one from each of `count` equal parts."""
        place = stratified(len(self._chosen), count, self.total, generator)
        return place + BLOCK * torch.searchsorted(self._jumps, place, right=True)


def _proposal(certain: list[torch.Tensor], sampled: list[torch.Tensor], total: int) -> Proposal:
    """Rows in ascending order, of which those that were sampled stand for all `total`."""
    counts = torch.tensor([len(c) + len(s) for c, s in zip(certain, sampled, strict=True)])
    width = int(counts.max()) if len(counts) else 0
    rows = torch.zeros(len(counts), width, dtype=torch.int64)
    log_prob = torch.zeros(len(counts), width)
    for i, (known, drawn) in enumerate(zip(certain, sampled, strict=True)):
        both, order = torch.cat([known, drawn]).sort()
        logs = torch.zeros(len(both))
        logs[len(known) :] = math.log(len(drawn) / total) if len(drawn) else 0.0
        rows[i, : len(both)], log_prob[i, : len(both)] = both, logs[order]
    return Proposal(rows, log_prob, counts)


__all__ = ["Summaries", "VAttention"]
