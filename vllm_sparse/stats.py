"""STATS: what the sparse backend did in this process, counted, and said in one log line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

PERIOD_S = 10.0  # least time between two lines


@dataclass
class Stats:
    """Counters since the process started. Tokens, chunks and rows count once a step, keys and
    seconds once a layer. A chunk is one sequence's part of one step."""

    prefill_tokens: int = 0
    sparse_chunks: int = 0
    dense_chunks: int = 0  # below the break-even length
    decode_rows: int = 0
    shared_rows: int = 0  # of them: whose first keys were read together with other rows'
    softmax_flagged: int = 0  # rows x heads x layers whose unified softmax was computed again
    keys_read: int = 0  # by prefill, in keys x query tiles x heads
    keys_causal: int = 0  # the same if every chunk were dense
    index_seconds: float = 0.0  # planning
    attention_seconds: float = 0.0  # prefill kernels, planning not included
    fallbacks: dict[str, int] = field(default_factory=dict)  # layers left to vLLM, by reason

    def fell_back(self, reason: str) -> None:
        """Count a layer that was left to vLLM."""
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def since(self, before: Stats) -> Stats:
        """What was added after `before`; fallbacks stay totals."""
        added = {
            f.name: getattr(self, f.name) - getattr(before, f.name)
            for f in fields(self)
            if f.name != "fallbacks"
        }
        return Stats(**added, fallbacks=dict(self.fallbacks))

    @property
    def density(self) -> float:
        """Share of causal key reads that prefill made, 0 to 1."""
        return self.keys_read / self.keys_causal if self.keys_causal else 0.0

    @property
    def index_share(self) -> float:
        """Share of prefill attention's time that planning took, 0 to 1."""
        total = self.index_seconds + self.attention_seconds
        return self.index_seconds / total if total else 0.0

    def line(self) -> str:
        """One line for people that ends in the same as JSON."""
        record = {
            "prefill_tokens": self.prefill_tokens,
            "sparse_chunks": self.sparse_chunks,
            "dense_chunks": self.dense_chunks,
            "decode_rows": self.decode_rows,
            "shared_rows": self.shared_rows,
            "softmax_flagged": self.softmax_flagged,
            "density": round(self.density, 4),
            "index_share": round(self.index_share, 4),
            "index_seconds": round(self.index_seconds, 4),
            "attention_seconds": round(self.attention_seconds, 4),
            "keys_read": self.keys_read,
            "keys_causal": self.keys_causal,
            "fallbacks": self.fallbacks,
        }
        chunks = self.sparse_chunks + self.dense_chunks
        return (
            f"Sparse prefill: {self.prefill_tokens} tokens in {chunks} chunks"
            f" ({self.dense_chunks} dense), density {self.density:.1%}, index"
            f" {self.index_share:.1%} of attention time, attention"
            f" {self.index_seconds + self.attention_seconds:.2f} s {json.dumps(record)}"
        )


class Reporter:
    """Logs what came since its last line, once prefill has made way for decoding."""

    def __init__(
        self,
        stats: Stats,
        logger: logging.Logger,
        clock=time.monotonic,
        settle: Sequence[Callable[[], None]] = (),
    ) -> None:
        """`settle`: what brings the stats up to date before a line, where that costs a wait."""
        self.settle = settle
        self.stats = stats
        self.logger = logger
        self.clock = clock
        self.reported = replace(stats)
        self.last: float | None = None

    def step(self, decode_only: bool) -> None:
        """To be called at each step, before the step is counted."""
        if not decode_only or self.stats.sparse_chunks == self.reported.sparse_chunks:
            return
        now = self.clock()
        if self.last is not None and now - self.last < PERIOD_S:
            return
        for settle in self.settle:
            settle()
        self.logger.info("%s", self.stats.since(self.reported).line())
        self.reported, self.last = replace(self.stats), now


STATS = Stats()
