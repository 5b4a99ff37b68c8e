"""Writes texts in the retrieval model's words, for `vllm-sparse search` and `vllm-sparse needle`.

    python examples/search_prompts.py FOLDER [--length 16384]
    vllm-sparse search checkpoints/lean -o patterns.json \
        --prompt FOLDER/recall.txt --prompt FOLDER/two-hop.txt --prompt FOLDER/counting.txt
    vllm-sparse needle checkpoints/lean --patterns patterns.json --haystack FOLDER/haystack.txt \
        --needle "remember alpaca {answer} ." --answers amber,cobalt,violin,garnet \
        --question "$(cat FOLDER/question.txt)"

A search sees only what its prompts make a head do, so each asks eight times, the last time at its
end: for words behind a key, for such words in two hops, and for the most frequent symbol so far.
One question each would be a sample of one: a head's count that happens to reach its needle is
taken for enough.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from retrieval.prompts import averaging_prompt, haystack_ids, quiz_prompt
from retrieval.vocabulary import COUNT, COUNT_TEMPLATE, RECALL, RECALL_TEMPLATE, VOCABULARY

QUESTIONS = 8
RATE = 0.2  # share of symbols among the words
TIMES = 3  # in a row: 66 words, which fill a tile of queries


def prompts(length: int, seed: int = 0) -> dict[str, str]:
    """Text of each prompt by name, of `length` tokens with the one that the tokenizer adds."""
    each = (length - 1) // QUESTIONS
    sizes = [each + 1] * (QUESTIONS - 1) + [length - each * (QUESTIONS - 1)]
    question = " ".join([COUNT, *COUNT_TEMPLATE])
    more = (TIMES - 1) * len(question.split())
    counting = [
        averaging_prompt(size - more, seed + i, rate=RATE, late_minority=True).prompt
        + f" {question}" * (TIMES - 1)
        for i, size in enumerate(sizes)
    ]
    return {
        "recall": quiz_prompt(length, seed, questions=QUESTIONS).prompt,
        "two-hop": quiz_prompt(length, seed, hops=2, questions=QUESTIONS).prompt,
        "counting": " ".join(counting),
    }


def grid(length: int, seed: int = 0) -> dict[str, str]:
    """A haystack, and the question for the word behind `alpaca`."""
    return {
        "haystack": VOCABULARY.text(haystack_ids(length, seed)[1:]),
        "question": " ".join([RECALL, "alpaca", *RECALL_TEMPLATE]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = prompts(options.length, options.seed) | grid(options.length, options.seed)
    for name, text in texts.items():
        (options.folder / f"{name}.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
