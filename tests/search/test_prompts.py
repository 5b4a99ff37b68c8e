"""Prompts of a search: synthetic ones, and text files."""

from __future__ import annotations

import pytest
import search_prompts

from vllm_sparse.search.prompts import CUE, PromptError, synthetic_prompts, text_prompts


def test_synthetic_prompts_are_of_the_length_and_of_ordinary_tokens():
    special = [0, 1, 7, 500]
    prompts = synthetic_prompts(2, 3000, 1000, special, 1, seed=3)
    again = synthetic_prompts(2, 3000, 1000, special, 1, seed=3)
    assert [p.token_ids for p in prompts] == [p.token_ids for p in again]
    assert prompts[0].digest == again[0].digest != prompts[1].digest
    for prompt in prompts:
        ids = prompt.token_ids
        assert len(ids) == 3000 and ids[0] == 1
        assert not set(ids[1:]) & set(special) and max(ids) < 1000 and min(ids[1:]) >= 0
        # The cue at the end stood somewhere before.
        cue = ids[-CUE:]
        assert any(ids[i : i + CUE] == cue for i in range(1, 3000 - 2 * CUE))
    without = synthetic_prompts(1, 300, 1000, special, None, seed=3)[0]
    assert len(without.token_ids) == 300


def test_too_short_or_too_few_words():
    with pytest.raises(PromptError, match="256 or more"):
        synthetic_prompts(1, 100, 1000, [], None, 0)
    with pytest.raises(PromptError, match="give text files"):
        synthetic_prompts(1, 1000, 100, [], None, 0)


class Words:
    def __call__(self, text: str) -> dict:
        return {"input_ids": [int(word) for word in text.split()]}


def test_texts_keep_their_end(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, range(1000))))
    (prompt,) = text_prompts([file], Words(), 301)
    assert prompt.token_ids == [*range(151), *range(850, 1000)]
    assert text_prompts([file], Words(), 5000)[0].token_ids == list(range(1000))


@pytest.mark.parametrize(
    "content, message",
    [(b"1 2 3", "has 3 tokens; give 256"), (b"\xff\xfe\x00", "not UTF-8"), (None, "cannot be")],
)
def test_texts_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PromptError, match=message):
        text_prompts([file], Words(), 1000)


def test_the_retrieval_models_samples_are_of_the_length_and_ask():
    texts = search_prompts.prompts(3000)
    assert {name: len(text.split()) for name, text in texts.items()} == {
        "recall": 2999, "two-hop": 2999, "counting": 2999,
    }  # fmt: skip
    words = {name: text.split() for name, text in texts.items()}
    asked = search_prompts.QUESTIONS
    assert words["counting"].count("count") == asked * search_prompts.TIMES
    for name, verb in (("recall", "recall"), ("two-hop", "follow")):
        places = [i for i, word in enumerate(words[name]) if word == verb]
        keys = [words[name][i + 1] for i in places]
        assert len(set(keys)) == asked and verb in words[name][-30:]
        # What is asked for stands before the question.
        for place, key in zip(places, keys, strict=True):
            assert words[name][words[name].index(key) - 1] == "remember"
            assert words[name].index(key) < place


def test_the_example_file_is_of_the_lean_model():
    from pathlib import Path

    from vllm_sparse.patterns import PatternFile

    root = Path(__file__).resolve().parent.parent.parent
    file = PatternFile.load(root / "examples" / "patterns" / "lean-16k.json")
    file.check_model(layers=4, heads=8, kv_heads=2, head_size=128)
    kinds = {p.kind for layer in range(4) for p in file.for_layer(layer)}
    assert kinds >= {"a_shape", "vertical_slash", "block_sparse", "dense"}
