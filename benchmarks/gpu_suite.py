"""Everything that is to be measured on a GPU, in the order of its worth, within some minutes.

Each step is a process with a deadline of its own. What it measured is in the folder as soon as it
is there: a step that fails or is stopped costs no other, and neither does a suite that is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from benchmarks._form import ROOT, arguments, machine, needs_a_gpu, require_editable, versions
from benchmarks._gpu_steps import STEPS, Step
from benchmarks._process import stop_tree

NEEDS_A_GPU = needs_a_gpu("benchmarks.gpu_suite")
NAME = "suite.json"
LOG = "suite.log"
RESERVE_S = 5.0  # for the table, at the end
TIMED_OUT = 124
FEWEST_CORES = 8  # from which on something runs beside a step
SAID_LINES, SAID_LETTERS = 3, 300
# Figures that are in the files, and not in the table at the end: it would have hundreds of rows.
UNSHOWN = r"decode_(lazy|unified)_vs_(?!online)(?!.*_all)"


@dataclass(frozen=True)
class Outcome:
    """What came of a step: rc None while it runs or where it was left out, 124 after a deadline."""

    name: str
    state: str  # running, passed, failed, stopped, left out
    rc: int | None
    seconds: float
    limit_s: float
    command: str
    said: str  # last

    @property
    def bad(self) -> bool:
        return self.state in ("failed", "stopped")


class Suite:
    """A run of steps, and the folder that holds what came of them."""

    def __init__(self, out: Path, minutes: float, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.until = time.monotonic() + 60 * minutes - RESERVE_S
        self.outcomes: dict[str, Outcome] = {}
        out.mkdir(parents=True, exist_ok=True)
        self._find_earlier()

    def _find_earlier(self) -> None:
        path = self.out / NAME
        if not path.exists():
            return
        earlier = json.loads(path.read_text())
        if any(earlier[key] != self.about[key] for key in ("gpu", "versions")):
            raise SystemExit(
                f"{self.out} holds the results of another machine or other versions; give --out "
                "another folder"
            )
        self.outcomes = {one["name"]: Outcome(**one) for one in earlier["steps"]}

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Every step, one after another; outcomes of these steps."""
        for step in steps:
            self.outcomes.pop(step.name, None)
        for step in steps:
            limit = step.limit(self.until - time.monotonic())
            command = " ".join(step.arguments(self.out))
            if not limit:
                left = max(self.until - time.monotonic(), 0)
                said = f"{left:.0f} s were left"
                self._note(Outcome(step.name, "left out", None, 0.0, 0.0, command, said))
                continue
            print(f"== {step.name}: {step.about}, {limit:.0f} s at most", flush=True)
            self._note(Outcome(step.name, "running", None, 0.0, limit, command, ""))
            self._note(self._take(step, limit, command))
            one = self.outcomes[step.name]
            print(f"   {one.state} in {one.seconds:.1f} s: {one.said}", flush=True)
        return [self.outcomes[step.name] for step in steps]

    def _take(self, step: Step, limit: float, command: str) -> Outcome:
        begin = time.monotonic()
        with (self.out / LOG).open("a") as log:
            log.write(f"\n===== {step.name}: python {command}\n")
            log.flush()
            start = log.tell()
            beside = [] if (os.cpu_count() or 1) < FEWEST_CORES else list(step.beside)
            processes: list[subprocess.Popen] = []
            rc, state = None, "stopped"
            try:
                processes.append(_started(step.arguments(self.out), log))
                for one in beside:
                    processes.append(_started(one, subprocess.DEVNULL))
                rc = processes[0].wait(timeout=limit)
                state = "failed" if rc else "passed"
            except subprocess.TimeoutExpired:
                rc = TIMED_OUT
            finally:  # an interrupted suite leaves nothing running, and says where it was
                seconds = time.monotonic() - begin
                for process in processes:
                    stop_tree(process)
                log.flush()
                said = _last_lines(self.out / LOG, start)
                outcome = Outcome(step.name, state, rc, round(seconds, 1), limit, command, said)
                self._note(outcome)
        return outcome

    def _note(self, outcome: Outcome) -> None:
        from vllm_sparse.files import write_whole

        self.outcomes[outcome.name] = outcome
        steps = [asdict(one) for one in self.outcomes.values()]
        text = json.dumps({**self.about, "steps": steps}, indent=2) + "\n"
        write_whole(self.out / NAME, text)


def _started(arguments: Sequence[str], log: TextIO | int) -> subprocess.Popen:
    env = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
    env.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, cwd=ROOT, env=env,
    )  # fmt: skip


def _last_lines(path: Path, start: int) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - 8192))
        text = file.read().decode(errors="replace")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    lines = [" ".join(line.split()) for line in plain.splitlines()]
    lines = [line for line in lines if any(c.isalnum() for c in line)]
    return " | ".join(lines[-SAID_LINES:])[-SAID_LETTERS:]


def about(minutes: float, note: str | None) -> dict[str, Any]:
    """What the whole run was measured on and with."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    found = machine()
    driver = _driver()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": minutes,
        "note": note,
        "gpu": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": driver,
        },
        "machine": found,
        "versions": versions() | {"cuda": torch.version.cuda or "none"},
    }


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def show(about: dict[str, Any], outcomes: Sequence[Outcome], out: Path) -> None:
    """The figures of the folder that have a ratio, then the steps."""
    from rich.console import Console
    from rich.table import Table

    figures = Table(
        "figure", "ours", "theirs", "unit", "ratio", "error", "peer, or why not", box=None
    )
    for path in sorted(out.glob("*.json")):
        for row in [] if path.name == NAME else json.loads(path.read_text())["rows"]:
            if row["ours"] is not None and re.match(UNSHOWN, row["figure"]):
                continue
            ours, theirs, ratio, error = map(
                _short, (row[key] for key in ("ours", "theirs", "ratio", "error"))
            )
            peer = row["case"].get("failed", row["peer"] or "-")[:60]
            style = "red" if row["ours"] is None else None
            cells = (row["figure"], ours, theirs, row["unit"], ratio, error, peer)
            figures.add_row(*cells, style=style)
    gpu = about["gpu"]
    title = f"{gpu['name']}, driver {gpu['driver']}, torch {about['versions'].get('torch')}"
    steps = Table("step", "result", "seconds", "of", "said last", title=title)
    for one in outcomes:
        took = (f"{one.seconds:.1f}", f"{one.limit_s:.0f}")
        style = "red" if one.bad else "dim" if one.state == "left out" else None
        steps.add_row(one.name, one.state, *took, one.said[-120:], style=style)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    if figures.row_count:
        console.print(figures)
    console.print(steps)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def list_steps(steps: Sequence[Step], minutes: float, out: Path) -> None:
    """The dry mode: commands, and what each would have if all before it took all that they may."""
    left = 60 * minutes - RESERVE_S
    for step in steps:
        limit = step.limit(left)
        left -= limit
        given = f"{limit:.0f} s" if limit else "left out"
        print(f"{step.name}: {step.about}")
        print(f"    {given} of {60 * minutes:.0f} s ({step.share:.0%} of what is left, at most "
              f"{step.most_s:.0f} s)")  # fmt: skip
        print(f"    python {' '.join(step.arguments(out))}")
        for one in step.beside:
            print(f"    beside it: python {' '.join(one)}")


def parse(argv: list[str] | None, table: Sequence[Step]) -> argparse.Namespace:
    parser = arguments(__doc__)
    names = [step.name for step in table]
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR",
                        help="folder of the results: suite.json, suite.log, a JSON of each "
                        "benchmark")  # fmt: skip
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP",
                        help=f"only these, in this order: {', '.join(names)}")  # fmt: skip
    parser.add_argument("--note", help="kept in suite.json: a commit, where there is no git")
    parser.add_argument("--list", action="store_true", help="print the steps, and run none")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes: got {options.minutes}; give more than 0")
    options.out = options.out.resolve()
    return options


def main(argv: list[str] | None = None, table: Sequence[Step] = STEPS) -> int:
    options = parse(argv, table)
    known = {step.name: step for step in table}
    steps = [known[name] for name in options.steps]
    if options.list:
        list_steps(steps, options.minutes, options.out)
        return 0
    import torch

    if not torch.cuda.is_available():
        print(NEEDS_A_GPU, file=sys.stderr)
        return 2
    require_editable()
    # A SIGTERM that ends this process at once would leave the step running.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        found = about(options.minutes, options.note)
        suite = Suite(options.out, options.minutes, found)
        outcomes = suite.run(steps)
    finally:
        signal.signal(signal.SIGTERM, before)
    if options.json is not None:
        from vllm_sparse.files import write_whole

        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.json, (options.out / NAME).read_text())
    show(found, outcomes, options.out)
    return 1 if any(one.bad for one in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
