"""Which pages of a host store are whose: numbers only, no memory. One page holds all layers.

The vLLM worker's pool and the scheduler's side can each keep a `Pages` of their own: given the same
calls in the same order, both hand out the same numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from .store import StoreFull


@dataclass
class _Page:
    references: int = 0
    key: Hashable = None


class Pages:
    """Page numbers 0 .. count - 1, each in use by one or more requests, idle under a key, or free.

    A page under a key is found by `acquire`; when the last who holds it has released it, it stays
    until its number is needed, the least recently used first. The key must tell apart everything
    that the rows depend on (in vLLM the block hash, which holds cache salt, LoRA and multimodal
    inputs): token ids alone would show one tenant's prefix to another.

    Args:
        count: pages, at least 1.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"count: got {count}; a store needs at least one page")
        self.count = count
        self.generations = [0] * count  # how often each was handed out
        self._pages = [_Page() for _ in range(count)]
        self._free = list(range(count - 1, -1, -1))
        self._by_key: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, int] = OrderedDict()  # least recently used first

    @property
    def free(self) -> int:
        """Pages that `allocate` can give, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and `acquire` still finds."""
        return len(self._idle)

    def allocate(self, count: int = 1) -> list[int]:
        """Pages with nothing of use in them, each to be released once.

        Raises:
            StoreFull: fewer than `count` are free; none is taken then.
        """
        if count > self.free:
            raise StoreFull(
                f"{count} pages of host memory are wanted, and {self.free} of {self.count} are "
                "free; wait for a request to end, or give the store more memory"
            )
        taken = []
        for _ in range(count):
            if not self._free:
                key, page = self._idle.popitem(last=False)
                del self._by_key[key]
                self._pages[page].key = None
                self._free.append(page)
            page = self._free.pop()
            self._pages[page].references = 1
            self.generations[page] += 1
            taken.append(page)
        return taken

    def seal(self, page: int, key: Hashable) -> int:
        """Let others find a page that will not change any more.

        Where the key has a page already, that one is held instead and returned, and this one is
        released.
        """
        if key is None or not self._pages[page].references:
            raise ValueError(f"seal: got key {key!r} for page {page}; give a key to a page in use")
        known = self._by_key.get(key)
        if known == page:
            return page
        if known is not None:
            self.acquire(key)
            self.release([page])
            return known
        if self._pages[page].key is not None:
            return page  # under another key already; one name is enough
        self._pages[page].key = key
        self._by_key[key] = page
        return page

    def find(self, key: Hashable) -> int | None:
        """The page of a key, not held; None: there is none."""
        return self._by_key.get(key)

    def references(self, page: int) -> int:
        """How many hold a page."""
        return self._pages[page].references

    def acquire(self, key: Hashable) -> int | None:
        """The page of a key, to be released once; None: there is none."""
        page = self._by_key.get(key)
        if page is not None:
            self._idle.pop(key, None)
            self._pages[page].references += 1
        return page

    def release(self, pages: list[int]) -> list[int]:
        """Give pages back, the last first; returns those that are free and under no key now."""
        freed = []
        for page in reversed(pages):
            held = self._pages[page]
            if held.references < 1:
                raise ValueError(f"release: page {page} was released before")
            held.references -= 1
            if held.references:
                continue
            if held.key is None:
                self._free.append(page)
                freed.append(page)
            else:
                self._idle[held.key] = page
        return freed

    def forget(self) -> None:
        """Let no page be found any more; those that nobody holds are free."""
        for page in self._by_key.values():
            self._pages[page].key = None
        self._free += self._idle.values()
        self._by_key.clear()
        self._idle.clear()

    def shared(self, page: int) -> bool:
        """Whether the page may not be written to: others hold it, or can find it."""
        return self._pages[page].references > 1 or self._pages[page].key is not None
