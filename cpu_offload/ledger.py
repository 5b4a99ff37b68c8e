"""What the scheduler knows of the host stores: which request has how many rows, and what fits.

It keeps `Pages` of its own. Told of the same events in the same order as the workers' pools, they
name the same keys, so a prefix that is found here is found there, in the same step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from .pages import Pages


@dataclass
class Held:
    """One request's part of the host stores."""

    most: int  # pages that it may come to need
    rows: int = 0  # written, or being written in the step that is under way
    acknowledged: int = 0  # rows that every worker has said to have
    since: int = 0  # the first step whose acknowledgements are of these rows
    pages: list[int] = field(default_factory=list)
    old: bool = False  # it has rows that are good for nobody else


class Ledger:
    """Admits requests by the host pages that they may need until they end.

    Nothing is dropped to make room for others, so a request is admitted when all that it may write
    fits beside all that those before it may write: never are more pages promised than are free.

    Args:
        pages: of each worker's store; page_rows: of a page; most_requests: that it has slots for.
    """

    def __init__(self, pages: int, page_rows: int, most_requests: int):
        self.most_requests = most_requests
        self.pages = Pages(pages)
        self.page_rows = page_rows
        self.held: dict[str, Held] = {}
        self.promised = 0  # pages that requests may still ask for
        self.number = 0  # of the step that is put together; those under way have lower ones

    def found(self, keys: Sequence[Hashable]) -> int:
        """How many of the leading keys the stores have."""
        return next((i for i, k in enumerate(keys) if self.pages.find(k) is None), len(keys))

    def fits(self, rows: int, keys: Sequence[Hashable] = ()) -> bool:
        """Whether a request of at most `rows` rows can be admitted, with these keys' pages."""
        found = [self.pages.find(key) for key in keys]
        woken = sum(not self.pages.references(page) for page in found)
        needed = pages_of(rows, self.page_rows) - len(found) + woken
        has_slot = len(self.held) < self.most_requests
        return has_slot and needed <= self.pages.free - self.promised

    def admit(self, request: str, rows: int, keys: Sequence[Hashable] = ()) -> Held:
        """Enter a request of at most `rows` rows, which has those of these keys already."""
        pages = [p for p in map(self.pages.acquire, keys) if p is not None]
        assert len(pages) == len(keys) and request not in self.held
        held = Held(pages_of(rows, self.page_rows), len(pages) * self.page_rows, pages=pages)
        held.acknowledged, held.since = held.rows, self.number
        self.held[request] = held
        self.promised += held.most - len(pages)
        return held

    def append(self, request: str, rows: int) -> None:
        """Rows that a step writes behind the others."""
        held = self.held[request]
        held.rows += rows
        missing = pages_of(held.rows, self.page_rows) - len(held.pages)
        held.pages += self.pages.allocate(missing)
        self.promised -= missing

    def seal(self, request: str, first: int, keys: Sequence[Hashable]) -> None:
        """The pages from number `first` on are full and get these keys."""
        held = self.held[request]
        for number, key in enumerate(keys, first):
            held.pages[number] = self.pages.seal(held.pages[number], key)

    def can_truncate(self, request: str, rows: int) -> bool:
        """Whether there is room for what may be written again in place of the rows from `rows` on.

        A page that others hold as well does not become free when one drops it.
        """
        dropped = self.held[request].pages[pages_of(rows, self.page_rows) :]
        shared = sum(self.pages.references(page) > 1 for page in dropped)
        return shared <= self.pages.free - self.promised

    def truncate(self, request: str, rows: int) -> None:
        """Rows from `rows` on are gone; `can_truncate` has said yes.

        In the middle of a page those behind are the request's own, which nobody was shown.
        """
        assert self.can_truncate(request, rows)
        held = self.held[request]
        kept = pages_of(rows, self.page_rows)
        assert not rows % self.page_rows or not self.pages.shared(held.pages[kept - 1])
        dropped = held.pages[kept:]
        held.rows, held.acknowledged = rows, min(rows, held.acknowledged)
        held.since, held.old = self.number, held.old and rows > 0
        del held.pages[kept:]
        self.pages.release(dropped)
        self.promised += len(dropped)

    def acknowledge(self, number: int, rows: dict[str, int]) -> None:
        """Every worker has so many rows of these requests after step `number`.

        A step that was under way when rows were cut or forgotten says nothing of those that
        follow.
        """
        for request, count in rows.items():
            held = self.held.get(request)
            if held is not None and number >= held.since:  # it may have ended
                held.acknowledged = min(count, held.rows)

    def forget(self) -> None:
        """No rows are good any more, those of preempted requests and steps under way included."""
        self.pages.forget()
        for held in self.held.values():
            held.acknowledged, held.since, held.old = 0, self.number, held.rows > 0

    def close(self, request: str) -> None:
        held = self.held.pop(request)
        self.promised -= held.most - len(held.pages)
        self.pages.release(held.pages)


def pages_of(rows: int, page_rows: int) -> int:
    """Pages that so many rows take."""
    return -(-rows // page_rows)
