"""The commands about pattern files: search, show, plot, import; and needle. Light to import."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_sparse.errors import UserError
from vllm_sparse.files import check_folder

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[str, typer.Argument(help="Folder or Hugging Face id of the model.")]
File = Annotated[Path, typer.Argument(help="A pattern file.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(search)
    app.command()(show)
    app.command()(plot)
    app.command("import")(import_file)
    app.command()(needle)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What cannot be used is one line on stderr, and exit code 1."""
    try:
        yield
    except (UserError, OSError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def search(
    model: Model,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where the pattern file is written.")
    ] = Path("patterns.json"),
    prompt: Annotated[
        list[Path] | None,
        typer.Option(help="A text file to run the model over; may be given several times."),
    ] = None,
    length: Annotated[int, typer.Option(help="Most tokens of a prompt.", min=256)] = 16384,
    samples: Annotated[
        int, typer.Option(help="Synthetic prompts, where no text is given.", min=1, max=64)
    ] = 2,
    error: Annotated[
        float | None,
        typer.Option(
            help="In each head the cheapest pattern with at most this output error  [in each "
            "layer as right as the default]"
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Or the least error within this share of a head's dense time."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16  [float32 on a CPU]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic prompts.", min=0)] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted search.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Where the report is written  [report.html beside -o]")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Measure the result against the default and dense.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Find out which attention pattern suits each head of a model on this machine.

    Every pattern competes in every head: its error is that of the head's
    output against dense attention, its cost what this machine's kernels
    really take. Writes a pattern file for --additional-config.sparse.patterns,
    and a report to look at. An interrupted search leaves its work in
    OUT.search, and goes on there with --resume.
    """
    with one_line_errors():
        _quiet_transformers()
        from vllm_sparse.report.html import write_report
        from vllm_sparse.search.choose import Goal
        from vllm_sparse.search.run import Options
        from vllm_sparse.search.run import search as run_search

        goal = Goal(error, budget)
        check_folder(out)
        place = report or out.with_name("report.html")
        check_folder(place)
        result = run_search(
            Options(
                model=model, out=out, texts=tuple(prompt or ()), length=length, samples=samples,
                seed=seed, goal=goal, device=device, dtype=dtype, resume=resume, verify=verify,
                progress=not as_json,
            )
        )  # fmt: skip
        write_report(result, place)
    if as_json:
        check = None if result.check is None else asdict(result.check)
        _print_json(
            {
                "file": str(out),
                "report": str(place),
                "seconds": round(result.seconds, 1),
                "check": check,
                "patterns": result.file.model_dump(mode="json", exclude_none=True),
            }
        )
        return
    from vllm_sparse.report import tables

    console = tables.console()
    tables.show_file(result.file, console)
    tables.show_check(result, console)
    console.print(f"{out} and {place} are written, in {result.seconds / 60:.1f} minutes.")
    typer.echo(f"Serve with it: --additional-config.sparse.patterns {out}")


def show(
    file: File,
    heads: Annotated[
        bool | None, typer.Option(help="List every head  [where there are at most 64]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what is in a pattern file, and whether it can be read."""
    with one_line_errors():
        from vllm_sparse.patterns import PatternFile

        loaded = PatternFile.load(file)
    if as_json:
        _print_json(loaded.model_dump(mode="json", exclude_none=True))
        return
    from vllm_sparse.report import tables

    tables.show_file(loaded, tables.console(), heads)


def plot(
    file: File,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="PNG to write  [FILE with .png]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Draw this model's attention too, a picture for each layer."),
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="Text for the model  [a synthetic prompt]")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of that text.", min=256, max=16384)] = 4096,
    as_json: JsonFlag = False,
) -> None:
    """Draw a pattern file: kind, density and error of every head, as PNG."""
    with one_line_errors():
        from vllm_sparse.patterns import PatternFile
        from vllm_sparse.report import pictures

        loaded = PatternFile.load(file)
        target = out or file.with_suffix(".png")
        pictures.pyplot()
        pictures.draw_file(loaded, target)
        written = [target]
        if model is not None:
            written += _plot_model(loaded, model, prompt, length, target)
    if as_json:
        _print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        typer.echo(path)


def _plot_model(
    loaded: Any, model: str, prompt: Path | None, length: int, target: Path
) -> Iterator[Path]:
    _quiet_transformers()
    from vllm_sparse.report import pictures
    from vllm_sparse.search import capture, maps, prompts
    from vllm_sparse.search.candidates import budget

    network = capture.load_model(model)
    info = capture.model_info(network, model)
    loaded.check_model(
        layers=info.layers, heads=info.heads, kv_heads=info.kv_heads, head_size=info.head_size,
        rope=info.rope,
    )  # fmt: skip
    tokenizer = prompts.load_tokenizer(model)
    if prompt is not None:
        (text,) = prompts.text_prompts([prompt], tokenizer, length)
    else:
        vocabulary = min(len(tokenizer), network.config.get_text_config().vocab_size)
        (text,) = prompts.synthetic_prompts(
            1, length, vocabulary, tokenizer.all_special_ids, tokenizer.bos_token_id, 0
        )
    for found in maps.attention_maps(network, text.token_ids, loaded):
        patterns = loaded.for_layer(found.layer)
        labels = [f"head {i}: {p.kind} {budget(p)}".strip() for i, p in enumerate(patterns)]
        path = target.with_name(f"{target.stem}-layer-{found.layer:02d}{target.suffix}")
        pictures.draw_attention(
            found.layer, found.mass, found.selected, labels, path, loaded.model.name
        )
        yield path


def import_file(
    file: Annotated[Path, typer.Argument(help="A configuration of MInference, as JSON.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where the pattern file is written.")
    ] = Path("patterns.json"),
    model: Annotated[
        str | None,
        typer.Option(help="Folder or id of the model, which the file is then checked against."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a pattern file of a configuration that MInference published.

    Without --model, the number of KV heads and the head size are not known,
    and are not checked when serving.
    """
    with one_line_errors():
        from vllm_sparse.search.minference import convert

        info = None
        if model is not None:
            _quiet_transformers()
            from vllm_sparse.search.capture import config_info

            info = config_info(model)
        made = convert(file, info)
        made.save(out)
    if as_json:
        _print_json({"file": str(out), "patterns": made.model_dump(mode="json", exclude_none=True)})
        return
    from vllm_sparse.report import tables

    console = tables.console()
    tables.show_file(made, console, heads=False)
    typer.echo(f"Serve with it: --additional-config.sparse.patterns {out}")


def needle(
    model: Model,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="PNG to write; the JSON goes beside it.")
    ] = Path("needle.png"),
    lengths: Annotated[
        str, typer.Option(help="Lengths in tokens, with commas.")
    ] = "1024,2048,4096,8192",
    depths: Annotated[str, typer.Option(help="Depths, 0 to 1, with commas.")] = "0,0.25,0.5,0.75,1",
    backends: Annotated[
        str, typer.Option(help="sparse and default (vLLM's own), with a comma.")
    ] = "sparse,default",
    haystack: Annotated[Path | None, typer.Option(help="Text that takes ours' place.")] = None,
    needle_text: Annotated[
        str | None, typer.Option("--needle", help="The needle, with {answer} in it.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What stands at the end.")] = None,
    answers: Annotated[str | None, typer.Option(help="Answers, with commas.")] = None,
    patterns: Annotated[
        Path | None, typer.Option(help="Pattern file of the sparse backend.")
    ] = None,
    config: Annotated[
        str, typer.Option(help="Other settings of the sparse backend, as JSON.")
    ] = "{}",
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Hide a needle in prompts, and ask for it through vLLM, length by depth.

    Each backend gets the same prompts; the picture and the JSON say what
    share of the answers' words came back. Exits with 1 if the sparse backend
    finds less than vLLM's own.
    """
    with one_line_errors():
        from vllm_sparse import needle as needles
        from vllm_sparse.report import pictures

        pictures.pyplot()  # before minutes are spent
        check_folder(out)
        settings = _object(config, "--config")
        if patterns is not None:
            settings["patterns"] = str(patterns)
        texts = {
            "haystack": None if haystack is None else haystack.read_text(encoding="utf-8"),
            "needle": needle_text,
            "question": question,
            "answers": None if answers is None else tuple(_split(answers)),
        }
        grid = needles.Grid(
            model=model,
            lengths=tuple(_numbers(lengths, int, "--lengths")),
            depths=tuple(_numbers(depths, float, "--depths")),
            backends=tuple(_split(backends)),
            config=settings,
            dtype=dtype,
            **{name: text for name, text in texts.items() if text is not None},
        )

        def say(cell: needles.Cell) -> None:
            if not as_json:
                typer.echo(
                    f"{cell.backend:8} {cell.length:7} tokens, depth {cell.depth:4.0%}: "
                    f"{cell.found:4.0%} in {cell.seconds:.1f} s"
                )

        cells = needles.run(grid, say)
        data = needles.save(cells, grid, out.with_suffix(".json"))
        pictures.draw_needle(
            {name: _grid(cells, grid, name) for name in grid.backends}, grid.lengths, grid.depths,
            out, f"{model}: needle in a haystack",
        )  # fmt: skip
    if as_json:
        _print_json(data)
    else:
        for name, found in data["found"].items():
            typer.echo(f"{name}: {found:.1%} found")
        typer.echo(f"{out} and {out.with_suffix('.json')} are written.")
    if {"sparse", "default"} <= data["found"].keys():
        raise typer.Exit(1 if data["found"]["sparse"] < data["found"]["default"] else 0)


def _grid(cells: list, grid: Any, backend: str) -> Any:
    import numpy as np

    table = np.full((len(grid.depths), len(grid.lengths)), np.nan)
    for cell in cells:
        if cell.backend == backend:
            table[grid.depths.index(cell.depth), grid.lengths.index(cell.length)] = cell.found
    return table


def _numbers(text: str, kind: type, name: str) -> list:
    try:
        return [kind(part) for part in _split(text)]
    except ValueError:
        raise UserError(f"{name}: got {text!r}; allowed: numbers with commas between") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f'{name}: got {text!r}; allowed: an object such as {{"coverage": 0.98}}')
    return data


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def _quiet_transformers() -> None:
    """Its progress bars and reports of unused weights are not about the search."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
