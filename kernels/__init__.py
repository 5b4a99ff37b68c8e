"""Attention kernels: torch and triton only, nothing else of ours. Loads torch when first used."""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "BlockIndices": "block_indices",
    "RowScores": "reference",
    "SampledMass": "pattern_reference",
    "block_means": "plan_steps",
    "cheapest_columns": "pattern_search",
    "cheapest_threshold": "pattern_search",
    "cheapest_union": "pattern_search",
    "cheapest_window": "pattern_search",
    "cope_attention": "dispatch",
    "gather_keys": "paged_cache",
    "heaviest": "plan_steps",
    "index_lists": "plan_steps",
    "least_keys": "pattern_search",
    "merge": "reference",
    "paged_decode": "dispatch",
    "row_scores": "row_scoring",
    "shared_prefixes": "dispatch",
    "sort_columns": "pattern_search",
    "sparse_prefill": "dispatch",
    "tile_means": "plan_steps",
    "write_kv": "dispatch",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
