"""The connector in the engine: admits requests by host memory, and says whose rows are whose."""

from __future__ import annotations

from collections.abc import Hashable

from ..kv_spec import OffloadWindowManager
from ..ledger import Ledger
from ..step import Start, Step
from . import recompute
from .metrics import OffloadStats


class SchedulerSide:
    def __init__(self, vllm_config, kv_cache_config) -> None:
        self.max_model_len = vllm_config.model_config.max_model_len
        groups = kv_cache_config.kv_cache_groups
        self.block_size = groups[0].kv_cache_spec.block_size
        self.caching = bool(vllm_config.cache_config.enable_prefix_caching)
        self.ledger: Ledger | None = None
        self.manager = None
        self.hash_rows = 0  # tokens of a block hash
        self.renew = self.forget = False
        self.closed: list[str] = []
        self.started: list[Start] = []
        self.tokens: dict[str, object] = {}  # vLLM's requests that are held
        self.queued: str | None = None  # the first that waits for host memory
        self.waited = 0
        recompute.install()

    def set_stores(self, sizes: list[tuple[int, int, int]]) -> None:
        """What each worker's stores hold: (pages, rows of a page, requests)."""
        if len(set(sizes)) != 1:
            raise RuntimeError(
                f"The workers' host stores differ in (pages, rows of a page, requests): {sizes}. "
                'Set additional_config["sparse"]["host_gib"] to what all of them can have'
            )
        self.ledger = Ledger(*sizes[0])

    def bind(self, kv_cache_manager) -> None:
        self.manager = kv_cache_manager
        self.hash_rows = kv_cache_manager.block_pool.hash_block_size
        for manager in kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, OffloadWindowManager):
                manager.acknowledged = self.acknowledged

    def acknowledged(self, request_id: str) -> int:
        held = self.ledger.held.get(request_id)
        return held.acknowledged if held is not None else 0

    def acknowledge(self, number: int, rows: dict[str, int]) -> None:
        self.ledger.acknowledge(number, rows)

    def matched(self, request, computed: int) -> int | None:
        """Rows that the host has beyond the computed ones; None: the host has no room yet."""
        if request.request_id in self.ledger.held:
            kept = self._kept(request)
            if self.ledger.can_truncate(request.request_id, kept):
                return max(kept - computed, 0)
            # Others hold pages that it would have to write again, and there is no room to have
            # them twice. If it waited with its pages, all might wait for each other.
            self._give_up(request.request_id)
            self.started.append(Start(request.request_id, 0, [], gone=True))
        if self.queued not in (None, request.request_id):
            return None  # in order of arrival: a small one does not pass a large one for ever
        keys = [] if computed else self._prefix(request)
        if not self.ledger.fits(self._most(request), keys):
            self.waited += self.queued is None
            self.queued = request.request_id
            return None
        return len(keys) * self.ledger.page_rows

    def allocated(self, request, rows: int) -> None:
        """vLLM admits the request, with this many of the rows that the host has for it."""
        request_id = request.request_id
        if self.queued == request_id:
            self.queued = None
        held = self.ledger.held.get(request_id)
        if held is not None and request.num_computed_tokens:
            # A session goes on with more input, behind the last token that stays. Its device blocks
            # stay as well. A step that was under way when it stopped has written rows that do not.
            rows = request.num_computed_tokens
            if held.rows > rows:
                self.ledger.truncate(request_id, rows)
                self.started.append(Start(request_id, rows, [], on_device=True))
            return
        if held is not None:
            self.ledger.truncate(request_id, rows)
            self.started.append(Start(request_id, rows, []))
            return
        keys = self._prefix(request)[: rows // self.ledger.page_rows]
        self.ledger.admit(request_id, self._most(request), keys)
        self.tokens[request_id] = request
        self.started.append(Start(request_id, rows, keys))

    def step(self, scheduler_output) -> Step:
        step = Step(self.ledger.number, self.renew, self.forget, self.closed, self.started)
        self.ledger.number += 1
        self.renew, self.forget, self.closed, self.started = False, False, [], []
        cached = scheduler_output.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        before |= {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        blocks = {r: self.manager.get_block_ids(r) for r in before}
        for start in step.started:
            if start.rows and not start.on_device:
                count = -(-start.rows // self.block_size)
                start.blocks = tuple(group[:count] for group in blocks[start.request])
        for request_id, rows in before.items():
            new = scheduler_output.num_scheduled_tokens[request_id]
            step.rows[request_id] = rows, new
            tail = (rows + new - 1) // self.block_size
            step.tails[request_id] = tuple(group[tail] for group in blocks[request_id])
            self.ledger.append(request_id, new)
        for request_id, (rows, new) in step.rows.items():
            if self.ledger.held[request_id].old:
                continue  # it runs through a reset: what it writes follows from what was forgotten
            first = rows // self.ledger.page_rows
            keys = self._keys(self.tokens[request_id], first, (rows + new) // self.ledger.page_rows)
            if keys:
                step.keys[request_id] = keys
                self.ledger.seal(request_id, first, keys)
        step.free_pages = self.ledger.pages.free
        return step

    def finished(self, request_id: str) -> None:
        if self.queued == request_id:
            self.queued = None
        if request_id in self.ledger.held:
            self._give_up(request_id)
            self.closed.append(request_id)

    def reset_cache(self) -> bool:
        """Forget every row: the weights may have changed."""
        self.ledger.forget()
        self.forget = True
        # Those that are preempted have nothing left to keep: each begins anew when it has room,
        # and finds what those before it have written until then.
        for request_id, request in list(self.tokens.items()):
            if not request.num_computed_tokens:
                self._give_up(request_id)
                self.closed.append(request_id)
        return True

    def lose(self) -> None:
        """A worker's store is lost: nobody has any rows, and all stores begin again."""
        ledger = self.ledger
        self.ledger = Ledger(ledger.pages.count, ledger.page_rows, ledger.most_requests)
        self.ledger.number = ledger.number
        self.tokens.clear()
        self.renew, self.forget, self.closed, self.started = True, False, [], []
        self.queued = None

    def stats(self) -> OffloadStats:
        """What came since the last call."""
        queued, self.waited = self.waited, 0
        return OffloadStats.of({"queued": queued}, 0, {})

    def _give_up(self, request_id: str) -> None:
        self.ledger.close(request_id)
        del self.tokens[request_id]

    def _most(self, request) -> int:
        if request.resumable:  # a session: nobody knows what it will be asked next
            return self.max_model_len
        return min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)

    def _kept(self, request) -> int:
        """Rows of a preempted request that it goes on with; its last token is always computed."""
        if request.skip_reading_prefix_cache:
            return 0  # vLLM computes all of it, whatever it is told
        rows = min(self.ledger.held[request.request_id].acknowledged, request.num_tokens - 1)
        return rows // self.ledger.page_rows * self.ledger.page_rows

    def _prefix(self, request) -> list[Hashable]:
        """Keys of the leading pages that the stores have."""
        if request.skip_reading_prefix_cache:
            return []
        keys = self._keys(request, 0, (request.num_tokens - 1) // self.ledger.page_rows)
        return keys[: self.ledger.found(keys)]

    def _keys(self, request, first: int, last: int) -> list[Hashable]:
        """Keys of the pages `first` to `last` - 1: vLLM's hash of all tokens up to their end."""
        if not self.caching or self.ledger.page_rows % self.hash_rows:
            return []
        each = self.ledger.page_rows // self.hash_rows
        ends = [(number + 1) * each - 1 for number in range(first, last)]
        return [bytes(request.block_hashes[end]) for end in ends if end < len(request.block_hashes)]
