"""What serving launches compiles for sm_90 without spills, and multiplies with wgmma."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from vllm_sparse.kernels.gpu import aot, launch

ROOT = Path(__file__).resolve().parents[2]
# In a process of its own: in this one Triton interprets where there is no GPU.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

# Bytes that a Triton spills all the same: once a program, before and after its loops.
SPILLS = {"3.6": {("sparse_prefill", "bf16-e4m3-d256-sparse"): 28}}


def report(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("report") / "report.json"
    done = report("--targets", "sm_90", "--serving", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())["rows"]


def test_every_serving_configuration_is_there(rows):
    target = launch.TARGETS["sm_90"]
    expected = {
        (name, config.name)
        for name, kernel in launch.kernels().items()
        for config in kernel.serving(target)
    }
    assert {(row["kernel"], row["config"]) for row in rows} == expected
    assert all(row["target"] == "sm_90" and row["serving"] for row in rows)


def test_nothing_spills_on_sm_90(rows):
    spilling = {
        (row["kernel"], row["config"]): row["spills"]
        for row in rows
        if row["spills"] or row["stack"]
    }
    assert spilling == SPILLS.get(triton.__version__.rsplit(".", 1)[0], {})


@pytest.mark.parametrize("kernel", ["sparse_prefill", "flat_gemm"])
def test_what_is_made_for_wgmma_multiplies_with_it(rows, kernel):
    """A flat GEMM also with 8 rows, which no operand but the second can have."""
    its = [row for row in rows if row["kernel"] == kernel]
    assert its and all(row["wgmma"] for row in its)


def test_unknown_names_are_refused():
    done = report("--targets", "sm_1")
    assert done.returncode != 0
    assert "no sm_1; there are sm_80, sm_90, sm_100, gfx942" in done.stderr


def test_the_interpreter_is_refused():
    done = report("--targets", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr


def test_a_spill_is_seen(tmp_path):
    """The count comes from stores to the thread's own memory in the machine code."""
    sass = "STL [R1], R6 ;\n STL.64 [R1+0x8], R8 ;\n STL.128 [R1+0x10], R8 ;\n LDL R2, [R1] ;"
    assert aot.spilled_bytes(sass) == 4 + 8 + 16
