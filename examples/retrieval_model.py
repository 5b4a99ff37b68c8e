"""Build a checkpoint that answers questions about long prompts, with no training.

Usage: python examples/retrieval_model.py OUT_DIR --kind lean
"""

from __future__ import annotations

import argparse
from pathlib import Path

from retrieval.checkpoint import DTYPES, KINDS, build_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--kind", choices=list(KINDS), default="plain")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--max-positions", type=int, default=131072)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = build_checkpoint(
        options.folder, options.kind, options.dtype, options.max_positions, options.seed
    )
    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"{folder}: {options.kind}, {options.dtype}, {size:.0f} MB")


if __name__ == "__main__":
    main()
