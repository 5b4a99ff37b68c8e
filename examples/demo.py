"""Serves a long prompt with sparse attention, then with vLLM's own, and compares the two.

    make demo                                   # or, in an environment that is set up:
    python examples/demo.py [--length 16384]

Each backend gets a real `vllm serve`, one after the other, and the same prompts through the
OpenAI API. The exit code is 0 only if every answer is right, the sparse backend was active, and
its first token came sooner.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrieval.prompts import Question, needle_prompt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from server import Server, ServerError, ends_on_signals

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo-output"
CHUNK = 4096
WARM_UP_TOKENS = 1000
READY_S = 600
ANSWER_S = 1200
COUNTED_S = 30

# Lines stay whole, also where they go to a file.
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Outcome:
    """What one backend did."""

    name: str
    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    log: str = ""
    warm_up_ends: int = 0  # where in the log

    @property
    def median_s(self) -> float:
        return statistics.median(self.first_token_s)

    @property
    def active_line(self) -> str | None:
        match = re.search(r"Sparse attention active: .*", self.log)
        return match[0] if match else None

    @property
    def density(self) -> float | None:
        """Share of the keys that prefill read, as the server itself counted them."""
        counts = counted(self.log[self.warm_up_ends :])
        causal = sum(count["keys_causal"] for count in counts)
        return sum(count["keys_read"] for count in counts) / causal if causal else None


def counted(log: str) -> list[dict[str, float]]:
    """What the sparse backend reported, a record for each time that it did."""
    found = re.findall(r"Sparse prefill: .*? (\{.*\})\s*$", log, re.M)
    return [json.loads(record) for record in found]


def serve(name: str, arguments: list[str], checkpoint: Path, questions: list[Question]) -> Outcome:
    outcome = Outcome(name)
    longest = max(len(question.token_ids) for question in questions)
    settings = [
        "--served-model-name", "demo",
        "--max-model-len", str(longest + 64),
        "--max-num-batched-tokens", str(CHUNK),
        "--max-num-seqs", "2",
        # On a CPU vLLM takes 0.92 of all memory for KV unless told otherwise.
        "--kv-cache-memory-bytes", str(512 * 2**20),
        # The second prompt is not to profit from the first one.
        "--no-enable-prefix-caching",
        # Compiling takes a minute and changes neither time to first token by much.
        "--enforce-eager",
        *arguments,
    ]  # fmt: skip
    server = Server(checkpoint, OUTPUT / f"{name}.log", *settings)
    try:
        with server:
            with Progress(
                TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
            ) as progress:
                task = progress.add_task(f"{name}: starting the server", total=None)
                for _ in server.wait_until_ready(READY_S):
                    pass
                progress.update(task, total=1, completed=1)
            warm_up = needle_prompt(min(WARM_UP_TOKENS, longest), 0.5, seed=10_000)
            ask(server, warm_up, f"{name}: warm-up")
            outcome.warm_up_ends = len(server.log_text())
            for number, question in enumerate(questions, 1):
                label = f"{name}: prompt {number} of {len(questions)}"
                answer, seconds = ask(server, question, label)
                outcome.answers.append(answer)
                outcome.right.append(question.is_right(answer))
                outcome.first_token_s.append(seconds)
            if name == "sparse":
                wait_until_counted(server, outcome.warm_up_ends, questions)
    except ServerError as error:
        console.print(f"[red]{name}: {error}. The end of {server.log}:[/]")
        console.print("\n".join(server.log_text().splitlines()[-30:]), markup=False)
        raise
    outcome.log = server.log_text()
    return outcome


def wait_until_counted(server: Server, start: int, questions: list[Question]) -> None:
    """The backend reports while it decodes, and at most every ten seconds: let it decode."""
    tokens = sum(len(question.token_ids) for question in questions)
    deadline = time.monotonic() + COUNTED_S
    while time.monotonic() < deadline:
        records = counted(server.log_text()[start:])
        if sum(record["prefill_tokens"] for record in records) >= tokens:
            return
        time.sleep(1)
        complete(server, needle_prompt(100, 0.5, seed=20_000), {})


def ask(server: Server, question: Question, label: str) -> tuple[str, float]:
    """The answer and the seconds to its first token, with a progress bar meanwhile."""
    result: dict[str, Any] = {}

    def request() -> None:
        try:
            complete(server, question, result)
        except Exception as error:  # told in the thread that waits
            result["error"] = error

    worker = threading.Thread(target=request, daemon=True)
    worker.start()
    total = len(question.token_ids)
    columns = (
        TextColumn("{task.description}"), BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} tokens"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        while worker.is_alive():
            worker.join(0.5)
            if worker.is_alive() and (cached := server.tokens_in_cache()):
                progress.update(task, completed=min(total, cached))
        progress.update(task, completed=total if "text" in result else 0)
    if "text" not in result:
        raise ServerError(f"no answer: {result.get('error', 'the stream ended early')}")
    return result["text"], result["first"]


def complete(server: Server, question: Question, result: dict[str, Any]) -> None:
    """Streams an answer; `result` gets the seconds to its first token, and in the end its text."""
    import openai

    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S
    )
    start = time.perf_counter()
    stream = client.completions.create(
        model="demo",
        prompt=question.prompt,
        max_tokens=len(question.answer_ids) + 2,
        temperature=0,
        stream=True,
    )
    text = ""
    for event in stream:
        result.setdefault("first", time.perf_counter() - start)
        text += event.choices[0].text if event.choices else ""
    result["text"] = text


def report(sparse: Outcome, dense: Outcome, questions: list[Question]) -> list[str]:
    """Prints what both did and returns what is wrong with it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("backend", "expected", "answer", "", "time to first token"):
        table.add_column(heading, justify="right" if heading.startswith("time") else "left")
    for outcome in (sparse, dense):
        for i, question in enumerate(questions):
            table.add_row(
                outcome.name,
                question.answer,
                outcome.answers[i].strip() or "(nothing)",
                "right" if outcome.right[i] else "[red]wrong[/]",
                f"{outcome.first_token_s[i]:.2f} s",
            )
    console.print()
    console.print(table)
    console.print()
    console.print(sparse.active_line or "The sparse server did not say that it was active.")
    wrong = []
    if not all(sparse.right):
        wrong.append("a sparse answer is wrong")
    if not all(dense.right):
        wrong.append("an answer of vLLM's own backend is wrong")
    if sparse.active_line is None:
        wrong.append("the sparse backend was not active")
    if sparse.density is None:
        wrong.append("the server reported no sparse prefill")
    else:
        console.print(f"Density: {sparse.density:.1%} of the causal keys were read in prefill.")
    if not sparse.median_s < dense.median_s:
        wrong.append(
            f"the sparse first token took {sparse.median_s:.2f} s, dense {dense.median_s:.2f} s"
        )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=16384, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=1, help="prompts for each backend")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16 is the faster one on CPUs that multiply it (AVX512_BF16, AMX)",
    )  # fmt: skip
    parser.add_argument("--depth", type=float, default=0.35, help="where the needle lies, 0 to 1")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a retrieval model; without it the lean one, built if absent",
    )
    parser.add_argument(
        "--config", type=json.loads, help="settings of the sparse backend, as a JSON object"
    )
    options = parser.parse_args()
    if options.checkpoint is None:
        subprocess.run([sys.executable, str(ROOT / "tools" / "checkpoint.py"), "lean"], check=True)
        options.checkpoint = ROOT / "checkpoints" / "lean"
    questions = [
        needle_prompt(options.length, options.depth, seed=seed, distractors=3)
        for seed in range(options.prompts)
    ]
    console.print(
        f"A prompt of {options.length:,} tokens, the needle at {options.depth:.0%} of it, "
        f"three needles of other keys around it. The servers' logs: {OUTPUT}"
    )
    try:
        with ends_on_signals():
            dtype = ["--dtype", options.dtype]
            selected = [*dtype, "--attention-backend", "sparse"]
            if options.config:
                selected += ["--additional-config", json.dumps({"sparse": options.config})]
            sparse = serve("sparse", selected, options.checkpoint, questions)
            dense = serve("dense", dtype, options.checkpoint, questions)
    except ServerError:
        console.print("FAILED: a server did not answer")
        return 1
    except KeyboardInterrupt:
        console.print("FAILED: interrupted; the server was stopped")
        return 130
    if wrong := report(sparse, dense, questions):
        console.print(f"[red]FAILED:[/] {'; '.join(wrong)}")
        return 1
    console.print(
        f"[green]PASSED:[/] every answer is right, and sparse attention's first token came "
        f"{dense.median_s / sparse.median_s:.2f} times as soon "
        f"({sparse.median_s:.2f} s against {dense.median_s:.2f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
