"""The engine benchmark of decode: what it makes of what two engines gave."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bare pytest leaves the root out

from benchmarks import decode_engine
from benchmarks._engines import difference, unlike
from benchmarks.decode_engine import TOKENS, Series, make_checkpoint, row

OPTIONS = Namespace(shape="llama-3.2-1b", linear="flat", dtype="bfloat16", compiled=False)


def series(*seconds: float, logprob: float = -1.0, tokens: tuple[int, ...] = (1, 2)) -> Series:
    return Series(list(seconds), [tokens, tokens], [{7: logprob}, {7: logprob, 8: -9.0}])


def test_rates_are_of_all_sequences_and_medians():
    found = row(2, OPTIONS, 1, series(1.0, 4.0, 2.0), series(4.0, 4.0, 9.0))
    assert found.figure == "decode_engine_flat_llama_3_2_1b_b2"
    assert (found.ours, found.theirs, found.ratio) == (2 * TOKENS / 2, 2 * TOKENS / 4, 2.0)
    assert found.case["same_tokens"] == "2 of 2 sequences" and found.error == 0


def test_other_tokens_are_told():
    found = row(2, OPTIONS, 1, series(1.0), series(1.0, tokens=(1, 3)))
    assert found.case["same_tokens"] == "0 of 2 sequences" and found.ratio == 1.0


@pytest.mark.parametrize(
    "ours, theirs, why",
    [
        (series(1.0, logprob=-1.2), series(1.0), "log-probability"),
        (series(1.0, logprob=float("nan")), series(1.0), "log-probability"),
        (series(-0.1), series(1.0), "too short"),
    ],
)
def test_what_is_wrong_has_no_rate(ours: Series, theirs: Series, why: str):
    found = row(2, OPTIONS, 1, ours, theirs)
    assert found.ours is None and found.ratio is None and why in found.case["failed"]


def test_the_checkpoint_is_a_llama_of_the_shape(tmp_path):
    from transformers import AutoModelForCausalLM

    make_checkpoint("tiny", tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}  # it is the embedding
    assert type(model).__name__ == "LlamaForCausalLM"
    shape = decode_engine.SHAPES["tiny"]
    assert model.model.layers[1].mlp.down_proj.weight.shape == (
        shape["hidden_size"], shape["intermediate_size"],
    )  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 512


def test_numbers_that_make_no_sense_are_refused(capsys):
    for arguments in (["--batches", "0"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            decode_engine.main(arguments)
        assert "give 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{1: math.nan, 2: -2.0}, {3: -0.1}, {1: -0.4, 2: -2.0}])
def test_an_engine_that_says_something_else_is_not_timed(other):
    same = {1: -0.1, 2: -2.0}
    assert unlike(difference([same, same], [same, dict(same)])) is None
    assert unlike(difference([same, same], [same, other])) is not None
