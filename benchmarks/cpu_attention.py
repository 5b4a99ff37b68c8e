"""Sampled attention over host memory: how fast rows are read, what samples cost and are worth.

Bandwidth is useful KV bytes a second against a loop that only reads, of the same threads, taking
turns with it. Speed is one token's attention, sampling included, against the same kernel reading
everything. Errors are of the output against exact attention, each sampler with the same rows.
Everything is checked before it is timed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._form import ROOT, Row, arguments, publish, require_editable

HEAD_SIZE, GROUP = 128, 4
STREAM = "read STREAM"
EXACT = "same kernel, every row"
SPEED_HEADS = 8  # KV heads of the token whose attention is timed
BUDGET = 0.02
CACHE_TIMES = 8  # working set of the bandwidth figures, in last-level caches
SEEDS = 5
MODEL_TOKENS = 16384
SINK, WINDOW = 4, 64  # rows of a captured context that stay with the device, as in serving


def last_level_cache() -> int:
    """Bytes of the largest cache that a core sees."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


def turns(ours: Callable, theirs: Callable, rounds: int) -> tuple[float, float]:
    """Median seconds of both, which take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, found in zip((ours, theirs), seconds, strict=True):
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def random_context(kv_heads: int, length: int, dtype, samplers=()):
    """A context of bf16 numbers; keys have a common offset, as trained ones have."""
    import torch

    from vllm_sparse.cpu_offload import Context, KVStore, allocate

    rows = min(length, 65536)
    row_bytes = 2 * HEAD_SIZE * dtype.itemsize + (8 if dtype == torch.int8 else 0)
    nbytes = length // rows * (kv_heads * rows * row_bytes + 64) + 64
    store = KVStore(
        allocate(nbytes), kv_heads=kv_heads, head_size=HEAD_SIZE, dtype=dtype, segment_rows=rows
    )
    context = Context(store, samplers=samplers)
    generator = torch.Generator().manual_seed(0)
    offset = 2 * torch.randn(2, 1, kv_heads, HEAD_SIZE, generator=generator)
    step = min(length, max(1 << 25, kv_heads * HEAD_SIZE) // (kv_heads * HEAD_SIZE))
    for first in range(0, length, step):
        shape = (2, min(step, length - first), kv_heads, HEAD_SIZE)
        k, v = torch.randn(shape, generator=generator) + offset
        context.append(k.bfloat16(), v.bfloat16())
    return context


def selection(kv_heads: int, length: int, density: float, block: int):
    """Sorted rows int64 [kv_heads, W] and their counts: random blocks of so many rows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(kv_heads, length // block, generator=generator) < density
    lists = [(mine.nonzero() * block + torch.arange(block)).flatten() for mine in chosen]
    counts = torch.tensor([len(mine) for mine in lists])
    return torch.nn.utils.rnn.pad_sequence(lists, batch_first=True), counts


def wrong(context, q, rows, counts, out) -> tuple[float, str | None]:
    """Largest error of two KV heads against fp32, and what is wrong with it if anything is."""
    import torch

    from vllm_sparse.cpu_offload import reference

    worst = 0.0
    for head in (0, context.store.kv_heads - 1):
        chosen = torch.arange(context.length) if rows is None else rows[head, : counts[head]]
        k, v = context.rows(head, chosen)
        true, _ = reference.gathered_attention(q[0, head, 0], k, v, None, HEAD_SIZE**-0.5)
        worst = max(worst, float((out[0, head, 0] - true).abs().max() / v.abs().max()))
    return worst, None if worst < 4e-3 else f"differs from the reference by {worst:.2g}"


def bandwidth(rounds: int) -> list[Row]:
    import torch

    from vllm_sparse.cpu_offload import native
    from vllm_sparse.cpu_offload.memory import available_memory
    from vllm_sparse.kernels import cpu

    found = []
    for dtype, suffix in ((torch.bfloat16, ""), (torch.int8, "_int8")):
        length = 65536
        per_head = length * 2 * HEAD_SIZE * dtype.itemsize
        # A quarter of it is useful, and that alone shall be so many caches, as far as memory goes.
        nbytes = min(4 * CACHE_TIMES * last_level_cache(), available_memory() // 2)
        heads = -(-nbytes // per_head)
        context = random_context(heads, length, dtype)
        q = torch.randn(1, heads, 1, GROUP, HEAD_SIZE).bfloat16().float()
        cases: list[tuple[str, float, int]] = [
            ("all", 1.0, 1), ("blocks", 0.25, 16), ("rows", 0.25, 1), ("blocks", BUDGET, 16),
            ("rows", BUDGET, 1),
        ]  # fmt: skip
        for name, density, block in cases:
            rows, counts = None, torch.full((heads,), length)
            if density < 1:
                rows, counts = selection(heads, length, density, block)

            def ours(context=context, q=q, rows=rows, counts=counts):
                return native.gather(context, q, rows, None, counts, scale=HEAD_SIZE**-0.5)

            error, failed = wrong(context, q, rows, counts, ours()[0])
            memory = context.store.buffer
            seconds, stream = turns(ours, lambda memory=memory: native.read(memory), rounds)
            useful = int(counts.sum()) * 2 * HEAD_SIZE * dtype.itemsize
            case = {
                "rows": f"{block} at a time" if density < 1 else "every row", "density": density,
                "dtype": str(dtype).removeprefix("torch."), "heads": f"{heads * GROUP}/{heads}",
                "working_set_mb": memory.numel() >> 20, "threads": cpu.num_threads(),
                "kernels": native.isa(),
            }  # fmt: skip
            figure = f"gather_{name}_vs_stream{suffix}{'_2pct' if density == BUDGET else ''}"
            found.append(
                Row.rate(figure, case, useful / seconds / 1e9, STREAM,
                         memory.numel() / stream / 1e9, unit="GB/s", error=error, failed=failed)
            )  # fmt: skip
        del context, q, ours
    return found


def speed(lengths: list[int], rounds: int) -> list[Row]:
    """One token of 32 query and 8 KV heads; keys and queries without structure, so that errors are
    those of flat attention."""
    import torch

    from vllm_sparse.cpu_offload import LSH, Exact, Uniform, VAttention, gather
    from vllm_sparse.kernels import cpu

    found = []
    for length in lengths:
        lsh, finer = LSH(), LSH(bits=9, tables=90)
        # What LSH samples without a budget is about 2%; the case says how much it was.
        samplers = {
            "sampled": (lsh, None), "sampled_finer": (finer, None),
            "sampled_1pct": (lsh, BUDGET / 2), "sampled_each_head": (LSH(shared=False), None),
            "vattention": (VAttention(), BUDGET), "uniform": (Uniform(), BUDGET),
            "vattention_bound": (VAttention(), None),
        }  # fmt: skip
        context = random_context(SPEED_HEADS, length, torch.bfloat16, (lsh, finer, VAttention()))
        q = torch.randn(SPEED_HEADS * GROUP, HEAD_SIZE).bfloat16()
        exact = gather(q, context, Exact())[0].float()
        for name, (sampler, share) in samplers.items():
            budget = None if share is None else int(share * length)

            def ours(q=q, context=context, sampler=sampler, budget=budget):
                return gather(q, context, sampler, budget)

            out, _, read = ours()
            error = float((out.float() - exact).norm() / exact.norm())
            seconds, theirs = turns(ours, lambda q=q, c=context: gather(q, c, Exact()), rounds)
            case = {
                "tokens": length, "rows_read": round(float(read.float().mean()) / length, 4),
                "heads": f"{SPEED_HEADS * GROUP}/{SPEED_HEADS}", "dtype": "bfloat16",
                "threads": cpu.num_threads(),
            }  # fmt: skip
            if isinstance(sampler, LSH):
                case |= {"bits": sampler.bits, "tables": sampler.tables}
            figure = f"{name}_vs_exact_{length >> 10}k"
            if name in ("sampled", "vattention", "uniform"):
                figure += "_2pct"
            failed = None if error < 1 else f"the error is {error:.2g}"
            found.append(
                Row.time(figure, case, 1e3 * seconds, EXACT, 1e3 * theirs, unit="ms", error=error,
                         failed=failed)
            )  # fmt: skip
    return found


def index() -> list[Row]:
    """Bytes of the indexes of 64K tokens, and how fast they are made and added to."""
    import torch

    from vllm_sparse.cpu_offload import LSH, Context, VAttention

    length, heads, step = 65536, 2, 16
    found = []
    for name, sampler in (("lsh", LSH()), ("vattention", VAttention())):
        context = random_context(heads, length, torch.bfloat16)
        begin = time.perf_counter()
        nbytes = sampler.index_bytes(context)
        build = time.perf_counter() - begin
        case = {"tokens": length, "kv_heads": heads, "head_size": HEAD_SIZE}
        if isinstance(sampler, LSH):
            case |= {"bits": sampler.bits, "tables": sampler.tables}
        kv = length * heads * 2 * HEAD_SIZE * 2
        found.append(Row.share(f"{name}_index_bytes_per_kv_byte", case, nbytes / kv, unit="bytes"))
        rate = length * heads / build
        found.append(Row.share(f"{name}_build_rate", case, rate, unit="rows/s"))
        context.free()
        grown = Context(context.store, samplers=[sampler])
        k, v = torch.randn(2, length, heads, HEAD_SIZE).bfloat16()
        grown.append(k[: length // 2], v[: length // 2])
        begin, steps = time.perf_counter(), 256
        for i in range(length // 2, length // 2 + steps * step, step):
            grown.append(k[i : i + step], v[i : i + step])
        rate = steps * step * heads / (time.perf_counter() - begin)
        case = {**case, "rows_at_a_time": step, "after": length // 2}
        found.append(Row.share(f"{name}_append_rate", case, rate, unit="rows/s"))
    return found


def errors_of(heads: list[tuple], seeds: int) -> tuple[dict[str, float], float]:
    """Relative error of the outputs of all heads (q [G, D], k, v [n, 1, D]) together, by sampler,
    and the share of rows read: what LSH reads without a budget is the budget of the others."""
    from vllm_sparse.cpu_offload import LSH, TopK, Uniform, VAttention, attend

    makers = {
        "lsh": lambda s: LSH(seed=s), "lsh_each_head": lambda s: LSH(seed=s, shared=False),
        "vattention": lambda s: VAttention(seed=s), "uniform": lambda s: Uniform(seed=s),
        "topk": lambda s: TopK(),
    }  # fmt: skip
    squares, norm, shares = dict.fromkeys(makers, 0.0), 0.0, []
    for q, k, v in heads:
        exact = attend(q, k, v, "exact")[0].float()
        norm += seeds * float(exact.square().sum())
        for seed in range(seeds):
            rows = None
            for name, make in makers.items():
                budget = None if name.startswith("lsh") else rows
                out, _, read = attend(q, k, v, make(seed), budget, seed)
                squares[name] += float((out.float() - exact).square().sum())
                rows = int(read) if rows is None else rows
            shares.append(rows / len(k))
    found = {name: (total / norm) ** 0.5 for name, total in squares.items()}
    return found, statistics.mean(shares)


def error_rows(source: str, case: dict, heads: list[tuple], seeds: int) -> list[Row]:
    means, share = errors_of(heads, seeds)
    case = {**case, "rows_read": round(share, 4)}
    topk = max(means.pop("topk"), 1e-9)
    return [
        Row.time(f"error_{source}_{name}", case, max(mean, 1e-9), "top-k, the same rows", topk,
                 unit="relative", error=mean)
        for name, mean in means.items()
    ]  # fmt: skip


def captured_heads(tokens: int) -> list[tuple]:
    """The last query of every head group of the lean model over what would be on the host."""
    import torch
    from retrieval.forward import capture_qkv
    from retrieval.prompts import needle_prompt

    found = []
    prompt = needle_prompt(tokens).token_ids
    for q, k, v in capture_qkv(ROOT / "checkpoints" / "lean", prompt):
        group = q.shape[1] // k.shape[1]
        kept = slice(SINK, len(k) - WINDOW)
        for head in range(k.shape[1]):
            mine = q[-1, head * group : (head + 1) * group]
            rows = slice(head, head + 1)
            found.append(
                (mine.contiguous(), k[kept, rows].to(torch.bfloat16), v[kept, rows].bfloat16())
            )
    return found


def errors(length: int, seeds: int) -> list[Row]:
    from attention_heads import KINDS, synthetic_head

    from vllm_sparse.cpu_offload import VAttention, attend

    found, exceeded, read_share, draws = [], 0, 0.0, 0
    sampler = VAttention()
    for kind in KINDS:
        heads = [synthetic_head(kind, n=length, d=HEAD_SIZE, seed=s) for s in range(3)]
        case = {"tokens": length, "head_size": HEAD_SIZE, "source": "synthetic", "heads": 3}
        found += error_rows(kind, case, heads, seeds)
        for q, k, v in heads:
            exact = attend(q, k, v, "exact")[0]
            for seed in range(4 * seeds):
                out, _, read = attend(q, k, v, VAttention(seed=seed))
                error = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
                exceeded += int((error > sampler.epsilon).sum())
                read_share += float(read) / length * len(error)
                draws += len(error)
    case = {
        "epsilon": sampler.epsilon, "delta": sampler.delta, "outputs": draws, "tokens": length,
        "rows_read": round(read_share / draws, 4),
    }  # fmt: skip
    found.append(Row.share("vattention_bound_exceeded", case, exceeded / draws))
    heads = captured_heads(MODEL_TOKENS)
    case = {"tokens": MODEL_TOKENS, "source": "lean retrieval model", "heads": len(heads)}
    found += error_rows("model", case, heads, seeds)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parts = ["bandwidth", "speed", "index", "errors"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, help="of the kernels; default: every core allowed")
    parser.add_argument("--rounds", type=int, default=9, help="that timings are the median of")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 262144])
    options = parser.parse_args()
    require_editable()
    sys.path.insert(0, str(ROOT / "examples"))
    import os

    import torch

    from vllm_sparse.kernels import cpu

    cores = sorted(os.sched_getaffinity(0))
    threads = options.threads or len(cores)
    torch.set_num_threads(threads)
    cpu.set_threads(threads, cores if threads <= len(cores) else None)
    rows = []
    if "bandwidth" in options.parts:
        rows += bandwidth(options.rounds)
    if "speed" in options.parts:
        rows += speed(options.lengths, options.rounds)
    if "index" in options.parts:
        rows += index()
    if "errors" in options.parts:
        subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), "lean"], check=True)
        rows += errors(65536, SEEDS)
    publish(rows, options.json)


if __name__ == "__main__":
    main()
