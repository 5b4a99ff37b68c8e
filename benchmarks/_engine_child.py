"""One vLLM engine in a process of its own, which does what its parent writes to its input.

    python -m benchmarks._engine_child FD SETTINGS

SETTINGS are keyword arguments of `vllm.LLM`, as JSON. A line of JSON comes back through file
descriptor FD when the engine stands, and after each line of JSON that is read:
{"length": tokens, "seed": n, "max_tokens": n} asks the lean model for a needle.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from benchmarks._engines import import_examples


def question(length: int, seed: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of its answer."""
    import_examples()
    from retrieval.prompts import needle_prompt

    # Depths spread over the prompt, in no order.
    asked = needle_prompt(length, (0.13 + 0.618 * seed) % 1, seed, distractors=3)
    return asked.token_ids, asked.answer_ids


def stands(llm: Any) -> dict[str, Any]:
    """What is said of an engine: whether and how it captures CUDA graphs, and its layers."""
    config = llm.llm_engine.vllm_config
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    eager = config.model_config.enforce_eager
    graphs = "none" if eager else str(getattr(mode, "name", mode)).lower()
    return {"graphs": graphs, **llm.collective_rpc("probe")[0]}


def answer(llm: Any, asked: dict[str, int]) -> dict[str, Any]:
    """Tokens and seconds of one prompt, and what the worker counts since its start."""
    from vllm import SamplingParams

    ids, wanted = question(asked["length"], asked["seed"])
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
    begin = time.perf_counter()
    output = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0].outputs[0]
    seconds = time.perf_counter() - begin
    stats = llm.collective_rpc("probe")[0]["stats"]
    tokens = list(output.token_ids)
    return {"tokens": tokens, "answer": wanted, "seconds": seconds, "stats": stats}


def main(argv: list[str]) -> None:
    descriptor, settings = int(argv[0]), json.loads(argv[1])
    os.set_inheritable(descriptor, False)
    from vllm import LLM

    llm = LLM(**settings)
    with os.fdopen(descriptor, "w", buffering=1) as replies:
        print(json.dumps(stands(llm)), file=replies)
        for line in sys.stdin:
            print(json.dumps(answer(llm, json.loads(line))), file=replies)


if __name__ == "__main__":
    main(sys.argv[1:])
