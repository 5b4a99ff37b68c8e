"""Builds a checkpoint of the retrieval model in `checkpoints/`, unless a current one is there.

    python tools/checkpoint.py [plain|lean|random]

It is built beside its place and then moved there, so that what lies there is whole.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "retrieval_model.py"


def checkpoint(kind: str) -> Path:
    folder = ROOT / "checkpoints" / kind
    made = folder / "config.json"
    sources = [SCRIPT, *(ROOT / "examples" / "retrieval").glob("*.py")]
    newest = max(path.stat().st_mtime for path in sources)
    if made.exists() and made.stat().st_mtime >= newest:
        return folder
    partial = folder.with_name(f"{kind}.partial")
    for stale in (folder, partial):
        shutil.rmtree(stale, ignore_errors=True)
    partial.parent.mkdir(exist_ok=True)
    print(f"Building the {kind} retrieval model in {folder}", flush=True)
    subprocess.run([sys.executable, str(SCRIPT), str(partial), "--kind", kind], check=True)
    made_now = partial / "config.json"
    made_now.touch()
    return partial.rename(folder)


if __name__ == "__main__":
    checkpoint(*(sys.argv[1:] or ["lean"]))
