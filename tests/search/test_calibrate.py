"""phi: measured on prompts, proven from QK-norm, and written into pattern files."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from vllm_sparse.cli import app
from vllm_sparse.kernels.softmax_modes import HIGH, LOW
from vllm_sparse.patterns import HeadPattern, PatternFile
from vllm_sparse.search import calibrate
from vllm_sparse.search.capture import LayerInputs, capture, load_model

HEADS, LAYERS = 4, 4


def small_model(kind: str, path, **extra):
    """A random model with QK-norm ("qwen3", "gemma3") or without ("llama")."""
    import tiny_models

    if kind == "llama":
        return tiny_models.save_llama(path, layers=2, **extra)
    if kind == "gemma3":
        return tiny_models.save_gemma3(path, layers=3)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, initializer_range=0.12,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    for name, value in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            value.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(path)
    return str(path)


def test_extremes_are_those_of_every_row():
    torch.manual_seed(0)
    length = calibrate.ROWS + 37
    q, k = torch.randn(length, 4, 64) * 3, torch.randn(length, 2, 64)
    found = calibrate.extremes(LayerInputs(0, q, k, k, 0.125, q))
    scores = torch.einsum("mhd,nhd->hmn", q, k.repeat_interleave(2, 1)) * 0.125
    scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(found.high, scores.amax((1, 2)))
    torch.testing.assert_close(found.low, scores.logsumexp(2).amin(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "high, low, phi, wide",
    [
        (10.0, -10.0, 0.0, 0),
        (300.0, 260.0, 280.0, 0),
        (-300.0, -310.0, -305.0, 0),
        (100.0, -40.0, 60.0, 1),  # 140 is more than the window: no overflow, some underflow
    ],
)
def test_phi_lies_so_that_the_window_holds_what_was_seen(high, low, phi, wide):
    found = calibrate.Extremes(torch.tensor([high]), torch.tensor([low]))
    assert found.phi().tolist() == [phi]
    assert found.too_wide() == wide
    assert high - phi <= HIGH
    assert wide or low - phi >= LOW


def test_every_row_of_the_prompts_is_inside(tmp_path):
    model = load_model(small_model("llama", tmp_path))
    prompts = calibrate.random_prompts(512, 2, 300)
    found = calibrate.calibrate(model, prompts)
    assert sorted(found.phi) == [0, 1]
    assert found.proven == {}
    assert found.tokens == 600
    assert not found.wide

    def check(inputs: LayerInputs) -> None:
        seen = calibrate.extremes(inputs)
        phi = torch.tensor(found.phi[inputs.layer])
        assert (seen.high - phi <= HIGH).all()
        assert (seen.low - phi >= LOW).all()
        assert len(set(found.phi[inputs.layer])) > 1, "one phi for each head"

    for prompt in prompts:
        capture(model, prompt, check)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_the_bound_of_qk_norm_holds(kind, tmp_path):
    model = load_model(small_model(kind, tmp_path))
    size = model.config.get_text_config().head_dim
    bounds = calibrate.proven_bounds(model, size)
    assert sorted(bounds) == list(range(model.config.get_text_config().num_hidden_layers))
    highest = {}

    def look(inputs: LayerInputs) -> None:
        group = inputs.q.shape[1] // inputs.k.shape[1]
        k = inputs.k.repeat_interleave(group, 1)
        scores = torch.einsum("mhd,nhd->hmn", inputs.q, k) * inputs.scale
        highest[inputs.layer] = float(scores.abs().max())

    capture(model, calibrate.random_prompts(512, 1, 100)[0], look)
    for layer, bound in bounds.items():
        assert highest[layer] <= bound
        assert bound < 20 * highest[layer], "a bound, and not any large number"


def test_no_norm_proves_nothing(tmp_path):
    assert calibrate.proven_bounds(load_model(small_model("llama", tmp_path)), 64) == {}
    assert calibrate.gain(torch.nn.LayerNorm(64), 64) is None


def test_proven_layers_need_no_prompt(tmp_path):
    model = load_model(small_model("qwen3", tmp_path))
    found = calibrate.calibrate(model, [])
    assert found.phi == {0: [0.0, 0.0], 1: [0.0, 0.0]}
    assert found.tokens == 0
    assert all(bound <= HIGH for bound in found.proven.values())


def test_a_file_is_written_and_one_that_is_there_is_added_to(tmp_path):
    name = small_model("llama", tmp_path)
    file = tmp_path / "phi.json"
    arguments = ["calibrate", name, "-o", str(file), "--length", "64", "--samples", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"--additional-config.sparse.patterns {file}" in done.output.replace("\n", "")
    alone = PatternFile.load(file)
    assert sorted(alone.phi) == [0, 1]
    assert alone.layers == {}
    assert alone.settings["phi_tokens"] == 64
    patterns = alone.model_copy(
        update={"phi": {}, "layers": {1: {2: HeadPattern(kind="dense")}}, "settings": {"a": 1}}
    )
    patterns.save(file)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    both = PatternFile.load(file)
    assert both.phi == alone.phi
    assert both.layers == patterns.layers
    assert both.settings["a"] == 1


def test_a_file_of_another_model_is_refused(tmp_path):
    name = small_model("llama", tmp_path)
    file = tmp_path / "phi.json"
    model = {"name": "m", "layers": 5, "heads": 4, "kv_heads": 2, "head_size": 64}
    file.write_text(json.dumps({"schema_version": 1, "model": model}))
    done = CliRunner().invoke(app, ["calibrate", name, "-o", str(file), "--length", "16"])
    assert done.exit_code == 1
    assert "layers: file 5, model 2" in done.output


@pytest.mark.parametrize(
    "output, message", [("none/f.json", "does not exist"), ("", "is a folder")]
)
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, output, message):
    done = CliRunner().invoke(app, ["calibrate", "no model", "-o", str(tmp_path / output)])
    assert done.exit_code == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_empty_prompt_is_refused(tmp_path, monkeypatch):
    """A tokenizer makes the token that begins every text of it."""

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [7] * len(text.split())}

    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    file = tmp_path / "prompt.txt"
    file.write_text("two words")
    assert calibrate.text_prompts("m", [file], 9) == [[1, 7, 7]]
    file.write_text("")
    with pytest.raises(ValueError, match="is empty; give text"):
        calibrate.text_prompts("m", [file], 9)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = CliRunner().invoke(app, ["calibrate", str(tmp_path / "no"), "-o", str(tmp_path / "f")])
    assert done.exit_code == 1
    assert done.output.startswith("Error: model ")
