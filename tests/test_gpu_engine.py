"""benchmarks.gpu_engine without a GPU and without vLLM: stand-ins for its engines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bare pytest leaves the root out

from benchmarks import _engine_child, _probe_gpu, gpu_engine
from vllm_sparse.planner.device_break_even import BreakEven

STATS = ("keys_read", "keys_causal", "index_seconds", "attention_seconds", "sparse_chunks",
         "dense_chunks")  # fmt: skip


class Stub:
    """An engine's process: answers with what its settings say."""

    made: ClassVar[list[Stub]] = []
    refuses_graphs: ClassVar[set[str]] = set()
    tokens: ClassVar[dict[str, list[int]]] = {}
    dies_at: ClassVar[dict[str, int]] = {}
    slow: ClassVar[set[str]] = set()

    def __init__(self, module: str, given: str, *, cwd: Path) -> None:
        assert module == gpu_engine.CHILD
        self.settings = json.loads(given)
        config = self.settings.get("additional_config")
        asked = {} if config is None else config["sparse"]
        self.kind = "own" if config is None else "everything" if asked else "sparse"
        self.kind = asked.get("decode", self.kind)
        self.asked, self.open = 0, True
        self.process = SimpleNamespace(kill=lambda: None)
        Stub.made.append(self)

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_) -> None:
        self.open = False

    def stats(self) -> dict[str, float]:
        return dict.fromkeys(STATS, 2.0 * self.asked) | {"keys_read": 0.5 * self.asked}

    def hear(self, until: float) -> dict:
        assert until > time.monotonic()
        eager = self.settings["enforce_eager"]
        if self.kind in Stub.refuses_graphs and not eager:
            raise EOFError("the process ended with status 1")
        impls = ["TritonAttentionImpl" if self.kind == "own" else "SparseCudaImpl"]
        graphs = "none" if eager else "full_and_piecewise"
        return {"graphs": graphs, "impls": impls, "break_even": 4096, "stats": self.stats()}

    def ask(self, question: dict, until: float) -> dict:
        self.asked += 1
        if self.asked == Stub.dies_at.get(self.kind):
            raise EOFError("the process ended with status -11")
        if self.kind in Stub.slow:
            raise TimeoutError("no answer in time")
        given = Stub.tokens.get(self.kind, [5, 3, 7, 7, 7, 7, 7, 7])[: question["max_tokens"]]
        seconds = 2.0 if self.kind == "own" else 0.5
        seconds += (question["max_tokens"] - 1) * (0.5 if self.kind == "own" else 0.25)
        return {"tokens": given, "answer": [5, 3], "seconds": seconds, "stats": self.stats()}


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """What runs gpu_engine on stand-ins: (status, rows by figure)."""
    for name in ("made", "refuses_graphs", "tokens", "dies_at", "slow"):
        monkeypatch.setattr(Stub, name, type(getattr(Stub, name))())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_engine, "Child", Stub)
    monkeypatch.setattr(gpu_engine, "stop_tree", lambda process: None)
    monkeypatch.setattr(gpu_engine, "checkpoint", lambda kind: Path("/checkpoint"))
    file = tmp_path / "engine.json"

    def run(*more: str):
        given = ["--lengths", "8k", "32k", "--json", str(file), *more]
        status = gpu_engine.main(given)
        rows = json.loads(file.read_text())["rows"]
        assert not any(child.open for child in Stub.made)
        return status, {row["figure"]: row for row in rows}

    return run


def test_answers_then_first_tokens_in_turns_then_tokens(stub):
    status, rows = stub()
    assert status == 0
    assert list(rows) == [
        f"engine_{what}_{length}"
        for what in ("answers", "ttft", "tokens") for length in ("8k", "32k")
    ]  # fmt: skip
    case = rows["engine_answers_8k"]["case"]
    assert case["right"] == "3 of 3" and case["density"] == 0.25 and case["break_even"] == 4096
    assert case["graphs"] == "full_and_piecewise" and "eager" not in case
    row = rows["engine_ttft_32k"]
    assert (row["ours"], row["theirs"], row["ratio"]) == (0.5, 2.0, 4.0)
    assert row["case"]["index_share"] == 0.5 and row["case"]["repeats"] == 3
    assert rows["engine_tokens_8k"]["ours"] == 1.0
    assert rows["engine_tokens_8k"]["case"]["compared"] == 24
    kinds = {child.kind: child.settings for child in Stub.made}
    assert list(kinds) == ["sparse", "own", "everything"]
    assert kinds["sparse"]["attention_backend"] == "sparse"
    assert kinds["everything"]["additional_config"] == {
        "sparse": {"coverage": 1.0, "break_even": 0}
    }
    assert "attention_backend" not in kinds["own"]
    assert kinds["own"]["max_model_len"] == 32768 + gpu_engine.ROOM


@pytest.mark.parametrize("kind", ["sparse", "own"])
def test_where_graphs_do_not_work_all_engines_are_without_and_rows_say_so(kind, stub, capsys):
    Stub.refuses_graphs = {kind}
    status, rows = stub()
    assert status == 0
    assert "once more without CUDA graphs" in capsys.readouterr().out
    case = rows["engine_ttft_8k"]["case"]
    assert case["graphs"] == case["their_graphs"] == "none"
    assert case["eager"] == f"{kind} did not start with CUDA graphs"
    assert ("eager" in rows["engine_answers_8k"]["case"]) == (kind == "sparse")


def test_wrong_answers_have_no_time(stub):
    Stub.tokens = {"sparse": [4, 3, 7, 7, 7, 7, 7, 7]}
    status, rows = stub()
    assert status == 1
    assert rows["engine_answers_8k"]["case"]["failed"] == "3 of 3 answers are wrong"
    assert rows["engine_ttft_8k"]["ours"] is None
    assert rows["engine_tokens_8k"]["ours"] == 1.0


def test_tokens_count_up_to_the_first_that_differs(stub):
    Stub.tokens = {"everything": [5, 3, 7, 8, 7, 7, 7, 7]}
    status, rows = stub()
    assert status == 0 and rows["engine_tokens_8k"]["ours"] == 3 / 8
    Stub.tokens = {"everything": [5, 4, 7, 7, 7, 7, 7, 7]}
    status, rows = stub()
    assert status == 1
    said = "answers are wrong; 3 of 24 tokens are the peer's"
    assert rows["engine_tokens_8k"]["case"]["failed"] == said


def test_decode_over_host_memory_is_compared_with_the_own_backend(stub):
    status, rows = stub("--parts", "host")
    assert status == 0
    assert list(rows) == [
        f"host_{what}_{length}"
        for what in ("tokens", "answers", "decode") for length in ("8k", "32k")
    ]  # fmt: skip
    assert [child.kind for child in Stub.made] == ["exact", "own", "vattention"]
    row = rows["host_decode_8k"]
    assert (row["ours"], row["theirs"], row["ratio"]) == (0.25, 0.5, 2.0)
    assert row["case"]["decoded"] == gpu_engine.DECODED
    Stub.made.clear()
    Stub.tokens = {"vattention": [4] * 65}
    status, rows = stub("--parts", "host")
    assert status == 1 and rows["host_decode_8k"]["ours"] is None
    assert rows["host_decode_8k"]["case"]["failed"] == "6 answers are wrong"
    assert rows["host_tokens_8k"]["ours"] == 1.0


@pytest.mark.parametrize("how", ["dies", "slow"])
def test_an_engine_that_ends_or_hangs_costs_no_row_before(how, stub, capsys):
    if how == "dies":
        Stub.dies_at = {"own": 6}  # a warm-up and three prompts of 8K, then in 32K
    else:
        Stub.slow = {"everything"}
    status, rows = stub()
    assert status == 1
    assert {"engine_answers_32k", "engine_ttft_8k"} <= set(rows)
    assert ("engine_ttft_32k" in rows) == (how == "slow") and "engine_tokens_8k" not in rows
    assert "an engine failed: " in capsys.readouterr().out


def test_an_engine_that_is_not_sparse_is_told(stub, monkeypatch):
    right = Stub.hear

    def other(self, until):
        return right(self, until) | {"impls": ["FlashAttentionImpl"]}

    monkeypatch.setattr(Stub, "hear", other)
    status, rows = stub()
    assert status == 1
    assert rows["engine_answers_8k"]["case"]["failed"].startswith("sparse attention is not active")


def test_an_engine_that_does_not_start_at_all_is_a_failure(stub, monkeypatch):
    def ends(self, until):
        raise EOFError("the process ended with status 1")

    monkeypatch.setattr(Stub, "hear", ends)
    assert stub() == (1, {})
    assert [child.settings["enforce_eager"] for child in Stub.made] == [False, True]


def test_what_is_asked_of_a_worker_is_settled_first():
    settled = []
    counters = SimpleNamespace(settle=lambda: settled.append(1))
    impl = SimpleNamespace(counters=counters, break_even=512)
    layers = {str(i): SimpleNamespace(impl=impl) for i in range(3)} | {"x": SimpleNamespace()}
    config = SimpleNamespace(static_forward_context=layers)
    probe = _probe_gpu.GpuProbe()
    probe.vllm_config = SimpleNamespace(compilation_config=config)
    found = probe.probe()
    assert settled == [1]
    assert found["break_even"] == 512 and found["impls"] == ["SimpleNamespace"]
    impl.break_even = BreakEven(((8192, 4096), (4096, 6144)))
    found = probe.probe()
    assert found["break_even"] == "8192 rows: 4096 tokens, 4096 rows: 6144 tokens"
    json.dumps(found)


def test_questions_are_the_lean_models():
    ids, answer = _engine_child.question(2048, 3)
    assert len(ids) == 2048 and len(answer) == 2
    assert _engine_child.question(2048, 4)[0] != ids


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert gpu_engine.main([]) == 2
    assert capsys.readouterr().err == gpu_engine.NEEDS_A_GPU + "\n"
