"""Tables for the terminal: what a search found, and what is in a pattern file."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_sparse.patterns import ADAPTIVE, PatternFile
from vllm_sparse.search.candidates import budget

if TYPE_CHECKING:
    from vllm_sparse.search.run import Result

KINDS = ("a_shape", "vertical_slash", "block_sparse", "adaptive", "dense")
LISTED = 64  # so many heads are listed one by one without being asked


def plain(text: str, length: int = 120) -> str:
    """Text of a file for a terminal: no control characters, no markup, and not for ever."""
    clean = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return escape(clean if len(clean) <= length else clean[:length] + "...")


def console() -> Console:
    """For people; a file or a pipe has no width of its own, and is not wrapped."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=150)


def show_file(file: PatternFile, console: Console, heads: bool | None = None) -> None:
    """A pattern file for people; `heads`: list every head (default: where they are few)."""
    model = file.model
    shape = f"{model.layers} layers of {model.heads} query heads"
    if model.kv_heads is not None and model.head_size is not None:
        shape += f" and {model.kv_heads} KV heads of {model.head_size}"
    console.print(f"[bold]{plain(model.name)}[/]: {shape}", soft_wrap=True)
    for title, entries in (("rope", model.rope), ("found with", file.tools)):
        if entries:
            said = ", ".join(f"{plain(k, 40)} {_value(v)}" for k, v in list(entries.items())[:8])
            console.print(f"{title}: {said}", soft_wrap=True)
    if goal := file.settings.get("goal"):
        console.print(f"goal: {_value(goal)}", soft_wrap=True)
    console.print(layers_table(file))
    listed = model.layers * model.heads <= LISTED if heads is None else heads
    if listed:
        console.print(heads_table(file))


def layers_table(file: PatternFile) -> Table:
    """A row for each layer: how many heads of each kind, and what they read and cost."""
    table = Table(title="Layers", title_justify="left")
    table.add_column("layer", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    names = [n for n in ("density", "time", "error") if n in file.measured]
    for name in names:
        table.add_column({"error": "largest error"}.get(name, f"mean {name}"), justify="right")
    total: Counter[str] = Counter()
    for layer in range(file.model.layers):
        kinds = Counter(p.kind for p in file.for_layer(layer))
        total += kinds
        cells = [str(kinds[k] or "") for k in KINDS]
        for name in names:
            row = [x for x in file.measured[name][layer] if x is not None]
            value = (max(row) if name == "error" else sum(row) / len(row)) if row else None
            cells.append("-" if value is None else f"{value:.1%}")
        table.add_row(str(layer), *cells)
    table.add_section()
    means = []
    for name in names:
        row = [x for line in file.measured[name] for x in line if x is not None]
        value = (max(row) if name == "error" else sum(row) / len(row)) if row else None
        means.append("-" if value is None else f"{value:.1%}")
    table.add_row("all", *(str(total[k] or "") for k in KINDS), *means)
    return table


def heads_table(file: PatternFile) -> Table:
    """A row for each head that is not adaptive by default."""
    table = Table(title="Heads", title_justify="left")
    for name in ("layer", "head"):
        table.add_column(name, justify="right")
    table.add_column("pattern", no_wrap=True)
    table.add_column("budget", no_wrap=True)
    names = [n for n in ("density", "time", "error", "last", "worst") if n in file.measured]
    for name in names:
        table.add_column(
            {"worst": "worst 64 rows", "last": "last 64"}.get(name, name), justify="right"
        )
    for layer in range(file.model.layers):
        for head, pattern in enumerate(file.for_layer(layer)):
            if pattern == ADAPTIVE:
                continue
            cells = [file.measured[name][layer][head] for name in names]
            table.add_row(
                str(layer), str(head), pattern.kind, budget(pattern),
                *("-" if c is None else f"{c:.2%}" for c in cells),
            )  # fmt: skip
        table.add_section()
    return table


def show_check(result: Result, console: Console) -> None:
    """What the file was measured to cost, beside the adaptive default and dense."""
    check = result.check
    if check is None:
        return
    table = Table(
        title=f"Prefill attention of {check.tokens:,} tokens, planning included",
        title_justify="left",
    )
    table.add_column("")
    for name in ("CPU seconds", "of dense", "output error"):
        table.add_column(name, justify="right")
    for key, name in (("file", "this file"), ("adaptive", "adaptive default"), ("dense", "dense")):
        seconds = check.seconds[key]
        table.add_row(
            name, f"{seconds:.2f}", f"{seconds / check.seconds['dense']:.1%}",
            f"{check.error[key]:.3%}",
        )  # fmt: skip
    console.print(table)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{len(value)} values]" if len(value) > 4 else ", ".join(map(_value, value))
    return plain(value, 200) if isinstance(value, str) else plain(f"{value}", 40)
