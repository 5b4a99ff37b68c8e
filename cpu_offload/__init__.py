"""Decode over keys and values in host memory: a store, samplers, and attention over a sample.

Loads torch when first used. `attend` is the entry to the whole; `KVStore`, `Context` and the
samplers are its parts, for who keeps a context over many queries.
"""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "LSH": "samplers",
    "Context": "context",
    "Exact": "samplers",
    "KVStore": "store",
    "Pages": "pages",
    "Pool": "pool",
    "Proposal": "samplers",
    "Sampler": "samplers",
    "StoreFull": "store",
    "TopK": "samplers",
    "Uniform": "samplers",
    "VAttention": "vattention",
    "allocate": "store",
    "attend": "attention",
    "gather": "attention",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
