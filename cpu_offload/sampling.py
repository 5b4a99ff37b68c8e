"""What a pool samples, and how much of it: the settings of its samplers, checked."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

SAMPLERS = ("exact", "topk", "vattention", "lsh")
OPTIONS = {
    "exact": (),
    "topk": ("share", "least"),
    "vattention": ("share", "least", "epsilon", "delta", "even"),
    "lsh": ("share", "least", "even", "bits", "tables", "seed"),
}


@dataclass(frozen=True)
class Sampling:
    """How a KV head's query heads read a request's rows.

    All but "exact" look at every key in four bits first, and so expect what each row weighs.

    * "exact" reads every row.
    * "topk" reads the rows that are expected to be the heaviest, and takes nothing for the others.
    * "vattention" reads heavy rows for certain and a sample of the others, drawn by what they are
      expected to weigh and in part evenly, so that nothing is without a chance. The sample grows
      until the error of each head's output, as the sample itself shows it, is at most epsilon times
      the root mean square of the values that the head attends to, with probability 1 - delta.
    * "lsh" reads such a sample, which does not grow, and every row that shares at least two hash
      buckets with the query (MagicPIG), about 2% more.

    Args:
        rows: the most rows that are read; None: `share` of them and at least `least`, more where
            the bound of "vattention" asks for it.
        share, least: what is read at first.
        epsilon, delta: of the bound; epsilon 0: the sample does not grow.
        even: share of the sample that is drawn evenly.
        bits, tables, seed: of the hashes.

    Raises:
        ValueError: an argument is not what it may be.
    """

    name: str = "exact"
    rows: int | None = None
    share: float = 0.02
    least: int = 512
    epsilon: float = 0.1
    delta: float = 0.05
    even: float = 0.25
    bits: int = 8
    tables: int = 46
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler: got {self.name!r}; use one of {', '.join(SAMPLERS)}")
        if self.rows is not None and self.rows < 16:
            raise ValueError(f"rows: got {self.rows}; give at least 16, or None")
        for key, low, high in (
            ("share", 0, 1), ("least", 16, 1 << 30), ("epsilon", 0, 1), ("even", 0, 1),
            ("bits", 1, 8), ("tables", 2, 255),
        ):  # fmt: skip
            value = getattr(self, key)
            if not low <= value <= high:
                raise ValueError(f"{key}: got {value}; give a number from {low} to {high}")
        for key in ("least", "bits", "tables", "seed"):
            value = getattr(self, key)
            if value != int(value):
                raise ValueError(f"{key}: got {value}; give a whole number")
            object.__setattr__(self, key, int(value))  # settings arrive as floats
        if not 0 < self.delta < 1:
            raise ValueError(f"delta: got {self.delta}; give a number between 0 and 1")

    @classmethod
    def of(cls, name: str, rows: int | None, options: dict[str, Any] | None) -> Sampling:
        """By a sampler's name and its options.

        Raises:
            ValueError: an unknown sampler or option, or a value that is not allowed.
        """
        allowed = OPTIONS.get(name, ())
        for key in options or {}:
            if key not in allowed and name in OPTIONS:
                raise ValueError(
                    f"sampler_options: {name!r} has no option {key!r}; it has "
                    f"{', '.join(allowed) or 'none'}"
                )
        return cls(name, rows, **(options or {} if name in OPTIONS else {}))

    @property
    def sketched(self) -> bool:
        return self.name != "exact"

    @property
    def hash_tables(self) -> int:
        return self.tables if self.name == "lsh" else 0

    @property
    def quantile(self) -> float:
        """Standard deviations that an error exceeds with probability delta."""
        return NormalDist().inv_cdf(1 - self.delta / 2)
