"""Compile every Triton kernel for GPUs that need not be there, and tell what each takes of them.

Registers are those of a thread, shared memory is a program's, spills and stack are bytes of a
thread. The configurations are those of the launch table, which serving launches by.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from ._form import arguments, machine, require_editable, versions

FIELDS = (
    "kernel", "config", "serving", "target", "registers", "shared_bytes", "spills", "stack",
    "wgmma",
)  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument(
        "--targets", nargs="+", metavar="TARGET", help="sm_80, sm_90, sm_100, gfx942 (default: all)"
    )
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--serving", action="store_true", help="only the configurations that serving uses"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)),
        help="processes that compile (default: one for each core)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: got {args.jobs}; give 1 or more")
    return args


def report(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """(rows, what did not compile)."""
    from rich.progress import track

    from vllm_sparse.kernels.gpu import launch

    table = launch.kernels()
    targets = _chosen("targets", args.targets, launch.TARGETS)
    kernels = _chosen("kernels", args.kernels, table)
    work = [
        (kernel.name, config.name, target.name)
        for kernel in kernels
        for target in targets
        for config in (kernel.serving(target) if args.serving else kernel.configs(target))
    ]
    # Compilers hold threads: no fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.jobs, len(work) or 1), context) as pool:
        try:
            done = pool.map(row_of, work)
            every = list(track(done, "Compiling", len(work), disable=not sys.stderr.isatty()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rows = [row for row in every if isinstance(row, dict)]
    return rows, [line for line in every if isinstance(line, str)]


def row_of(names: tuple[str, str, str]) -> dict | str:
    """The row of a kernel, its configuration and a target, by their names; or why there is none."""
    from vllm_sparse.kernels.gpu import aot, launch

    kernel, target = launch.kernels()[names[0]], launch.TARGETS[names[2]]
    (config,) = (config for config in kernel.configs(target) if config.name == names[1])
    try:
        return aot.usage(kernel, config, target).as_json()
    except Exception as error:  # whatever a compiler raises is a line of the report
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{kernel.name} {config.name} for {target.name}: {why[-300:]}"


def _chosen(name: str, wanted: list[str] | None, known: dict) -> list:
    unknown = set(wanted or ()) - set(known)
    if unknown:
        raise SystemExit(f"--{name}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [known[key] for key in wanted or known]


def show(rows: list[dict], failed: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*FIELDS)
    for row in rows:
        bad = row["spills"] > 0 and row["serving"]
        cells = ("-" if row[field] is None else str(row[field]) for field in FIELDS)
        table.add_row(*cells, style="red" if bad else None)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    for line in failed:
        console.print(line, style="red", markup=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    require_editable()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: unset it, as the interpreter compiles nothing")
    rows, failed = report(args)
    show(rows, failed)
    if args.json is not None:
        from vllm_sparse.files import write_whole

        args.json.parent.mkdir(parents=True, exist_ok=True)
        form = {"machine": machine(), "versions": versions(), "rows": rows, "failed": failed}
        write_whole(args.json, json.dumps(form, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
