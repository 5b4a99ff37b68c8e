"""benchmarks.prefill without a GPU: its arguments, its checks, where its inputs come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import ANY_DTYPE, DEVICE, HAS_GPU
from known_heads import SCALE, Heads

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bare pytest leaves the root out

from benchmarks import _capture, _gpu_clock, _prefill_peers, _prefill_problem, prefill
from benchmarks._capture import capture
from benchmarks._form import Row
from benchmarks._prefill_problem import Checked, Paged, check


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
        (["--peers", "mine"], "invalid choice"),
        (["--chunk", "8192", "--lengths", "8k", "32k"], "fewer than --lengths have"),
        (["--chunk", "0"], "give 1 or more"),
    ],
)
def test_bad_arguments_are_named(argv, says, capsys):
    with pytest.raises(SystemExit):
        prefill.parse(argv)
    assert says in capsys.readouterr().err


def problem(n: int = 576, *, fp8: bool = False) -> Paged:
    heads = Heads(n, columns=20)
    q = torch.stack([heads.sink_window(), heads.same_word()], 1)
    v = torch.randn(n, 1, 128, generator=torch.Generator().manual_seed(1))
    tensors = (x.to(ANY_DTYPE).to(DEVICE) for x in (q, heads.keys[:, None], v))
    return Paged.of(*tensors, SCALE, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True], ids=["auto", "fp8"])
def test_a_right_result_passes_and_says_what_it_read(fp8):
    found = check(problem(fp8=fp8), 0.95)
    assert found.why is None
    assert 0 < found.density < 0.9 and found.covered > 0.94
    assert found.dense_error < 1e-2 and found.error < 0.3


def test_an_fp8_cache_stands_for_the_keys_and_values_that_it_is_checked_with():
    q, k, v = (torch.randn(40, heads, 64).to(ANY_DTYPE).to(DEVICE) for heads in (4, 2, 2))
    given = Paged.of(q, k * 3, v / 7, 0.125, fp8=True)
    for name, cache, meant, before in (
        ("k_scale", given.caches[0], given.k, k * 3), ("v_scale", given.caches[1], given.v, v / 7),
    ):  # fmt: skip
        scale = given.scales[name]
        assert cache.dtype == torch.float8_e4m3fn and scale.shape == (1,)
        assert float(scale.log2()) % 1 == 0 and float(scale) != 1
        rows = cache.float().transpose(1, 2).flatten(0, 1)[:40] * scale
        assert torch.equal(rows, meant.float())
        assert 224 < float(before.abs().max() / scale) <= 448
        torch.testing.assert_close(meant, before, rtol=2**-4, atol=float(scale) * 2**-9)
    assert not given.caches[0].float().transpose(1, 2).flatten(0, 1)[40:].any()


def test_a_wrong_output_fails_its_check(monkeypatch):
    right = Paged.attend
    monkeypatch.setattr(Paged, "attend", lambda self, i: tuple(x + 0.5 for x in right(self, i)))
    assert "everything selected is off by" in check(problem(), 0.95).why


def test_a_selection_that_covers_too_little_fails_its_check(monkeypatch):
    right = Paged.plan
    # Of the first tiles' lists every tile gets the first head's: the sink and a window.
    monkeypatch.setattr(Paged, "plan", lambda self, coverage: right(self, 0.1))
    monkeypatch.setattr(_prefill_problem, "COVERAGE_SLACK", 0.0)
    assert "of the mass, asked for 0.9999" in check(problem(), 0.9999).why


class _Inputs:
    def __init__(self, layer, q, k, v, scale):
        self.layer, self.q, self.k, self.v, self.scale = layer, q, k, v, scale


def inputs(n: int = 64, layer: int = 0) -> _Inputs:
    p = problem(n)
    return _Inputs(layer, p.q, p.k, p.v, SCALE)


real_peers = _prefill_peers.peers


def exact(p: Paged):
    """A peer that gives what float32 attention gives."""
    return lambda: _prefill_problem.float32_rows(p, torch.arange(len(p.q), device=p.q.device))


@pytest.fixture
def clock(monkeypatch):
    """Times that are given in place of a GPU's; what runs is what is named."""
    given = {"ours": 1.0, "index": 0.25, "kernel": 0.5, "right": 8.0, "slow": 9.0}
    asked = []

    def measured(works, repeats, most_s, *, ahead=1):
        asked.append((tuple(works), ahead))
        return {name: _gpu_clock.Taken(given[name] / ahead, 0.1) for name in works}

    monkeypatch.setattr(prefill, "measured", measured)
    return asked


def test_a_failed_check_has_no_time(monkeypatch):
    failed = Checked(0.1, 0.5, 0.2, 0.0, "covered too little")
    monkeypatch.setattr(_prefill_problem, "check", lambda *a: failed)
    monkeypatch.setattr(_prefill_peers, "peers", lambda *a: iter([("x", "is not installed")]))
    rows = list(prefill.measure("1k", inputs(), prefill.parse([])))
    assert [(row.ours, row.case["failed"]) for row in rows] == [(None, "covered too little")]


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_rows_are_of_the_peers_that_are_right(cache, clock, monkeypatch, capsys):
    def peers(p, wanted):
        assert bool(p.scales) == (cache == "fp8") and wanted == ["fa3", "triton"]
        yield "gone", "ImportError: no gone"
        yield "right", exact(p)
        yield "wrong", lambda: torch.zeros_like(p.q)
        yield "slow", exact(p)

    monkeypatch.setattr(_prefill_peers, "peers", peers)
    options = prefill.parse(["--cache", cache, "--peers", "fa3", "triton", "--repeats", "2"])
    rows = {row.figure: row for row in prefill.measure("1k", inputs(200), options)}
    name = "prefill_1k_layer0" + ("_fp8" if cache == "fp8" else "")
    assert list(rows) == [name, f"{name}_kernel", f"{name}_queued"]
    row = rows[name]
    assert (row.peer, row.ratio) == ("right", 8.0)
    assert row.case["right"] == 8.0 and row.case["slow"] == 9.0 and "wrong" not in row.case
    assert row.case["index_share"] == 0.25 and row.case["launch_s"] == 0.1
    assert rows[f"{name}_queued"].ratio == 8.0
    assert clock[1] == (("ours", "index", "right"), prefill.AHEAD)
    said = capsys.readouterr().out
    assert "gone is not here: ImportError: no gone" in said and "wrong is left out: off by" in said


def test_a_chunk_is_the_last_rows_over_all_keys(clock, monkeypatch):
    def peers(p, wanted):
        assert (p.query_len, p.seq_len) == (30, 200)
        yield "right", exact(p)

    monkeypatch.setattr(_prefill_peers, "peers", peers)
    whole = problem(200)
    one = _Inputs(2, whole.q, whole.k, whole.v, SCALE)
    rows = list(prefill.measure("1k", one, prefill.parse(["--chunk", "30"])))
    assert rows[0].figure == "prefill_1k_layer2_chunk30" and rows[0].ratio == 8.0
    assert (rows[0].case["tokens"], rows[0].case["chunk"]) == (200, 30)
    chunk = Paged.of(whole.q[-30:], whole.k, whole.v, SCALE)
    assert chunk.pairs == sum(range(171, 201)) and whole.pairs == 200 * 201 / 2
    assert rows[1].ours == pytest.approx(4 * 128 * 2 * chunk.pairs * 1e-12 / 0.5
                                         * check(chunk, 0.95).density)  # fmt: skip
    torch.testing.assert_close(exact(chunk)(), exact(whole)()[-30:])
    dense, _ = chunk.attend(None)
    torch.testing.assert_close(dense.float(), exact(chunk)(), rtol=1e-2, atol=1e-2)
    found = dict(real_peers(chunk, ["cudnn", "flash", "xformers", "flex"]))
    assert set(found.values()) == {"its mask is of whole prompts"}


def test_what_fails_half_way_keeps_the_rows_before(clock, monkeypatch):
    def peers(p, wanted):
        yield "right", exact(p)

    monkeypatch.setattr(_prefill_peers, "peers", peers)
    once = prefill.measured

    def fails_queued(*args, ahead=1):
        if ahead > 1:
            raise torch.OutOfMemoryError("no room\nleft")
        return once(*args)

    monkeypatch.setattr(prefill, "measured", fails_queued)
    rows = list(prefill.measure("1k", inputs(200), prefill.parse([])))
    assert [row.ours is None for row in rows] == [False, False, True]
    assert rows[-1].figure == "prefill_1k_layer0_rest"
    assert rows[-1].case["failed"] == "OutOfMemoryError: no room left"

    def no_plan(*args):
        raise RuntimeError("no plan")

    monkeypatch.setattr(Paged, "plan", no_plan)
    (row,) = prefill.measure("1k", inputs(200), prefill.parse([]))
    assert row.figure == "prefill_1k_layer0" and row.case["failed"] == "RuntimeError: no plan"


def layer_row(layer: int, ours: float, **peers: float) -> Row:
    case = {"tokens": 64, "layer": layer, "coverage": 0.95, "density": 0.5, "index_share": 0.5}
    best = min(peers, key=peers.get)
    case = {**case, "covered": 0.96, "launch_s": 0.1, **peers}
    return Row.time(f"prefill_1k_layer{layer}", case, ours, best, peers[best], error=0.1 * layer)


def test_layers_are_summed_against_the_peer_that_is_best_over_all():
    rows = [layer_row(0, 1.0, a=4.0, b=5.0), layer_row(1, 2.0, a=8.0, b=6.0, c=0.1)]
    (row,) = prefill.all_layers("prefill_1k_all", rows)
    assert (row.peer, row.ours, row.theirs, row.error) == ("b", 3.0, 11.0, 0.1)
    assert row.case == {"tokens": 64, "layers": 2, "density": 0.5, "index_share": 0.5}
    assert not list(prefill.all_layers("x", rows[:1]))
    failed = Row.failed("prefill_1k_layer2", {}, "wrong", peer=None, unit="s")
    assert not list(prefill.all_layers("x", [*rows, failed]))


def test_each_layer_is_in_the_file_before_the_next_is_measured(monkeypatch, tmp_path):
    file, seen = tmp_path / "rows.json", []

    def measure(name, one, options):
        seen.append([row["figure"] for row in json.loads(file.read_text())["rows"]])
        yield layer_row(one.layer, 1.0, a=2.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(prefill, "checkpoint", lambda kind: kind)
    monkeypatch.setattr(prefill, "prompt_of", lambda *a: [1])
    monkeypatch.setattr(prefill, "measure", measure)
    monkeypatch.setattr(_capture, "capture", lambda *a, **k: iter([inputs(), inputs(layer=1)]))
    assert prefill.main(["--lengths", "4k", "--json", str(file)]) == 0
    assert seen == [[], ["prefill_1k_layer0"]]
    rows = json.loads(file.read_text())["rows"]
    assert [row["figure"] for row in rows][2:] == ["prefill_4k_all"]
    assert prefill.main(["--lengths", "8k", "--json", str(file), "--add"]) == 0
    figures = [row["figure"] for row in json.loads(file.read_text())["rows"]]
    assert sorted(figures) == [
        "prefill_1k_layer0", "prefill_1k_layer1", "prefill_4k_all", "prefill_8k_all",
    ]  # fmt: skip


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
    q, k = (torch.randn(64, heads, 64).to(ANY_DTYPE).to(DEVICE) for heads in (4, 2))
    p = Paged.of(q, k, k, 0.125)
    found = dict(_prefill_peers.peers(p))
    assert set(found) == {
        "SDPA cuDNN", "SDPA flash", "FlexAttention", "FlashAttention 3", "xformers",
        "vLLM Triton attention",
    }  # fmt: skip
    assert set(_prefill_peers.PEERS) == set(prefill.PEERS)
    assert found["FlexAttention"] == "ImportError: no compiler here"
    for run in found.values():
        assert isinstance(run, str) or run().shape == q.shape
    assert list(dict(_prefill_peers.peers(p, ["flex"]))) == ["FlexAttention"]
    in_fp8 = Paged.of(q, k, k, 0.125, fp8=True)
    assert set(dict(_prefill_peers.peers(in_fp8, ["triton", "flex"]))) == {
        "vLLM Triton attention", "FlexAttention (16 bits)",
    }  # fmt: skip


def truth_of(p: Paged) -> torch.Tensor:
    return exact(p)()


@pytest.mark.skipif(HAS_GPU, reason="takes torch's plain kernels for a GPU's")
@pytest.mark.parametrize("grouped", [True, False])
def test_sdpa_has_keys_of_its_own_where_a_backend_has_no_groups(grouped, monkeypatch):
    from torch.nn.functional import scaled_dot_product_attention as plain

    asked = []

    def attention(*tensors, enable_gqa, **more):
        asked.append(enable_gqa)
        if enable_gqa and not grouped:
            raise RuntimeError("No available kernel")
        return plain(*tensors, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    q, k = torch.randn(70, 4, 64), torch.randn(70, 2, 64)
    p = Paged.of(q, k, k, 0.125)
    out = _prefill_peers._sdpa("MATH")(p)()
    torch.testing.assert_close(out, truth_of(p), rtol=1e-4, atol=1e-4)
    assert asked == ([True, True] if grouped else [True, False])


@pytest.mark.parametrize("length", [256, 200])
def test_the_mask_of_flex_attention_is_causal(length, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    q, k = (torch.randn(length, heads, 64).to(ANY_DTYPE).to(DEVICE) for heads in (4, 2))
    p = Paged.of(q, k, k, 0.125)
    out = _prefill_peers._flex(p)()
    torch.testing.assert_close(out.float(), truth_of(p), rtol=1e-2, atol=1e-2)
    if length == 256:
        whole = torch.nn.attention.flex_attention.create_block_mask(
            lambda b, h, row, key: row >= key, None, None, length, length, device=DEVICE
        )
        mine = _prefill_peers.causal_mask(length, torch.device(DEVICE))
        assert torch.equal(mine.to_dense(), whole.to_dense())
        assert torch.equal(mine.full_kv_num_blocks, whole.full_kv_num_blocks)


@pytest.mark.parametrize("has", ["vllm.vllm_flash_attn", "vllm_fa3", None])
def test_flash_attention_3_is_vllms_or_a_package_of_its_own(has, monkeypatch):
    class Module:
        flash_attn_varlen_func = "found"

    def find(name):
        if name == has:
            return Module
        raise ImportError(f"no {name}")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_prefill_peers.importlib, "import_module", find)
    if has:
        assert _prefill_peers.flash_attention_3(torch.device("cuda")) == "found"
        return
    with pytest.raises(ImportError, match=r"no vllm\.vllm_flash_attn; vllm_fa3: no vllm_fa3"):
        _prefill_peers.flash_attention_3(torch.device("cuda"))


def test_the_clock_stops_at_its_seconds_but_has_a_median(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    now, calls = [0.0], []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(1, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(_gpu_clock.time, "perf_counter", lambda: now[0])

    def work():
        calls.append(now[0])
        now[0] += 2.0

    for most, wanted in ((1.0, 4), (9.0, 5), (100.0, 10)):
        calls.clear()
        taken = _gpu_clock.measured({"x": work}, 9, most)
        assert taken["x"].seconds == taken["x"].host == 2.0
        assert len(calls) == wanted
