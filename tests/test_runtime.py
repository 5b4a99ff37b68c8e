"""What a worker settles at its start, and the line that says so."""

from __future__ import annotations

import logging

import pytest
import torch

from vllm_sparse import runtime
from vllm_sparse.config import SparseConfig
from vllm_sparse.patterns import ADAPTIVE, HeadPattern, PatternFile
from vllm_sparse.planner.break_even import NEVER

MODEL = runtime.Model(layers=4, heads=4, kv_heads=2, head_size=64)
SHAPE = {
    "dtype": torch.float32, "head_size": 64, "num_heads": 4, "num_kv_heads": 2, "chunk": 512,
}  # fmt: skip


@pytest.fixture
def start(monkeypatch):
    """start(settings, measured) -> (Runtime, start-up line)."""
    lines: list[str] = []
    monkeypatch.setattr(runtime.logger, "info", lambda message, *args: lines.append(message % args))
    assert isinstance(runtime.logger, logging.Logger)

    def run(measured: int = 2048, **settings):
        monkeypatch.setattr(runtime, "measure_break_even", lambda *args, chunk: measured)
        runtime.start.cache_clear()
        started = runtime.start(SparseConfig(**settings), MODEL, **SHAPE)
        return started, lines[-1]

    yield run
    runtime.start.cache_clear()


def test_the_defaults_are_said(start):
    started, line = start()
    assert started.break_even == 2048
    assert started.heads.patterns(3, 0, 4) == (ADAPTIVE,) * 4
    assert line.startswith(
        "Sparse attention active: coverage 0.95, break-even 2048 tokens (measured), "
        "patterns adaptive, decode dense, softmax online, kernels "
    )


def test_what_is_given_is_not_measured(start):
    started, line = start(break_even=0, dense_layers=(1,), coverage=1.0)
    assert started.break_even == 0
    assert "coverage 1, break-even 0 tokens (given)" in line
    assert line.endswith(", dense layers [1]")


def test_mean_correction_is_said_where_it_is_on(start):
    assert "mean correction" not in start()[1]
    _, line = start(mean_correction=True, dense_layers=(1,))
    assert line.endswith(", mean correction, dense layers [1]")


def test_a_machine_where_sparse_never_pays_is_said_so(start, caplog):
    with caplog.at_level(logging.WARNING, logger=runtime.logger.name):
        started, line = start(measured=NEVER)
        assert started.break_even == NEVER
        assert "break-even never (measured)" in line
        (said,) = caplog.messages
        assert "every prompt is read densely" in said and "break_even.json" in said
        start(measured=2048)
        start(break_even=NEVER)
        assert len(caplog.messages) == 1


def test_layers_of_one_shape_settle_it_once(start):
    started, _ = start()
    assert runtime.start(SparseConfig(), MODEL, **SHAPE) is started


def test_a_rank_gets_the_patterns_of_its_own_heads(start, tmp_path):
    dense = HeadPattern(kind="dense")
    model = {"name": "m", "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 64}
    path = tmp_path / "patterns.json"
    PatternFile(schema_version=1, model=model, layers={2: {3: dense}}).save(path)
    started, line = start(patterns=str(path))
    assert f"patterns {path}, " in line
    assert started.heads.patterns(2, 2, 2) == (ADAPTIVE, dense)
    assert started.heads.patterns(2, 0, 2) == (ADAPTIVE, ADAPTIVE)


def test_settings_that_do_not_fit_the_model_are_errors(start):
    with pytest.raises(ValueError, match="the model has the layers 0 to 3"):
        start(dense_layers=(4,))
    with pytest.raises(ValueError, match="cannot be read"):
        start(patterns="/no/such/file.json")


def with_phi(path, layers):
    model = {"name": "m", "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 64}
    phi = {i: [float(10 * i + h) for h in range(4)] for i in layers}
    PatternFile(schema_version=1, model=model, phi=phi).save(path)
    return str(path)


def test_a_rank_gets_the_phi_of_its_own_heads(start, tmp_path):
    path = with_phi(tmp_path / "phi.json", range(4))
    started, line = start(patterns=path, softmax="unified")
    assert "softmax unified, " in line
    assert started.heads.phi(3, 2, 2).tolist() == [32.0, 33.0]
    assert started.heads.phi(0, 0, 2).tolist() == [0.0, 1.0]
    assert started.heads.phi(0, 0, 2).dtype == torch.float32
    started, _ = start(patterns=path)
    assert started.heads.phi(3, 2, 2) is None


@pytest.mark.parametrize("layers", [None, [], [0, 1, 3]])
def test_unified_without_phi_names_the_command(start, tmp_path, layers):
    path = None if layers is None else with_phi(tmp_path / "phi.json", layers)
    with pytest.raises(ValueError) as error:
        start(softmax="unified", patterns=path)
    text = str(error.value)
    assert text.startswith('additional_config["sparse"]["softmax"] is \'unified\'')
    assert "`vllm-sparse calibrate MODEL -o FILE`" in text
    if layers is None:
        assert "no pattern file is given" in text
    else:
        assert f"has none for the layers {[i for i in range(4) if i not in layers]}" in text
