"""Attention kernels: torch and triton only, nothing else of ours. Loads torch when first used."""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "BlockIndices": "block_indices",
    "RowScores": "reference",
    "block_means": "plan_steps",
    "gather_keys": "reference",
    "heaviest": "plan_steps",
    "index_lists": "plan_steps",
    "merge": "reference",
    "paged_decode": "dispatch",
    "row_scores": "row_scoring",
    "sparse_prefill": "dispatch",
    "write_kv": "dispatch",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
