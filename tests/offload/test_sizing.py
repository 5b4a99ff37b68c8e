"""How much host memory the stores get, and what is said where it is too little."""

from __future__ import annotations

import pytest

from vllm_sparse.cpu_offload.connector import sizing

SHAPE = {"page_bytes": 1 << 20, "page_rows": 256, "max_tokens": 1000, "max_requests": 3}
NEEDED = 4  # pages of one request


def test_what_is_given_is_shared_by_the_ranks():
    assert sizing.store_pages(1, ranks=2, **SHAPE) == 512


def test_by_itself_it_takes_what_requests_can_need(monkeypatch):
    monkeypatch.setattr(sizing, "available_memory", lambda: 1 << 40)
    assert sizing.store_pages(None, ranks=1, **SHAPE) == 3 * NEEDED


def test_by_itself_it_takes_no_more_than_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(sizing, "available_memory", lambda: 40 << 20)
    assert sizing.store_pages(None, ranks=2, **SHAPE) == 10


def test_one_request_must_fit():
    with pytest.raises(ValueError) as error:
        sizing.store_pages(0.001, ranks=2, **SHAPE)
    text = str(error.value)
    assert '"host_gib"] is 0.001' in text
    assert "one request of 1000 tokens (--max-model-len)" in text
    assert "Set host_gib to 0.01 or more" in text
    sizing.store_pages(0.01, ranks=2, **SHAPE)  # it would do
