"""Decode over keys and values in host memory, against vLLM's own CPU backend with full KV.

Both engines are alive at once, serve the same prompts of the lean model in turns, and have made
the prompts' keys and values before anything is timed. `decode`: tokens a second from the first
token on, by batch, where vLLM has all the device memory it wants and ours keeps a window there.
`admitted`: how many requests decode at once where both have device memory for 1.2 of them.
A mode whose answers are wrong has no figure; rows read and the error of the log-probabilities
stand beside it.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._form import ROOT, Row, arguments, publish, require_editable

CHUNK = 4096
LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768}
MODES = ("exact", "lsh", "vattention", "topk")
PEER = "vLLM's CPU backend"
TOKENS = 65  # generated: 64 of them decoded
TOKEN_BYTES = 4 * 2 * 2 * 128 * 4  # layers, KV heads, K and V, head size, float32
QUIET_S = 1.2  # a worker polls for a second after its last step
ANSWER_TOKENS = 2  # of a needle: the word and the full stop


@dataclass
class Series:
    tokens_per_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # of the worker, a decoded token
    right: list[bool] = field(default_factory=list)
    logprobs: list[list[dict[int, float]]] = field(default_factory=list)
    rows_read: float = 0.0
    rows_there: float = 0.0
    pool_share: list[float] = field(default_factory=list)  # of decode's time


class Engine:
    """vLLM with one backend, in processes of its own."""

    def __init__(self, checkpoint: Path, longest: int, batch: int, device: int, **settings: Any):
        from vllm import LLM

        self.llm = LLM(
            str(checkpoint),
            dtype="float32",
            max_model_len=longest + TOKENS + 15,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=batch,
            kv_cache_memory_bytes=device,
            enforce_eager=True,
            disable_log_stats=False,
            worker_extension_cls="benchmarks._probe.WorkerProbe",
            **settings,
        )

    def probe(self) -> dict[str, Any]:
        return self.llm.collective_rpc("probe")[0]

    def serve(self, prompts: list[list[int]], tokens: int) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(asked, sampling, use_tqdm=False)

    def measure(
        self, prompts: list[list[int]], answers: list[list[int]], series: Series
    ) -> None:  # fmt: skip
        """One batch whose prompts are in the prefix cache but for their last tokens."""
        time.sleep(QUIET_S)
        before = self.probe()
        outputs = self.serve(prompts, TOKENS)
        after = self.probe()
        first = max(x.metrics.first_token_ts for x in outputs)
        last = max(x.metrics.last_token_ts for x in outputs)
        # Before everyone has begun, and after the first has ended, fewer decode.
        count = len(prompts) * (TOKENS - 1)
        series.tokens_per_s.append(count / (last - first))
        series.cpu_s.append((after["cpu_s"] - before["cpu_s"]) / count)
        for output, answer in zip(outputs, answers, strict=True):
            made = output.outputs[0]
            series.right.append(list(made.token_ids[: len(answer)]) == answer)
            series.logprobs.append(
                [{t: x.logprob for t, x in step.items()} for step in made.logprobs[:ANSWER_TOKENS]]
            )
        host = {n: v - before["host"][n] for n, v in after["host"].items()}
        series.rows_read += host.get("rows_read", 0)
        series.rows_there += host.get("rows_there", 0)
        series.pool_share.append(host.get("pool_seconds", 0.0) / (last - first))


@contextmanager
def engines(
    longest: int, batch: int, device: tuple[int, int], settings: dict[str, Any]
) -> Iterator:
    """(ours, vLLM's own); nothing of them remains afterwards."""
    import psutil

    subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), "lean"], check=True)
    checkpoint = ROOT / "checkpoints" / "lean"
    before = set(psutil.Process().children(recursive=True))
    started: list[Engine] = []
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sparse = {"attention_backend": "sparse", "additional_config": {"sparse": settings}}
        started.append(Engine(checkpoint, longest, batch, device[0], **sparse))
        started.append(Engine(checkpoint, longest, batch, device[1]))
        yield started
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        left = set(psutil.Process().children(recursive=True)) - before
        for engine in started:
            engine.llm.llm_engine.engine_core.shutdown(timeout=30)
        _, alive = psutil.wait_procs(left, timeout=15)
        for process in alive:
            process.kill()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def questions(length: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of their own, and the tokens that answer them.

    One token longer than `length`: with the rest in the prefix cache the last one, which asks, is
    decoded like all that follow, so that a sampler has to find the answer.
    """
    examples = str(ROOT / "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
    from retrieval.prompts import needle_prompt

    found = [
        needle_prompt(length + 1, (0.13 + 0.618 * seed) % 0.9, seed, distractors=3)
        for seed in range(count)
    ]
    return [q.token_ids for q in found], [q.answer_ids[:ANSWER_TOKENS] for q in found]


def decode(name: str, options: Any) -> list[Row]:
    """Tokens a second with as much device memory as vLLM wants, by batch."""
    from tqdm import tqdm

    length, most = LENGTHS[name], max(options.batches)
    room = (length + 512) * TOKEN_BYTES * (most + 1)
    rows = []
    settings = {"decode": options.mode, "host_gib": options.host_gib, **options.config}
    with engines(length, most, (room, room), settings) as pair:
        prompts, answers = questions(length, most)
        for engine in pair:
            for ids in tqdm(prompts, desc=f"prefill {name}", leave=False):
                engine.serve([ids], 1)
        for batch in options.batches:
            series = Series(), Series()
            for turn in range(options.repeats):
                for i in (0, 1) if turn % 2 == 0 else (1, 0):
                    pair[i].measure(prompts[:batch], answers[:batch], series[i])
            rows.append(_decode_row(name, batch, options, *series))
    return rows


def _decode_row(name: str, batch: int, options: Any, ours: Series, theirs: Series) -> Row:
    case = {
        "mode": options.mode,
        "tokens": LENGTHS[name],
        "batch": batch,
        "dtype": "float32",
        "repeats": options.repeats,
        "settings": json.dumps(options.config),
        "density": ours.rows_read / ours.rows_there if ours.rows_there else None,
        "pool_share": statistics.median(ours.pool_share),
        "ours_cpu_s_per_token": statistics.median(ours.cpu_s),
        "theirs_cpu_s_per_token": statistics.median(theirs.cpu_s),
        "right": f"{sum(ours.right)} of {len(ours.right)}",
    }
    error = max(
        abs(a[token] - b[token])
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True)
        for a, b in zip(mine, other, strict=True)
        for token in a.keys() & b.keys()
    )
    failed = None
    if not all(ours.right) or not all(theirs.right):
        failed = f"{ours.right.count(False)} answers, and {theirs.right.count(False)} of the peer"
        failed += f", of {len(ours.right)} are wrong"
    return Row.rate(
        f"decode_{options.mode}_{name}_batch{batch}",
        case,
        statistics.median(ours.tokens_per_s),
        PEER,
        statistics.median(theirs.tokens_per_s),
        unit="tokens/s",
        error=error,
        failed=failed,
    )


def admitted(name: str, options: Any) -> list[Row]:
    """Requests that decode at once, with device memory for 1.2 of them."""
    length, most = LENGTHS[name], max(options.batches)
    room = int(1.2 * (length + TOKENS + 15)) * TOKEN_BYTES
    settings = {
        "decode": options.mode, "host_gib": options.host_gib, "resident_layers": [],
        **options.config,
    }  # fmt: skip
    with engines(length, most, (room, room), settings) as pair:
        prompts, answers = questions(length, most)
        figures = []
        for engine in pair:
            begin = time.perf_counter()
            outputs = engine.serve(prompts, 4 * TOKENS)
            wall = time.perf_counter() - begin
            spans = [(x.metrics.first_token_ts, x.metrics.last_token_ts) for x in outputs]
            together = max(sum(a <= t < b for a, b in spans) for t, _ in spans)
            right = [
                list(x.outputs[0].token_ids[: len(answer)]) == answer
                for x, answer in zip(outputs, answers, strict=True)
            ]
            figures.append((together, wall, right))
    (ours, wall, right), (theirs, their_wall, their_right) = figures
    case = {
        "mode": options.mode, "tokens": length, "requests": most, "device_bytes": room,
        "seconds_for_all": wall, "their_seconds_for_all": their_wall,
        "right": f"{sum(right)} of {most}",
    }  # fmt: skip
    return [
        Row.rate(
            f"admitted_{options.mode}_{name}", case, ours, PEER, theirs, unit="requests",
            failed=None if all(right) and all(their_right) else "answers are wrong",
        )
    ]  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--mode", choices=MODES, default="vattention")
    parser.add_argument("--parts", choices=("decode", "admitted"), nargs="+", default=["decode"])
    parser.add_argument("--lengths", choices=list(LENGTHS), nargs="+", default=["16k"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--host-gib", type=float, default=4.0)
    parser.add_argument(
        "--config", type=json.loads, default={}, help="more settings of the sparse backend, as JSON"
    )
    options = parser.parse_args()
    require_editable()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parts = {"decode": decode, "admitted": admitted}
    rows = [
        row for part in options.parts for n in options.lengths for row in parts[part](n, options)
    ]
    publish(rows, options.json)
    return 1 if any(row.ours is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
