"""The needle grid through a real engine, on a model that really retrieves."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vllm_sparse import needle
from vllm_sparse.cli import app

QUESTION = (
    "recall alpaca and state each word that stood right behind it in the text above until its "
    "first full stop comes , nothing else :"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    from retrieval.checkpoint import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("plain"), "plain", max_positions=8192)


def test_the_model_finds_needles_and_nothing_where_there_is_none(plain, tmp_path):
    from retrieval.prompts import haystack_ids
    from retrieval.vocabulary import VOCABULARY

    hay = tmp_path / "hay.txt"
    hay.write_text(VOCABULARY.text(haystack_ids(3000)[1:]))
    out = tmp_path / "grid.png"
    done = CliRunner().invoke(
        app,
        [
            "needle", str(plain), "-o", str(out), "--lengths", "600,2500", "--depths", "0,0.5,1",
            "--backends", "sparse", "--haystack", str(hay), "--question", QUESTION,
            "--needle", "remember alpaca {answer} .", "--answers", "amber,cobalt",
            "--config", '{"break_even": 0}', "--dtype", "float32",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(out.with_suffix(".json").read_text())
    assert data["found"] == {"sparse": 1.0}, data["cells"]
    cells = [(c["length"], c["depth"], c["expected"]) for c in data["cells"]]
    assert cells == [
        (600, 0.0, "amber"), (600, 0.5, "cobalt"), (600, 1.0, "amber"),
        (2500, 0.0, "cobalt"), (2500, 0.5, "amber"), (2500, 1.0, "cobalt"),
    ]  # fmt: skip
    assert all(c["seconds"] > 0 for c in data["cells"])
    assert out.read_bytes().startswith(b"\x89PNG")


class Words:
    """A tokenizer of numbers, that puts 1 before a text and 2 behind it."""

    eos_token_id = 2

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [100 + len(word) for word in text.split()]
        return [1, *ids, 2] if add_special_tokens else ids


def test_prompts_are_of_the_length_with_the_needle_at_its_depth():
    grid = needle.Grid("m", lengths=(50, 80), depths=(0.0, 0.5, 1.0), needle="xxxxxxxxx {answer}",
                       question="q q", answers=("aaaaaaaaaa",), haystack="a bb ccc")  # fmt: skip
    found = list(needle.prompts(grid, Words()))
    assert [(n, d) for n, d, _, _ in found] == [
        (50, 0.0), (50, 0.5), (50, 1.0), (80, 0.0), (80, 0.5), (80, 1.0),
    ]  # fmt: skip
    for length, depth, _, ids in found:
        assert len(ids) == length and ids[0] == 1 and ids[-2:] == [101, 101]
        place = ids.index(109)
        assert ids[place + 1] == 110
        assert place == 1 + round(depth * (length - 5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": (4,)}, "give 5 or more"),
        ({"haystack": ""}, "haystack is empty"),
    ],
)
def test_grids_that_cannot_be(change, message):
    grid = {"needle": "x {answer} x", "question": "q", "haystack": "a", "answers": ("a",)}
    with pytest.raises(needle.NeedleError, match=message):
        list(needle.prompts(needle.Grid("m", **{**grid, **change}), Words()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--backends", "fast"), "backend 'fast'; allowed: sparse, default"),
        (("--depths", "2"), "depths [2.0]; allowed: 0 (first) to 1 (last)"),
        (("--depths", "x"), "--depths: got 'x'; allowed: numbers"),
        (("--needle", "no"), "holds no {answer}"),
        (("--config", "[]"), "--config: got '[]'; allowed: an object"),
        (("--haystack", "none.txt"), "none.txt"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["needle", "model", *arguments])
    assert done.exit_code == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_shares_of_answers():
    assert needle.share_found("amber", "Amber.") == 1
    assert needle.share_found("amber cobalt", "the cobalt one") == 0.5
    assert needle.share_found("amber", "ambers") == 0
