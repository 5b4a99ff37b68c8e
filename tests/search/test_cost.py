"""The measured cost model: that it measures, is kept, and survives what others write there."""

from __future__ import annotations

import json

import pytest
import torch

from vllm_sparse.search import cost
from vllm_sparse.search.candidates import candidates, plan_class


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "folder" / "costs.json"
    return cache, cost.machine_costs(2, 1, 64, torch.float32, cache)


def test_every_candidate_has_a_cost(measured):
    _, costs = measured
    assert costs.block > 0 and costs.tile >= 0 and costs.column >= 0
    # A column is a 64th of a block, give or take what gathering costs.
    assert costs.column < costs.block
    for pattern in candidates(16384)[:-1]:
        assert costs.planning(pattern, 16384) >= costs.planning(pattern, 4096) > 0
    a_shape, coverage = (
        costs.plan[name][0] + 16384 * costs.plan[name][1]
        for name in ("a_shape counts", "adaptive coverage")
    )
    assert a_shape < coverage / 4  # counted windows are planned for nothing
    assert {plan_class(p) for p in candidates(16384)} == {*costs.plan, "dense"}


def test_it_is_measured_once(measured, monkeypatch):
    cache, costs = measured
    monkeypatch.setattr(cost, "measure", lambda *_: pytest.fail("measured again"))
    assert cost.machine_costs(2, 1, 64, torch.float32, cache) == costs


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"KEY": {"tile": "x"}}', '{"KEY": 3}'])
def test_a_damaged_cache_is_measured_again(measured, damage, tmp_path, monkeypatch):
    kept, costs = measured
    (key,) = json.loads(kept.read_text())
    cache = tmp_path / "costs.json"
    cache.write_text(damage.replace("KEY", key))
    monkeypatch.setattr(cost, "measure", lambda *_: costs)
    assert cost.machine_costs(2, 1, 64, torch.float32, cache) == costs
    assert json.loads(cache.read_text())[key] == costs.model_dump(mode="json")


def test_a_cache_that_cannot_be_written_is_said(measured, tmp_path, monkeypatch, caplog):
    _, costs = measured
    monkeypatch.setattr(cost, "measure", lambda *_: costs)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cost.machine_costs(2, 1, 64, torch.float32, blocked / "costs.json") == costs
    assert "not kept" in caplog.text
