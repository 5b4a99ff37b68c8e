"""The `vllm-sparse` command. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_sparse import __version__
from vllm_sparse.search import commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Dynamic sparse attention for long contexts, as a vLLM plugin.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-sparse {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    fix: Annotated[bool, typer.Option(help="Mend what can be mended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say whether the sparse backend will be active here, and why not."""
    from vllm_sparse import check as checks

    if as_json:
        import json

        findings = list(checks.run(fix))
        listed = [finding.as_json() for finding in findings]
        typer.echo(json.dumps({"active": checks.is_active(findings), "checks": listed}, indent=2))
        raise typer.Exit(0 if checks.is_active(findings) else 1)

    from rich.console import Console
    from rich.markup import escape

    marks = {
        checks.OK: "[green]ok[/]     ",
        checks.PROBLEM: "[red]problem[/]",
        checks.WARNING: "[yellow]warning[/]",
        checks.INFO: "[dim]info[/]   ",
    }
    console = Console(highlight=False)
    findings = []
    for finding in checks.run(fix):
        findings.append(finding)
        text = f"{finding.name:<18}{escape(finding.detail)}"
        console.print(f"{marks[finding.state]} {text}", soft_wrap=True)
        if finding.hint and finding.state in (checks.PROBLEM, checks.WARNING):
            console.print(f"{'':26}{escape(finding.hint)}", soft_wrap=True)
    if checks.is_active(findings):
        console.print("The sparse backend is ready: --attention-backend sparse")
        raise typer.Exit(0)
    wrong = ", ".join(finding.name for finding in findings if finding.state == checks.PROBLEM)
    console.print(f"The sparse backend will not be active: {wrong}")
    raise typer.Exit(1)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the Hugging Face hub.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The pattern file to write, or to add phi to.")
    ],
    prompt: Annotated[
        list[Path] | None,
        typer.Option(help="A text file to measure on, more than once if there are more. "
                     "Without: random tokens."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of a prompt.")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of random tokens.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.")
    ] = None,
) -> None:  # fmt: skip
    """Measure phi, which decode with softmax "unified" needs, and put it into a pattern file."""
    from vllm_sparse.errors import UserError
    from vllm_sparse.files import check_folder
    from vllm_sparse.search import calibrate as calibration

    try:
        check_folder(output)
        found, _ = calibration.run(
            model, output, files=prompt or (), length=length, samples=samples, device=device,
            dtype=dtype,
        )  # fmt: skip
    except (ValueError, OSError, UserError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if found.proven:
        typer.echo(
            f"{len(found.proven)} of {len(found.phi)} layers are bounded by their QK-norm: phi 0, "
            "and no row can leave its window."
        )
    if found.tokens:
        values = [value for layer in found.phi.values() for value in layer]
        typer.echo(
            f"Measured over {found.tokens} tokens: phi from {min(values):g} to {max(values):g}."
        )
    if found.wide:
        typer.echo(
            f"{sum(found.wide.values())} heads (of the layers {', '.join(map(str, found.wide))}) "
            "reach further than any phi serves: some of their rows will be computed again."
        )
    typer.echo(
        f"Written: {output}. Serve with --additional-config.sparse.softmax unified "
        f"--additional-config.sparse.patterns {output}"
    )


# `--help` is one of the things to pass on.
@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which benchmark; without one, list them.")] = "",
) -> None:
    """Run a benchmark of the checkout by name; what follows the name is passed on to it."""
    root = Path(__file__).resolve().parent.parent
    folder = root / "benchmarks"
    if not (folder / "_form.py").exists():
        typer.echo(
            "The benchmarks are in the source repository, not in the wheel: clone it, run "
            "`make setup`, then `.venv/bin/vllm-sparse bench NAME` there.",
            err=True,
        )
        raise typer.Exit(2)
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    if name not in names:
        unknown = name not in ("", "--help")
        typer.echo(f"vllm-sparse bench NAME ...; names: {', '.join(names)}", err=unknown)
        raise typer.Exit(2 if unknown else 0)
    # Files named on the command line are the caller's, relative to where the caller is.
    search = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"benchmarks.{name}", *context.args]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": search})
    raise typer.Exit(done.returncode)


commands.register(app)


if __name__ == "__main__":
    app()
