"""The steps of `benchmarks.gpu_suite`, in the order of their worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """A command with a deadline of its own.

    command, beside: arguments of Python; `{out}` is the folder of the results.
    share: of the time that is left when the step begins, the most that it may take.
    most_s: the most in any case. least_s: with less the step is left out.
    beside: commands that run beside it, so that a later step finds compiled what it launches. They
        end with it, and what they say does not count.
    """

    name: str
    about: str
    command: tuple[str, ...]
    share: float
    most_s: float
    least_s: float = 20.0
    beside: tuple[tuple[str, ...], ...] = ()

    def limit(self, left_s: float) -> float:
        """Seconds that it may take where so many are left; 0: it is to be left out."""
        limit = min(self.share * left_s, self.most_s)
        return limit if limit >= self.least_s else 0.0

    def arguments(self, out: Path) -> tuple[str, ...]:
        return tuple(part.replace("{out}", str(out)) for part in self.command)


def _prefill(*more: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.prefill", "--json", "{out}/prefill.json", "--add", *more)


def _decode(*more: str) -> tuple[str, ...]:
    return (
        "-m", "benchmarks.decode", "--parts", "gpu", "--json", "{out}/decode.json", "--add", *more,
    )  # fmt: skip


# FlexAttention is compiled for most of a minute, and vLLM's Triton kernel may take ten times as
# long as the fastest at 128K: they have steps of their own.
FAST_PEERS = ("--peers", "fa3", "cudnn", "flash")
CELLS = ("4096", "32768", "131072", "65536", "16384", "8192")

STEPS = (
    Step(
        "checkpoint", "builds the lean retrieval model", ("tools/checkpoint.py", "lean"),
        share=0.2, most_s=40, least_s=5,
    ),
    Step(
        "smoke", "each kernel against the reference, in bf16, fp16 and FP8",
        ("-m", "benchmarks._gpu_smoke"), share=0.3, most_s=120, least_s=30,
        beside=(
            ("-m", "benchmarks.prefill", "--lengths", "8k", "--layers", "0", "--repeats", "1",
             *FAST_PEERS),
            ("-m", "benchmarks.decode", "--parts", "gpu", "--heads", "32/8", "--batches", "1",
             "--rounds", "1", "--contexts", *CELLS),
            ("-m", "benchmarks.decode", "--parts", "gpu", "--heads", "32/8", "--batches", "8", "64",
             "--rounds", "1", "--contexts", "32768", "8192"),
        ),
    ),
    Step(
        "prefill", "sparse prefill at 8K, 32K, 128K and 4K, against the fastest dense kernels",
        _prefill("--lengths", "8k", "32k", "128k", "4k", *FAST_PEERS),
        share=0.45, most_s=180,
    ),
    Step(
        "decode", "decode of one sequence of 4K to 128K, 32 query and 8 KV heads",
        _decode("--heads", "32/8", "--batches", "1", "--contexts", *CELLS),
        share=0.4, most_s=100,
    ),
    Step(
        "engine", "vLLM with sparse attention: answers, tokens, times to first token",
        ("-m", "benchmarks.gpu_engine", "--json", "{out}/engine.json", "--add",
         "--lengths", "8k", "32k", "120k"),
        share=0.9, most_s=300, least_s=45,
    ),
    Step(
        "engine-host", "decode over host memory: answers, tokens, times",
        ("-m", "benchmarks.gpu_engine", "--json", "{out}/engine.json", "--add", "--parts", "host",
         "--lengths", "32k", "8k"),
        share=0.6, most_s=150, least_s=60,
    ),
    Step(
        "prefill-chunk", "the last 8K of 32K and 128K, which is a step of serving",
        _prefill("--chunk", "8192", "--lengths", "128k", "32k", "--peers", "fa3", "triton"),
        share=0.5, most_s=90,
    ),
    Step(
        "decode-batches", "decode of 8 and 64 sequences, and with 4 KV heads",
        _decode("--batches", "8", "64", "--contexts", "32768", "8192", "--heads", "32/8", "32/4"),
        share=0.5, most_s=120,
    ),
    Step(
        "shared-prefix", "decode of sequences that begin alike, and what it costs where none do",
        ("-m", "benchmarks.shared_prefix", "--parts", "gpu", "--json", "{out}/decode.json",
         "--add", "--batches", "8", "32", "2"),
        share=0.4, most_s=60,
    ),
    Step(
        "break-even", "from which context on sparse prefill pays",
        ("-m", "benchmarks.gpu_break_even", "--json", "{out}/prefill.json", "--add"),
        share=0.5, most_s=60,
    ),
    Step(
        "prefill-fp8", "sparse prefill over FP8 caches",
        _prefill("--cache", "fp8", "--lengths", "32k", "128k", "8k", "--peers", "fa3", "triton"),
        share=0.5, most_s=120,
    ),
    Step(
        "prefill-flex", "against FlexAttention, which is compiled first",
        # In a file of its own: the same figures with other peers.
        ("-m", "benchmarks.prefill", "--json", "{out}/prefill-flex.json", "--lengths", "32k", "8k",
         "128k", "--layers", "0", "--peers", "fa3", "flex", "xformers"),
        share=0.5, most_s=150,
    ),
    Step(
        "prefill-float16", "sparse prefill in float16",
        _prefill("--dtype", "float16", "--lengths", "32k", "128k", *FAST_PEERS),
        share=0.5, most_s=120,
    ),
    Step(
        "prefill-long", "sparse prefill at 256K and 512K",
        _prefill("--lengths", "256k", "512k", "--layers", "0", "1", *FAST_PEERS,
                 "--most-seconds", "40"),
        share=0.7, most_s=300, least_s=40,
    ),
    Step(
        "decode-fp8", "decode over FP8 caches",
        _decode("--cache", "fp8", "--heads", "32/8", "--batches", "1", "--contexts", *CELLS),
        share=0.7, most_s=100,
    ),
    Step(
        "cope", "attention with contextual positions against plain attention",
        ("-m", "benchmarks.cope", "--device", "cuda", "--json", "{out}/cope.json", "--add",
         "--lengths", "8192", "32768"),
        share=0.9, most_s=120,
    ),
    Step(
        "linear", "linear layers of decode against cuBLAS and torch.compile",
        ("-m", "benchmarks.linear", "--device", "cuda", "--json", "{out}/decode.json", "--add",
         "--models", "Llama-3.1-8B", "--compiled", "16", "1"),
        share=0.9, most_s=240,
    ),
)  # fmt: skip
