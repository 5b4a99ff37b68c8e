"""What memory is said to be free, under the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_sparse.cpu_offload import memory

MIB = 1 << 20
V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes a file of a machine that has 1,000 MiB, of which 800 are free."""

    def write(name: str, text: str) -> None:
        file = tmp_path / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(
        memory, "Path", lambda first, *rest: Path(tmp_path, first.lstrip("/"), *rest)
    )
    write("/proc/meminfo", f"MemTotal: {1000 * 1024} kB\nMemAvailable:  {800 * 1024} kB\n")
    return write


def free() -> float:
    """MiB, without the headroom."""
    return memory.available_memory() / (1 - memory.HEADROOM) / MIB


def group(write, folder, files, limit, used, stat=""):
    for name, text in zip((*files, "memory.stat"), (limit, used, stat), strict=True):
        write(f"/sys/fs/cgroup/{folder}/{name}", str(text))


def test_without_limits_it_is_what_the_machine_has(machine):
    assert free() == pytest.approx(800, abs=1)
    group(machine, "", V2, "max\n", 900 * MIB)
    group(machine, "memory", V1, 2**63 - 4096, 900 * MIB)
    machine("/proc/self/cgroup", "4:memory:/elsewhere\n0::/\n")
    assert free() == pytest.approx(800, abs=1)


def test_a_container_has_its_limit_at_the_root(machine):
    group(machine, "", V2, 500 * MIB, 300 * MIB, f"anon 5\ninactive_file {100 * MIB}\n")
    assert free() == pytest.approx(300, abs=1)


def test_a_job_is_under_the_limits_of_all_groups_above_it(machine):
    machine("/proc/self/cgroup", "0::/slurm/job_7/step_0\n")
    group(machine, "slurm/job_7/step_0", V2, "max", 10 * MIB)
    assert free() == pytest.approx(800, abs=1)
    group(machine, "slurm/job_7", V2, 400 * MIB, 150 * MIB)
    assert free() == pytest.approx(250, abs=1)
    group(machine, "slurm", V2, 450 * MIB, 250 * MIB)
    assert free() == pytest.approx(200, abs=1)


def test_version_1_counts_the_groups_below_in_numbers_of_their_own(machine):
    machine("/proc/self/cgroup", "9:name=systemd:/a\n4:cpu,memory:/job\n0::/\n")
    stat = f"inactive_file 0\ntotal_inactive_file {40 * MIB}\n"
    group(machine, "memory/job", V1, 300 * MIB, 100 * MIB, stat)
    assert free() == pytest.approx(240, abs=1)


def test_a_group_over_its_limit_has_nothing(machine):
    group(machine, "", V2, 100 * MIB, 120 * MIB)
    assert memory.available_memory() == 0


def test_this_machine_has_some():
    assert MIB < memory.available_memory() < 1 << 62
