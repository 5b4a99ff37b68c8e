"""A model of heads of known kinds, and the costs of a quiet machine for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_sparse.search import cost

# Seconds for one head: Zen 4, one thread, float32.
COSTS = {
    "tile": 7.9e-6,
    "block": 2.0e-5,
    "column": 3.3e-7,
    "plan": {
        "a_shape counts": (2.2e-5, 1.6e-9),
        "vertical_slash counts": (0.0, 8.5e-7),
        "block_sparse counts": (0.0, 8.8e-8),
        "a_shape coverage": (0.0, 1.2e-7),
        "vertical_slash coverage": (0.0, 2.2e-7),
        "block_sparse coverage": (0.0, 2.0e-7),
        "adaptive coverage": (0.0, 2.6e-7),
    },
}


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """3 layers of 8 heads of known kinds."""
    from retrieval.checkpoint import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("plain"), "plain", max_positions=8192)


@pytest.fixture(scope="session")
def costs() -> cost.Costs:
    return cost.Costs(machine="", **COSTS)


@pytest.fixture(scope="session")
def home(tmp_path_factory, costs) -> Path:
    """A cache folder with the costs of a quiet machine for heads like `plain`'s.

    Measured ones of a busy machine differ by more than what two patterns of a head differ by.
    """
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cost, "measure", lambda *shape: costs.model_copy(update={"machine": shape[-1]})
        )
        where = folder / "vllm-sparse" / "costs.json"
        cost.machine_costs(8, 2, 128, torch.float32, cache=where)
    return folder
