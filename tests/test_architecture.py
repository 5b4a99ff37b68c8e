"""The direction of the imports, held over the source text, and the length of the files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
# Where the packages lie, and the import names that setup.py gives them.
PACKAGES = {
    "kernels": "vllm_sparse.kernels",
    "cpu_offload": "vllm_sparse.cpu_offload",
    "vllm_sparse": "vllm_sparse",
}
MEASURED = (*PACKAGES, "benchmarks", "examples", "tests", "tools")

# The only files that may name vLLM, as import names. `linear` is vLLM layers; of a model, its
# configuration and its plain torch are for Hugging Face alone.
VLLM_FILES = {
    f"vllm_sparse.{name}"
    for name in (
        "plugin", "compat", "cpu_platform", "log", "backend", "metadata", "impl", "metrics",
        "cuda_backend", "cuda_dense", "cuda_metadata", "cuda_impl", "check", "needle", "linear",
        "models.cope_backend", "models.cope_cuda", "models.cope_vllm", "cpu_offload.connector",
        "cpu_offload.kv_spec",
    )
}  # fmt: skip
RAY_FILES = {"vllm_sparse.cpu_offload.actor", "vllm_sparse.cpu_offload.pool"}
# What plans may know nothing of what serves.
SERVING = tuple(
    f"vllm_sparse.{name}"
    for name in (
        "plugin", "cpu_platform", "compat", "log", "config", "backend", "metadata", "impl",
        "cuda_backend", "cuda_dense", "cuda_metadata", "cuda_impl", "cuda_runtime",
        "metrics", "cpu_offload", "search", "linear", "models", "report", "check", "cli",
    )
)  # fmt: skip


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every name that a file imports, anywhere in it, relative ones resolved."""
    parent = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = parent.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            yield base
            # `from package import module` imports the module as well.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            argument = node.args[0]
            if (
                name in ("import_module", "__import__", "find_spec")
                and isinstance(argument, ast.Constant)
                and isinstance(argument.value, str)
                and not argument.value.startswith(".")
            ):
                yield argument.value


def broken_rules(source: str, module: str, is_package: bool = False) -> set[str]:
    """The rules that a file of this text would break as this module."""
    broken = set()
    is_kernel = within(module, "vllm_sparse.kernels")
    is_offload = within(module, "vllm_sparse.cpu_offload")
    for name in imports(source, module, is_package):
        ours = within(name, "vllm_sparse")
        if within(name, "kernels", "cpu_offload"):
            broken.add(f"top-level name: {name}")
        if within(name, "vllm") and not within(module, *VLLM_FILES):
            broken.add(f"vllm: {name}")
        if within(name, "ray") and module not in RAY_FILES:
            broken.add(f"ray: {name}")
        if (is_kernel and ours and not within(name, "vllm_sparse.kernels")) and (
            name != "vllm_sparse"
        ):
            broken.add(f"kernels import nothing of ours: {name}")
        if within(module, "vllm_sparse.planner") and within(name, *SERVING):
            broken.add(f"planner plans only: {name}")
        if module in ("vllm_sparse.patterns", "vllm_sparse.config") and within(
            name, "torch", "vllm", "vllm_sparse.planner", "vllm_sparse.kernels"
        ):
            broken.add(f"torch: {name}")
        if is_offload and within(name, "vllm_sparse.planner", "vllm_sparse.impl"):
            broken.add(f"cpu_offload does not plan: {name}")
    return broken


def modules() -> Iterator[tuple[Path, str, bool]]:
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            yield path, ".".join([package, *(parts[:-1] if is_package else parts)]), is_package


def sources() -> Iterator[Path]:
    yield ROOT / "setup.py"
    for folder in MEASURED:
        for suffix in ("py", "cpp", "h", "sh"):
            yield from sorted((ROOT / folder).rglob(f"*.{suffix}"))


@pytest.mark.parametrize("path, module, is_package", list(modules()), ids=lambda v: str(v))
def test_imports_point_one_way(path: Path, module: str, is_package: bool):
    assert not broken_rules(path.read_text(), module, is_package)


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES


def test_nothing_outside_the_packages_takes_the_folders_for_import_names():
    for folder in ("benchmarks", "examples", "tests", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for name in imports(path.read_text(), module, path.name == "__init__.py"):
                assert not within(name, "kernels", "cpu_offload"), f"{path}: {name}"


@pytest.mark.parametrize(
    "module, loaded",
    [
        ("vllm_sparse", ("torch", "vllm", "pydantic", "rich", "typer")),
        ("vllm_sparse.patterns", ("torch", "vllm")),
        ("vllm_sparse.config", ("torch", "vllm")),
        ("vllm_sparse.models", ("vllm",)),
        ("vllm_sparse.cli", ("torch", "vllm", "numpy")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, loaded: tuple[str, ...]):
    code = f"import sys, {module}; print(*(n for n in {loaded!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("vllm_sparse.kernels.merge", "from vllm_sparse.planner import plan_prefill"),
        ("vllm_sparse.kernels.merge", "from ..config import SparseConfig"),
        ("vllm_sparse.kernels.merge", "from .. import stats"),
        ("vllm_sparse.kernels.merge", "def f():\n    import vllm"),
        ("vllm_sparse.planner.base", "from vllm.logger import init_logger"),
        ("vllm_sparse.planner.base", "if TYPE_CHECKING:\n    import vllm.config"),
        ("vllm_sparse.planner.base", "from ..impl import SparseImpl"),
        ("vllm_sparse.planner.base", "import importlib\nimportlib.import_module('vllm.envs')"),
        ("vllm_sparse.planner.base", "from vllm_sparse import backend"),
        ("vllm_sparse.cpu_offload.store", "import vllm"),
        ("vllm_sparse.cpu_offload.store", "import ray"),
        ("vllm_sparse.cpu_offload.connector", "from ray import remote"),
        ("vllm_sparse.cpu_offload.actor", "from vllm import envs"),
        ("vllm_sparse.cpu_offload.lsh", "from vllm_sparse.planner import plan_prefill"),
        ("vllm_sparse.patterns", "import torch"),
        ("vllm_sparse.config", "from torch import Tensor"),
        ("vllm_sparse.config", "from vllm.config import VllmConfig"),
        ("vllm_sparse.stats", "import vllm"),
        ("vllm_sparse.models", "from .cope_vllm import x\nimport vllm"),
        ("vllm_sparse.models.cope_config", "from vllm.config import VllmConfig"),
        ("vllm_sparse.models.cope_torch", "import vllm"),
        ("vllm_sparse.impl", "import kernels.reference"),
        ("vllm_sparse.impl", "from cpu_offload import lsh"),
        ("vllm_sparse.impl", "import ray"),
    ],
)
def test_the_rules_can_be_broken(module: str, source: str):
    assert broken_rules(source, module)


@pytest.mark.parametrize(
    "module, source",
    [
        ("vllm_sparse.kernels.merge", "import torch, triton\nfrom . import reference"),
        ("vllm_sparse.kernels.cpu", "from vllm_sparse.kernels import _cpu"),
        ("vllm_sparse.planner.base", "from vllm_sparse.kernels import BlockIndices"),
        ("vllm_sparse.planner.base", "from ..patterns import HeadPattern"),
        ("vllm_sparse.cpu_offload.connector", "import vllm"),
        ("vllm_sparse.cpu_offload.kv_spec", "from vllm.v1 import kv_cache_interface"),
        ("vllm_sparse.cpu_offload.pool", "import ray"),
        ("vllm_sparse.cpu_offload.attention", "from vllm_sparse.kernels import merge"),
        ("vllm_sparse.impl", "import vllm_sparse.planner, vllm.config, torch"),
        ("vllm_sparse.config", "import pydantic"),
        ("vllm_sparse.models.cope_vllm", "from vllm.config import VllmConfig"),
        ("vllm_sparse.models.cope_torch", "import transformers\nfrom ..kernels import x"),
    ],
)
def test_the_rules_allow_what_the_design_draws(module: str, source: str):
    assert not broken_rules(source, module)


def test_relative_imports_of_a_package_file_are_resolved_from_the_package():
    assert "vllm_sparse.planner.base" in imports(
        "from .base import x", "vllm_sparse.planner", is_package=True
    )
    assert "vllm_sparse.config" in imports(
        "from ..config import x", "vllm_sparse.planner", is_package=True
    )
