"""The patterns that compete for every head, and which of two equally dear ones is preferred."""

from __future__ import annotations

from vllm_sparse.patterns import HeadPattern

# Whole tokens; a window is read in blocks of 64 and the first block is in every selection.
SINK = 64
WINDOWS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)
VERTICAL_SLASH = ((64, 64), (512, 64), (1024, 64), (64, 256), (256, 512))
BLOCKS = (8, 16, 32, 64, 96, 128)
# Budgets that follow the prompt: what covers this share of the mass, and is dense where nothing
# does. The narrow kinds first; `adaptive` takes the cheapest of the three in every chunk.
COVERAGE = {
    "a_shape": (0.9, 0.95, 0.98),
    "vertical_slash": (0.9, 0.95, 0.98, 0.99),
    "block_sparse": (0.9, 0.95, 0.98),
    "adaptive": (0.9, 0.95, 0.98),
}
DENSE = HeadPattern(kind="dense")
DEFAULT = HeadPattern(coverage=0.95)  # what a head without a file is, at the default coverage
# Where costs tie: what is simpler to plan first.
ORDER = ("a_shape", "block_sparse", "vertical_slash", "adaptive", "dense")


def candidates(length: int) -> list[HeadPattern]:
    """Every pattern that may save something on prompts of `length` tokens; dense is the last."""
    found = [
        HeadPattern(kind="a_shape", sink=SINK, window=window)
        for window in WINDOWS
        if window <= length // 2
    ]
    found += [
        HeadPattern(kind="vertical_slash", vertical=vertical, slash=slash)
        for vertical, slash in VERTICAL_SLASH
        if vertical + slash <= length // 4
    ]
    found += [
        HeadPattern(kind="block_sparse", blocks=blocks)
        for blocks in BLOCKS
        if blocks * 64 <= 0.8 * length
    ]
    found += [
        HeadPattern(kind=kind, coverage=share)  # type: ignore[arg-type]
        for kind, shares in COVERAGE.items()
        for share in shares
    ]
    return [*found, DENSE]


def budget(pattern: HeadPattern) -> str:
    """The budget in few words: `64 + 512`, `95%`, and nothing for dense."""
    if pattern.coverage is not None:
        return f"{100 * pattern.coverage:.4g}%"
    numbers = {
        "a_shape": (pattern.sink, pattern.window),
        "vertical_slash": (pattern.vertical, pattern.slash),
        "block_sparse": (pattern.blocks,),
    }.get(pattern.kind, ())
    return " + ".join(str(n) for n in numbers)


def plan_class(pattern: HeadPattern) -> str:
    """What planning's cost goes by: the kind, and whether counts or coverage decide."""
    if pattern.kind == "dense":
        return "dense"
    return f"{pattern.kind} {'counts' if pattern.fixed else 'coverage'}"
