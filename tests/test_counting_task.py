"""Programs of the counting task: their answers, their words and their lengths."""

from __future__ import annotations

import random

import pytest
from counting_task import (
    IDS,
    MOST,
    PASS,
    PRINT,
    SET,
    VARIABLES,
    WORDS,
    random_program,
    save_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st

SIZES = {
    "operations": st.integers(6, 200),
    "variables": st.integers(1, len(VARIABLES)),
    "seed": st.integers(0, 2**32),
}


def statements(text: str) -> list[list[str]]:
    """A program's operations, read off its text."""
    words = iter(text.split())
    return [[word] if word == PASS else [word, next(words)] for word in words]


@given(**SIZES)
def test_answers_are_counts_since_the_last_set(operations: int, variables: int, seed: int) -> None:
    program = random_program(operations, variables, random.Random(seed))
    places = sorted(program.answers)
    for place in places:
        # Counted backwards, in text, where the generator keeps values as it goes forwards.
        text = " ".join(program.words[: place + 1])
        name = program.words[place]
        assert text.endswith(f"{PRINT} {name}")
        behind = text.rpartition(f"{SET} {name}")[2]
        assert program.answers[place] == behind.count(f"inc {name}")
    prints = [i + 1 for i, word in enumerate(program.words) if word == PRINT]
    assert places == prints


@given(**SIZES)
def test_programs_are_as_long_as_asked_and_sound(
    operations: int, variables: int, seed: int
) -> None:
    program = random_program(operations, variables, random.Random(seed), most_busy=20)
    done = statements(program.prompt)
    assert len(done) == operations
    assert [statement[0] for statement in done[:variables]] == [SET] * variables
    assert done[-1][0] == PRINT and program.answer == program.answers[len(program.words) - 1]
    assert {statement[1] for statement in done if statement[0] != PASS} == set(
        VARIABLES[:variables]
    )
    assert sum(s[0] != PASS for s in done) <= 20 + variables + 1
    assert [WORDS[token] for token in program.token_ids] == list(program.words)
    assert all(0 <= answer <= MOST for answer in program.answers.values())
    assert all(str(answer) in IDS for answer in program.answers.values())


def test_a_seed_gives_one_program_and_every_answer_comes() -> None:
    drawn = [random_program(64, 2, random.Random(seed)) for seed in range(600)]
    assert drawn[:9] == [random_program(64, 2, random.Random(seed)) for seed in range(9)]
    assert {program.answer for program in drawn} == set(range(MOST + 1))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="variables=6: allowed are 1 to 5"):
        random_program(20, 6, random.Random(0))
    with pytest.raises(ValueError, match="operations=3: 3 variables take at least 4"):
        random_program(3, 3, random.Random(0))


def test_tokenizer_has_the_words_and_adds_none(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    program = random_program(40, 3, random.Random(1))
    assert tokenizer(program.prompt).input_ids == program.token_ids
    assert tokenizer.decode([IDS[str(program.answer)]]) == str(program.answer)
    assert len(tokenizer) == len(WORDS)
