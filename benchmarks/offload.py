"""Decode over host memory against vLLM's full KV, at the same device memory for KV.

Both backends have device memory for 1.2 requests. Prompts are read once and found in the prefix
caches after that, so that a round measures decode alone, from when all requests of it decode;
rounds take turns, medians. Ours has as many texts as requests. vLLM's own has one text, whose
blocks its requests share, so that it is compared at a concurrency which its memory would not allow
(`decode_...`), and at as many requests as fit (`budget_...`). A text that was answered wrongly by
either has no time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._engines import checkpoint, ended_together, import_examples
from benchmarks._form import Row, arguments, publish, require_editable

CHUNK = 4096
BLOCK = 128  # tokens of a KV block of vLLM's on CPUs
BUDGET = 1.2  # requests
WORDS = 3  # of an answer: all but the first come from decode
PEER = "vLLM's CPU backend, full KV"
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of a number
SAMPLERS = ("vattention", "lsh", "topk", "exact")
QUIET_S = 1.2  # a worker polls for a second after its last step


@dataclass
class Series:
    """One backend's rounds at one concurrency."""

    tokens_per_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # of the worker and its actors, per token
    counts: dict[str, float] = field(default_factory=dict)  # of the pool, over all rounds
    tokens: list[list[list[int]]] = field(default_factory=list)  # [round][request]


@dataclass
class Answers:
    tokens: list[list[int]]
    logprobs: list[list[float]]  # of each chosen token


class Engine:
    """vLLM with one backend, in processes of its own."""

    def __init__(
        self, checkpoint: Path, dtype: str, longest: int, requests: int, budget: int,
        **settings: Any,
    ) -> None:  # fmt: skip
        import psutil
        from vllm import LLM

        self.llm = LLM(
            str(checkpoint), dtype=dtype, max_model_len=longest,
            max_num_batched_tokens=CHUNK, max_num_seqs=requests, kv_cache_memory_bytes=budget,
            enforce_eager=True, disable_log_stats=True, skip_tokenizer_init=True,
            worker_extension_cls="benchmarks._probe.WorkerProbe", **settings,
        )  # fmt: skip
        self.worker = psutil.Process(self.probe()["pid"])
        self.asked = 0

    def probe(self) -> dict[str, Any]:
        return self.llm.collective_rpc("probe")[0]

    def pool(self) -> dict[str, float]:
        return self.llm.collective_rpc("pool")[0]

    def blocks(self) -> int:
        """Device blocks that requests can use; one is vLLM's null block."""
        return self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1

    def cpu_seconds(self) -> float:
        """Of the worker and of the actors that it started."""
        found = [self.worker, *self.worker.children(recursive=True)]
        return sum(p.cpu_times().user + p.cpu_times().system for p in found)

    def ask(self, prompts: list[list[int]], max_tokens: int) -> Answers:
        """Serve prompts together, greedily."""
        outputs = {}
        for _, step in self._steps(prompts, max_tokens, logprobs=0):
            outputs |= {output.request_id: output.outputs[0] for output in step}
        found = [outputs[name] for name in sorted(outputs, key=int)]
        return Answers(
            [list(x.token_ids) for x in found],
            [[step[t].logprob for t, step in zip(x.token_ids, x.logprobs, strict=True)]
             for x in found],
        )  # fmt: skip

    def measure(self, prompts: list[list[int]], max_tokens: int, series: Series | None) -> None:
        """A round; without a series, a warm-up."""
        time.sleep(QUIET_S)
        before = self.pool()
        done: dict[str, int] = {}
        tokens: dict[str, list[int]] = {}
        begin, at_begin, cpu = None, 0, 0.0
        end, at_end, cpu_end = 0.0, 0, 0.0
        for now, step in self._steps(prompts, max_tokens):
            tokens |= {output.request_id: list(output.outputs[0].token_ids) for output in step}
            done |= {output.request_id: len(tokens[output.request_id]) for output in step}
            if len(done) < len(prompts):
                continue
            if begin is None:
                begin, at_begin, cpu = now, sum(done.values()), self.cpu_seconds()
            if max(done.values()) < max_tokens:
                end, at_end, cpu_end = now, sum(done.values()), self.cpu_seconds()
        if series is not None and at_end > at_begin:
            decoded = at_end - at_begin
            series.tokens_per_s.append(decoded / (end - begin))
            series.cpu_s.append((cpu_end - cpu) / decoded)
            series.tokens.append([tokens[name] for name in sorted(tokens, key=int)])
            for name, value in self.pool().items():
                series.counts[name] = series.counts.get(name, 0.0) + value - before[name]

    def _steps(
        self, prompts: list[list[int]], max_tokens: int, logprobs: int | None = None
    ) -> Iterator[tuple[float, list]]:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False,
            logprobs=logprobs,
        )  # fmt: skip
        for prompt in prompts:
            engine.add_request(str(self.asked), {"prompt_token_ids": prompt}, sampling)
            self.asked += 1
        while engine.has_unfinished_requests():
            outputs = engine.step()
            yield time.perf_counter(), outputs


def texts(length: int, count: int) -> tuple[list, list]:
    """(questions on as many texts, as many questions on the first of them)."""
    import_examples()
    from retrieval.prompts import questions_on_one_text

    depths = [(i + 0.5) / count for i in range(count)]
    all_texts = [
        questions_on_one_text(length, depths, seed, words=WORDS)[1:] for seed in range(count)
    ]
    return [questions[i] for i, questions in enumerate(all_texts)], all_texts[0]


def wrong(questions: list, rounds: list[list[list[int]]]) -> str | None:
    """What was answered wrongly, if anything was; `rounds` are tokens [round][request]."""
    bad = [
        f"{tokens[: WORDS + 1]} instead of {question.answer_ids}"
        for answers in rounds
        for question, tokens in zip(questions, answers, strict=False)  # smaller rounds ask fewer
        if tokens[: WORDS + 1] != question.answer_ids
    ]
    return "; ".join(bad) or None


def difference(ours: Answers, theirs: Answers) -> float:
    """The largest difference of a chosen token's log-probability in the first request, as far as
    both chose the same."""
    largest = 0.0
    for a, b, p, q in zip(
        ours.tokens[0], theirs.tokens[0], ours.logprobs[0], theirs.logprobs[0], strict=True
    ):
        if a != b:
            break
        largest = max(largest, abs(p - q))
    return largest


def rows_of(
    name: str, requests: int, common: dict[str, Any], ours: Series, theirs: Series, layers: int,
    error: float, failed: str | None,
) -> list[Row]:  # fmt: skip
    """Tokens and CPU seconds at one concurrency."""
    mine, other = (statistics.median(s.tokens_per_s or [0.0]) for s in (ours, theirs))
    if not mine or not other:
        failed = failed or "not all requests decoded at the same time"
    counts = ours.counts
    steps = counts.get("decode_rows", 0) / (requests * layers)
    case = {**common, "requests": requests}
    if not failed:
        case |= {
            "rows_read": round(counts["rows_read"] / max(counts["rows_there"], 1), 4),
            "step_ms": round(1e3 * requests / mine, 2),
            "pool_share_of_step": round(counts["pool_seconds"] / steps * mine / requests, 3)
            if steps else 0.0,
        }  # fmt: skip
    figure = f"{name}_{requests}"
    rate = Row.rate(
        f"decode_{figure}", case, mine or None, PEER, other or None, unit="tokens/s", error=error,
        failed=failed,
    )  # fmt: skip
    if failed:
        return [rate]
    cpu = Row.time(
        f"cpu_{figure}", {**common, "requests": requests, "of": "the worker and its actors"},
        statistics.median(ours.cpu_s), PEER, statistics.median(theirs.cpu_s),
        unit="CPU s/token",
    )  # fmt: skip
    return [rate, cpu]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--decode", nargs="+", choices=SAMPLERS, default=["vattention", "lsh"])
    parser.add_argument("--length", type=int, default=32768, help="tokens of each prompt")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the model")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4], help="at a time")
    parser.add_argument("--tokens", type=int, default=48, help="that a round decodes of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--config", type=json.loads, default={}, help="further settings of ours, as JSON"
    )
    parser.add_argument(
        "--bind", help="VLLM_CPU_OMP_THREADS_BIND of both; as each comes if left out"
    )
    options = parser.parse_args()
    require_editable()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.bind:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = options.bind
    rows = measure(checkpoint("lean"), options)
    publish(rows, options.json)
    return 1 if any(row.ours is None for row in rows) else 0


def configurations(samplers: list[str], further: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the engines, by name: vLLM's own, and one for each sampler."""
    found: dict[str, dict[str, Any]] = {"vllm": {}}
    for name in samplers:
        settings = {"resident_layers": [], **further, "decode": name}
        found[name] = {"attention_backend": "sparse", "additional_config": {"sparse": settings}}
    return found


def read(engine: Engine, questions: list, tokens: int, name: str) -> Answers:
    """Ask one question after another, so that its text is in the prefix cache."""
    from tqdm import tqdm

    found = [
        engine.ask([question.token_ids], tokens)
        for question in tqdm(questions, desc=f"{name}: prompts", leave=False)
    ]
    return Answers(
        [tokens for x in found for tokens in x.tokens],
        [logprobs for x in found for logprobs in x.logprobs],
    )


def measure(folder: Path, options: Any) -> list[Row]:
    from tqdm import tqdm

    model = json.loads((folder / "config.json").read_text())
    layers = model["num_hidden_layers"]
    itemsize = DTYPES[options.dtype]
    block_bytes = BLOCK * layers * model["num_key_value_heads"] * 2 * model["head_dim"] * itemsize
    longest = options.length + options.tokens + 16
    needed = -(-longest // BLOCK)
    budget = int(BUDGET * needed) * block_bytes
    sizes = sorted(options.requests)
    own, shared = texts(options.length, sizes[-1])
    config = configurations(options.decode, options.config)
    questions = {name: shared if name == "vllm" else own for name in config}
    series = {(name, n): Series() for name in config for n in sizes}
    with ended_together() as llms:
        running = {}
        for name, settings in config.items():
            running[name] = Engine(folder, options.dtype, longest, sizes[-1], budget, **settings)
            llms.append(running[name].llm)
        answers = {
            name: read(engine, questions[name], options.tokens, name)
            for name, engine in running.items()
        }
        threads = {name: engine.probe()["threads"] for name, engine in running.items()}
        fits = running["vllm"].blocks() // needed
        for n in sizes:
            for i in tqdm(range(options.rounds + 1), desc=f"{n} at a time", leave=False):
                # Who goes first alternates, so that a drift of the machine's speed hits all.
                for name in list(running)[:: 1 if i % 2 else -1]:
                    prompts = [question.token_ids for question in questions[name][:n]]
                    into = series[name, n] if i else None
                    running[name].measure(prompts, options.tokens, into)
    rows = []
    for name in options.decode:
        failed = None
        for who in ("vllm", name):
            rounds = [answers[who].tokens] + [x for n in sizes for x in series[who, n].tokens]
            failed = failed or wrong(questions[who], rounds)
        common = {
            "tokens": options.length, "dtype": options.dtype, "rounds": options.rounds,
            "threads": threads[name], "their_threads": threads["vllm"],
        }  # fmt: skip
        device = {"tokens": options.length, "device_mib": budget >> 20}
        at_a_time = max([n for n in sizes if series[name, n].tokens_per_s], default=0)
        rows.append(
            Row.rate(
                f"admitted_{name}", {**device, "asked": sizes[-1]}, at_a_time,
                f"{PEER}: whole requests that its blocks hold", fits, unit="requests",
            )
        )  # fmt: skip
        error = difference(answers[name], answers["vllm"])
        for n in sizes:
            ours = series[name, n]
            rows += rows_of(name, n, common, ours, series["vllm", n], layers, error, failed)
            if n > fits and fits in sizes and not failed and ours.tokens_per_s:
                rows.append(
                    Row.rate(
                        f"budget_{name}_{n}", {**device, "requests": n, "their_requests": fits},
                        statistics.median(ours.tokens_per_s),
                        f"{PEER}, as many requests at a time as fit",
                        statistics.median(series["vllm", fits].tokens_per_s), unit="tokens/s",
                    )
                )  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
