"""Modules of the checkout that are no package: the checkout itself is not on the import path, where
it would offer a `kernels` that belongs to Hugging Face."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load(file: str) -> ModuleType:
    """A fresh module of a file such as `tools/sanitize.py`, known to Python by the file's name."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
