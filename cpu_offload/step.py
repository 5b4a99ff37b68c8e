"""What the scheduler tells the workers' host stores, once a step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass
class Start:
    """A request that begins, or goes on: after it was preempted, or with more input."""

    request: str
    rows: int  # that it has in the host stores
    keys: list[Hashable]  # whose pages they are, where it begins
    blocks: tuple[list[int], ...] = ()  # device blocks to fill with them, by KV cache group
    on_device: bool = False  # it still has its device blocks
    gone: bool = False  # it does not go on: it gives up its rows, and may begin anew behind this


@dataclass
class Step:
    """One step, in the order in which the stores have to follow."""

    number: int = 0  # of the steps so far; what workers acknowledge is of one
    renew: bool = False  # begin again with empty stores, before all else
    forget: bool = False  # every prefix that could be shared
    closed: list[str] = field(default_factory=list)
    started: list[Start] = field(default_factory=list)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # (there before, new)
    keys: dict[str, list[Hashable]] = field(default_factory=dict)  # of pages that become full
    # Device block of each request's last new row, by KV cache group. No other request has it.
    tails: dict[str, tuple[int, ...]] = field(default_factory=dict)
    free_pages: int = 0  # what is left in each store when the step is done
