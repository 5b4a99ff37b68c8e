"""The offload pool without an engine: its round trip, and a step's attention over host memory.

python -m benchmarks.offload_pool --parts ring step
"""

from __future__ import annotations

import importlib.util
import statistics
import time

from benchmarks._form import Row, arguments, publish, require_editable

# The lean retrieval model's attention.
LAYERS, HEADS, KV_HEADS, SIZE = 4, 8, 2, 128
SINK, WINDOW = 4, 1024
ECHO_HEADS = 128  # of 128 floats: 64 KB each way


def ring(rounds: int) -> list[Row]:
    """64 KB to an answerer and back, by the ring and by Ray's own calls."""
    import torch

    from vllm_sparse.cpu_offload import ring as rings
    from vllm_sparse.cpu_offload.pool import Pool

    found = []
    peer, theirs = ray_call(rounds)
    for kind in ("thread", "process", *(("ray",) if importlib.util.find_spec("ray") else ())):
        pool = Pool(
            layers=1, heads=ECHO_HEADS, kv_heads=1, head_size=SIZE, dtype=torch.float32,
            host_bytes=256 << 20, max_tokens=256, max_requests=1, kind=kind,
        )  # fmt: skip
        q = torch.randn(1, ECHO_HEADS, SIZE)
        out, lse = torch.empty_like(q), torch.empty(1, ECHO_HEADS)
        times = []
        for _ in range(20 * rounds):
            out.zero_()
            served = pool._ring.answered(0)
            start = time.perf_counter()
            number = pool._ring.ask(rings.ECHO, 0, q.data_ptr(), 0, (0,), (0,), (0,))
            # Only the actor answers, so that what is timed is the way there and back.
            while pool._ring.answered(0) == served:
                pass
            pool._ring.collect(number, out.data_ptr(), lse.data_ptr(), 1.0)
            times.append(time.perf_counter() - start)
        failed = None if torch.equal(out, q) else "what came back is not what was sent"
        pool.shutdown()
        times.sort()
        case = {
            "bytes_each_way": q.nbytes, "kind": kind, "rounds": len(times),
            "p90_us": round(times[len(times) * 9 // 10] * 1e6, 1),
        }  # fmt: skip
        found.append(
            Row.time(f"round_trip_{kind}", case, statistics.median(times), peer, theirs,
                     failed=failed)
        )  # fmt: skip
    return found


def ray_call(rounds: int) -> tuple[str, float]:
    """The median of sending the same bytes through `.remote` and `ray.get`."""
    if importlib.util.find_spec("ray") is None:
        return "Ray's .remote and get, as published: 1.4 ms", 1.4e-3
    import numpy as np

    from vllm_sparse.cpu_offload import actor

    ray = actor.connect()

    @ray.remote(num_cpus=0)
    class Echo:
        def echo(self, x):
            return x

    echo, x = Echo.remote(), np.zeros((ECHO_HEADS, SIZE), np.float32)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        ray.get(echo.echo.remote(x))
        times.append(time.perf_counter() - start)
    ray.kill(echo)
    return "Ray's .remote and get", statistics.median(times)


def step(length: int, requests: int, rounds: int, kinds: list[str]) -> list[Row]:
    """All layers of one decode step: the pool's samplers, and vLLM's own kernel over all rows."""
    import torch

    from benchmarks._vllm_cpu import VllmCpuAttention
    from vllm_sparse.cpu_offload.pool import Pool

    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, length, KV_HEADS, SIZE, generator=generator)
    q = 2 * torch.randn(requests, HEADS, SIZE, generator=generator)
    peer = VllmCpuAttention(*keys)
    exact = torch.empty(requests, HEADS, SIZE)
    pools, slots = {}, None
    for kind in kinds:
        for sampler in ("exact", "vattention", "lsh", "topk"):
            pool = Pool(
                layers=1, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float32,
                host_bytes=int(length * KV_HEADS * 1250 * requests * 1.1) + (8 << 20),
                sampler=sampler, max_tokens=length + 256, max_requests=requests, kind=kind,
            )  # fmt: skip
            slots = [pool.open(str(r)) for r in range(requests)]
            for slot in slots:
                pool.append(slot, 0, *keys)
            pools[kind, sampler] = pool
    first, last = [0] * requests, [length] * requests
    times: dict = {name: [] for name in (*pools, "vllm")}
    answers = {}
    for _ in range(rounds):
        start = time.perf_counter()
        for r in range(requests):
            peer.attend(q[r : r + 1], length, exact[r : r + 1])
        times["vllm"].append(time.perf_counter() - start)
        for name, pool in pools.items():
            out, lse = torch.empty_like(q), torch.empty(requests, HEADS)
            start = time.perf_counter()
            pool.collect(pool.submit(0, q, slots, first, last), out, lse)
            times[name].append(time.perf_counter() - start)
            answers[name] = out
    theirs = LAYERS * statistics.median(times["vllm"])
    found = []
    for (kind, sampler), pool in pools.items():
        stats = pool.stats()
        ours = LAYERS * statistics.median(times[kind, sampler])
        error = float((answers[kind, sampler] - exact).norm() / exact.norm())
        failed = None
        if sampler == "exact" and error > 1e-4:
            failed = "the exact answer is not vLLM's"
        case = {
            "tokens": length, "requests": requests, "layers": LAYERS,
            "heads": f"{HEADS}/{KV_HEADS}", "dtype": "float32",
            "rows_read": round(stats["rows_read"] / stats["rows_there"], 4),
        }  # fmt: skip
        found.append(
            Row.time(f"step_{kind}_{sampler}", case, ours, "vLLM's kernel over all rows", theirs,
                     error=error, failed=failed)
        )  # fmt: skip
        pool.shutdown()
    return found


def overhead(rounds: int) -> list[Row]:
    """What a layer of a step costs beside attention: four requests with hardly any rows."""
    import torch

    from vllm_sparse.cpu_offload.pool import Pool

    found = []
    for kind in ("inline", "process"):
        pool = Pool(
            layers=1, heads=HEADS, kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float32,
            host_bytes=64 << 20, sampler="vattention", max_tokens=8192, max_requests=4, kind=kind,
        )  # fmt: skip
        slots = [pool.open(str(r)) for r in range(4)]
        k, v = torch.randn(2, 4, KV_HEADS, SIZE)
        q, out, lse = (
            torch.randn(4, HEADS, SIZE),
            torch.empty(4, HEADS, SIZE),
            torch.empty(4, HEADS),
        )
        times = []
        for n in range(min(20 * rounds, 2000)):
            start = time.perf_counter()
            pool.append_each(0, slots, k, v)
            ticket = pool.submit(0, q, slots, [n] * 4, [n + 1] * 4)
            pool.collect(ticket, out, lse)
            times.append(time.perf_counter() - start)
        failed = None if torch.equal(out[:, 0], v[:, 0]) else "not the row that was asked for"
        pool.shutdown()
        found.append(
            Row.failed(f"overhead_{kind}", {}, failed, peer=None, unit="s") if failed else
            Row(f"overhead_{kind}", {"requests": 4, "of": "append, submit, collect of a layer"},
                statistics.median(times), None, None, "s", None, None)
        )  # fmt: skip
    return found


def main() -> None:
    parser = arguments(__doc__)
    parts = ["ring", "overhead", "step"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--length", type=int, default=32768, help="rows of each request")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--kinds", nargs="+", default=["inline", "process"])
    parser.add_argument("--rounds", type=int, default=15, help="that timings are the median of")
    options = parser.parse_args()
    require_editable()
    import torch

    torch.set_num_threads(1)
    rows = []
    if "ring" in options.parts:
        rows += ring(20 * options.rounds)
    if "overhead" in options.parts:
        rows += overhead(20 * options.rounds)
    if "step" in options.parts:
        for requests in options.requests:
            made = step(options.length, requests, options.rounds, options.kinds)
            rows += [_with_requests(row, requests) for row in made]
    publish(rows, options.json)


def _with_requests(row: Row, requests: int) -> Row:
    from dataclasses import replace

    return replace(row, figure=f"{row.figure}_{requests}")


if __name__ == "__main__":
    main()
