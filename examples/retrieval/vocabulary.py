"""The words of the retrieval model, their classes, and the tokenizer made of them.

Every word is one token and words are separated by blanks, so that the length of a prompt in
tokens is its number of words plus one (the beginning-of-sequence token).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

SIZE = 2048
SPECIAL_WORDS = 256


def _words(text: str) -> list[str]:
    return text.split()


BOS, EOS, UNKNOWN, STOP = "<s>", "</s>", "<unk>", "."
NOTE, RECALL, FOLLOW, COUNT = "remember", "recall", "follow", "count"

# What follows the asked word in a question. Each of these words looks back by its own place in
# the template (the first by 1, the second by 2, ...) to find the asked word, so every word stands
# in one template only, and once. A question is this long on purpose: like an instruction in front
# of a trained model, it asks with many query rows, so a selection that averages over the rows of
# a tile of 64 or 128 queries sees it.
RECALL_TEMPLATE = _words(
    "and state each word that stood right behind it in the text above until its first full stop "
    "comes , nothing else :"
)
FOLLOW_TEMPLATE = _words(
    "to a partner then onward from there onto one more link along this chain before reporting "
    "only what lies at last ="
)
COUNT_TEMPLATE = _words(
    "how many times every colour occurs so far over whole passage ; give whichever wins by number "
    "among them all ?"
)

SYMBOLS = ("red", "green", "blue", "white")

KEYS = _words("""
alpaca badger beaver bison bobcat camel cheetah cobra condor cougar coyote crane cricket dingo
dolphin donkey eagle egret falcon ferret finch gazelle gecko gibbon giraffe gopher heron hippo
hornet hyena ibex iguana impala jackal jaguar koala lemur leopard lizard llama lobster lynx magpie
marmot meerkat mole moose newt ocelot orca osprey otter panther parrot pelican puffin python
rabbit raven salmon seal stork tapir walrus
""")

VALUES = _words("""
amber anchor apron arrow attic basket beacon bottle bronze bucket candle canoe carpet castle
cedar chapel cipher cobalt copper cotton dagger diamond drum engine feather flute garnet ginger
granite hammer harbor helmet indigo ivory jacket jasper kettle ladder lantern lemon magnet maple
marble mirror needle nickel olive orchid paddle pepper pillow quartz ribbon rocket saddle sapphire
silver spruce tunnel velvet violin walnut willow zipper
""")


def _invented(count: int, syllables: int, rng: random.Random) -> list[str]:
    """`count` distinct words of consonant-vowel syllables, ending in a consonant."""
    words: dict[str, None] = {}
    while len(words) < count:
        stem = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
        words[stem + rng.choice("klnrst")] = None
    return list(words)


@dataclass(frozen=True)
class Vocabulary:
    """All words in order of their ids, and the classes that give a word its behaviour."""

    words: tuple[str, ...]
    special: tuple[str, ...]
    filler: tuple[str, ...]

    def ids(self, words: list[str] | tuple[str, ...]) -> list[int]:
        """Ids of `words`; an unknown word is a KeyError, not `<unk>`."""
        return [_index(self)[word] for word in words]

    def id(self, word: str) -> int:
        """Id of one word."""
        return _index(self)[word]

    def text(self, ids: list[int]) -> str:
        """The words of `ids` with blanks between them."""
        return " ".join(self.words[i] for i in ids)


_INDEX: dict[tuple[str, ...], dict[str, int]] = {}


def _index(vocabulary: Vocabulary) -> dict[str, int]:
    words = vocabulary.words
    if words not in _INDEX:
        _INDEX[words] = {word: i for i, word in enumerate(words)}
    return _INDEX[words]


def _vocabulary() -> Vocabulary:
    rng = random.Random(20)
    named = [BOS, EOS, UNKNOWN, STOP, NOTE, RECALL, FOLLOW, COUNT]
    named += RECALL_TEMPLATE + FOLLOW_TEMPLATE + COUNT_TEMPLATE
    named += [*SYMBOLS, *KEYS, *VALUES]
    special = _invented(SPECIAL_WORDS, 3, rng)
    filler = _invented(SIZE - len(named) - len(special), 2, rng)
    words = tuple(named + special + filler)
    if len(set(words)) != SIZE:
        twice = sorted({word for word in words if words.count(word) > 1})
        raise ValueError(f"words that stand in two classes: {twice}")
    return Vocabulary(words, tuple(special), tuple(filler))


VOCABULARY = _vocabulary()


def save_tokenizer(folder: Path, max_positions: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for a word-level tokenizer with a BOS."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(VOCABULARY.words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (BOS, EOS, UNKNOWN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
