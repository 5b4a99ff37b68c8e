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


def pytest_addoption(parser):
    parser.addoption(
        "--native-library",
        type=Path,
        metavar="FILE",
        help="test this build of the native extension (see tools/sanitize.py)",
    )
    parser.addoption(
        "--native-threads",
        type=int,
        metavar="N",
        help="so many threads in each test of the native kernels that does not choose itself",
    )


def pytest_configure(config):
    if file := config.getoption("--native-library"):
        from vllm_sparse.kernels import cpu

        cpu.LIBRARY_FILE = file


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
