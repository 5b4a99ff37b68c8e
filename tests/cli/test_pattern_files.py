"""`show`, `plot` and `import`; and fifty files that are none, each refused in one line."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_sparse.cli import app
from vllm_sparse.files import write_whole
from vllm_sparse.patterns import PatternFile

GOOD = {
    "schema_version": 1,
    "model": {
        "name": "org/model", "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 128,
        "rope": {"rope_type": "default", "rope_theta": 1e6},
    },
    "settings": {"goal": "the cheapest", "tokens": [4096]},
    "tools": {"vllm-sparse": "0.1.0"},
    "measured": {"density": [[0.1] * 4] * 2, "error": [[0.01] * 4] * 2},
    "layers": {
        "0": {"0": {"kind": "a_shape", "sink": 64, "window": 512}, "1": {"kind": "dense"}},
        "1": {"2": {"kind": "vertical_slash", "vertical": 64, "slash": 64},
              "3": {"kind": "block_sparse", "coverage": 0.9}},
    },
}  # fmt: skip
TEXT = json.dumps(GOOD)
EVIL = "\x1b]0;owned\x07\x1b[2J[bold red]<script>alert(1)</script>\n\r" + "A" * 100_000


def changed(path: str, value: object) -> dict:
    """GOOD with one entry replaced; the path's parts are divided by slashes."""
    data = copy.deepcopy(GOOD)
    *parents, last = path.split("/")
    place = data
    for part in parents:
        place = place[part]
    place[last] = value
    return data


def without(path: str) -> dict:
    data = copy.deepcopy(GOOD)
    *parents, last = path.split("/")
    place = data
    for part in parents:
        place = place[part]
    del place[last]
    return data


def deep(levels: int) -> str:
    return '{"schema_version": 1, "model": ' + '{"a":' * levels + "1" + "}" * levels + "}"


# What a file may hold instead of patterns: text, bytes, or JSON.
HOSTILE: dict[str, object] = {
    "empty": "",
    "blank": "  \n\n",
    "truncated in a word": TEXT[:40],
    "truncated in the middle": TEXT[: len(TEXT) // 2],
    "truncated at the end": TEXT[:-1],
    "two documents": TEXT + TEXT,
    "trailing comma": TEXT[:-1] + ",}",
    "comments": "// patterns\n" + TEXT,
    "single quotes": TEXT.replace('"', "'"),
    "yaml": "schema_version: 1\nmodel:\n  name: m\n",
    "a list": "[1, 2, 3]",
    "a string": '"patterns"',
    "a number": "17",
    "null": "null",
    "MInference's own": '[{"0": ["vertical_and_slash", 1000, 6096, 1]}]',
    "a model config": '{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}',
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94.",
    "a safetensors": (8).to_bytes(8, "little") + b"{}      " + bytes(64),
    "a zip": b"PK\x03\x04" + bytes(200),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "an ELF": b"\x7fELF" + bytes(100),
    "half a UTF-16 file": TEXT.encode("utf-16")[:-1],
    "Latin-1": b'{"schema_version": 1, "model": {"name": "\xe9"}}',
    "NUL bytes": bytes(5000),
    "deep lists": "[" * 200_000,
    "deep objects": deep(100_000),
    "a few levels too deep": deep(40),
    "NaN": TEXT.replace("0.1", "NaN"),
    "infinity": TEXT.replace("0.1", "Infinity"),
    "a number that overflows": TEXT.replace("0.1", "1e999"),
    "ten thousand digits": TEXT.replace("512", "9" * 10_000),
    "a key twice": TEXT[:-1] + ', "layers": {}}',
    "no version": without("schema_version"),
    "another version": changed("schema_version", 2),
    "the version as text": changed("schema_version", "1"),
    "the version true": changed("schema_version", [1]),
    "no model": without("model"),
    "a model with no heads": changed("model/heads", 0),
    "a million layers": changed("model/layers", 1_000_000),
    "heads that are not a number": changed("model/heads", "many"),
    "heads that do not divide": changed("model/kv_heads", 3),
    "a long name": changed("model/name", "x" * 600),
    "an unknown field": changed("command", "rm -rf /"),
    "an unknown field with a hostile name": {**GOOD, EVIL: 1},
    "a nested setting": changed("settings/goal", {"a": {"b": {}}}),
    "too many settings": changed("settings", {str(i): i for i in range(100)}),
    "layers as a list": changed("layers", [[]]),
    "a layer that is not there": changed("layers/7", {}),
    "a negative layer": changed("layers/-1", {}),
    "a layer written twice": changed("layers/00", {}),
    "a head that is not there": changed("layers/0/9", {"kind": "dense"}),
    "a head in other digits": changed("layers/0/\u0663", {"kind": "dense"}),
    "a hostile kind": changed("layers/0/0", {"kind": EVIL}),
    "a hostile layer": changed(f"layers/{EVIL.replace('/', '')}", {}),
    "a budget of nothing": changed("layers/0/0/window", 0),
    "a negative budget": changed("layers/0/0/sink", -64),
    "a budget beyond 2^31": changed("layers/0/0/window", 1 << 31),
    "a budget that is half a token": changed("layers/0/0/window", 0.5),
    "a budget of another kind": changed("layers/0/0/blocks", 5),
    "two budgets": changed("layers/0/0/coverage", 0.5),
    "a coverage above one": changed("layers/1/3/coverage", 1.5),
    "a table of another shape": changed("measured/density", [[0.1] * 3] * 2),
    "a table that is too short": changed("measured/density", [[0.1] * 4]),
    "a table of text": changed("measured/density", [["a"] * 4] * 2),
}


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(error: str, code: int) -> None:
    """One clear line, short, printable, and a failure."""
    assert code == 1
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), error[:500]
    assert 20 < len(lines[0]) < 2000
    assert lines[0].isprintable() and "Traceback" not in error


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "patterns.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_one_line_and_a_failure(name: str, tmp_path: Path):
    done = invoke("show", written(tmp_path, HOSTILE[name]))
    assert done.stdout == ""
    refused(done.stderr, done.exit_code)
    assert "patterns.json" in done.stderr


def test_there_are_fifty_of_them():
    assert len(HOSTILE) >= 50
    assert invoke("show", "/dev/null").exit_code == 1


@pytest.mark.parametrize("command", ["show", "plot"])
def test_what_is_not_a_file(command: str, tmp_path: Path):
    for path in (tmp_path, tmp_path / "none.json", tmp_path / ("x" * 300)):
        done = invoke(command, path)
        refused(done.stderr, done.exit_code)
    looping = tmp_path / "loop"
    looping.symlink_to(looping)
    done = invoke(command, looping)
    refused(done.stderr, done.exit_code)


@pytest.mark.parametrize(
    "name", ["deep objects", "a pickle", "an unknown field with a hostile name"]
)
def test_the_real_command_does_the_same(name: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "vllm_sparse.cli", "show", str(written(tmp_path, HOSTILE[name]))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == ""
    refused(done.stderr, done.returncode)


def test_show_says_what_is_there(tmp_path: Path):
    path = written(tmp_path, GOOD)
    done = invoke("show", path)
    assert done.exit_code == 0 and done.stderr == ""
    for said in ("org/model", "2 layers of 4 query heads", "the cheapest", "64 + 512", "90%"):
        assert said in done.stdout
    machine = invoke("show", path, "--json")
    assert PatternFile.parse(json.loads(machine.stdout)) == PatternFile.load(path)
    short = invoke("show", path, "--no-heads")
    assert "64 + 512" not in short.stdout


def test_text_of_a_good_file_is_shown_as_text(tmp_path: Path):
    evil = "\x1b[2J[bold red]boo[/]<script>"
    data = changed("model/name", evil)
    data["settings"] = {"goal": evil}
    data["tools"] = {evil: evil}
    done = invoke("show", written(tmp_path, data))
    assert done.exit_code == 0 and "\x1b" not in done.stdout
    assert "[bold red]boo[/]<script>" in done.stdout


def test_plot_draws_a_picture(tmp_path: Path):
    done = invoke("plot", written(tmp_path, GOOD))
    assert done.exit_code == 0, done.stderr
    data = (tmp_path / "patterns.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert done.stdout.strip() == str(tmp_path / "patterns.png")
    imported = written(tmp_path, without("measured"))
    other = tmp_path / "other.png"
    assert invoke("plot", imported, "-o", other, "--json").exit_code == 0
    assert other.read_bytes() != data
    bad = invoke("plot", imported, "-o", tmp_path / "no" / "folder.png")
    refused(bad.stderr, bad.exit_code)


def test_without_matplotlib_plot_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for arguments in (("plot", written(tmp_path, GOOD)), ("needle", "model")):
        done = invoke(*arguments)
        refused(done.stderr, done.exit_code)
        assert "pip install 'vllm-sparse[plot]'" in done.stderr


def test_the_models_attention_is_drawn_layer_by_layer(llama: str, tmp_path: Path):
    heads = {str(i): {"kind": "a_shape", "sink": 64, "window": 64} for i in range(4)}
    model = {"name": "tiny", "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 64}
    path = written(tmp_path, {"schema_version": 1, "model": model, "layers": {"0": heads}})
    text = tmp_path / "text.txt"
    done = invoke("plot", path, "--model", llama, "--prompt", text)
    refused(done.stderr, done.exit_code)  # the checkpoint brings no tokenizer
    assert "tokenizer" in done.stderr
    other = written(tmp_path, {"schema_version": 1, "model": {**model, "layers": 5}})
    done = invoke("plot", other, "--model", llama)
    refused(done.stderr, done.exit_code)
    assert "layers: file 5, model 4" in done.stderr


MINFERENCE = [
    {"0": ["vertical_and_slash", 1000, 6096, 0.3], "1": ["stream_llm", 128, 3968, 1],
     "3": ["block_sparse", 1000, 1000, 2]},
    {"0": ["vertical_and_slash", 10, 20, 336]},
]  # fmt: skip


def test_minferences_files_become_pattern_files(tmp_path: Path, llama: str):
    source, out = tmp_path / "theirs.json", tmp_path / "ours.json"
    source.write_text(json.dumps(MINFERENCE))
    done = invoke("import", source, "-o", out)
    assert done.exit_code == 0, done.stderr
    file = PatternFile.load(out)
    assert (file.model.name, file.model.layers, file.model.heads) == ("theirs", 2, 4)
    assert file.model.kv_heads is None and file.model.head_size is None
    file.check_model(layers=2, heads=4, kv_heads=2, head_size=64)  # not known: not compared
    dumped = [
        [p.model_dump(exclude_none=True) for p in file.for_layer(layer)] for layer in range(2)
    ]
    default = {"kind": "vertical_slash", "vertical": 1000, "slash": 6096}
    assert dumped[0] == [
        default, {"kind": "a_shape", "sink": 128, "window": 3968}, default,
        {"kind": "block_sparse", "blocks": 100},
    ]  # fmt: skip
    # Their code reads at least 30 columns and 50 diagonals.
    assert dumped[1][0] == {"kind": "vertical_slash", "vertical": 30, "slash": 50}
    other = invoke("import", source, "-o", out, "--model", llama)
    refused(other.stderr, other.exit_code)
    assert "layers: file 2, model 4" in other.stderr
    source.write_text(json.dumps(MINFERENCE * 2))
    assert invoke("import", source, "-o", out, "--model", llama).exit_code == 0
    assert PatternFile.load(out).model.kv_heads == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not valid JSON"),
        (TEXT, "not of MInference's form"),
        ("[]", "not of MInference's form"),
        ("[1]", "not of MInference's form"),
        ("[{}]", "names no head"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"x": ["stream_llm", 1, 2, 3]}]', "head 'x' is not a number"),
        ('[{"99999": ["stream_llm", 1, 2, 3]}]', "allowed: 0 to 4095"),
        ('[{"0": ["triangle", 1, 2, 3]}]', "with a type of vertical_and_slash"),
        ('[{"0": ["stream_llm", -1, 2, 3]}]', "vertical: got -1"),
        ('[{"0": ["stream_llm", 1, 1e9, 3]}]', "slash: got 1000000000.0"),
        ('[{"0": "stream_llm"}]', "allowed: [type, vertical, slash, score]"),
        ('[{"0": [["stream_llm"], 1, 2, 3]}]', "allowed: [type, vertical, slash, score]"),
    ],
)
def test_what_is_not_theirs_is_refused(content: str, message: str, tmp_path: Path):
    source = tmp_path / "theirs.json"
    source.write_text(content)
    done = invoke("import", source, "-o", tmp_path / "ours.json")
    refused(done.stderr, done.exit_code)
    assert message in done.stderr
    assert os.listdir(tmp_path) == ["theirs.json"]


@pytest.mark.parametrize("command", ["search", "show", "plot", "import", "needle", "check"])
def test_every_command_explains_itself(command: str):
    done = invoke(command, "--help")
    assert done.exit_code == 0 and "--json" in done.stdout


def test_what_cannot_be_written_names_the_file_that_was_asked_for(tmp_path):
    wanted = tmp_path / "none" / "file.json"
    with pytest.raises(FileNotFoundError) as error:
        write_whole(wanted, "{}")
    assert error.value.filename == str(wanted)
