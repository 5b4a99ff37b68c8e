"""Runs vLLM engines for tests, each in a process group of its own that is gone afterwards.

An engine that is stopped by a signal to its main process leaves EngineCore and workers running.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DENSE: dict = {}
# Everything selected, through the sparse path.
EVERYTHING = {
    "attention_backend": "sparse",
    "additional_config": {"sparse": {"coverage": 1.0, "break_even": 0}},
}
TIMEOUT_S = 300


@dataclass(frozen=True)
class Run:
    """What an engine gave."""

    tokens: list[list[list[int]]]  # [batch][prompt]
    cached: list[list[int]]  # prompt tokens found in the prefix cache, [batch][prompt]
    preemptions: list[int]  # [batch]
    logprobs_finite: bool
    stats: list[dict]  # what each worker counted, see vllm_sparse.stats
    log: str


class Probe:
    """Methods of every worker."""

    def probe(self) -> dict:
        from dataclasses import asdict

        from vllm_sparse.stats import STATS

        return asdict(STATS)


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(512) for _ in range(length)]


def run(
    model: str,
    batches: list[list[list[int]]],
    *,
    max_tokens: int = 16,
    env: dict[str, str] | None = None,
    expect_failure: bool = False,
    script: str | Path = __file__,
    **engine,
) -> Run | str:
    """Generate greedily, one batch of token-id prompts after another, in one engine, which
    `script` makes.

    Returns:
        The Run, or with `expect_failure` the log of an engine that did not start.
    """
    arguments = {
        "model": model,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_num_batched_tokens": 512,
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": False,
        "worker_extension_cls": "engine_run.Probe",
        **engine,
    }
    job = json.dumps({"engine": arguments, "batches": batches, "max_tokens": max_tokens})
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=Path(model),  # not the repository, whose folders would hide the installed packages
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(job, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        raise AssertionError(f"the engine took over {TIMEOUT_S} s:\n{log[-8000:]}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if expect_failure:
        assert process.returncode != 0, f"the engine started:\n{log[-8000:]}"
        return log
    assert process.returncode == 0, f"the engine failed:\n{log[-12000:]}"
    result = next(x for x in log.splitlines() if x.startswith("RESULT "))
    return Run(**json.loads(result.removeprefix("RESULT ")), log=log)


def _generate(job: dict) -> dict:
    import math

    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        detokenize=False,
        ignore_eos=True,
        logprobs=0,
    )

    def preemptions() -> int:
        return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")

    result = {"tokens": [], "cached": [], "preemptions": [], "logprobs_finite": True}
    for batch in job["batches"]:
        before = preemptions()
        outputs = llm.generate([{"prompt_token_ids": x} for x in batch], sampling, use_tqdm=False)
        result["tokens"].append([list(x.outputs[0].token_ids) for x in outputs])
        result["cached"].append([x.num_cached_tokens for x in outputs])
        result["preemptions"].append(preemptions() - before)
        for output in outputs:
            for step in output.outputs[0].logprobs:
                if not all(math.isfinite(x.logprob) for x in step.values()):
                    result["logprobs_finite"] = False
    result["stats"] = llm.collective_rpc("probe")
    return result


if __name__ == "__main__":
    print("RESULT " + json.dumps(_generate(json.load(sys.stdin))), flush=True)
