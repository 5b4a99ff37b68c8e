"""The counters' log line, and when it is written."""

from __future__ import annotations

import json
import logging

import pytest

from vllm_sparse.stats import Reporter, Stats


class Log:
    def __init__(self) -> None:
        self.logger = logging.getLogger("vllm_sparse.tests.stats")
        self.logger.setLevel(logging.INFO)
        self.lines: list[str] = []
        self.logger.handlers = [logging.Handler()]
        self.logger.handlers[0].emit = lambda record: self.lines.append(record.getMessage())


@pytest.fixture
def reported():
    """(stats, reporter, a clock to set, lines logged so far)."""
    stats, clock, log = Stats(), [100.0], Log()
    return stats, Reporter(stats, log.logger, lambda: clock[0]), clock, log.lines


def prefill(stats: Stats, tokens: int = 4096) -> None:
    stats.prefill_tokens += tokens
    stats.sparse_chunks += 1
    stats.keys_read += 100
    stats.keys_causal += 1000
    stats.index_seconds += 0.25
    stats.attention_seconds += 0.75


def test_the_line_reads_well_and_ends_in_json():
    stats = Stats(fallbacks={"sliding_window": 4})
    for _ in range(4):
        prefill(stats)
    line = stats.line()
    assert line.startswith(
        "Sparse prefill: 16384 tokens in 4 chunks (0 dense), density 10.0%, "
        "index 25.0% of attention time, attention 4.00 s {"
    )
    record = json.loads(line[line.index("{") :])
    assert record["prefill_tokens"] == 16384
    assert record["density"] == 0.1
    assert record["fallbacks"] == {"sliding_window": 4}


def test_nothing_done_is_no_division_by_zero():
    assert Stats().density == 0.0
    assert Stats().index_share == 0.0


def test_a_line_comes_when_decoding_begins(reported):
    stats, reporter, _, lines = reported
    reporter.step(decode_only=True)
    prefill(stats)
    reporter.step(decode_only=False)
    assert lines == []
    reporter.step(decode_only=True)
    assert len(lines) == 1
    reporter.step(decode_only=True)
    assert len(lines) == 1


def test_dense_prefill_alone_says_nothing(reported):
    stats, reporter, _, lines = reported
    stats.dense_chunks += 1
    stats.prefill_tokens += 10
    reporter.step(decode_only=True)
    assert lines == []


def test_lines_are_ten_seconds_apart_and_lose_nothing(reported):
    stats, reporter, clock, lines = reported
    prefill(stats, 1)
    reporter.step(decode_only=True)
    prefill(stats, 20)
    clock[0] += 9.9
    reporter.step(decode_only=True)
    assert len(lines) == 1
    prefill(stats, 300)
    clock[0] += 0.1
    reporter.step(decode_only=True)
    assert [line.split()[2] for line in lines] == ["1", "320"]
