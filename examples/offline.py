"""Answers a prompt with sparse attention, in this process's own engine.

python examples/offline.py MODEL PROMPT.txt [--coverage 0.98] [--max-tokens 64]
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a model's name or folder")
    parser.add_argument("prompt", type=Path, help="a text file")
    parser.add_argument("--coverage", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    options = parser.parse_args()
    try:
        prompt = options.prompt.read_text(encoding="utf-8")  # before the engine starts
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.prompt} cannot be read: {error}")

    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        attention_backend="sparse",
        additional_config={"sparse": {"coverage": options.coverage}},
        # On a CPU vLLM takes 0.92 of all memory for KV unless told otherwise.
        kv_cache_memory_bytes=int(options.kv_cache_gib * 2**30),
        max_num_batched_tokens=4096,
    )
    sampling = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    print(llm.generate(prompt, sampling)[0].outputs[0].text)


# The engine runs in processes that are spawned, and import this file.
if __name__ == "__main__":
    main()
