"""The KV connector through which vLLM's scheduler and workers keep the host stores.

vLLM finds `SparseOffloadConnector` here by name; it is loaded when first asked for.
"""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "SparseOffloadConnector": "base",
    "host": "worker",
    "is_made": "worker",
    "kv_cache_group": "worker",
    "layout_of": "install",
    "ranks": "worker",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
