"""Which implementation a linear layer runs by its rows: chosen by times, and kept."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
import torch

from vllm_sparse.kept import kept
from vllm_sparse.linear import cpu_layer, timing
from vllm_sparse.linear.choice import ROWS, VLLM, Choice

FIRST, LAST = ROWS[0], ROWS[-1]
NAMES = ("a", "b")
CHOICE = Choice((4, 256), ("a", "b"))


def times(**of: list[float | None] | float) -> dict[str, list[float | None]]:
    return {k: v if isinstance(v, list) else [v] * len(ROWS) for k, v in of.items()}


def up_to(rows: int, below: float | None, above: float | None) -> list[float | None]:
    return [below if r <= rows else above for r in ROWS]


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        (times(a=1.0), [(LAST, "a")]),
        (times(a=2.0, b=1.0), [(LAST, "b")]),
        (times(a=1.0, b=1.0), [(LAST, "a")]),  # the first named where nothing is won
        (times(a=up_to(4, 1.0, 3.0), b=2.0), [(4, "a"), (LAST, "b")]),
        (times(a=up_to(4, 1.0, None), b=2.0), [(4, "a"), (LAST, "b")]),
        (times(a=up_to(4, None, 1.0), b=2.0), [(4, "b"), (LAST, "a")]),
        (times(a=up_to(64, 1.0, 3.0), b=2.0, c=up_to(2, 0.5, None)),
         [(2, "c"), (64, "a"), (LAST, "b")]),
        # Back and forth is left as it is.
        (times(a=[1.0, 3.0] * (len(ROWS) // 2), b=2.0),
         [(r, "ab"[i % 2]) for i, r in enumerate(ROWS)]),
    ],
    ids=range(8),
)  # fmt: skip
def test_the_fastest_at_each_number_of_rows(given, pairs):
    choice = Choice.of_times(given)
    assert list(zip(choice.rows, choice.names, strict=True)) == pairs
    for i, rows in enumerate(ROWS):
        found = {k: v[i] for k, v in given.items() if v[i] is not None}
        assert found[choice.name(rows)] == min(found.values())


def test_what_fewer_rows_run_is_kept_within_the_noise():
    other = [1.0] * len(ROWS)
    ours = [0.9, 1.02, 1.02, 1.04, *other[4:]]
    assert Choice.of_times({"flat": ours, "vllm": other}) == Choice((3, 256), ("flat", "vllm"))


def test_names_at_and_between_and_beyond_the_measured_rows():
    choice = Choice((1, 4, 16), ("a", "b", "c"))
    rows = [0, 1, 2, 3, 4, 5, 15, 16, 17, 1 << 40]
    assert "".join(map(choice.name, rows)) == "aabbbccccc"


def test_always():
    choice = Choice.always("a")
    assert [choice.name(rows) for rows in (0, 1, 2, 1 << 40)] == ["a"] * 4


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        (Choice.always("flat"), "flat for any rows"),
        (Choice((256,), ("vllm",)), "vllm for any rows"),
        (Choice((1, 256), ("a", "b")), "a for 1, b for 2 rows and more"),
        (Choice((4, 256), ("a", "b")), "a for 1-4, b for 5 rows and more"),
        (Choice((4, 5, 65), ("a", "b", "c")), "a for 1-4, b for 5, c for 6 rows and more"),
    ],
    ids=str,
)
def test_the_line_for_people(choice: Choice, line: str):
    assert choice.line() == line


@pytest.mark.parametrize("choice", [Choice.always("a"), CHOICE, Choice((1, 2, 8), tuple("aba"))])
def test_what_is_kept_is_read_again(choice: Choice):
    assert Choice.from_kept(json.loads(json.dumps(choice.to_keep())), NAMES) == choice


CORRUPT = [
    None, True, 1, 1.5, "", "a", [], {}, [1], ["a"], [[]], [[1]], [[1, "a", 2]], {"1": "a"},
    [["1", "a"]], [[1.0, "a"]], [[float("nan"), "a"]], [[float("inf"), "a"]], [[True, "a"]],
    [[0, "a"]], [[-1, "a"]], [[None, "a"]], [[1, "c"]], [[1, None]], [[1, ["a"]]], [[1, {}]],
    [[4, "a"], [1, "b"]], [[4, "a"], [4, "b"]], [[1, "a"], [2, "c"]], [[1, "a"], 2],
]  # fmt: skip


@pytest.mark.parametrize("value", CORRUPT, ids=repr)
def test_corrupt_values_are_no_choice(value):
    assert Choice.from_kept(value, NAMES) is None


class Measured:
    """Counts the measurements, which find CHOICE."""

    calls = 0

    def __call__(self) -> Choice:
        self.calls += 1
        return CHOICE


def test_a_choice_is_measured_once_for_a_key(tmp_path: Path):
    measure, cache = Measured(), tmp_path / "folder" / "linear.json"
    assert timing.settled("x", NAMES, measure, cache) == (CHOICE, "measured")
    assert timing.settled("x", NAMES, measure, cache) == (CHOICE, "kept")
    assert timing.settled("y", NAMES, measure, cache) == (CHOICE, "measured")
    assert measure.calls == 2
    assert set(kept(cache)) == {f"{key}, {timing.__version__}" for key in "xy"}


def test_another_version_measures_anew(tmp_path: Path, monkeypatch):
    measure, cache = Measured(), tmp_path / "linear.json"
    timing.settled("x", NAMES, measure, cache)
    monkeypatch.setattr(timing, "__version__", "another")
    assert timing.settled("x", NAMES, measure, cache) == (CHOICE, "measured")
    assert len(kept(cache)) == 2


def test_a_name_that_is_not_known_any_more_is_measured_anew(tmp_path: Path):
    measure, cache = Measured(), tmp_path / "linear.json"
    timing.settled("x", NAMES, measure, cache)
    assert timing.settled("x", ("a", "c"), measure, cache)[1] == "measured"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 20) + b"{}"],
    ids=["empty", "cut", "list", "bytes", "deep", "large"],
)  # fmt: skip
def test_a_corrupt_file_is_measured_anew(tmp_path: Path, text: bytes):
    measure, cache = Measured(), tmp_path / "linear.json"
    cache.write_bytes(text)
    assert timing.settled("x", NAMES, measure, cache) == (CHOICE, "measured")
    assert timing.settled("x", NAMES, measure, cache) == (CHOICE, "kept")


@pytest.mark.parametrize("value", CORRUPT, ids=repr)
def test_a_corrupt_value_is_measured_anew_and_others_stay(tmp_path: Path, value):
    measure, cache = Measured(), tmp_path / "linear.json"
    key = f"x, {timing.__version__}"
    cache.write_text(json.dumps({key: value, "other": 1}))
    assert timing.settled("x", NAMES, measure, cache) == (CHOICE, "measured")
    assert timing.settled("x", NAMES, measure, cache) == (CHOICE, "kept")
    assert kept(cache)["other"] == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path):
    blocked, folder = tmp_path / "file", tmp_path / "folder"
    blocked.write_text("")
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    for cache in (blocked / "linear.json", folder / "linear.json", tmp_path):
        assert timing.settled("x", NAMES, Measured(), cache) == (CHOICE, "measured")


def test_a_shape_is_measured_once_where_nothing_can_be_written(tmp_path: Path):
    measure, blocked = Measured(), tmp_path / "file"
    blocked.write_text("")
    said = [timing.settled("x", NAMES, measure, blocked / "linear.json")[1] for _ in range(3)]
    assert (said, measure.calls) == (["measured", "kept", "kept"], 1)


def test_the_users_cache_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing.settled("x", NAMES, Measured())[1] == "measured"
    assert timing.settled("x", NAMES, Measured())[1] == "kept"
    assert os.listdir(tmp_path / "vllm-sparse") == ["linear.json"]


@pytest.mark.parametrize(
    ("shape", "rows", "count"),
    [
        ((10, 5), 10, 5),
        ((1, 1), 1, 250),  # many of a tiny one
        ((13, 5), 13, 3),  # no more than fit
        ((50, 5), 50, 1),
        ((100, 5), 50, 1),  # a large one is cut
        ((3, 500), 1, 1),  # but a row is the least
    ],
)
def test_copies_are_as_large_as_is_asked_for(shape, rows: int, count: int, monkeypatch):
    monkeypatch.setattr(timing, "TOGETHER_BYTES", 1000)
    weight = torch.randn(shape)
    each = timing.copies(weight)
    assert [tuple(one.shape) for one in each] == [(rows, shape[1])] * count
    assert all(torch.equal(one, weight[:rows]) for one in each)
    # Each has memory of its own: those that read them take it over.
    assert len({one.untyped_storage().data_ptr() for one in [*each, weight]}) == count + 1
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in each)


class Clock:
    """Seconds that pass only where an implementation runs."""

    def __init__(self, **costs) -> None:
        """costs: seconds of a name by (rows, how often it ran before with so many)."""
        self.costs, self.now = costs, 0.0
        self.calls: dict[tuple[str, int], int] = {}
        self.seen: list[torch.Tensor] = []

    def __call__(self, run) -> float:
        begin = self.now
        run()
        return self.now - begin

    def choose(self, dtype=torch.float32, most_rows=None, num_copies: int = 1) -> Choice:
        runs = {name: [lambda x, n=name: self.run(n, x)] * num_copies for name in self.costs}
        device = torch.device("cpu")
        return timing.choose(runs, 7, dtype, device, self, most_rows)

    def run(self, name: str, x: torch.Tensor) -> None:
        before = self.calls.get((name, len(x)), 0)
        self.calls[name, len(x)] = before + 1
        self.seen.append(x)
        self.now += self.costs[name](len(x), before)


def test_the_fastest_by_the_clock():
    clock = Clock(a=lambda rows, before: float(rows), b=lambda rows, before: 9.0)
    assert clock.choose() == Choice((8, 256), ("a", "b"))
    assert {rows for _, rows in clock.calls} == set(ROWS)


def test_warming_up_does_not_count():
    """The first call takes no time here: were it counted, `a` would win."""
    clock = Clock(a=lambda rows, before: 2.0 if before else 0.0, b=lambda rows, before: 1.0)
    assert clock.choose() == Choice((256,), ("b",))


@pytest.mark.parametrize("disturbed", [1, 2])
def test_the_best_round_counts(disturbed: int):
    clock = Clock(a=lambda rows, before: 50.0 if before == disturbed else 1.0, b=lambda *_: 2.0)
    assert clock.choose() == Choice((256,), ("a",))


def test_what_is_for_few_rows_is_not_tried_with_more():
    clock = Clock(a=lambda *_: 1.0, b=lambda *_: 2.0)
    assert clock.choose(most_rows={"a": 4}) == CHOICE
    assert max(rows for name, rows in clock.calls if name == "a") == 4
    assert max(rows for name, rows in clock.calls if name == "b") == LAST


@pytest.mark.parametrize("default", [torch.float32, torch.float16], ids=str)
def test_each_copy_runs_on_rows_of_the_given_type(default, monkeypatch):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)  # as vLLM's loader does
    try:
        clock = Clock(a=lambda *_: 1.0)
        clock.choose(torch.bfloat16, num_copies=3)
    finally:
        torch.set_default_dtype(before)
    assert set(clock.calls.values()) == {3 * (timing.ROUNDS + 1)}
    assert {(x.shape[1], x.dtype) for x in clock.seen} == {(7, torch.bfloat16)}
    assert all((x == 1).all() for x in clock.seen)


@pytest.mark.parametrize("slow", cpu_layer.NAMES)
def test_the_slower_one_is_not_chosen(slow: str, tmp_path: Path, monkeypatch):
    def late(*_):
        time.sleep(5e-3)

    weight, made = torch.randn(96, 64), []

    def make_theirs(one: torch.Tensor):
        made.append(one)
        return late if slow == VLLM else lambda *_: None

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "TOGETHER_BYTES", 2 * weight.nbytes)
    if slow == cpu_layer.FLAT:
        monkeypatch.setattr(cpu_layer, "linear", late)
    other = next(name for name in cpu_layer.NAMES if name != slow)
    choice, source = cpu_layer.choose(weight, make_theirs, 1)
    assert (choice.names, source) == ((other,), "measured")
    assert len(made) == 2
    assert cpu_layer.choose(weight, make_theirs, 1) == (choice, "kept")
    # Another shape, type or number of threads is another key.
    others = [(weight[:95], 1), (weight[:, :63], 1), (weight.half(), 1), (weight, 2)]
    assert {cpu_layer.choose(w, make_theirs, n)[1] for w, n in others} == {"measured"}
