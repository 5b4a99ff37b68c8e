"""Writes sample prompts of the retrieval model for `vllm-sparse search`, as text files.

    python examples/search_prompts.py FOLDER [--length 16384]
    vllm-sparse search checkpoints/lean --prompt FOLDER/needle.txt ... -o patterns.json

A search sees only what its prompts make a head do: here retrieval in one hop and in two, asked at
the end, and a text that asks again and again for the most frequent symbol so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from retrieval.prompts import averaging_prompt, needle_prompt, two_hop_prompt

COUNTINGS = 8
RATE = 0.2  # share of symbols among the words


def prompts(length: int, seed: int = 0) -> dict[str, str]:
    """Text of each prompt by name, of `length` tokens with the one that the tokenizer adds."""
    each = (length - 1) // COUNTINGS
    sizes = [each + 1] * (COUNTINGS - 1) + [length - each * (COUNTINGS - 1)]
    counting = [
        averaging_prompt(size, seed + i, rate=RATE, late_minority=True).prompt
        for i, size in enumerate(sizes)
    ]
    return {
        "needle": needle_prompt(length, 0.4, seed, distractors=3).prompt,
        "two-hop": two_hop_prompt(length, seed=seed, distractors=2).prompt,
        "counting": " ".join(counting),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, text in prompts(options.length, options.seed).items():
        (options.folder / f"{name}.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
