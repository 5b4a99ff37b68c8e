"""Sparse prefill attention on a GPU, index included, against the dense kernels that are there.

Queries, keys and values are those of a model's layers on a real prompt: of the lean retrieval model
with a needle prompt, or of a model and a text that are given. Every result is checked before it is
timed: everything selected against float32 attention, the selection for the mass it was to cover.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ._form import ROOT, Row, arguments, publish, require_editable
from ._gpu_clock import seconds

NEEDS_A_GPU = "benchmarks.prefill needs an NVIDIA GPU, and torch finds none here"
LENGTHS = {f"{n}k": n * 1024 for n in (4, 8, 16, 32, 64, 128, 256, 512)} | {"1m": 1 << 20}
PAGE = 16
CHECKED_ROWS = 256
COVERAGE_SLACK = 0.01
DENSE_ERROR = 2e-2  # of the largest value; bfloat16 itself makes 4e-3


@dataclass(frozen=True)
class Paged:
    """One layer's attention over a paged cache, as `kernels.sparse_prefill` takes it."""

    q: object  # [T, H, D]
    k: object  # [T, Hkv, D]
    v: object
    scale: float
    caches: tuple
    where: tuple  # block table, query starts, lengths

    @classmethod
    def of(cls, q, k, v, scale: float) -> Paged:
        import torch

        length, kv_heads, size = k.shape
        pages = -(-length // PAGE)
        both = torch.zeros(pages * PAGE, kv_heads, 2 * size, dtype=k.dtype, device=k.device)
        both[:length] = torch.cat([k, v], -1)
        cache = both.view(pages, PAGE, kv_heads, 2 * size).transpose(1, 2)
        integers = dict(dtype=torch.int32, device=k.device)
        where = (
            torch.arange(pages, **integers)[None],
            torch.tensor([0, length], **integers),
            torch.tensor([length], **integers),
        )
        return cls(q, k, v, scale, tuple(cache.chunk(2, -1)), where)

    def plan(self, coverage: float):
        from vllm_sparse.patterns import ADAPTIVE
        from vllm_sparse.planner.device import plan_on_device

        length, heads = self.q.shape[:2]
        return plan_on_device(
            self.q, self.caches[0], self.where[0], [length], [length], (ADAPTIVE,) * heads,
            scale=self.scale, coverage=coverage,
        )  # fmt: skip

    def attend(self, indices):
        from vllm_sparse.kernels.gpu.sparse_prefill import sparse_prefill

        return sparse_prefill(self.q, *self.caches, *self.where, indices, scale=self.scale)


@dataclass(frozen=True)
class Checked:
    """What a check found: how much is read, what it covers, how far off the output is."""

    density: float
    covered: float
    error: float  # of the sparse output, relative, over the checked rows
    dense_error: float
    why: str | None  # it failed


def check(problem: Paged, coverage: float) -> Checked:
    """Runs both forms once and holds them to float32 attention of some rows."""
    import torch

    indices = problem.plan(coverage)
    out, lse = problem.attend(indices)
    dense, dense_lse = problem.attend(None)
    length = problem.q.shape[0]
    rows = torch.linspace(0, length - 1, min(CHECKED_ROWS, length), device=out.device).long()
    truth = float32_rows(problem, rows)
    dense_error = float((dense[rows].float() - truth).abs().max() / truth.abs().max())
    error = float((out[rows].float() - truth).norm() / truth.norm())
    covered = float((lse - dense_lse).exp().mean())
    density = indices_density(indices, length)
    why = None
    if not dense_error <= DENSE_ERROR:  # NaN fails as well
        why = f"everything selected is off by {dense_error:.2g} of the largest value"
    elif not covered >= coverage - COVERAGE_SLACK:
        why = f"covered {covered:.3f} of the mass, asked for {coverage}"
    return Checked(density, covered, error, dense_error, why)


def indices_density(indices, length: int) -> float:
    from vllm_sparse.cuda_runtime import Counters

    counters = Counters(indices.blocks.device)
    counters.add(indices, [length], [length])
    return int(counters.read) / counters.causal


def float32_rows(problem: Paged, rows):
    """Attention of some rows in float32: [R, H, D]."""
    import torch

    group = problem.q.shape[1] // problem.k.shape[1]
    key = torch.arange(problem.k.shape[0], device=rows.device)
    out = torch.empty(len(rows), *problem.q.shape[1:], device=rows.device)
    for head in range(problem.q.shape[1]):
        k, v = problem.k[:, head // group].float(), problem.v[:, head // group].float()
        scores = problem.q[rows, head].float() @ k.T * problem.scale
        scores.masked_fill_(key > rows[:, None], -torch.inf)
        out[:, head] = scores.softmax(-1) @ v
    return out


def measure(name: str, inputs, coverage: float, repeats: int) -> list[Row]:
    """The rows of one length and layer."""
    from ._prefill_peers import peers

    problem = Paged.of(inputs.q, inputs.k, inputs.v, inputs.scale)
    found = check(problem, coverage)
    length, heads, size = problem.q.shape
    case = {
        "tokens": length, "layer": inputs.layer, "heads": f"{heads}/{problem.k.shape[1]}x{size}",
        "coverage": coverage, "density": round(found.density, 4),
        "covered": round(found.covered, 4),
    }  # fmt: skip
    works = {
        "ours": lambda: problem.attend(problem.plan(coverage)),
        "index": lambda: problem.plan(coverage),
    }
    indices = problem.plan(coverage)
    works["kernel"] = lambda: problem.attend(indices)
    for peer, run in peers(inputs.q, inputs.k, inputs.v, inputs.scale):
        if isinstance(run, str):
            print(f"{peer} is not here: {run}")
        else:
            works[peer] = run
    figure = f"prefill_{name}_layer{inputs.layer}"
    theirs = [peer for peer in works if peer not in ("ours", "index", "kernel")]
    if found.why or not theirs:
        why = found.why or "no dense kernel to compare with runs here"
        return [Row.failed(figure, case, why, peer=None, unit="s", error=found.error)]
    times = seconds(works, repeats)
    best = min(theirs, key=times.get)
    flops = 4 * size * heads * length * (length + 1) / 2 * found.density
    case |= {"index_share": round(times["index"] / times["ours"], 4)} | {
        peer: round(times[peer], 6) for peer in theirs
    }
    return [
        Row.time(figure, case, times["ours"], best, times[best], error=found.error),
        Row.rate(
            f"{figure}_kernel", {"tokens": length, "density": round(found.density, 4)},
            flops / times["kernel"] / 1e12, best, flops / found.density / times[best] / 1e12,
            unit="TFLOP/s", error=found.dense_error,
        ),
    ]  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument(
        "--lengths", nargs="+", choices=list(LENGTHS), default=["4k", "8k", "32k", "128k"]
    )
    parser.add_argument("--model", help="a Hugging Face model instead of the lean one")
    parser.add_argument("--text", type=Path, help="with --model: the file the prompt is cut from")
    parser.add_argument("--layers", nargs="+", type=int, help="default: all of the lean model's, "
                        "three of a given one")  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--coverage", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(argv)
    if bool(options.model) != bool(options.text):
        parser.error("--model and --text go together: a model's heads are real on real text only")
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
    sys.path.insert(0, str(ROOT / "examples"))
    if options.model is None:
        subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), "lean"], check=True)
    from ._capture import capture

    model = options.model or str(ROOT / "checkpoints" / "lean")
    rows = []
    for name in options.lengths:
        prompt = prompt_of(options, LENGTHS[name])
        dtype = getattr(torch, options.dtype)
        layers = wanted_layers(options, model)
        for inputs in capture(model, prompt, layers, dtype=dtype, device=torch.device("cuda")):
            rows += measure(name, inputs, options.coverage, options.repeats)
    publish(rows, options.json)
    return 1 if any(row.ours is None for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
