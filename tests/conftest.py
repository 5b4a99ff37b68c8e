"""Common set-up of the tests, and the tiny checkpoints that they share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "examples"))
sys.path.insert(0, str(TESTS / "helpers"))
sys.path.insert(0, str(TESTS / "planner"))  # known_heads

try:
    installed = importlib.util.find_spec("vllm_sparse.kernels") is not None
except ModuleNotFoundError:
    installed = False
if not installed:
    pytest.exit("vllm_sparse.kernels is missing: run `pip install -e .` in the repository", 4)

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Before the first import of triton, which reads it once.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Another build of the native extension, which is tested (see tools/sanitize.py). No option: the
# tests' folders have their own conftest.py, which load the extension before options are known.
LIBRARY_VARIABLE = "TEST_NATIVE_LIBRARY"
if LIBRARY := os.environ.get(LIBRARY_VARIABLE):
    from vllm_sparse.kernels import cpu

    cpu.LIBRARY_FILE = Path(LIBRARY)
    loaded = getattr(cpu.native(), "_name", None)
    if loaded != LIBRARY:
        pytest.exit(f"{LIBRARY_VARIABLE} is {LIBRARY}, but {loaded} is loaded", 4)


def pytest_addoption(parser):
    parser.addoption(
        "--native-threads",
        type=int,
        metavar="N",
        help="so many threads in each test of the native kernels that does not choose itself",
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """4 layers, 4 query heads, 2 KV heads of 64, random."""
    import tiny_models

    return tiny_models.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory) -> str:
    """6 layers of which 2 and 5 are full attention, random."""
    import tiny_models

    return tiny_models.save_gemma3(tmp_path_factory.mktemp("gemma3"))
