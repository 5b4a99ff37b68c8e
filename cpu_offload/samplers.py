"""Samplers: which rows of a context a query reads, and with what probability each was chosen.

All of them feed one estimator, the softmax of `q . k * scale - log_prob` over the proposed rows
(`reference.gathered_attention`): rows that are chosen for certain have the logarithm 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from . import hashing, native, reference
from .context import Context
from .lsh import LshIndex
from .store import KVStore, Segment

MAX_BITS, MAX_TABLES = 15, 255  # codes and collision counts are 15 and 8 bits wide


@dataclass
class Proposal:
    """What items read: rows int64 [items, W] and log_prob fp32 [items, W], the first counts[i]
    (int64 [items]) of each; rows None: every row of the context. log_prob None: all zero."""

    rows: torch.Tensor | None
    log_prob: torch.Tensor | None
    counts: torch.Tensor
    # Rows of K that were read beside the proposed ones to find them, int64 [items].
    looked_at: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampler(ABC):
    """Proposes rows for queries. Immutable; what it knows of rows lies with their segments.

    Args:
        shared: the query heads of a KV head read one sample, made for all of them, instead of one
            each. Rows are then read once for the group.
        seed: of everything random; with the same seed the same rows are proposed.
    """

    shared: bool = True
    seed: int = 0

    @abstractmethod
    def propose(
        self, context: Context, q: torch.Tensor, rows: int | None, *, scale: float, seed: int = 0
    ) -> Proposal:
        """Rows for every item.

        Args:
            q: fp32 [T, kv_heads, E, G, D].
            rows: the most rows to propose for an item; None: as many as the sampler holds right.
            seed: joins the sampler's own; steps of a sequence should not repeat it.
        """

    def extend(self, store: KVStore, segment: Segment, keys: torch.Tensor) -> None:
        """Bring the index up to date: `keys` [n, kv_heads, D] are the segment's last n rows."""
        del store, segment, keys

    def index_bytes(self, context: Context) -> int:
        """Bytes that the sampler keeps for the context beside its rows."""
        del context
        return 0

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + seed) & (2**63 - 1))


@dataclass(frozen=True)
class Exact(Sampler):
    """Every row."""

    def propose(self, context, q, rows, *, scale, seed=0):
        del rows, scale, seed
        return Proposal(None, None, torch.full((q.shape[:3].numel(),), context.length))


@dataclass(frozen=True)
class TopK(Sampler):
    """The rows of the largest attention weight, found by reading all keys; no estimate of the rest.

    Shared, weights are those of the group's heads together.
    """

    def propose(self, context, q, rows, *, scale, seed=0):
        del seed
        count = min(_needed("topk", rows), context.length)
        logits = native.scores(context, q, scale=scale)
        found = logits.softmax(-1).sum(1).topk(count).indices.sort(-1).values
        counts = torch.full((len(found),), count)
        return Proposal(found, None, counts, torch.full_like(counts, context.length))


@dataclass(frozen=True)
class Uniform(Sampler):
    """Rows drawn evenly from all: one from each of as many equal parts of the context."""

    def propose(self, context, q, rows, *, scale, seed=0):
        del scale
        count = min(_needed("uniform", rows), context.length)
        items = q.shape[:3].numel()
        picked = stratified(items, count, context.length, self.generator(seed))
        log_prob = torch.full((items, count), np.log(max(count, 1) / max(context.length, 1)))
        return Proposal(picked, log_prob.float(), torch.full((items,), count))


@dataclass(frozen=True)
class LSH(Sampler):
    """Rows that share at least two hash buckets with the query, as in MagicPIG (arXiv:2410.16179).

    Shared, the query that is hashed is the mean direction of the group's heads; with its own
    inclusion probabilities that is importance sampling for each of them, too.

    The default samples about 2% of a context, 1.4% of the keys at right angles to the query, and
    takes 2 bytes a row and table. 9 bits and 90 tables sample as much, with 0.7 times the error
    and twice the index; MagicPIG's own 10 bits and 150 tables sample 1.7%.

    Args:
        bits: K, 1 to 15; tables: L, 2 to 255.
    """

    bits: int = 8
    tables: int = 46

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= MAX_BITS and 2 <= self.tables <= MAX_TABLES):
            raise ValueError(
                f"bits, tables: got {self.bits}, {self.tables}; give 1 to {MAX_BITS} bits and 2 to "
                f"{MAX_TABLES} tables"
            )

    @property
    def key(self) -> tuple:
        """What an index depends on."""
        return "lsh", self.bits, self.tables, self.seed

    def directions(self, head_size: int) -> torch.Tensor:
        return hashing.directions(head_size, self.bits, self.tables, self.seed)

    def extend(self, store, segment, keys):
        known = self._index(store, segment)
        if known.length + len(keys) == segment.length:
            known.extend(keys.transpose(0, 1), store, segment)
        self.index(store, segment)

    def index(self, store: KVStore, segment: Segment) -> LshIndex:
        """The segment's index, made from the store's rows as far as it is not there yet."""
        known = self._index(store, segment)
        if known.length < segment.length:
            known.extend(store.keys(segment, known.length), store, segment)
        return known

    def _index(self, store: KVStore, segment: Segment) -> LshIndex:
        if self.key not in segment.indexes:
            directions = self.directions(store.head_size)
            segment.indexes[self.key] = LshIndex(store, self.bits, self.tables, directions)
        return segment.indexes[self.key]

    def index_bytes(self, context):
        return sum(self.index(context.store, s).nbytes for s in context.segments)

    def propose(self, context, q, rows, *, scale, seed=0):
        indexes = [self.index(context.store, s) for s in context.segments]
        if native.available():
            found, log_prob, along, counts = native.lsh_query(
                context,
                q,
                np.array([i.entry() for i in indexes] or [(0,) * 7], native.LSH_SEGMENT),
                bits=self.bits,
                tables=self.tables,
                directions=self.directions(context.store.head_size),
                log_inclusion=hashing.log_inclusion_table(self.bits, self.tables),
            )
        else:
            found, log_prob, along, counts = self._propose_in_torch(context, q, indexes)
        if rows is None or not len(counts) or int(counts.max()) <= rows:
            return Proposal(found, log_prob, counts)
        reach = (q * reference.mean_direction(q)[..., None, :]).sum(-1).mean(-1).flatten() * scale
        log_weight = along * reach[:, None] - log_prob
        return thin(found, log_prob, log_weight, counts, rows, self.generator(seed))

    def _propose_in_torch(self, context, q, indexes):
        """What `native.lsh_query` does."""
        size = context.store.segment_rows
        directions = self.directions(context.store.head_size)
        direction = reference.mean_direction(q.flatten(0, 2))
        codes = hashing.hash_vectors(direction[None], directions, self.bits)[0]  # [L, items]
        found = []
        for i, head in enumerate(native.kv_heads(q).tolist()):
            parts = []
            for number, index in enumerate(indexes):
                hits = reference.lsh_hits(codes[:, i], index.codes(head))
                rows = (hits >= 2).nonzero()[:, 0] + number * size
                centred = context.rows(head, rows)[0] - index.centre[head]
                along = centred @ direction[i]
                cosine = along / centred.norm(dim=-1).clamp(min=1e-38)
                u = hashing.inclusion_probability(cosine, self.bits, self.tables)
                logs = u.clamp(min=hashing.LEAST_PROBABILITY).log().float()
                parts.append((rows, logs, along))
            found.append([torch.cat(x) for x in zip(*parts, strict=True)])
        counts = torch.tensor([len(rows) for rows, *_ in found])
        padded = (torch.nn.utils.rnn.pad_sequence(x, True) for x in zip(*found, strict=True))
        return *padded, counts


def thin(
    rows: torch.Tensor,
    log_prob: torch.Tensor,
    log_weight: torch.Tensor,
    counts: torch.Tensor,
    most: int,
    generator: torch.Generator,
) -> Proposal:
    """At most `most` of each item's rows [items, W], kept in proportion to their weights.

    Given what was sampled, the thinned estimate is right on average, so it stays right over all.
    Kept alike, rows of great weight would be lost as often as others: the error of 2.2% of a
    context thinned to 2% was 1.5 times that of the whole sample, against 1.0 times so.
    """
    there = torch.arange(int(counts.max())) < counts[:, None]
    log_weight = log_weight[:, : there.shape[1]].double().masked_fill(~there, -torch.inf)
    share = proportional(log_weight, most).masked_fill(~there, 0.0)
    place = torch.arange(most, dtype=torch.float64).expand(len(rows), -1)
    place = place + torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
    last = (counts[:, None] - 1).clamp(min=0)
    picked = torch.minimum(torch.searchsorted(share.cumsum(1), place), last)
    log_prob = log_prob.gather(1, picked) + share.gather(1, picked).log().float()
    return Proposal(rows.gather(1, picked), log_prob, counts.clamp(max=most), counts)


def proportional(log_weight: torch.Tensor, most: int) -> torch.Tensor:
    """Probabilities [items, n] whose sum is `most`, in proportion to the weights but at most 1;
    all 1 for items with no more weights above 0 than that."""
    if most == 0:
        return torch.zeros_like(log_weight)
    most = min(most, log_weight.shape[1])
    weight = (log_weight - log_weight.amax(1, keepdim=True)).exp().clamp(min=1e-12)
    weight = weight.masked_fill(log_weight == -torch.inf, 0.0)
    largest, order = weight.sort(1, descending=True)
    # With the c largest kept for certain, the others share what is left of the budget.
    left = largest.flip(1).cumsum(1).flip(1)
    budget = most - torch.arange(most)
    certain = (largest[:, :most] * budget >= left[:, :most]).long().cumprod(1).sum(1, keepdim=True)
    rest = left.gather(1, certain.clamp(max=most - 1)).clamp(min=1e-300)
    shared = largest * ((most - certain) / rest)
    shared = torch.where(torch.arange(weight.shape[1]) < certain, 1.0, shared.clamp_(max=1.0))
    shared = shared.masked_fill(largest == 0, 0.0)
    return torch.empty_like(weight).scatter_(1, order, shared)


def stratified(items: int, count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [items, count] of 0 .. total - 1, ascending: one from each of `count` equal parts.

    Each number is drawn count / total times on average, and none is missing or twice where count
    is total.
    """
    if count == total:
        return torch.arange(total).expand(items, -1).contiguous()
    within = torch.rand(items, count, generator=generator, dtype=torch.float64)
    place = (torch.arange(count) + within) * (total / max(count, 1))
    return place.long().clamp_(max=total - 1)


def _needed(name: str, rows: int | None) -> int:
    if rows is None:
        raise ValueError(f"rows: the sampler {name!r} has no budget of its own; say how many")
    return rows
