"""Linear layers of decode, whose weights are read once for few rows: ours and vLLM's own.

On a CPU the native kernel, against oneDNN over packed weights (what vLLM runs there), torch, and a
loop that only reads the same bytes; each has as many copies of the weights as no cache holds, and
takes the next one each time. On a GPU the two Triton kernels as graphs, with a cold L2, against
cuBLAS (what vLLM runs there) and what torch.compile chooses. Results are checked against float64
before they are timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator

from benchmarks._form import (
    Results,
    Row,
    addable,
    arguments,
    needs_a_gpu,
    require_editable,
    use_threads,
)

NEEDS_A_GPU = needs_a_gpu("benchmarks.linear --device cuda")
# [N, K]: qkv, o, gate_up and down.
MODELS = {
    "Llama-3.2-1B": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
    "Llama-3.1-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
MORE_ON_CPU = (128, 512)
COPIES_BYTES = 128 << 20  # of the weights together: four times a cache of 32 MiB
TORCH, STREAM = "torch linear", "read STREAM"
VLLM = {"cpu": "vLLM CPU linear (oneDNN, packed)", "cuda": "cuBLAS, as vLLM"}
COMPILED = "torch.compile, max-autotune"


class Layer:
    """A layer's weights, activations and truth, and who computes it."""

    def __init__(self, n: int, k: int, dtype_name: str, options: argparse.Namespace) -> None:
        import torch

        self.n, self.k, self.device = n, k, options.device
        self.dtype_name, self.dtype = dtype_name, getattr(torch, dtype_name)
        generator = torch.Generator(self.device).manual_seed(n + k)
        made = {"generator": generator, "device": self.device}
        self.weight = torch.randn(n, k, **made).to(self.dtype)
        self.x = torch.randn(max(*options.batches, *options.compiled, 1), k, **made).to(self.dtype)
        x = self.x.double()
        self.truth = torch.cat([x @ part.double().T for part in self.weight.split(4096)], 1)
        self.bytes = self.weight.numel() * self.weight.itemsize
        self.ours, self.works = self._cpu() if self.device == "cpu" else self._cuda()

    def _cpu(self) -> tuple[Callable, dict[str, Callable]]:
        import torch
        import vllm  # noqa: F401  (the platform comes first)
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        from vllm_sparse.cpu_offload import native
        from vllm_sparse.kernels.linear import PackedWeight, linear

        current_platform.import_kernels()
        copies = [self.weight.clone() for _ in range(-(-COPIES_BYTES // self.bytes))]
        packed = [PackedWeight(weight) for weight in copies]
        handlers = [ops.create_onednn_mm(weight.t(), 32) for weight in copies]
        # It begins half-way, so that it does not read what torch has just read.
        half = len(copies) // 2
        memory = [one.view(torch.uint8).flatten() for one in copies[half:] + copies[:half]]
        works = {
            "cpu": in_turn(linear, packed),
            VLLM["cpu"]: in_turn(lambda x, handler: ops.onednn_mm(handler, x, None), handlers),
            TORCH: in_turn(torch.nn.functional.linear, copies),
            STREAM: in_turn(lambda x, one: native.read(one), memory),
        }
        return lambda m: ("cpu",), works

    def _cuda(self) -> tuple[Callable, dict[str, Callable]]:
        import torch

        from vllm_sparse.kernels.gpu.flat_gemm import flat_gemm
        from vllm_sparse.kernels.gpu.gemv import MOST_ROWS, gemv

        weight, words = self.weight, self.weight.view(torch.int64)
        total = torch.empty((), dtype=torch.int64, device=self.device)
        made: dict[int, Callable] = {}

        def compiled(x):
            if len(x) not in made:
                torch._dynamo.reset()  # it compiles one function for a few shapes only
                made[len(x)] = torch.compile(
                    lambda x: torch.nn.functional.linear(x, weight),
                    mode="max-autotune-no-cudagraphs", dynamic=False,
                )  # fmt: skip
            return made[len(x)](x)

        works = {
            "gemv": lambda x: gemv(x, weight),
            "flat_gemm": lambda x: flat_gemm(x, weight),
            VLLM["cuda"]: lambda x: torch.nn.functional.linear(x, weight),
            COMPILED: compiled,
            STREAM: lambda x: torch.sum(words, dim=None, out=total),
        }
        return lambda m: ("gemv", "flat_gemm") if m <= MOST_ROWS else ("flat_gemm",), works

    def ready(self, name: str, x) -> tuple[Callable, object]:
        """What is timed, and its output."""
        work = self.works[name]
        if self.device == "cpu":
            return lambda: work(x), work(x)
        from benchmarks._decode_gpu import graphed

        run, out = graphed(lambda: work(x))
        run()
        return run, out

    def error(self, out) -> float:
        truth = self.truth[: len(out)]
        return float((out.double() - truth).abs().max() / truth.abs().max())

    def case(self, m: int) -> dict:
        found = {"m": m, "n": self.n, "k": self.k, "dtype": self.dtype_name}
        if self.device == "cpu":
            from vllm_sparse.kernels import cpu

            found |= {"threads": cpu.num_threads(), "kernels": cpu.isa()}
        return {**found, "weights_mb": round(self.bytes / 1e6, 1)}


def in_turn(work: Callable, each: list) -> Callable:
    turn = itertools.cycle(each)
    return lambda x: work(x, next(turn))


def clock(works: dict[str, Callable], device: str, rounds: int) -> dict[str, float]:
    if device == "cpu":
        from benchmarks.decode import turns

        return turns(works, rounds)
    from benchmarks._gpu_clock import seconds

    return seconds(works, rounds)


def rows_of(layer: Layer, m: int, peers: tuple[str, ...], rounds: int) -> Iterator[Row]:
    """The rows of each of our kernels at m rows of activations, against these peers."""
    import torch

    from benchmarks._decode_gpu import reason

    ours = layer.ours(m)
    suffix = f"{layer.n}x{layer.k}_m{m}"
    suffix += "" if layer.dtype == torch.bfloat16 else f"_{layer.dtype_name}"
    case, works, errors, failed = layer.case(m), {}, {}, {}
    plain = TORCH if layer.device == "cpu" else VLLM["cuda"]
    theirs = layer.error(torch.nn.functional.linear(layer.x[:m], layer.weight))
    # Of the largest output: its own rounding, and that of fp32 sums in another order.
    limit = 2 * theirs + torch.finfo(layer.dtype).eps + 16 * torch.finfo(torch.float32).eps
    for name in (*ours, *peers):
        try:
            run, out = layer.ready(name, layer.x[:m])
            if name != STREAM:
                errors[name] = layer.error(out)
                if not errors[name] <= limit:  # NaN fails as well
                    raise ValueError(f"off by {errors[name]:.2g}, {plain} by {theirs:.2g}")
            works[name] = run
        except Exception as error:  # what keeps one from running must not cost the others
            failed[name] = reason(error)
            print(f"{name} at {suffix}: {failed[name]}", flush=True)
    times = clock(works, layer.device, rounds)
    for kernel in ours:
        figure, error = f"linear_{kernel}_{suffix}", errors.get(kernel)
        if kernel in failed:
            named = figure if COMPILED not in peers else f"{figure}_vs_compiled"
            yield Row.failed(named, case, failed[kernel], peer=None, unit="us", error=error)
            continue
        for peer, named in (
            (VLLM[layer.device], figure), (TORCH, f"{figure}_vs_torch"),
            (COMPILED, f"{figure}_vs_compiled"),
        ):  # fmt: skip
            if peer in times:
                us, its = 1e6 * times[kernel], 1e6 * times[peer]
                yield Row.time(named, case, us, peer, its, unit="us", error=error)
        if STREAM in times:
            rate, its = (layer.bytes / 1e9 / times[name] for name in (kernel, STREAM))
            yield Row.rate(f"{figure}_stream", case, rate, STREAM, its, unit="GB/s", error=error)


def together(rows: list[Row]) -> Iterator[Row]:
    """Of all layers with so many rows: how many times as fast as vLLM's own the faster of our
    kernels is, as a geometric mean; the case has the least."""
    best: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.ratio is None or row.peer not in VLLM.values():
            continue
        layers = best.setdefault((row.case["m"], row.case["dtype"], row.peer), {})
        shape = f"{row.case['n']}x{row.case['k']}"
        layers[shape] = max(layers.get(shape, 0.0), row.ratio)
    for (m, dtype, peer), ratios in best.items():
        if len(ratios) < 2:
            continue
        worst = min(ratios, key=ratios.get)
        case = {"m": m, "dtype": dtype, "peer": peer, "layers": ", ".join(ratios),
                "least": round(ratios[worst], 3), "least_at": worst}  # fmt: skip
        device = next(name for name, known in VLLM.items() if known == peer)
        yield Row.share(
            f"linear_{device}_all_m{m}" + ("" if dtype == "bfloat16" else f"_{dtype}"), case,
            math.exp(sum(map(math.log, ratios.values())) / len(ratios)),
            unit="geometric mean of ratios",
        )  # fmt: skip


def all_rows(options: argparse.Namespace) -> Iterator[Row]:
    peers = (VLLM[options.device], *((TORCH,) if options.device == "cpu" else ()), STREAM)
    for dtype in options.dtypes:
        found: list[Row] = []
        for n, k in options.shapes:
            layer = Layer(n, k, dtype, options)
            for m in options.batches:
                for row in rows_of(layer, m, peers, options.rounds):
                    found.append(row)
                    yield row
        yield from together(found)
    for dtype, (n, k) in itertools.product(options.dtypes, options.shapes):
        layer = Layer(n, k, dtype, options) if options.compiled else None
        for m in options.compiled:
            yield from rows_of(layer, m, (COMPILED,), options.rounds)


def shape_of(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; give NxK, as 4096x14336")
    n, k = map(int, text.split("x"))
    return n, k


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = addable(arguments(__doc__))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="NxK",
                        help="layers, in place of those of models")  # fmt: skip
    parser.add_argument("--batches", type=int, nargs="+", metavar="M",
                        help="rows of activations; default: 1 to 64, on a CPU to 512")  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32", "float16"],
        help="default: bfloat16, and on a CPU float32 as well",
    )  # fmt: skip
    parser.add_argument(
        "--compiled", type=int, nargs="*", default=[], metavar="M",
        help="on a GPU: with so many rows also against torch.compile, which tunes for each",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="on a CPU, of everyone")
    parser.add_argument("--rounds", type=int, default=5, help="the fewest that a median is of")
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    if on_cpu and options.compiled:
        parser.error("--compiled: it is a peer on GPUs; add --device cuda")
    options.batches = options.batches or [*ROWS, *(MORE_ON_CPU if on_cpu else ())]
    if bad := [m for m in (*options.batches, *options.compiled) if m < 1]:
        parser.error(f"--batches, --compiled: got {bad}; give 1 or more")
    options.dtypes = options.dtypes or ["bfloat16", *(["float32"] if on_cpu else [])]
    if not on_cpu and "float32" in options.dtypes:
        parser.error("--dtypes: float32 is for CPUs")
    if options.shapes is None:
        options.shapes = [shape for name in options.models for shape in MODELS[name]]
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    require_editable()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(NEEDS_A_GPU, file=sys.stderr)
        return 2
    use_threads(options.threads)
    results = Results(options.json, add=options.add)
    results.add(all_rows(options))
    results.show()
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
