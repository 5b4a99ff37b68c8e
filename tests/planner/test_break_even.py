"""The break-even length: measured once, kept, and never a reason to fail."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from vllm_sparse.kept import keep
from vllm_sparse.planner import break_even as module
from vllm_sparse.planner.break_even import (
    NEVER,
    STEP,
    break_even,
    cache_file,
    crossing,
    measure,
    settled,
)

SHAPE = (torch.float32, 64, 4, 2, 1)


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Counts the measurements, which find 1024 tokens."""
    calls: list[int] = []

    def fake(*_):
        calls.append(1)
        return iter([(512, 2.0), (1024, 1.0 - 1e-9)])

    monkeypatch.setattr(module, "measure", fake)
    return calls


class Clock:
    """Time that passes only where a path runs."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter

    def paths(self, dtype, head_size, heads, kv_heads, length: int, chunk: int):
        def run(seconds: float):
            self.now += seconds

        dense = (length / 1024) ** 2 * 0.05
        return lambda: run(1.5 * dense), lambda: run(dense)


@pytest.mark.parametrize("budget, lengths", [(1.0, 1), (2.0, 2), (1e9, 4), (-1.0, 0)])
def test_measuring_stops_before_its_time_is_over(monkeypatch, budget: float, lengths: int):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "_paths", clock.paths)
    ratios = list(measure(*SHAPE, budget))
    assert [length for length, _ in ratios] == list(module.LENGTHS[:lengths])
    assert clock.now <= max(budget, 0.0)
    assert all(ratio == pytest.approx(1.5 / module.WORTH) for _, ratio in ratios)


def test_the_paths_run_and_the_first_that_pays_is_the_last():
    ratios = list(measure(*SHAPE, 2.0))
    assert ratios and all(ratio > 0 for _, ratio in ratios)
    assert all(ratio >= 1 for _, ratio in ratios[:-1])


def test_one_length_alone_is_no_reason_to_keep_never(tmp_path):
    cache = tmp_path / "break_even.json"
    found = [[(1024, 1.2)], [(1024, 1.2), (2048, 0.6)], [(1024, 2.0), (2048, 2.5)]]
    tokens = [settled(cache, str(i), lambda i=i: found[i]) for i in range(3)]
    assert tokens == [NEVER, crossing(found[1]), NEVER] and tokens[1] < NEVER
    assert set(json.loads(cache.read_text())) == {"1", "2"}
    assert settled(cache, "0", lambda: found[1]) == tokens[1]


def test_the_budget_lasts_as_long_on_a_busy_machine(monkeypatch):
    """Whatever else runs meanwhile takes no CPU seconds of ours."""
    wall, cpu = [0.0], [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(module.time, "thread_time", lambda: cpu[0])

    def path(seconds: float):
        def run() -> None:
            cpu[0] += seconds
            wall[0] += 100 * seconds

        return run

    monkeypatch.setattr(module, "_paths", lambda *_: (path(0.02), path(0.01)))
    assert len(list(measure(*SHAPE, 2.0))) > 2


@pytest.mark.parametrize(
    "ratios, tokens",
    [
        ([], NEVER),
        ([(1024, 0.9)], 1024),
        ([(1024, 1.1)], NEVER),
        ([(1024, 2.0), (2048, 1.0)], 2048),
        ([(1024, 2.0), (2048, 0.5)], 1536),  # 1448, rounded up
        ([(1024, 4.0), (2048, 2.0)], 4096),  # extrapolated
        ([(1024, 4.0), (2048, 3.9)], NEVER),  # further than is trusted
        ([(1024, 2.0), (2048, 2.5)], NEVER),
    ],
)
def test_crossing(ratios: list[tuple[int, float]], tokens: int):
    assert crossing(ratios) == tokens
    assert tokens % STEP == 0


def test_a_result_is_kept_by_shape(tmp_path: Path, measured: list[int]):
    cache = tmp_path / "folder" / "break_even.json"
    first = break_even(*SHAPE, cache=cache)
    assert first == 1024
    assert break_even(*SHAPE, cache=cache) == first and len(measured) == 1
    break_even(torch.bfloat16, *SHAPE[1:], cache=cache)
    break_even(*SHAPE[:4], 2, cache=cache)
    break_even(*SHAPE, chunk=512, cache=cache)
    assert len(measured) == 4
    assert len(json.loads(cache.read_text())) == 4
    assert os.listdir(cache.parent) == ["break_even.json"]


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b" " * (1 << 20) + b"{}"],
    ids=["empty", "cut", "list", "bytes", "nan", "deep", "large"],
)
def test_a_corrupt_cache_is_measured_anew(tmp_path: Path, measured: list[int], text: bytes):
    cache = tmp_path / "break_even.json"
    cache.write_bytes(text)
    assert break_even(*SHAPE, cache=cache) == 1024
    assert break_even(*SHAPE, cache=cache) == 1024 and len(measured) == 1


@pytest.mark.parametrize("value", [-1, True, "1024", None, 1 << 60, 10.5])
def test_a_corrupt_value_is_measured_anew(tmp_path: Path, measured: list[int], value: object):
    cache = tmp_path / "break_even.json"
    break_even(*SHAPE, cache=cache)
    key = next(iter(json.loads(cache.read_text())))
    cache.write_text(json.dumps({key: value}))
    assert break_even(*SHAPE, cache=cache) == 1024 and len(measured) == 2


def test_an_unwritable_cache_is_no_error(tmp_path: Path, measured: list[int]):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert break_even(*SHAPE, cache=blocked / "break_even.json") == 1024
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert break_even(*SHAPE, cache=folder / "break_even.json") == 1024
    (tmp_path / "is_a_folder").mkdir()
    assert break_even(*SHAPE, cache=tmp_path / "is_a_folder") == 1024


def test_the_users_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_file() == Path("/somewhere/vllm-sparse/break_even.json")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", "/home/me")
        assert cache_file() == Path("/home/me/.cache/vllm-sparse/break_even.json")


def test_a_user_without_a_home_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a uid of no entry
    assert not keep(cache_file(), "key", 1)
    assert list(tmp_path.iterdir()) == []
