"""Heat maps as inline SVG: a row of cells for each quantity, a column for each head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

KIND_COLOURS = {
    "a_shape": "#4e9f6d",
    "vertical_slash": "#4a7fb5",
    "block_sparse": "#d98c3f",
    "adaptive": "#8d79b8",
    "dense": "#5b6168",
    "vllm": "#d9dce0",
}
# From white to the full colour.
BLUE, RED, GREEN = (33, 86, 138), (178, 56, 48), (44, 110, 73)
CELL_HEIGHT, LABEL, TOP = 30, 92, 22
NARROW = 46  # pixels; a cell that is narrower holds no number


@dataclass(frozen=True)
class Cell:
    """Colour, a few characters inside, and the whole story in the tooltip."""

    colour: str
    text: str
    title: str


@dataclass(frozen=True)
class Row:
    name: str
    cells: Sequence[Cell]


def shade(share: float, colour: tuple[int, int, int]) -> str:
    """A colour between near-white (0) and `colour` (1)."""
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(250 + (c - 250) * share):02x}" for c in colour)


def log_share(value: float, low: float, high: float) -> float:
    """Place of a value between two others on a logarithmic scale, 0 to 1."""
    if value <= low:
        return 0.0
    return min(math.log(value / low) / math.log(high / low), 1.0)


def ink(colour: str) -> str:
    """Black or white, whichever can be read on the colour."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#ffffff" if 0.299 * r + 0.587 * g + 0.114 * b < 140 else "#1c2126"


def heat_map(rows: Sequence[Row], title: str, width: int = 1060) -> str:
    """SVG of rows of cells, all of the same number, under the numbers of the heads."""
    count = max(len(row.cells) for row in rows)
    cell = max((width - LABEL) / max(count, 1), 8)
    height = TOP + CELL_HEIGHT * len(rows) + 4
    parts = [
        f'<svg viewBox="0 0 {LABEL + cell * count:.0f} {height}" role="img" '
        f'aria-label="{escape(title)}" class="map">'
    ]
    every = 1 if cell >= 22 else 4
    for i in range(0, count, every):
        x = LABEL + cell * (i + 0.5)
        parts.append(f'<text x="{x:.1f}" y="14" text-anchor="middle" class="axis">{i}</text>')
    for number, row in enumerate(rows):
        y = TOP + CELL_HEIGHT * number
        parts.append(f'<text x="0" y="{y + 19}" class="axis">{escape(row.name)}</text>')
        for i, item in enumerate(row.cells):
            x = LABEL + cell * i
            parts.append(
                f'<g><title>{escape(item.title)}</title><rect x="{x:.1f}" y="{y}" '
                f'width="{cell - 1.5:.1f}" height="{CELL_HEIGHT - 2}" rx="2" '
                f'fill="{item.colour}"/>'
            )
            if cell >= NARROW:
                parts.append(
                    f'<text x="{x + cell / 2:.1f}" y="{y + 18}" text-anchor="middle" '
                    f'class="cell" fill="{ink(item.colour)}">{escape(item.text)}</text>'
                )
            parts.append("</g>")
    return "".join([*parts, "</svg>"])
