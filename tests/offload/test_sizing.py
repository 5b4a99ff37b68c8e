"""How much host memory the stores get, and what is said where it is too little."""

from __future__ import annotations

import pytest

from vllm_sparse.cpu_offload.connector import sizing

SHAPE = {
    "layers": 4, "row_bytes": 1024, "page_rows": 256, "max_tokens": 1000, "max_requests": 3,
}  # fmt: skip
NEEDED = 4 * 1024 * 1024  # of one request: four pages


def test_what_is_given_is_shared_by_the_ranks():
    assert sizing.store_bytes(1, ranks=2, **SHAPE) == 1 << 29


def test_by_itself_it_takes_what_requests_can_need(monkeypatch):
    monkeypatch.setattr(sizing, "_available", lambda: 1 << 40)
    assert sizing.store_bytes(None, ranks=1, **SHAPE) == 3 * NEEDED


def test_by_itself_it_takes_no_more_than_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(sizing, "_available", lambda: 10 * NEEDED)
    assert sizing.store_bytes(None, ranks=2, **SHAPE) == 10 * NEEDED // 4


def test_one_request_must_fit():
    with pytest.raises(ValueError) as error:
        sizing.store_bytes(0.001, ranks=2, **SHAPE)
    text = str(error.value)
    assert '"host_gib"] is 0.001' in text
    assert "one request of 1000 tokens (--max-model-len)" in text
    assert "Set host_gib to 0.01 or more" in text


def test_free_memory_is_read():
    assert sizing._available() > 1 << 20
