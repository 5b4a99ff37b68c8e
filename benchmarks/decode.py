"""Decode attention of one layer: our three softmax modes, and vLLM's own, taking turns.

On a CPU the native kernel, against vLLM's CPU attention and against a loop that only reads the same
bytes. On a machine with a GPU the Triton kernel (see `_decode_gpu.py`). Everything is checked
before it is timed: a wrong result has no time. Each row is in the file once it is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
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

NEEDS_A_GPU = needs_a_gpu("benchmarks.decode --parts gpu")
PAGE, HEAD_SIZE = 128, 128
VLLM, STREAM, ONLINE = "vLLM CPU attention", "read STREAM", "ours, online"
SHORTEST_S = 0.3  # that each contender is timed for, at least
HEADS = {"32/8": (32, 8), "32/4": (32, 4), "8/2": (8, 2)}


def turns(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    begin = time.perf_counter()
    while len(seconds[next(iter(work))]) < rounds or (
        time.perf_counter() - begin < SHORTEST_S * len(work)
    ):
        # Who comes first in a round changes: each finds in the caches what the one before left.
        order = list(work.items())
        turn = len(seconds[order[0][0]]) % len(order)
        for name, call in order[turn:] + order[:turn]:
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def rounding(dtype, cancel: float) -> float:
    """What rounding may change of an output, of the largest there is.

    The output's own, and that of fp32 sums, whose values cancel each other: at 32K keys to a
    thirtieth of what they are. A key that was lost there would be sixteen times the limit.

    cancel: how many times as large as the largest output a value typically is.
    """
    import torch

    return 4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps * cancel


def rows_of(heads: str, batch: int, context: int, dtype_name: str, rounds: int) -> list[Row]:
    import torch

    from benchmarks._vllm_cpu import VllmCpuAttention
    from vllm_sparse.cpu_offload import native
    from vllm_sparse.kernels import cpu, reference, write_kv

    dtype = getattr(torch, dtype_name)
    num_heads, kv_heads = HEADS[heads]
    generator = torch.Generator().manual_seed(context + batch)
    tokens = batch * context
    k, v = torch.randn(2, tokens, kv_heads, HEAD_SIZE, generator=generator).to(dtype)
    q = torch.randn(batch, num_heads, HEAD_SIZE, generator=generator).to(dtype)
    scale = HEAD_SIZE**-0.5
    cache = torch.zeros(tokens // PAGE, kv_heads, PAGE, 2 * HEAD_SIZE, dtype=dtype)
    k_cache, v_cache = cache[..., :HEAD_SIZE], cache[..., HEAD_SIZE:]
    write_kv(k, v, k_cache, v_cache, torch.arange(tokens))
    table = torch.arange(tokens // PAGE, dtype=torch.int32).view(batch, -1)
    lens = torch.full((batch,), context, dtype=torch.int32)
    where = (k_cache, v_cache, table, lens)
    peer_out = torch.empty_like(q)
    peer = VllmCpuAttention(k, v, PAGE).decoder(q, batch, peer_out)
    typical = float(v.float().abs().mean())
    del k, v
    peer()

    # phi as calibration makes it, between the extremes of the lse: far from flagging.
    _, true_lse = reference.paged_decode(q[:1], k_cache, v_cache, table[:1], lens[:1], scale=scale)
    phi = true_lse[0].clone()
    results, flagged = {}, torch.zeros(1, dtype=torch.int64)
    work: dict[str, Callable[[], object]] = {VLLM: peer}
    for softmax in ("online", "lazy", "unified"):
        options = {"softmax": softmax, "phi": phi} if softmax == "unified" else {"softmax": softmax}

        def ours(options=options, out=None):
            return cpu.paged_decode(q, *where, scale=scale, out=out, flagged=flagged, **options)

        results[softmax] = ours()[0]
        out = torch.empty_like(q)
        work[softmax] = lambda ours=ours, out=out: ours(out=out)
    largest = float(peer_out.float().abs().max())
    limit = rounding(dtype, typical / largest)
    errors = {
        name: float((out.float() - peer_out.float()).abs().max()) / largest
        for name, out in results.items()
    }
    memory = cache.view(torch.uint8).flatten()
    work[STREAM] = lambda: native.read(memory)
    seconds = turns(work, rounds)
    case = {
        "batch": batch, "tokens": context, "heads": heads, "dtype": dtype_name,
        "threads": cpu.num_threads(), "kernels": cpu.isa(),
    }  # fmt: skip
    suffix = f"{heads.replace('/', '_')}_b{batch}_{context >> 10}k"
    suffix += "" if dtype == torch.bfloat16 else f"_{dtype_name}"
    found = []
    for name, error in errors.items():
        failed = None if error <= limit else f"differs from vLLM's output by {error:.2g}"
        if int(flagged):
            failed = f"{int(flagged)} rows left the window of phi"
        found.append(
            Row.time(f"decode_{name}_{suffix}", case, 1e6 * seconds[name], VLLM,
                     1e6 * seconds[VLLM], unit="us", error=error, failed=failed)
        )  # fmt: skip
        if name != "online" and failed is None:
            found.append(
                Row.time(f"decode_{name}_vs_online_{suffix}", case, 1e6 * seconds[name], ONLINE,
                         1e6 * seconds["online"], unit="us", error=error)
            )  # fmt: skip
    if errors["online"] <= limit:
        rate = memory.numel() / 1e9
        found.append(
            Row.rate(f"decode_stream_{suffix}", {**case, "working_set_mb": memory.numel() >> 20},
                     rate / seconds["online"], STREAM, rate / seconds[STREAM], unit="GB/s",
                     error=errors["online"])
        )  # fmt: skip
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = addable(arguments(__doc__))
    parser.add_argument("--parts", nargs="+", choices=["cpu", "gpu"],
                        help="default: the GPU where there is one, the CPU otherwise")  # fmt: skip
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=["32/8", "32/4"])
    parser.add_argument("--batches", type=int, nargs="+",
                        help="default: 1 and 8 on the CPU, 1 to 64 on a GPU")  # fmt: skip
    parser.add_argument("--contexts", type=int, nargs="+",
                        help="default: 1K to 128K on the CPU, to 256K on a GPU")  # fmt: skip
    parser.add_argument("--tokens", type=int, help="most of a batch, all together; default: 256K "
                        "on the CPU, 2M on a GPU")  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16"],
        help="of the CPU's part",
    )  # fmt: skip
    parser.add_argument("--cache", choices=["auto", "fp8"], default="auto", help="on the GPU")
    parser.add_argument("--threads", type=int, default=1, help="of both, each on a core")
    parser.add_argument("--rounds", type=int, default=9, help="the fewest that a median is of")
    options = parser.parse_args(argv)
    if bad := [n for n in options.contexts or () if n < PAGE or n % PAGE]:
        parser.error(f"--contexts: got {bad}; give multiples of {PAGE}")
    if bad := [n for n in options.batches or () if n < 1]:
        parser.error(f"--batches: got {bad}; give 1 or more")
    return options


def cpu_rows(options: argparse.Namespace) -> Iterator[Row]:
    use_threads(options.threads)
    most = options.tokens or 1 << 18
    for dtype in options.dtypes:
        for heads in options.heads:
            for batch in options.batches or (1, 8):
                for context in options.contexts or (1024, 8192, 32768, 131072):
                    if batch * context <= most:
                        yield from rows_of(heads, batch, context, dtype, options.rounds)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    require_editable()
    import torch

    has_gpu = torch.cuda.is_available()
    parts = options.parts or (["gpu"] if has_gpu else ["cpu"])
    if "gpu" in parts and not has_gpu:
        print(NEEDS_A_GPU, file=sys.stderr)
        return 2
    if not has_gpu:
        print("No GPU is here: the Triton kernel and its peers (vLLM's Triton attention, "
              "FlashAttention, FlashInfer, SDPA) are not timed.")  # fmt: skip
    results = Results(options.json, add=options.add)
    if "cpu" in parts:
        results.add(cpu_rows(options))
    if "gpu" in parts:
        from benchmarks._decode_gpu import gpu_rows

        results.add(gpu_rows(options))
    results.show()
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
