"""From which context length on sparse prefill pays on this GPU, as serving measures it at start.

The last chunk of contexts of 4K to 64K: planning and sparse attention against the dense kernel that
vLLM would take, until sparse is worth it. Shorter contexts are read by that dense kernel.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks._form import Results, Row, addable, arguments, needs_a_gpu, require_editable

NEEDS_A_GPU = needs_a_gpu("benchmarks.gpu_break_even")
HEADS = {"32/8": (32, 8), "8/2": (8, 2)}
HEAD_SIZE, PAGE = 128, 16
BUDGET_S = 10.0  # of the paths' own seconds; serving takes 2


def rows_of(heads: str, options: argparse.Namespace) -> Iterator[Row]:
    import torch

    from vllm_sparse.cuda_dense import flash_for, triton_dense
    from vllm_sparse.planner import device_break_even
    from vllm_sparse.planner.break_even import NEVER, WORTH

    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)
    shape = (dtype, HEAD_SIZE, *HEADS[heads])
    flash = flash_for(HEAD_SIZE, *HEADS[heads], PAGE, dtype, dtype, None, device)
    dense = flash or triton_dense
    where = (*shape, options.chunk, PAGE, device, dense)
    case = {
        "heads": heads, "dtype": options.dtype, "chunk": options.chunk, "dense": dense.__name__,
    }  # fmt: skip
    figure = f"break_even_{heads.replace('/', '_')}"
    for length, ratio in device_break_even.measure(*where, BUDGET_S):
        yield Row.share(
            f"{figure}_{length >> 10}k", {**case, "tokens": length}, 1 / (ratio * WORTH),
            unit="dense time / sparse time",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found = device_break_even.break_even(*where, cache=Path(folder) / "break-even.json")
    if found >= NEVER:
        yield Row.failed(figure, case, "sparse is never worth it", peer=None, unit="tokens")
    else:
        yield Row(figure, case, float(found), None, None, "tokens", None, None)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = addable(arguments(__doc__))
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--chunk", type=int, default=8192, help="most tokens of a step")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    import torch

    if not torch.cuda.is_available():
        print(NEEDS_A_GPU, file=sys.stderr)
        return 2
    require_editable()
    results = Results(options.json, add=options.add)
    for heads in options.heads:
        results.add(rows_of(heads, options))
    results.show()
    return 1 if results.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
