"""The start compiles every form of a kernel that serving launches: nothing is compiled after it.

Not in the interpreter, which has no forms: Triton's own launcher tells what it would compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "launch_forms.py"
SHAPES = ("32-8-128", "64-8-64", "7-1-128", "16-8-256", "32-8-128-fp8")
SHARED = [
    f"decode-{shape}-{rows}-shared" for shape in ("32-8-128", "7-1-128") for rows in (1, 3, 4)
]
CASES = [*(f"{part}-{shape}" for part in ("prefill", "decode") for shape in SHAPES),
         "prefill-mixed", "decode-unified", *SHARED]  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT], env=env, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_serving_launches_what_the_start_compiled(found, case):
    assert found[case]["made"] > (25 if case.startswith("prefill") else 5)
    assert found[case]["added"] == []


def test_all_cases_are_looked_at(found):
    assert set(found) == set(CASES)
