"""Tokens a second of decode in vLLM's engine on a CPU: the setting `linear`, against vLLM's own.

A model of a known shape with random weights, which are read as those of any model are. Two engines
are alive at once and take turns: vLLM's own CPU backend, and the sparse one with the setting. What
a prompt costs is taken off; medians. The log-probabilities of each first token must agree.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._engines import PEER, QUIET_S, difference, ended_together, logprobs_of, unlike
from benchmarks._form import Results, Row, addable, arguments, require_editable

SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
BATCHES = (1, 2, 4, 8, 16)
PROMPT, TOKENS = 64, 32  # a sequence's; attention over so few is little beside the weights


def make_checkpoint(shape: str, folder: Path) -> None:
    """A Llama of this shape with random weights, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    config = SHAPES[shape]
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rng = torch.Generator().manual_seed(0)

    def weight(*dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=torch.bfloat16).normal_(0, dims[-1] ** -0.5, generator=rng)

    heads = size * config["num_attention_heads"]
    kv_heads = size * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": weight(config["vocab_size"], hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, (out, into) in {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
            "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():  # fmt: skip
            tensors[f"{layer}{name}.weight"] = weight(out, into)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
             "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
             "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(plain | config))


@dataclass
class Series:
    """What one engine gave at one batch size."""

    seconds: list[float] = field(default_factory=list)  # of TOKENS steps
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)


class Engine:
    """vLLM in processes of its own."""

    def __init__(self, folder: Path, options: Any, **settings: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(folder), skip_tokenizer_init=True, dtype=options.dtype, max_model_len=1024,
            max_num_seqs=max(options.batches), kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False, enforce_eager=not options.compiled,
            disable_log_stats=True, worker_extension_cls="benchmarks._probe.WorkerProbe",
            **settings,
        )  # fmt: skip
        self.vocab = self.llm.llm_engine.model_config.get_vocab_size()

    def threads(self) -> int:
        return self.llm.collective_rpc("probe")[0]["threads"]

    def seconds(self, batch: int, tokens: int, logprobs: int | None = None) -> tuple[float, list]:
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": [3 + (37 * i + 11 * j) % (self.vocab - 3) for j in range(PROMPT)]}
            for i in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
        )
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin, [output.outputs[0] for output in outputs]

    def warm_up(self, batch: int, series: Series) -> None:
        """What is checked, before anything is timed."""
        _, outputs = self.seconds(batch, 1 + TOKENS, logprobs=5)
        series.tokens = [tuple(output.token_ids) for output in outputs]
        series.logprobs = [logprobs_of(output) for output in outputs]

    def measure(self, batch: int, series: Series) -> None:
        """One turn."""
        time.sleep(QUIET_S)
        prompt, _ = self.seconds(batch, 1)
        whole, _ = self.seconds(batch, 1 + TOKENS)
        series.seconds.append(whole - prompt)


@contextmanager
def engines(folder: Path, options: Any) -> Iterator[tuple[Engine, Engine]]:
    """(ours, vLLM's own); nothing of them remains afterwards."""
    config = {"sparse": {"linear": options.linear}}
    with ended_together() as llms:
        made = []
        for settings in ({"attention_backend": "sparse", "additional_config": config}, {}):
            made.append(Engine(folder, options, **settings))
            llms.append(made[-1].llm)
        yield made[0], made[1]


def row(batch: int, options: Any, threads: int, ours: Series, theirs: Series) -> Row:
    error = difference(ours.logprobs, theirs.logprobs)
    alike = [a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True)]
    rates = [TOKENS * batch / statistics.median(of.seconds) for of in (ours, theirs)]
    case = {
        "model": options.shape, "linear": options.linear, "batch": batch, "dtype": options.dtype,
        "threads": threads, "compiled": options.compiled, "rounds": len(ours.seconds),
        "same_tokens": f"{sum(alike)} of {batch} sequences",
    }  # fmt: skip
    failed = unlike(error)
    if failed is None and min(rates) <= 0:
        failed = "the steps are too short to be told from the prompt"
    shape = re.sub(r"\W", "_", options.shape)
    return Row.rate(
        f"decode_engine_{options.linear}_{shape}_b{batch}"
        + ("" if options.dtype == "bfloat16" else f"_{options.dtype}")
        + ("_compiled" if options.compiled else ""),
        case, rates[0], PEER, rates[1], unit="tokens/s", error=error, failed=failed,
    )  # fmt: skip


def all_rows(options: Any) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(options.shape, Path(folder))
        with engines(Path(folder), options) as pair:
            for batch in options.batches:
                series = Series(), Series()
                for engine, of in zip(pair, series, strict=True):
                    engine.warm_up(batch, of)
                for turn in range(options.rounds):
                    both = list(zip(pair, series, strict=True))
                    # Who goes first alternates, so that a drift of the machine hits both.
                    for engine, of in both if turn % 2 == 0 else both[::-1]:
                        engine.measure(batch, of)
                yield row(batch, options, pair[0].threads(), *series)


def main(argv: list[str] | None = None) -> int:
    parser = addable(arguments(__doc__))
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--linear", choices=("flat", "auto", "vllm"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="as vLLM starts; default: eager")
    options = parser.parse_args(argv)
    if min(*options.batches, options.rounds) < 1:
        parser.error("--batches, --rounds: give 1 or more")
    require_editable()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = Results(options.json, add=options.add)
    results.add(all_rows(options))
    results.show()
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
