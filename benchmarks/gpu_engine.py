"""vLLM on a GPU with sparse attention, against vLLM's own backend: answers, tokens, first tokens.

The lean retrieval model is asked for needles. Three engines, each a process of its own: sparse as
it is by default, vLLM's own backend, and sparse with everything selected. Those that are compared
are alive at once and take turns. Where an engine does not start with CUDA graphs, all are started
without, which every row says.

`--parts host` does the same for decode over host memory: `exact`, whose tokens are compared with
the own backend's, and `vattention` with its default settings, whose tokens after the first are
timed against it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._engines import checkpoint
from benchmarks._form import ROOT, Results, Row, addable, arguments, needs_a_gpu, require_editable
from benchmarks._process import Child, stop_tree

NEEDS_A_GPU = needs_a_gpu("benchmarks.gpu_engine")
CHILD = "benchmarks._engine_child"
LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768, "64k": 65536, "120k": 122880}
CHUNK = 8192
ROOM = 64  # tokens beside the longest prompt
ANSWERED = 8  # tokens that are compared
PEER = "vLLM's own backend"
SPARSE, OWN, EVERYTHING = "sparse", "own", "everything"
EXACT, SAMPLED = "exact", "vattention"
PARTS = ("device", "host")
DECODED = 64  # tokens after the first, whose time is that of decode
CONFIGS: dict[str, dict[str, Any] | None] = {
    SPARSE: {}, OWN: None, EVERYTHING: {"coverage": 1.0, "break_even": 0},
    EXACT: {"coverage": 1.0, "break_even": 0, "decode": EXACT, "resident_layers": []},
    SAMPLED: {"decode": SAMPLED, "resident_layers": []},
}  # fmt: skip


def settings(kind: str, folder: Path, options: argparse.Namespace, eager: bool) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM."""
    given = {
        "model": str(folder),
        "dtype": options.dtype,
        "max_model_len": max(LENGTHS[name] for name in options.lengths) + ROOM,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 4,
        # Three engines beside each other: a token of the lean model takes 4 KiB.
        "kv_cache_memory_bytes": 2 << 30,
        "enable_prefix_caching": False,
        "enforce_eager": eager,
        "disable_log_stats": True,
        "worker_extension_cls": "benchmarks._probe_gpu.GpuProbe",
    }
    if options.memory is not None:
        given["gpu_memory_utilization"] = options.memory
    if CONFIGS[kind] is not None:
        given["attention_backend"] = "sparse"
        given["additional_config"] = {"sparse": CONFIGS[kind]}
    return given


@dataclass
class Engine:
    """A started engine, and what it answered by prompt."""

    child: Child
    stands: dict[str, Any]
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    right: dict[tuple[str, int], bool] = field(default_factory=dict)
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    def ask(self, name: str, seed: int, tokens: int, until: float) -> None:
        asked = {"length": LENGTHS[name], "seed": seed, "max_tokens": tokens}
        got = self.child.ask(asked, until)
        key, wanted = (name, seed), got["answer"][:tokens]
        self.right[key] = got["tokens"][: len(wanted)] == wanted
        self.seconds[key] = got["seconds"]
        if tokens > 1:
            self.tokens[key] = got["tokens"]
        self.stats = got["stats"]

    def counted(self, before: dict[str, Any]) -> dict[str, float]:
        """What the worker counted since `before`."""
        return {
            key: value - before.get(key, 0)
            for key, value in self.stats.items() if isinstance(value, (int, float))
        }  # fmt: skip


class Session:
    """The engines of one part, and the deadline of all."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack, until: float) -> None:
        self.options, self.stack, self.until = options, stack, until
        self.folder = checkpoint("lean")
        self.eager, self.why_eager = options.eager, "asked for" if options.eager else None

    def launch(self, kind: str) -> Child:
        given = settings(kind, self.folder, self.options, self.eager)
        return self.stack.enter_context(Child(CHILD, json.dumps(given), cwd=ROOT))

    def start(self, *kinds: str) -> list[Engine]:
        """Engines that are started beside each other; without CUDA graphs where one needs that.

        Raises:
            EOFError, TimeoutError: one does not start.
        """
        children = [self.launch(kind) for kind in kinds]
        try:
            return [Engine(child, child.hear(self.until)) for child in children]
        except EOFError as error:
            if self.eager:
                raise
            print(f"{' and '.join(kinds)}: {error}; once more without CUDA graphs", flush=True)
            self.eager, self.why_eager = True, f"{kinds[0]} did not start with CUDA graphs"
            for child in children:
                stop_tree(child.process)
            return self.start(*kinds)

    def case(self, name: str, engine: Engine) -> dict[str, Any]:
        found = {
            "tokens": LENGTHS[name], "chunk": CHUNK, "dtype": self.options.dtype,
            "graphs": engine.stands["graphs"], "impls": ", ".join(engine.stands["impls"]),
            "break_even": engine.stands["break_even"],
        }  # fmt: skip
        return found | ({"eager": self.why_eager} if self.why_eager else {})


def answers(session: Session, engine: Engine, prefix: str = "engine") -> Iterator[Row]:
    """A sparse engine alone: whether it answers, and what it reads."""
    seeds = range(session.options.repeats)
    for name in session.options.lengths:
        before = engine.stats or engine.stands["stats"]
        for seed in seeds:
            engine.ask(name, seed, ANSWERED, session.until)
        counts = engine.counted(before)
        right = [engine.right[name, seed] for seed in seeds]
        case = session.case(name, engine) | {
            "right": f"{sum(right)} of {len(right)}",
            "sparse_chunks": counts["sparse_chunks"], "dense_chunks": counts["dense_chunks"],
            "density": density(counts),
        }  # fmt: skip
        if not any("Sparse" in impl for impl in engine.stands["impls"]):
            why = f"sparse attention is not active: {case['impls']}"
        elif not all(right):
            why = f"{right.count(False)} of {len(right)} answers are wrong"
        else:
            yield Row.share(f"{prefix}_answers_{name}", case, 1.0, unit="share right")
            continue
        yield Row.failed(f"{prefix}_answers_{name}", case, why, peer=None, unit="share right")


def density(counts: dict[str, float]) -> float | None:
    read, causal = counts["keys_read"], counts["keys_causal"]
    return round(read / causal, 4) if causal else None


def first_tokens(session: Session, ours: Engine, theirs: Engine) -> Iterator[Row]:
    """Times to first token, prompt by prompt in turns."""
    for name in session.options.lengths:
        pair = [ours, theirs]
        for engine in pair:
            engine.ask(name, 1000, 1, session.until)  # warms up
            engine.seconds.pop((name, 1000))
        before = ours.stats
        for seed in range(session.options.repeats):
            for engine in pair if seed % 2 == 0 else pair[::-1]:
                engine.ask(name, seed, 1, session.until)
        counts = ours.counted(before)
        medians = [
            statistics.median(s for (length, _), s in engine.seconds.items() if length == name)
            for engine in pair
        ]
        busy = counts["index_seconds"] + counts["attention_seconds"]
        case = session.case(name, ours) | {
            "their_graphs": theirs.stands["graphs"],
            "their_impls": ", ".join(theirs.stands["impls"]),
            "repeats": session.options.repeats, "density": density(counts),
            "index_share": round(counts["index_seconds"] / busy, 4) if busy else None,
            "sparse_chunks": counts["sparse_chunks"], "dense_chunks": counts["dense_chunks"],
        }  # fmt: skip
        wrong = [
            key for e in pair for key, right in e.right.items() if key[0] == name and not right
        ]
        failed = f"{len(wrong)} answers are wrong" if wrong else None
        if failed is None and ours.stands["graphs"] != theirs.stands["graphs"]:
            failed = "only one of both has CUDA graphs"
        yield Row.time(
            f"engine_ttft_{name}", case, medians[0], PEER, medians[1], failed=failed
        )  # fmt: skip


def tokens(session: Session, ours: Engine, theirs: Engine, prefix: str = "engine") -> Iterator[Row]:
    """Tokens with everything selected against the peer's: those of the answer must be the same."""
    for name in session.options.lengths:
        same, total = 0, 0
        for seed in range(session.options.repeats):
            for engine in (ours, theirs):
                if (name, seed) not in engine.tokens:
                    engine.ask(name, seed, ANSWERED, session.until)
            pairs = zip(ours.tokens[name, seed], theirs.tokens[name, seed], strict=True)
            equal = [a == b for a, b in pairs]
            # What differs by rounding differs in all that follows.
            same += equal.index(False) if False in equal else len(equal)
            total += len(equal)
        case = session.case(name, ours) | {"compared": total}
        right = all(ours.right[name, seed] for seed in range(session.options.repeats))
        figure = f"{prefix}_tokens_{name}"
        if right:
            yield Row.share(figure, case, same / total, unit="share equal")
        else:
            why = f"answers are wrong; {same} of {total} tokens are the peer's"
            yield Row.failed(figure, case, why, peer=PEER, unit="share equal")


def decode(session: Session, ours: Engine, theirs: Engine) -> Iterator[Row]:
    """Seconds a token of one request that decodes, prompt by prompt in turns."""
    for name in session.options.lengths:
        each: list[list[float]] = [[], []]
        wrong = 0
        for seed in range(session.options.repeats):
            for engine, times in zip((ours, theirs), each, strict=True):
                found = []
                for count in (1, 1 + DECODED):
                    engine.ask(name, seed, count, session.until)
                    found.append(engine.seconds[name, seed])
                    wrong += not engine.right[name, seed]
                times.append((found[1] - found[0]) / DECODED)
        case = session.case(name, ours) | {
            "decoded": DECODED, "repeats": session.options.repeats,
            "their_graphs": theirs.stands["graphs"],
        }  # fmt: skip
        failed = f"{wrong} answers are wrong" if wrong else None
        medians = [statistics.median(times) for times in each]
        if failed is None and min(medians) <= 0:
            failed = "prompts took longer by more than decode does; ask for more --repeats"
        yield Row.time(f"host_decode_{name}", case, medians[0], PEER, medians[1], failed=failed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = addable(arguments(__doc__))
    parser.add_argument(
        "--lengths", nargs="+", choices=list(LENGTHS), default=["8k", "32k", "120k"]
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["device"])
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each length")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.2,
                        help="share of the GPU's memory that each engine asks for")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=900.0, help="all together")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}; give 1 or more")
    return options


def measure(options: argparse.Namespace, results: Results) -> None:
    """Adds rows to results as they come; raises what ends an engine."""
    until = time.monotonic() + options.seconds
    for part, run in (("device", measure_device), ("host", measure_host)):
        if part in options.parts:
            with ExitStack() as stack:
                run(Session(options, stack, until), results)


def measure_device(session: Session, results: Results) -> None:
    # Alone: it measures its break-even when it starts.
    (ours,) = session.start(SPARSE)
    results.add(answers(session, ours))
    graphs = not session.eager
    theirs, everything = session.start(OWN, EVERYTHING)
    if graphs and session.eager:  # the peer's lack of graphs is ours as well
        (ours,) = session.start(SPARSE)
    results.add(first_tokens(session, ours, theirs))
    results.add(tokens(session, everything, theirs))


def measure_host(session: Session, results: Results) -> None:
    exact, theirs = session.start(EXACT, OWN)
    results.add(tokens(session, exact, theirs, "host"))
    stop_tree(exact.child.process)
    (sampled,) = session.start(SAMPLED)
    results.add(answers(session, sampled, "host"))
    results.add(decode(session, sampled, theirs))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch

    if not torch.cuda.is_available():
        print(NEEDS_A_GPU, file=sys.stderr)
        return 2
    require_editable()
    results = Results(options.json, add=options.add)
    why = None
    try:
        measure(options, results)
    except (EOFError, TimeoutError, BrokenPipeError) as error:
        why = f"an engine failed: {type(error).__name__}: {error}"
    results.show()
    if why:
        print(why, flush=True)
    return 1 if why or results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
