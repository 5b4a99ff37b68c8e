"""Linear layers of our kernels in engines: greedy tokens equal vLLM's own, in fp32."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from engine_run import DENSE, Run, prompt, run
from engines_beside import beside, on_two_cores
from vllm.engine.arg_utils import EngineArgs

from vllm_sparse import __version__, plugin
from vllm_sparse.kept import processor
from vllm_sparse.kernels import cpu

NEW = 40
# Chunks are 512 tokens, pages 128.
CASES = {
    "10": [prompt(10, 1)],
    "300": [prompt(300, 2)],
    "3000": [prompt(3000, 3)],
    "mixed-8": [prompt(n, n) for n in (1, 10, 63, 64, 65, 300, 700, 2000)],
    # 8 times 7 pages, of 63 that can be used, and the 17th new token of each needs an eighth.
    "preempted": [prompt(880, 100 + i) for i in range(8)],
}
KV_BYTES = 32 << 20  # as in test_tokens.py
SIZES = {"max_tokens": NEW, "kv_cache_memory_bytes": KV_BYTES}
# Outputs x inputs of the tiny Llama: queries, keys and values (and the output layer), attention's
# output, gate and up, down.
SHAPES = ["1024x256", "256x256", "256x512", "512x256"]
SHAPES_OF_A_RANK = ["256x128", "256x256", "512x256"]
# Decodes of up to three rows are ours, those of eight and prompts are vLLM's.
BOTH, BOTH_LINE = [[3, "flat"], [256, "vllm"]], "flat for 1-3, vllm for 4 rows and more"


def of(linear: str) -> dict:
    settings = {"coverage": 1.0, "break_even": 0, "linear": linear}
    return {"attention_backend": "sparse", "additional_config": {"sparse": settings}}


def run_with_cache(folder: Path, *arguments, env: dict[str, str], **more) -> Run:
    return run(*arguments, env={**env, "XDG_CACHE_HOME": str(folder)}, **more)


def cache_of_both(folder: Path) -> Path:
    """A cache folder whose choices name both implementations, for a worker of one thread."""
    machine = f"{processor()}, {cpu.isa()}, 1 threads"
    keys = [f"{machine}, {shape} torch.float32, {__version__}" for shape in SHAPES]
    (folder / "vllm-sparse").mkdir()
    (folder / "vllm-sparse" / "linear.json").write_text(json.dumps(dict.fromkeys(keys, BOTH)))
    return folder


@pytest.fixture(scope="module")
def engines(llama, tmp_path_factory):
    """Runs by name, all but the one that takes both cores."""
    every = list(CASES.values())
    kept, empty = cache_of_both(tmp_path_factory.mktemp("kept")), tmp_path_factory.mktemp("empty")
    with beside() as engines:
        yield {
            "dense": engines.start(run, llama, every, **SIZES, **DENSE),
            "compiled": engines.start(
                run_with_cache,
                kept,
                llama,
                every,
                enforce_eager=False,
                processes=True,
                **SIZES,
                **of("auto"),
            ),
            "measured": engines.start(
                run_with_cache, empty, llama, [CASES["mixed-8"]], dtype="bfloat16", **of("auto")
            ),
        }


@pytest.fixture(scope="module")
def dense(engines):
    return engines["dense"].result()


@pytest.fixture(scope="module")
def flat(llama):
    """Eager, by two ranks."""
    sizes = SIZES | {"kv_cache_memory_bytes": KV_BYTES // 2}  # as many pages, of half the heads
    every = list(CASES.values())
    return run(llama, every, tensor_parallel_size=2, env=on_two_cores(), **sizes, **of("flat"))


def lines(result: Run) -> list[str]:
    """What is said of each shape of layers."""
    return sorted(re.findall(r"Linear layers (.*)", result.log))


def assert_same(case: str, result: Run, dense: Run) -> None:
    i = list(CASES).index(case)
    assert len({t for tokens in dense.tokens[i] for t in tokens}) > 10, "degenerate model"
    assert result.tokens[i] == dense.tokens[i]
    assert (result.preemptions[i] > 0) == (case == "preempted")


@pytest.mark.parametrize("case", CASES)
def test_compiled_and_both_implementations_by_rows(case: str, dense, engines):
    assert_same(case, engines["compiled"].result(), dense)


def test_what_was_kept_is_chosen(dense, engines):
    result = engines["compiled"].result()
    assert lines(result) == [f"{n} float32: {BOTH_LINE} (kept)" for n in SHAPES]
    assert [stats["fallbacks"] for stats in result.stats] == [{}]
    assert lines(dense) == []


def test_bfloat16_measured(engines):
    # Equal tokens are no fair demand here: two correct products differ where logits nearly tie.
    result = engines["measured"].result()
    assert result.logprobs_finite
    assert len({t for tokens in result.tokens[0] for t in tokens}) > 10
    said = lines(result)
    assert [line.split()[0] for line in said] == SHAPES
    assert all(re.search(r" bfloat16: .*(flat|vllm) .*\(measured\)$", line) for line in said)


@pytest.mark.parametrize("case", CASES)
def test_flat_and_tensor_parallel(case: str, dense, flat):
    assert_same(case, flat, dense)


def test_every_layer_is_ours_and_each_shape_is_said_once(flat):
    said = [f"{n} float32: flat for any rows (given)" for n in SHAPES_OF_A_RANK]
    assert lines(flat) == sorted(said * 2)  # a line a worker
    assert [stats["fallbacks"] for stats in flat.stats] == [{}, {}]


def test_a_bad_value_is_refused_before_any_process_starts(llama):
    plugin.register()
    with pytest.raises(ValueError, match=r"linear.*'fast'") as error:
        EngineArgs(model=llama, skip_tokenizer_init=True, **of("fast")).create_engine_config()
    assert '"vllm", "flat" or "auto"' in str(error.value)
