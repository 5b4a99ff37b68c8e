"""benchmarks.prefill without a GPU: its arguments, its checks, where its inputs come from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import ANY_DTYPE, DEVICE, HAS_GPU
from known_heads import SCALE, Heads

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bare pytest leaves the root out

from benchmarks import _prefill_peers, prefill
from benchmarks._capture import capture


@pytest.mark.skipif(HAS_GPU, reason="here is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert prefill.main(["--lengths", "4k"]) == 2
    said = capsys.readouterr()
    assert said.err == prefill.NEEDS_A_GPU + "\n" and not said.out


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--lengths", "5k"], "invalid choice"),
        (["--model", "x"], "--model and --text go together"),
        (["--coverage", "1.5"], "more than 0, at most 1"),
    ],
)
def test_bad_arguments_are_named(argv, says, capsys):
    with pytest.raises(SystemExit):
        prefill.parse(argv)
    assert says in capsys.readouterr().err


def problem(n: int = 576) -> prefill.Paged:
    heads = Heads(n, columns=20)
    q = torch.stack([heads.sink_window(), heads.same_word()], 1)
    v = torch.randn(n, 1, 128, generator=torch.Generator().manual_seed(1))
    tensors = (x.to(ANY_DTYPE).to(DEVICE) for x in (q, heads.keys[:, None], v))
    return prefill.Paged.of(*tensors, SCALE)


def test_a_right_result_passes_and_says_what_it_read():
    found = prefill.check(problem(), 0.95)
    assert found.why is None
    assert 0 < found.density < 0.9 and found.covered > 0.94
    assert found.dense_error < 1e-2 and found.error < 0.3


def test_a_wrong_output_fails_its_check(monkeypatch):
    right = prefill.Paged.attend
    monkeypatch.setattr(
        prefill.Paged, "attend", lambda self, i: tuple(x + 0.5 for x in right(self, i))
    )
    assert "everything selected is off by" in prefill.check(problem(), 0.95).why


def test_a_selection_that_covers_too_little_fails_its_check(monkeypatch):
    right = prefill.Paged.plan

    # Of the first tiles' lists every tile gets the first head's: the sink and a window.
    def worse(self, coverage):
        indices = right(self, 0.1)
        return indices

    monkeypatch.setattr(prefill.Paged, "plan", worse)
    monkeypatch.setattr(prefill, "COVERAGE_SLACK", 0.0)
    assert "of the mass, asked for 0.9999" in prefill.check(problem(), 0.9999).why


def test_a_failed_check_has_no_time(monkeypatch):
    failed = prefill.Checked(0.1, 0.5, 0.2, 0.0, "covered too little")
    monkeypatch.setattr(prefill, "check", lambda *a: failed)
    monkeypatch.setattr(_prefill_peers, "peers", lambda *a: iter([("x", "is not installed")]))
    p = problem(64)
    rows = prefill.measure("1k", _Inputs(0, p.q, p.k, p.v, SCALE), 0.95, 1)
    assert [(row.ours, row.case["failed"]) for row in rows] == [(None, "covered too little")]


class _Inputs:
    def __init__(self, layer, q, k, v, scale):
        self.layer, self.q, self.k, self.v, self.scale = layer, q, k, v, scale


def test_inputs_are_what_the_models_layers_attend_with(llama):
    prompt = torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    found = list(capture(llama, prompt, [0, 2], dtype=torch.float32, device=torch.device("cpu")))
    assert [inputs.layer for inputs in found] == [0, 2]
    for inputs in found:
        assert inputs.q.shape == (40, 4, 64) and inputs.k.shape == inputs.v.shape == (40, 2, 64)
        assert inputs.scale == 64**-0.5 and inputs.q.isfinite().all()
    every = list(capture(llama, prompt, None, dtype=torch.float32, device=torch.device("cpu")))
    assert [inputs.layer for inputs in every] == [0, 1, 2, 3]
    torch.testing.assert_close(every[2].q, found[1].q)


def test_peers_that_do_not_run_say_why(monkeypatch):
    def not_here(*tensors):
        raise ImportError("no compiler\nhere")

    monkeypatch.setattr(_prefill_peers, "_flex", not_here)  # takes a minute to compile on a CPU
    q, k = torch.randn(64, 4, 64), torch.randn(64, 2, 64)
    found = dict(_prefill_peers.peers(q, k, k, 0.125))
    assert set(found) == {
        "SDPA cuDNN", "SDPA flash", "FlexAttention", "FlashAttention 3", "xformers",
    }  # fmt: skip
    assert found["FlexAttention"] == "ImportError: no compiler here"
    for run in found.values():
        assert isinstance(run, str) or run().shape == q.shape
