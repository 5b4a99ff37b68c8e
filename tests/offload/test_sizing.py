"""How much host memory the stores get, and what is said where it is too little."""

from __future__ import annotations

import pytest

from vllm_sparse.cpu_offload.connector import sizing

SHAPE = {"page_bytes": 1 << 20, "page_rows": 256, "max_tokens": 1000, "max_requests": 3}
NEEDED = 4  # pages of one request


def test_what_is_given_is_shared_by_the_ranks():
    assert sizing.store_pages(1, ranks=2, free=1 << 40, **SHAPE) == 512


def test_by_itself_it_takes_what_requests_can_need():
    assert sizing.store_pages(None, ranks=1, free=1 << 40, **SHAPE) == 3 * NEEDED


def test_by_itself_it_takes_no_more_than_half_of_what_is_free():
    assert sizing.store_pages(None, ranks=2, free=40 << 20, **SHAPE) == 10
    assert sizing.store_pages(None, ranks=1, engines=2, free=40 << 20, **SHAPE) == 10


def test_what_is_given_must_be_there_for_all_ranks():
    assert sizing.store_pages(1, ranks=2, free=1 << 30, **SHAPE) == 512
    with pytest.raises(ValueError, match=r'"host_gib"\] is 1, and 0\.98 GiB of memory are free'):
        sizing.store_pages(1, ranks=2, free=1000 << 20, **SHAPE)


def test_one_request_must_fit():
    with pytest.raises(ValueError) as error:
        sizing.store_pages(0.001, ranks=2, free=1 << 40, **SHAPE)
    text = str(error.value)
    assert '"host_gib"] is 0.001' in text
    assert "one request of 1000 tokens (--max-model-len)" in text
    assert "Set host_gib to 0.01 or more" in text
    sizing.store_pages(0.01, ranks=2, free=1 << 40, **SHAPE)  # it would do
