"""Runs vLLM engines for tests, as `LLM` does, and gives what they generate."""

from __future__ import annotations

import random
from dataclasses import dataclass

from engine_process import EngineFailed, answer

DENSE: dict = {}
# Everything selected, through the sparse path.
EVERYTHING = {
    "attention_backend": "sparse",
    "additional_config": {"sparse": {"coverage": 1.0, "break_even": 0}},
}


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
    processes: bool = False,
    function: str = "engine_run:generate",
    **engine,
) -> Run | str:
    """Generate greedily, one batch of token-id prompts after another, in one engine.

    `processes`: whether the engine's core and its worker have processes of their own, as they do
    unless told otherwise. Each takes ten seconds longer to start.
    `function`: another than this module's, in a process that has not imported vLLM before.

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
    job = {"engine": arguments, "batches": batches, "max_tokens": max_tokens}
    fresh = function != "engine_run:generate"
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)), **(env or {})}
    answered = answer(function, job, model, env, fresh=fresh)
    if expect_failure:
        if answered.given is not None:
            raise EngineFailed(f"the engine started:\n{answered.log[-8000:]}")
        return answered.log
    return Run(**answered.result(), log=answered.log)


def generate(job: dict) -> dict:
    """What a Run says but for its log."""
    import math

    import torch
    from vllm import LLM, SamplingParams

    if job["engine"]["enforce_eager"]:
        torch._dynamo.config.disable = True  # vLLM compiles how it ranks log-probabilities: 3 s

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
