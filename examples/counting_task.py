"""The counting task: programs that set and increment variables, and what they print.

    set a inc a pass inc a print a        -> 2

`set` makes a variable 0, `inc` adds 1 to it, `pass` does nothing, and `print` asks for it. An
answer is how often a variable was incremented since it was last set: how many tokens of one kind
lie behind another token, however many lie in between. That is what contextual positions measure
and a token's distance does not (arXiv 2405.18719, section 5.2; the words and the distribution of
programs are our own).

Words are tokens. Programs ask in their middle as well: such an answer is not part of the text, so
that each `print` is a question of its own, and a program gives many of them to learn from.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

EOS, UNKNOWN = "</s>", "<unk>"
SET, INCREMENT, PASS, PRINT = "set", "inc", "pass", "print"
VARIABLES = ("a", "b", "c", "d", "e")
# A variable that has reached the last is set instead of incremented, so that its answers stay
# words, and are about equally frequent.
MOST = 10
NUMBERS = tuple(str(number) for number in range(MOST + 1))
WORDS = (EOS, UNKNOWN, SET, INCREMENT, PASS, PRINT, *VARIABLES, *NUMBERS)
IDS = {word: i for i, word in enumerate(WORDS)}

BUSY = (SET, INCREMENT, PRINT)
BUSY_WEIGHTS = (0.08, 0.67, 0.25)


@dataclass(frozen=True)
class Program:
    """Words, and the answer behind each word that ends a `print`, by the word's place."""

    words: tuple[str, ...]
    answers: dict[int, int]

    @property
    def prompt(self) -> str:
        """The text, which ends where the last answer is to follow."""
        return " ".join(self.words)

    @property
    def token_ids(self) -> list[int]:
        return [IDS[word] for word in self.words]

    @property
    def answer(self) -> int:
        """What the last `print` prints."""
        return self.answers[len(self.words) - 1]


def random_program(
    operations: int, variables: int, rng: random.Random, most_busy: int = 48
) -> Program:
    """A program of so many operations; its first set each variable and its last is a `print`.

    Of those between, at most `most_busy` are not `pass`, however long the program is: in a longer
    one, what counts lies further back.

    Raises:
        ValueError: too many variables, or too few operations for them.
    """
    if not 1 <= variables <= len(VARIABLES):
        raise ValueError(f"variables={variables}: allowed are 1 to {len(VARIABLES)}")
    if operations <= variables:
        raise ValueError(
            f"operations={operations}: {variables} variables take at least {variables + 1}"
        )
    names = VARIABLES[:variables]
    free = operations - variables - 1
    busy = rng.randint(0, min(free, most_busy))
    kinds = rng.choices(BUSY, BUSY_WEIGHTS, k=busy) + [PASS] * (free - busy)
    rng.shuffle(kinds)
    values: dict[str, int] = {}
    words: list[str] = []
    answers: dict[int, int] = {}
    for place, kind in enumerate([SET] * variables + kinds + [PRINT]):
        if kind == PASS:
            words.append(PASS)
            continue
        name = names[place] if place < variables else rng.choice(names)
        if kind == INCREMENT and values[name] == MOST:
            kind = SET
        words += (kind, name)
        if kind == SET:
            values[name] = 0
        elif kind == INCREMENT:
            values[name] += 1
        else:
            answers[len(words) - 1] = values[name]
    return Program(tuple(words), answers)


def save_tokenizer(folder: Path) -> None:
    """Write the files of a tokenizer whose tokens are the words; it adds none of its own."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (EOS, UNKNOWN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
