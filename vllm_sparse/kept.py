"""What was measured on this machine, kept in the user's cache folder. No torch, no vLLM."""

from __future__ import annotations

import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

from .files import write_whole

logger = logging.getLogger("vllm_sparse.kept")

MAX_BYTES = 1 << 20


def kept_file(name: str) -> Path:
    """`vllm-sparse/NAME.json` in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say to ignore a relative path.
    root = Path(folder) if os.path.isabs(folder) else Path(os.path.expanduser("~/.cache"))
    return root / "vllm-sparse" / f"{name}.json"


def kept(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it cannot be read or is not ours."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        data = json.loads(text) if len(text) <= MAX_BYTES else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.debug("Nothing from %s: %s", path, error)
        return {}
    return data if isinstance(data, dict) else {}


def keep(path: Path, key: str, value: Any) -> bool:
    """Add a result, whole or not at all; False where the folder cannot be written,
    or there is none."""
    if not path.is_absolute():  # the user has no home: not into whatever folder this runs in
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**kept(path), key: value}, indent=1) + "\n")
    except OSError as error:
        logger.debug("A result is not kept in %s: %s", path, error)
        return False
    return True


def processor() -> str:
    """The processor's model."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
