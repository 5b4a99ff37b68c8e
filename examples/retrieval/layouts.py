"""Which head stands where: [layer][KV head] -> the content of its key and its query heads."""

from __future__ import annotations

from dataclasses import dataclass

from .heads import Head


@dataclass(frozen=True)
class Group:
    """One KV head: the slice of the stream that its key matches on, and its query heads."""

    content: str
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint and its heads by layer."""

    hidden: int
    intermediate: int
    layers: tuple[tuple[Group, ...], ...]


def _window(width: float, sink: float) -> Head:
    return Head("window", width=width, sink=sink)


def _local(width: float) -> Head:
    return Head("local", width=width, sink=0.0)


def _slash(distance: int) -> Head:
    return Head("slash", distance=distance)


def _vertical(taste: int, sink: float = 0.08) -> Head:
    return Head("vertical", taste=taste, sink=sink)


def _same_word(width: float, decay: float, sink: float = 0.25) -> Head:
    return Head("same_word", width=width, decay=decay, sink=sink)


_PREVIOUS = Head("previous", distance=1)
_ASKED, _RETRIEVE, _COUNT, _HOP = Head("asked"), Head("retrieve"), Head("count"), Head("hop")

PLAIN = Shape(
    hidden=512,
    intermediate=128,
    layers=(
        (
            Group("own", (_PREVIOUS, _ASKED, _window(8, 0.5), _window(32, 0.6))),
            Group("own", (_slash(2), _window(16, 0.7), _window(64, 0.4), _local(128))),
        ),
        (
            Group("previous", (_RETRIEVE, _COUNT, _window(16, 0.8), _window(64, 0.5))),
            Group("own", (_same_word(64, 0.6), _window(8, 0.6), _window(32, 0.7), _local(64))),
        ),
        (
            Group("previous", (_HOP, _window(64, 0.6), _slash(64), _window(16, 0.5))),
            Group("own", (_vertical(0), _window(8, 0.8), _window(32, 0.4), _local(32))),
        ),
    ),
)

LEAN = Shape(
    hidden=1024,
    intermediate=2816,
    layers=(
        (
            Group("own", (_PREVIOUS, _ASKED, _slash(2), _window(32, 0.6))),
            Group("own", (_vertical(0), _window(8, 0.5), _same_word(64, 0.35), _window(96, 0.4))),
        ),
        (
            Group("previous", (_RETRIEVE, _COUNT, _vertical(1), _window(64, 0.8))),
            Group("own", (_same_word(4000, 2.0), _local(512), _window(16, 0.7), _window(128, 0.5))),
        ),
        (
            Group("previous", (_HOP, _vertical(2), _window(48, 0.6), _slash(64))),
            Group("own", (_same_word(256, 0.3), _window(12, 0.9), _window(64, 0.5), _vertical(3))),
        ),
        (
            Group("own", (_slash(300), _window(24, 0.7), _vertical(1, 0.2), _local(256))),
            Group("own", (_same_word(5000, 2.0), _window(96, 0.6), _window(10, 0.8), _slash(17))),
        ),
    ),
)
