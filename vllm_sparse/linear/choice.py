"""Which implementation a linear layer runs, by the rows of a step. No torch, no vLLM."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VLLM = "vllm"
NOISE = 0.03  # of a time, from run to run
# What is timed. More rows than the last are as the last: products bound them, not memory.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 256)


@dataclass(frozen=True)
class Choice:
    """names[i] runs up to rows[i] rows, the last one any number."""

    rows: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def always(cls, name: str) -> Choice:
        return cls((1,), (name,))

    @classmethod
    def of_times(cls, times: Mapping[str, Sequence[float | None]]) -> Choice:
        """The fastest at each of ROWS; times in seconds, None where one does not run.

        What fewer rows run is kept where it is slower by no more than NOISE.
        """
        names: list[str] = []
        for i in range(len(ROWS)):
            found = {name: of[i] for name, of in times.items() if of[i] is not None}
            fastest = min(found, key=found.get)
            before = found.get(names[-1]) if names else None
            stays = before is not None and before <= found[fastest] * (1 + NOISE)
            names.append(names[-1] if stays else fastest)
        return cls._joined(ROWS, names)

    @classmethod
    def from_kept(cls, value: Any, known: Sequence[str]) -> Choice | None:
        """What `to_keep` gave; None for anything else."""
        try:
            pairs = [(rows, name) for rows, name in value]
        except (TypeError, ValueError):
            return None
        if not pairs or any(name not in known for _, name in pairs):
            return None
        rows = [r for r, _ in pairs]
        whole = all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in rows)
        if not whole or rows != sorted(set(rows)):
            return None
        return cls(tuple(rows), tuple(name for _, name in pairs))

    def to_keep(self) -> list[list[Any]]:
        return [list(pair) for pair in zip(self.rows, self.names, strict=True)]

    @classmethod
    def _joined(cls, rows: Sequence[int], names: Sequence[str]) -> Choice:
        """Neighbours of the same name made one."""
        last = [i for i in range(len(rows)) if i + 1 == len(rows) or names[i] != names[i + 1]]
        return cls(tuple(rows[i] for i in last), tuple(names[i] for i in last))

    def name(self, rows: int) -> str:
        """What runs with so many rows."""
        return self.names[min(bisect_left(self.rows, rows), len(self.names) - 1)]

    def line(self) -> str:
        """For people."""
        if len(self.names) == 1:
            return f"{self.names[0]} for any rows"
        parts, first = [], 1
        for last, name in zip(self.rows[:-1], self.names[:-1], strict=True):
            parts.append(f"{name} for {first if first == last else f'{first}-{last}'}")
            first = last + 1
        return ", ".join([*parts, f"{self.names[-1]} for {first} rows and more"])
