"""Time to first token: sparse attention against vLLM's own CPU backend, prompt by prompt.

One engine for each backend, as vLLM starts it, both alive at once and taking turns on the same
prompts; medians. Beside the wall time: CPU seconds of the worker, density, the share of the index
in attention's time, and the error of the first token's log-probabilities. The lean model is asked
for needles, and a length with a wrong answer has no time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._engines import (
    PEER,
    QUIET_S,
    checkpoint,
    difference,
    ended_together,
    import_examples,
    logprobs_of,
    unlike,
)
from benchmarks._form import Row, arguments, publish, require_editable

CHUNK = 4096
KINDS = ("lean", "random")
LENGTHS = {"1k": 1024, "2k": 2048, "4k": 4096, "16k": 16384, "32k": 32768}
# Short prompts are nearer to the noise, and long ones cost minutes.
REPEATS = {"1k": 10, "2k": 10, "4k": 5, "16k": 3, "32k": 3}


@dataclass
class Series:
    """One backend's repeats at one length."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)


class Engine:
    """vLLM with one backend, in processes of its own."""

    def __init__(self, checkpoint: Path, longest: int, dtype: str, **settings: Any) -> None:
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            str(checkpoint),
            dtype=dtype,
            max_model_len=longest + 16,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=1,
            kv_cache_memory_bytes=512 * 2**20,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
            worker_extension_cls="benchmarks._probe.WorkerProbe",
            **settings,
        )
        self.sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=5)

    def probe(self) -> dict[str, Any]:
        return self.llm.collective_rpc("probe")[0]

    def measure(self, token_ids: list[int], answer: int | None, series: Series | None) -> None:
        """One prompt; without a series, a warm-up."""
        time.sleep(QUIET_S)
        before = self.probe()
        start = time.perf_counter()
        output = self.llm.generate(
            {"prompt_token_ids": token_ids}, self.sampling, use_tqdm=False
        )[0].outputs[0]  # fmt: skip
        wall = time.perf_counter() - start
        after = self.probe()
        if series is None:
            return
        series.wall_s.append(wall)
        series.cpu_s.append(after["cpu_s"] - before["cpu_s"])
        series.right.append(answer is None or output.token_ids[0] == answer)
        series.logprobs.append(logprobs_of(output))
        for name, value in after["stats"].items():
            if isinstance(value, (int, float)):
                added = value - before["stats"][name]
                series.counts[name] = series.counts.get(name, 0) + added


@contextmanager
def engines(
    kind: str, longest: int, dtype: str, config: dict[str, Any], sparse_first: bool
) -> Iterator[tuple[Engine, Engine]]:
    """(sparse, vLLM's own) on a checkpoint of this kind; nothing of them remains afterwards."""
    folder = checkpoint(kind)
    started: list[Engine] = []
    with ended_together() as llms:
        sparse = {"attention_backend": "sparse", "additional_config": {"sparse": config}}
        for settings in (sparse, {}) if sparse_first else ({}, sparse):
            started.append(Engine(folder, longest, dtype, **settings))
            llms.append(started[-1].llm)
        yield (started[0], started[1]) if sparse_first else (started[1], started[0])


def prompt(kind: str, length: int, seed: int) -> tuple[list[int], int | None]:
    """Token ids, and the token that answers them where the model can answer."""
    import_examples()
    from retrieval.prompts import haystack_ids, needle_prompt

    if kind == "random":
        return haystack_ids(length, seed), None
    # Depths spread over the prompt, in no order.
    question = needle_prompt(length, (0.13 + 0.618 * seed) % 1, seed, distractors=3)
    return question.token_ids, question.answer_ids[0]


def compare(kind: str, name: str, seeds: range, pair: list[tuple[Engine, Series]]) -> None:
    """Adds a prompt of each seed to both series."""
    from tqdm import tqdm

    for engine, _ in pair if seeds else ():
        engine.measure(*prompt(kind, LENGTHS[name], 1000), None)
    for seed in tqdm(seeds, desc=f"{kind} {name}", unit="prompt", leave=False):
        # Who goes first alternates, so that a drift of the machine's speed hits both.
        for engine, series in pair if seed % 2 == 0 else pair[::-1]:
            engine.measure(*prompt(kind, LENGTHS[name], seed), series)


def row(kind: str, name: str, dtype: str, ours: Series, theirs: Series, threads: int) -> Row:
    counts = ours.counts
    busy = counts["index_seconds"] + counts["attention_seconds"]
    repeats = len(ours.wall_s)
    case = {
        "kind": kind,
        "tokens": LENGTHS[name],
        "chunk": CHUNK,
        "dtype": dtype,
        "threads": threads,
        "repeats": repeats,
        "ours_cpu_s": statistics.median(ours.cpu_s),
        "theirs_cpu_s": statistics.median(theirs.cpu_s),
        "cpu_ratio": statistics.median(theirs.cpu_s) / statistics.median(ours.cpu_s),
        "density": counts["keys_read"] / counts["keys_causal"] if counts["keys_causal"] else None,
        "index_share": counts["index_seconds"] / busy if busy else None,
        "attention_s": busy / repeats,
        "sparse_chunks": counts["sparse_chunks"],
        "dense_chunks": counts["dense_chunks"],
    }
    error = difference(ours.logprobs, theirs.logprobs)
    failed = None
    if kind == "lean":
        case["right"] = f"{sum(ours.right)} of {repeats}"
        if not all(ours.right):
            failed = f"{ours.right.count(False)} of {repeats} answers are wrong"
        elif not all(theirs.right):
            failed = f"{theirs.right.count(False)} of {repeats} answers of the peer are wrong"
    else:
        failed = unlike(error)
    return Row.time(
        f"ttft_{kind}_{name}" + ("" if dtype == "float32" else f"_{dtype}"),
        case,
        statistics.median(ours.wall_s),
        PEER,
        statistics.median(theirs.wall_s),
        error=error,
        failed=failed,
    )


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--lengths", choices=list(LENGTHS), nargs="+", default=list(LENGTHS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, help=f"at every length, instead of {REPEATS}")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="pairs of engines that the repeats are spread over: of two processes that do the "
        "same, one can be 8%% slower for as long as it lives",
    )
    parser.add_argument(
        "--config", type=json.loads, default={}, help="settings of the sparse backend, as JSON"
    )
    options = parser.parse_args()
    require_editable()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    for kind in options.kind:
        longest = max(LENGTHS[name] for name in options.lengths)
        measured = {name: (Series(), Series()) for name in options.lengths}
        for i in range(options.rounds):
            sparse_first = i % 2 == 0
            with engines(kind, longest, options.dtype, options.config, sparse_first) as pair:
                threads = pair[0].probe()["threads"]
                for name in options.lengths:
                    seeds = range(i, options.repeats or REPEATS[name], options.rounds)
                    compare(kind, name, seeds, list(zip(pair, measured[name], strict=True)))
        rows += [
            row(kind, name, options.dtype, *series, threads) for name, series in measured.items()
        ]
    publish(rows, options.json)
    return 1 if any(row.ours is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
