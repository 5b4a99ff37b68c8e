"""PNG pictures through matplotlib: pattern files, a model's attention, needle grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sparse.errors import UserError
from vllm_sparse.patterns import PatternFile

from .svg import KIND_COLOURS

KINDS = ("a_shape", "vertical_slash", "block_sparse", "adaptive", "dense")
DPI = 130
MAX_NUMBERS = 16  # heads beyond which cells hold no text


class PlotError(UserError, RuntimeError):
    """Nothing can be drawn; the message says what to do."""


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        PlotError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError(
            "pictures need matplotlib, which is not installed: pip install 'vllm-sparse[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_file(file: PatternFile, path: Path, tokens: int = 16384) -> None:
    """Kind, density and, where a search measured it, error of every head: layers down, heads
    across. Densities that were not measured are what counts come to at `tokens` tokens."""
    plt = pyplot()
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    model = file.model
    kinds = np.array(
        [[KINDS.index(p.kind) for p in file.for_layer(i)] for i in range(model.layers)]
    )
    panels: list[tuple[str, Any, dict[str, Any], str]] = []
    density, source = densities(file, tokens)
    if np.isfinite(density).any():
        panels.append(
            (f"Share of keys read\n({source})", density,
             {"cmap": "Blues", "vmin": 0, "vmax": 1}, "{:.0%}")
        )  # fmt: skip
    if "error" in file.measured:
        error = np.array(file.measured["error"], dtype=float)
        norm = LogNorm(vmin=1e-3, vmax=0.1, clip=True)
        shown = np.where(error > 0, np.maximum(error, 1e-3), error)
        panels.append(
            ("Output error\n(worst prompt)", np.where(shown == 0, 1e-3, shown),
             {"cmap": "Reds", "norm": norm, "numbers": error}, "{:.1%}")
        )  # fmt: skip
    columns = 1 + len(panels)
    wide = min(max(2.2 + 0.42 * model.heads, 4.2), 12)
    tall = min(max(1.9 + 0.36 * model.layers, 3.2), 22)
    figure, axes = plt.subplots(
        1, columns, figsize=(wide * columns, tall), squeeze=False, layout="constrained"
    )
    kind_axis = axes[0, 0]
    colours = ListedColormap([KIND_COLOURS[k] for k in KINDS])
    kind_axis.imshow(kinds, cmap=colours, vmin=-0.5, vmax=len(KINDS) - 0.5, aspect="auto")
    kind_axis.set_title("Pattern\n", fontsize=11)
    present = sorted(set(kinds.flatten().tolist()))
    figure.legend(
        handles=[Patch(color=KIND_COLOURS[KINDS[k]], label=KINDS[k]) for k in present],
        loc="outside lower left", ncol=len(KINDS), frameon=False, fontsize=9,
    )  # fmt: skip
    for axis, (title, values, how, form) in zip(axes[0, 1:], panels, strict=True):
        numbers = how.pop("numbers", values)
        image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", **how)
        figure.colorbar(image, ax=axis, shrink=0.85, pad=0.02)
        axis.set_title(title, fontsize=11)
        if model.heads <= MAX_NUMBERS:
            _numbers(axis, image, values, numbers, form)
    for axis in axes[0]:
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        _ticks(axis.xaxis, model.heads)
        _ticks(axis.yaxis, model.layers)
        _grid(axis, model.heads, model.layers)
    figure.suptitle(_plain(model.name), fontsize=12)
    _save(plt, figure, path)


def densities(file: PatternFile, tokens: int) -> tuple[np.ndarray, str]:
    """([layers, heads] shares of causal keys, where they come from); nan: not known."""
    if "density" in file.measured:
        return np.array(file.measured["density"], dtype=float), "measured"
    rows = []
    total = tokens * (tokens + 1) / 2
    for layer in range(file.model.layers):
        row = []
        for p in file.for_layer(layer):
            read = np.nan
            if p.kind == "dense":
                read = total
            elif p.kind == "a_shape" and p.fixed:
                n = min((p.sink or 0) + (p.window or 0), tokens)
                read = n * (n + 1) / 2 + n * (tokens - n)
            elif p.kind == "vertical_slash" and p.fixed:
                # Each diagonal and each column apart: no more than this.
                n = min((p.vertical or 0) + (p.slash or 0), tokens)
                read = n * (n + 1) / 2 + n * (tokens - n)
            elif p.kind == "block_sparse" and p.fixed:
                n = min((p.blocks or 0) * 64, tokens)
                read = n * (n + 1) / 2 + n * (tokens - n)
            row.append(read / total)
        rows.append(row)
    return np.array(rows), f"of {tokens:,} tokens, by the counts"


def draw_attention(
    layer: int,
    maps: np.ndarray,
    selected: np.ndarray,
    labels: Sequence[str],
    path: Path,
    title: str,
) -> None:  # fmt: skip
    """Attention of every head of a layer, and what its pattern leaves out.

    Args:
        maps: [heads, tiles, blocks], mean mass of each block over a tile's rows.
        selected: bool [heads, tiles, blocks].
        labels: of the heads.
    """
    plt = pyplot()
    from matplotlib.colors import LogNorm

    heads, tiles, blocks = maps.shape
    across = min(heads, 4)
    down = -(-heads // across)
    figure, axes = plt.subplots(
        down, across, figsize=(3.1 * across + 0.7, 3.35 * down + 0.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    future = np.arange(blocks)[None, :] > np.arange(tiles)[:, None] + blocks - tiles
    image = None
    for head, axis in enumerate(axes.flatten()):
        if head >= heads:
            axis.axis("off")
            continue
        mass = np.ma.masked_where(future, np.maximum(maps[head], 1e-5))
        image = axis.imshow(mass, cmap="magma_r", norm=LogNorm(vmin=1e-5, vmax=1), aspect="equal")
        left_out = np.ma.masked_where(selected[head] | future, np.ones_like(maps[head]))
        axis.imshow(left_out, cmap="Blues", vmin=0, vmax=1.6, alpha=0.35, aspect="equal")
        axis.set_title(labels[head], fontsize=8.5)
        axis.tick_params(labelsize=7)
        if head // across == down - 1 or head + across >= heads:
            axis.set_xlabel("key block", fontsize=8)
        if head % across == 0:
            axis.set_ylabel("query tile", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label("mean attention mass of a block of 64 keys", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"{_plain(title)}, layer {layer}. Tinted: left out", fontsize=11)
    _save(plt, figure, path)


def draw_needle(
    grids: dict[str, np.ndarray], lengths: Sequence[int], depths: Sequence[float], path: Path,
    title: str,
) -> None:  # fmt: skip
    """Share of the answer found, by depth (down) and length (across), a panel a backend."""
    plt = pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("found", ["#b23830", "#e8c25a", "#4e9f6d"])
    size = (max(3.2, 1.4 + 0.62 * len(lengths)), max(2.8, 1.6 + 0.36 * len(depths)))
    figure, axes = plt.subplots(
        1, len(grids), figsize=(size[0] * len(grids) + 0.6, size[1] + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    image = None
    for axis, (name, grid) in zip(axes[0], grids.items(), strict=True):
        image = axis.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
        axis.set_title(f"{_plain(name)}: {np.nanmean(grid):.0%} found", fontsize=10)
        axis.set_xticks(range(len(lengths)), [_tokens(n) for n in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
        axis.set_xlabel("length in tokens", fontsize=9)
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                axis.text(
                    column, row, f"{value:.0%}", ha="center", va="center", fontsize=7.5,
                    color="#ffffff" if value < 0.25 or value > 0.9 else "#1c2126",
                )  # fmt: skip
    axes[0, 0].set_ylabel("depth of the needle", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01)
    bar.set_label("share of the answer's words", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(_plain(title), fontsize=11)
    _save(plt, figure, path)


def _numbers(axis: Any, image: Any, values: np.ndarray, numbers: np.ndarray, form: str) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        r, g, b, _ = image.cmap(image.norm(value))
        dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.55
        axis.text(
            column, row, form.format(numbers[row, column]), ha="center", va="center",
            fontsize=6.5, color="#ffffff" if dark else "#1c2126",
        )  # fmt: skip


def _grid(axis: Any, across: int, down: int) -> None:
    """White lines between cells."""
    axis.set_xticks(np.arange(across + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(down + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2 if across <= MAX_NUMBERS else 0.5)
    axis.tick_params(which="minor", length=0)


def _ticks(axis: Any, count: int) -> None:
    every = 1 if count <= 16 else 4 if count <= 64 else 16
    axis.set_ticks(range(0, count, every))


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _plain(text: str) -> str:
    """Text of a file: no formulas, and not for ever."""
    clean = "".join(c if c.isprintable() and c != "$" else "?" for c in text)
    return clean if len(clean) <= 80 else clean[:77] + "..."


def _save(plt: Any, figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)
