"""Pattern files: what is read back, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_sparse import patterns
from vllm_sparse.patterns import ADAPTIVE, HeadPattern, ModelInfo, PatternError, PatternFile, shown

MODEL = {
    "name": "org/model", "layers": 4, "heads": 8, "kv_heads": 2, "head_size": 128,
    "rope": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip


def data(**changes) -> dict:
    return {"schema_version": 1, "model": MODEL, **changes}


def file_of(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "patterns.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_comes_back_as_it_was_saved(tmp_path: Path):
    heads = {
        0: HeadPattern(kind="a_shape", sink=64, window=1024),
        1: HeadPattern(kind="vertical_slash", vertical=100, slash=750),
        3: HeadPattern(kind="vertical_slash", coverage=0.9),
        5: HeadPattern(kind="block_sparse", blocks=100),
        6: HeadPattern(kind="dense"),
        7: HeadPattern(coverage=0.99),
    }
    file = PatternFile(
        model=ModelInfo(**MODEL), settings={"coverage": 0.95, "lengths": [4096, 16384]},
        tools={"vllm-sparse": "0.1.0"}, layers={2: heads},
    )  # fmt: skip
    path = tmp_path / "patterns.json"
    file.save(path)
    assert PatternFile.load(path) == file
    assert os.listdir(tmp_path) == ["patterns.json"]
    assert json.loads(path.read_text())["layers"]["2"]["0"] == {
        "kind": "a_shape", "sink": 64, "window": 1024,
    }  # fmt: skip


def test_heads_without_a_pattern_are_adaptive_and_ranks_get_their_own():
    file = PatternFile.parse(data(layers={"1": {"5": {"kind": "dense"}}}))
    assert file.for_layer(0) == (ADAPTIVE,) * 8
    assert [p.kind for p in file.for_layer(1, 4, 4)] == [
        "adaptive",
        "dense",
        "adaptive",
        "adaptive",
    ]
    assert file.for_layer(1, 0, 4) == (ADAPTIVE,) * 4
    for layer, start, count in ((4, 0, 8), (-1, 0, 8), (0, 6, 4), (0, -1, 2)):
        with pytest.raises(PatternError, match=r"layer: got|heads: got"):
            file.for_layer(layer, start, count)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "triangle"}, "kind"),
        ({"kind": "a_shape"}, "sink is missing; give sink and window, or coverage"),
        ({"kind": "a_shape", "sink": 4}, "window is missing"),
        ({"kind": "a_shape", "sink": 4, "window": 0}, "window"),
        ({"kind": "a_shape", "sink": -1, "window": 5}, "sink"),
        ({"kind": "a_shape", "sink": 1, "window": 1 << 31}, "window"),
        ({"kind": "a_shape", "sink": 4, "window": 8, "coverage": 0.9}, "exclude each other"),
        ({"kind": "a_shape", "sink": 4, "window": 8, "slash": 1}, "slash = 1 does not belong"),
        ({"kind": "vertical_slash", "vertical": 1.5, "slash": 3}, "vertical"),
        ({"kind": "vertical_slash", "vertical": True, "slash": 3}, "vertical"),
        ({"kind": "block_sparse", "blocks": 0}, "blocks"),
        ({"kind": "dense", "coverage": 0.5}, "does not belong to kind 'dense'"),
        ({"coverage": 0.0}, "coverage"),
        ({"coverage": 1.1}, "coverage"),
        ({"windw": 3}, "windw"),
    ],
)
def test_bad_heads_are_refused_with_field_value_and_what_is_allowed(fields: dict, message: str):
    with pytest.raises(ValidationError):
        HeadPattern(**fields)
    with pytest.raises(PatternError) as error:
        PatternFile.parse(data(layers={"3": {"7": fields}}))
    assert "layers.3.7" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not valid JSON"),
        ("[]", "dict"),
        ("{", "not valid JSON"),
        ('{"schema_version": 1, "schema_version": 1}', "'schema_version' stands twice"),
        ('{"schema_version": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ({}, "schema_version: got None; this vllm-sparse reads 1"),
        (data(schema_version=2), "schema_version: got 2; this vllm-sparse reads 1"),
        ({"schema_version": 1}, "model: "),
        (data(phi=1), "phi: "),
        (data(layers={"4": {}}), "layer 4 does not exist; allowed: 0 to 3"),
        (data(layers={"0": {"8": {}}}), "head 8 of layer 0 does not exist; allowed: 0 to 7"),
        (data(layers={"07": {}}), "layer '07' is not a number like '7'"),
        (data(layers={"0": {"٣": {}}}), "is not a number like '7'"),
        (data(layers=[]), "layers"),
        (data(model={**MODEL, "kv_heads": 3}), "kv_heads = 3 does not divide heads = 8"),
        (data(model={**MODEL, "layers": 1 << 40}), "model.layers"),
        (data(model={**MODEL, "rope": {str(i): i for i in range(65)}}), "model.rope"),
        (data(settings={"a": {"b": 1}}), "settings.a"),
        (data(settings={"a": "x" * 513}), "settings.a"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: object, message: str):
    path = file_of(tmp_path, content)
    with pytest.raises(PatternError) as error:
        PatternFile.load(path)
    assert message in str(error.value) and "patterns.json" in str(error.value)
    assert len(str(error.value)) < 1500


def test_a_long_path_is_shown_whole(tmp_path: Path):
    path = tmp_path / ("deep/" * 40) / "patterns.json"
    with pytest.raises(PatternError, match="cannot be read") as error:
        PatternFile.load(path)
    assert repr(str(path)) in str(error.value)


def test_text_of_a_file_is_quoted_and_shortened():
    evil = "\x1b[31m" + "x" * 10_000
    with pytest.raises(PatternError) as error:
        PatternFile.parse(data(layers={"0": {"0": {"kind": evil}, "1": {evil: 1}}}))
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 1500
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) < 90
    assert shown({"a": 1}) == "a dict of 1"
    assert shown(10**5000) == "a huge number"


def test_what_cannot_be_read_or_is_too_large(tmp_path: Path, monkeypatch):
    with pytest.raises(PatternError, match="No such file"):
        PatternFile.load(tmp_path / "none.json")
    with pytest.raises(PatternError, match="directory"):
        PatternFile.load(tmp_path)
    monkeypatch.setattr(patterns, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(PatternError, match="over 1 MiB"):
        PatternFile.load(file_of(tmp_path, " " * ((1 << 20) + 1)))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "patterns.json"
    file = PatternFile.parse(data())
    file.save(path)
    before = path.read_text()

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        PatternFile.parse(data(settings={"a": 1})).save(path)
    assert path.read_text() == before and os.listdir(tmp_path) == ["patterns.json"]


def test_another_model_is_refused_field_by_field():
    file = PatternFile.parse(data())
    same = {"layers": 4, "heads": 8, "kv_heads": 2, "head_size": 128}
    file.check_model(**same)
    file.check_model(**same, name="org/model", rope={"rope_theta": 1e6, "factor": 2.0})
    with pytest.raises(PatternError) as error:
        file.check_model(
            **{**same, "layers": 32, "kv_heads": 8}, name="other", rope={"rope_theta": 5e5}
        )
    assert str(error.value) == (
        "the pattern file is of another model, 'org/model': name: file 'org/model', model 'other'; "
        "layers: file 4, model 32; kv_heads: file 2, model 8; "
        "rope.rope_theta: file 1000000.0, model 500000.0"
    )


def test_patterns_load_neither_torch_nor_vllm():
    code = "import sys, vllm_sparse.patterns; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_phi_comes_back_as_it_was_saved(tmp_path: Path):
    file = PatternFile.parse(data(phi={"0": [0.5] * 8, "3": [-12.25] * 8}))
    path = tmp_path / "patterns.json"
    file.save(path)
    assert PatternFile.load(path) == file
    assert PatternFile.load(path).phi[3] == [-12.25] * 8


@pytest.mark.parametrize(
    "phi, message",
    [
        ({"4": [0.0] * 8}, "phi of layer 4, which does not exist; allowed: 0 to 3"),
        ({"-1": [0.0] * 8}, "is not a number like '7'"),
        ({"07": [0.0] * 8}, "'07' is not a number like '7'"),
        ({"0": [0.0] * 7}, "phi of layer 0 has 7 entries; allowed: one for each of the 8 heads"),
        ({"0": [0.0] * 7 + [1e7]}, "phi.0.7: got 10000000.0"),
        ({"0": [None] * 8}, "phi.0.0: got None"),
        ({"0": 1.0}, "phi.0: got 1.0"),
        ([1.0], "phi: got"),
    ],
)
def test_a_bad_phi_is_refused(phi, message):
    with pytest.raises(PatternError) as error:
        PatternFile.parse(data(phi=phi))
    assert message in str(error.value)
