"""The host stores of one vLLM worker, and which request stands in which row of a batch."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .host import StoreLost
from .pool import Pool
from .step import Start, Step

logger = logging.getLogger("vllm_sparse.offload")

LOOK_EVERY = 1.0  # seconds, after actors that have ended
MOST_LOSSES, LOSSES_WITHIN = 3, 3600.0  # stores that may be lost in so many seconds
OF_POOLS = ("rows_read", "rows_there", "restarts")  # counters that the first pool keeps


@dataclass(frozen=True)
class Place:
    """Where a layer's rows are kept."""

    store: int  # 0: offloaded layers, 1: resident ones
    layer: int  # its number there


class HostKV:
    """Keys and values of all layers in host memory.

    Layers that decode reads from here have a pool; resident layers, which decode reads on the
    device, have one of their own, for requests that are preempted and prefixes that come again.

    Args:
        offloaded: layer numbers of the model, in order; resident: likewise.
        pool: of the offloaded layers; mirror: of the resident ones, None without any.

    A store that is lost does not end the worker: what is left of the step is not computed, and
    whatever came of it must be thrown away.
    """

    def __init__(
        self, offloaded: Sequence[int], resident: Sequence[int], pool: Pool, mirror: Pool | None
    ):
        self.pool = pool
        self.pools = [pool] if mirror is None else [pool, mirror]
        self.places = {layer: Place(0, i) for i, layer in enumerate(offloaded)}
        self.places |= {layer: Place(1, i) for i, layer in enumerate(resident)}
        self.slots: dict[str, list[int]] = {}  # of each open request, by store
        self.step: Step | None = None
        self.counters: Counter[str] = Counter()  # since the start
        self.lost: str | None = None  # why nothing is read or written until stores are renewed
        self._losses: list[float] = []  # when stores were lost
        self._owners: dict[int, dict[int, str]] = {}
        self._written: set[int] = set()
        self._looked = 0.0
        # Waits until no device reads the stores: before pages change hands.
        self.settle: Callable[[], None] = lambda: None

    def begin(self, step: Step) -> None:
        """Follow the scheduler: end, begin and cut requests, before the model runs."""
        self.settle()
        self.step = step
        self._owners, self._written = {}, set()
        self.verify()
        if self.lost is not None:
            return
        if step.forget:
            for pool in self.pools:
                pool.forget()
        for request in step.closed:
            self._close(request)
        for start in step.started:
            self._start(start)
        # A worker that answers everything itself does not see that an actor has ended.
        now = time.monotonic()
        if not step.rows or now - self._looked > LOOK_EVERY:
            self.pool.look()
            self._looked = now

    def verify(self) -> None:
        """See whether the stores are still what this process made; `lost` says if not."""
        if self.lost is None:
            try:
                for pool in self.pools:
                    pool.store.verify()
            except StoreLost as error:
                self.lose(error)

    def lose(self, cause: StoreLost) -> None:
        """Give up what the stores hold; the scheduler lets every request be computed again.

        Raises:
            RuntimeError: that happens again and again.
        """
        if self.lost is not None:
            return
        self.lost = str(cause)
        now = time.monotonic()
        self._losses = [then for then in self._losses if now - then < LOSSES_WITHIN] + [now]
        if len(self._losses) > MOST_LOSSES:
            raise RuntimeError(
                f"The host store is lost for the {len(self._losses)}th time within "
                f"{LOSSES_WITHIN / 60:.0f} minutes: {cause}. Requests are not computed again any "
                "more; look for what writes to this process's memory, or takes all of the machine's"
            ) from cause
        self.counters["regions_lost"] += 1
        logger.error(
            "The host store is lost: %s. Every request is computed again; %d had rows there.",
            cause, len(self.slots),
        )  # fmt: skip

    def renew(self, make: Callable[[], list[Pool]]) -> None:
        """Begin again with empty stores: new ones of `make` where these are lost."""
        if self.lost is not None:
            stats = self.pool.stats()
            self.counters.update({name: stats[name] for name in OF_POOLS})
            self.settle()
            self.shutdown()  # first: there may be no room for both
            try:
                with torch.inference_mode(False):  # they outlive the step that makes them
                    self.pools = make()
            except Exception as error:
                raise RuntimeError(
                    f"The host store was lost ({self.lost}), and there is no new one: {error}"
                ) from error
            self.pool = self.pools[0]
            self.lost = None
        else:  # another worker's are
            for slots in self.slots.values():
                for pool, slot in zip(self.pools, slots, strict=True):
                    pool.close_request(slot)
            for pool in self.pools:
                pool.forget()
        self.slots.clear()

    def _close(self, request: str) -> None:
        for pool, slot in zip(self.pools, self.slots.pop(request), strict=True):
            pool.close_request(slot)

    def _start(self, start: Start) -> None:
        if start.gone:
            self._close(start.request)
            return
        if start.request in self.slots:
            for pool, slot in zip(self.pools, self.slots[start.request], strict=True):
                pool.truncate(slot, start.rows)
            return
        self.slots[start.request] = [pool.open(start.request) for pool in self.pools]
        for pool, slot in zip(self.pools, self.slots[start.request], strict=True):
            found = pool.share(slot, start.keys)
            if found != start.rows:
                raise RuntimeError(
                    f"The host store has {found} rows of a prefix of which the scheduler counts "
                    f"on {start.rows}; this is a fault of vllm-sparse, please report it"
                )

    def requests(self, group: int, tails: Sequence[int]) -> list[str]:
        """The requests whose last blocks in a KV cache group are these."""
        if group not in self._owners:
            self._owners[group] = {
                blocks[group]: request for request, blocks in self._step().tails.items()
            }
        return [self._owners[group][tail] for tail in tails]

    def append(
        self, layer: int, requests: Sequence[str], starts: Sequence[int],
        key: torch.Tensor, value: torch.Tensor,
    ) -> None:  # fmt: skip
        """Mirror a step's rows of a layer.

        Args:
            requests: in the order of the batch; starts: the first row of each, and the end.
            key, value: [T, Hkv, D].
        """
        place, step = self.places[layer], self._step()
        pool = self.pools[place.store]
        slots = [self.slots[request][place.store] for request in requests]
        counts = [b - a for a, b in pairwise(starts)]
        for request, slot, count in zip(requests, slots, counts, strict=True):
            there = pool.length(slot, place.layer)
            if (there, count) != step.rows[request]:
                before, new = step.rows[request]
                raise RuntimeError(
                    f"Layer {layer} of request {request!r} has {there} rows in the host store and "
                    f"gets {count} more, where the scheduler counts {before} and {new}; this is a "
                    "fault of vllm-sparse, please report it"
                )
        pool.append_each(place.layer, slots, key[: starts[-1]], value[: starts[-1]], counts)
        for request, keys in step.keys.items():
            pool.name(self.slots[request][place.store], step.rows[request][0], keys)
        self._written.add(layer)
        rows = starts[-1] * pool.layout.kv_heads
        self.counters["mirrored_bytes"] += rows * pool.layout.row_bytes

    def end(self) -> dict[str, int]:
        """Rows that are certain to be here after the step, by request."""
        if self.lost is not None or self.step is None or len(self._written) < len(self.places):
            return {}
        return {request: before + new for request, (before, new) in self.step.rows.items()}

    def load(
        self, start: Start, layer: int, group: int, block_size: int, kv_cache: torch.Tensor
    ) -> None:
        """Fill a request's device blocks of a layer [blocks, Hkv, block, 2 D]."""
        if start.on_device:
            return
        place = self.places[layer]
        pool, slot = self.pools[place.store], self.slots[start.request][place.store]
        on_device = [
            (number, block)
            for number, block in enumerate(start.blocks[group])
            if block != 0 and number * block_size < start.rows  # vLLM's null block
        ]
        if not on_device:
            return
        blocks = kv_cache.new_zeros(len(on_device), *kv_cache.shape[1:], device="cpu")
        for into, (number, _) in zip(blocks, on_device, strict=True):
            first = number * block_size
            last = min(first + block_size, start.rows)
            both = torch.cat(pool.read(slot, place.layer, first, last), -1)
            into[:, : last - first] = both.transpose(0, 1)
            self.counters["loaded_bytes"] += both.numel() * kv_cache.element_size()
        # Behind the request's rows in its last block are those that the step itself writes.
        kv_cache[[block for _, block in on_device]] = blocks.to(kv_cache.device)

    def check(self) -> None:
        """Raise RuntimeError where the scheduler's books and the stores differ."""
        self.verify()  # what the model gave rests on them: before anybody gets it
        if self.lost is not None or self.step is None or len(self._written) < len(self.places):
            return
        free = [pool.capacity().free_pages for pool in self.pools]
        if any(n != self.step.free_pages for n in free):
            raise RuntimeError(
                f"The host stores have {free} free pages, the scheduler counts "
                f"{self.step.free_pages}; this is a fault of vllm-sparse, please report it"
            )

    def totals(self) -> tuple[dict[str, float], dict[str, float]]:
        """(counters since the start, gauges), named as in connector/metrics.py."""
        stats = [pool.stats() for pool in self.pools]
        counters = Counter({name: stats[0][name] for name in OF_POOLS})
        counters.update(self.counters)
        gauges = {n: sum(s[n] for s in stats) for n in ("host_bytes", "host_bytes_used")}
        return dict(counters), gauges

    def shutdown(self) -> None:
        for pool in self.pools:
            pool.shutdown()

    def _step(self) -> Step:
        if self.step is None:
            raise RuntimeError(
                "The model runs without the connector's word of the step; this is a fault of "
                "vllm-sparse, please report it"
            )
        return self.step
