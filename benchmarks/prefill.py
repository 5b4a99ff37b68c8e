"""Sparse prefill attention on a GPU, index included, against the dense kernels that are there.

Queries, keys and values are those of a model's layers on a real prompt: of the lean retrieval model
with a needle prompt, or of a model and a text that are given. Every result is checked before it is
timed: everything selected against float32 attention, the selection for the mass it was to cover.
Each row is in the file as soon as it is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from . import _prefill_problem
from ._engines import checkpoint, import_examples
from ._form import Results, Row, addable, arguments, needs_a_gpu, require_editable
from ._gpu_clock import AHEAD, measured
from ._prefill_problem import DENSE_ERROR, Checked, Paged

NEEDS_A_GPU = needs_a_gpu("benchmarks.prefill")
LENGTHS = {f"{n}k": n * 1024 for n in (4, 8, 16, 32, 64, 128, 256, 512)} | {"1m": 1 << 20}
PEERS = ("fa3", "cudnn", "flash", "triton", "xformers", "flex")
CACHES = ("auto", "fp8")
OURS = ("ours", "index", "kernel")


def name_of(length: str, inputs, options: argparse.Namespace) -> str:
    """The figure of a layer: of the default dtype and cache, these are not in it."""
    parts = ["prefill", length, f"layer{inputs.layer}"]
    parts += [f"chunk{options.chunk}"] if options.chunk else []
    parts += [options.dtype] if options.dtype != "bfloat16" else []
    return "_".join([*parts, *([options.cache] if options.cache != "auto" else [])])


def measure(length: str, inputs, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one length and layer; one without a time where anything fails."""
    figure = name_of(length, inputs, options)
    tokens, heads, size = inputs.q.shape
    case = {
        "tokens": tokens, "chunk": options.chunk or tokens, "layer": inputs.layer,
        "heads": f"{heads}/{inputs.k.shape[1]}x{size}",
        "dtype": options.dtype, "cache": options.cache, "coverage": options.coverage,
    }  # fmt: skip
    at = figure
    try:
        for row in _measure(figure, case, inputs, options):
            yield row
            at = f"{figure}_rest"
    except Exception as error:  # no memory for one length must not cost the others
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"{at}: {why}", flush=True)
        yield Row.failed(at, case, why, peer=None, unit="s")


def _measure(figure: str, case: dict, inputs, options: argparse.Namespace) -> Iterator[Row]:
    q = inputs.q[-options.chunk :] if options.chunk else inputs.q
    problem = Paged.of(q, inputs.k, inputs.v, inputs.scale, fp8=options.cache == "fp8")
    found = _prefill_problem.check(problem, options.coverage)
    case |= {"density": round(found.density, 4), "covered": round(found.covered, 4)}
    works = {
        "ours": lambda: problem.attend(problem.plan(options.coverage)),
        "index": lambda: problem.plan(options.coverage),
    }
    indices = problem.plan(options.coverage)
    works["kernel"] = lambda: problem.attend(indices)
    if not found.why:
        works |= right_peers(problem, found, options.peers)
    theirs = [peer for peer in works if peer not in OURS]
    if found.why or not theirs:
        why = found.why or "no dense kernel to compare with runs here"
        yield Row.failed(figure, case, why, peer=None, unit="s", error=found.error)
        return
    taken = measured(works, options.repeats, options.most_seconds)
    times = {work: one.seconds for work, one in taken.items()}
    best = min(theirs, key=times.get)
    tokens, heads, size = inputs.q.shape
    flops = 4 * size * heads * problem.pairs * found.density
    case |= {
        "index_share": round(times["index"] / times["ours"], 4),
        "launch_s": round(taken["ours"].host, 6),
    } | {peer: round(times[peer], 6) for peer in theirs}
    yield Row.time(figure, case, times["ours"], best, times[best], error=found.error)
    yield Row.rate(
        f"{figure}_kernel", {"tokens": tokens, "density": round(found.density, 4)},
        flops / times["kernel"] / 1e12, best, flops / found.density / times[best] / 1e12,
        unit="TFLOP/s", error=found.dense_error,
    )  # fmt: skip
    # Before the GPU begins everything is launched, as where layers of work lie in its queue.
    queued = measured(
        {name: works[name] for name in ("ours", "index", best)}, options.repeats,
        options.most_seconds / 2, ahead=AHEAD,
    )  # fmt: skip
    index_share = queued["index"].seconds / queued["ours"].seconds
    yield Row.time(
        f"{figure}_queued", {"tokens": tokens, "index_share": round(index_share, 4)},
        queued["ours"].seconds, best, queued[best].seconds, error=found.error,
    )  # fmt: skip


def right_peers(problem: Paged, found: Checked, wanted: list[str] | None) -> dict:
    """The peers that run here and give what float32 attention gives."""
    from ._prefill_peers import peers

    works = {}
    for peer, run in peers(problem, wanted):
        if isinstance(run, str):
            print(f"{peer} is not here: {run}", flush=True)
        elif not (off := found.off(run())) <= DENSE_ERROR:  # NaN is none
            print(f"{peer} is left out: off by {off:.2g} of the largest value", flush=True)
        else:
            works[peer] = run
    return works


def all_layers(figure: str, rows: list[Row]) -> Iterator[Row]:
    """One row of the layers together, if there are several and all have a time."""
    layers = [row for row in rows if "index_share" in row.case and "layer" in row.case]
    if len(layers) < 2 or any(row.ours is None for row in rows):
        return
    common = set.intersection(*({p for p in row.case if isinstance(row.case[p], float)}
                                for row in layers))  # fmt: skip
    named = common - {"coverage", "density", "covered", "index_share", "launch_s"}
    times = {peer: sum(row.case[peer] for row in layers) for peer in sorted(named)}
    if not times:
        return
    best = min(times, key=times.get)
    ours = sum(row.ours for row in layers)
    index = sum(row.ours * row.case["index_share"] for row in layers)
    case = {
        "tokens": layers[0].case["tokens"], "layers": len(layers),
        "density": round(sum(row.case["density"] for row in layers) / len(layers), 4),
        "index_share": round(index / ours, 4),
    }  # fmt: skip
    worst = max(row.error for row in layers)
    yield Row.time(figure, case, ours, best, times[best], error=worst)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = addable(arguments(__doc__))
    parser.add_argument(
        "--lengths", nargs="+", choices=list(LENGTHS), default=["4k", "8k", "32k", "128k"]
    )
    parser.add_argument("--model", help="a Hugging Face model instead of the lean one")
    parser.add_argument("--text", type=Path, help="with --model: the file the prompt is cut from")
    parser.add_argument("--layers", nargs="+", type=int, help="default: all of the lean model's, "
                        "three of a given one")  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--cache", choices=CACHES, default="auto", help="what the cache holds")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="only these (default: all)")
    parser.add_argument("--chunk", type=int, metavar="N", help="only the last N tokens' queries, "
                        "as a step of serving has them (default: all)")  # fmt: skip
    parser.add_argument("--coverage", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--most-seconds", type=float, default=20.0, metavar="S",
                        help="of timing one layer: fewer repeats then, but three")  # fmt: skip
    options = parser.parse_args(argv)
    if bool(options.model) != bool(options.text):
        parser.error("--model and --text go together: a model's heads are real on real text only")
    if options.chunk is not None:
        short = [name for name in options.lengths if LENGTHS[name] <= options.chunk]
        if options.chunk < 1 or short:
            parser.error(f"--chunk {options.chunk}: give 1 or more, and fewer than --lengths have")
    if not 0 < options.coverage <= 1:
        parser.error(f"--coverage {options.coverage}: more than 0, at most 1")
    return options


def prompt_of(options: argparse.Namespace, length: int) -> list[int]:
    if options.model is None:
        from retrieval.prompts import needle_prompt

        return needle_prompt(length).token_ids
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"]
    if len(ids) < length:
        raise SystemExit(f"--text: {options.text} has {len(ids)} tokens, {length} are asked for")
    return ids[:length]


def wanted_layers(options: argparse.Namespace, model: str) -> list[int] | None:
    if options.layers or options.model is None:
        return options.layers
    from transformers import AutoConfig

    count = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    return sorted({0, count // 2, count - 1})


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch

    if not torch.cuda.is_available():
        print(NEEDS_A_GPU, file=sys.stderr)
        return 2
    require_editable()
    import_examples()
    from ._capture import capture

    model = options.model or str(checkpoint("lean"))
    results = Results(options.json, add=options.add)
    for name in options.lengths:
        prompt = prompt_of(options, LENGTHS[name])
        dtype = getattr(torch, options.dtype)
        layers = wanted_layers(options, model)
        rows = []
        try:
            for inputs in capture(model, prompt, layers, dtype=dtype, device=torch.device("cuda")):
                for row in measure(name, inputs, options):
                    results.add([row])
                    rows.append(row)
                torch.cuda.empty_cache()
        except torch.OutOfMemoryError as error:
            why = " ".join(f"the model on the prompt: {error}".split())[:200]
            failed = Row.failed(f"prefill_{name}", {}, why, peer=None, unit="s")
            results.add([failed])
            continue
        if rows:
            figure = name_of(name, inputs, options).replace(f"layer{inputs.layer}", "all")
            results.add(all_layers(figure, rows))
    results.show()
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
