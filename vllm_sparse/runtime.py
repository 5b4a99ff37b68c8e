"""What a worker process settles once: kernel threads, break-even length, pattern file."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from . import compat, log
from .config import SECTION, SparseConfig
from .kernels import cpu
from .patterns import ADAPTIVE, HeadPattern, PatternFile
from .planner.break_even import NEVER, cache_file
from .planner.break_even import break_even as measure_break_even
from .stats import STATS

logger = log.get_logger(__name__)

FLAGGED = (
    "Softmax unified: the logits of a row left the window of phi. It was computed again with the "
    "online softmax, as every such row is, and counted (softmax_flagged). If they are many, "
    "measure phi on prompts like yours: vllm-sparse calibrate MODEL -o FILE"
)


@dataclass(frozen=True)
class Model:
    """The facts about a model that a pattern file must agree with, over all ranks."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, vllm_config: Any) -> Model:
        """From vLLM's VllmConfig."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        return cls(
            layers=model.get_total_num_hidden_layers(),
            heads=model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
            kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
        )


@dataclass(frozen=True)
class HeadSettings:
    """What the settings say of the query heads of each layer."""

    pattern_file: PatternFile | None = None
    unified: bool = False  # whether decode joins its softmaxes by the phi of the pattern file

    @classmethod
    @functools.cache
    def of(cls, config: SparseConfig, model: Model) -> HeadSettings:
        """Raises ValueError for settings that do not fit the model."""
        pattern_file = fit_patterns(config, model)
        fit_phi(config, model, pattern_file)
        return cls(pattern_file, unified=config.softmax == "unified")

    def patterns(self, layer: int, first_head: int, heads: int) -> tuple[HeadPattern, ...]:
        """The patterns of this rank's query heads of a layer."""
        if self.pattern_file is None:
            return (ADAPTIVE,) * heads
        return self.pattern_file.for_layer(layer, first_head, heads)

    def phi(self, layer: int, first_head: int, heads: int) -> torch.Tensor | None:
        """phi of this rank's query heads of a layer, fp32 [heads]; None where it is not used."""
        if not self.unified:
            return None
        assert self.pattern_file is not None
        values = self.pattern_file.phi[layer][first_head : first_head + heads]
        return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    heads: HeadSettings
    break_even: int  # tokens of context below which a chunk's prefill is dense
    # int64 [1], what the decode kernels count: rows that left the window of phi.
    flagged: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))


@functools.cache
def start(
    config: SparseConfig,
    model: Model | None,
    *,
    dtype: torch.dtype,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    chunk: int,
) -> Runtime:
    """The Runtime for layers of one shape; heads are this rank's, `chunk` is the most tokens of a
    step, `model` None for layers of a draft, of which the settings say nothing. Logs the start-up
    line.

    Raises:
        ValueError: settings that do not fit the model.
    """
    heads = HeadSettings() if model is None else HeadSettings.of(config, model)
    threads = size_pool()
    break_even, source = config.break_even, "given"
    if break_even is None:
        break_even = measure_break_even(
            dtype, head_size, num_heads, num_kv_heads, threads, chunk=chunk
        )
        source = "measured"
    kernels = f"{cpu.isa()} x {threads} thread{'' if threads == 1 else 's'}"
    say_active(logger, config, break_even, source, kernels)
    return Runtime(heads=heads, break_even=break_even)


def say_active(
    logger: logging.Logger, config: SparseConfig, break_even: int, source: str, kernels: str
) -> None:
    """The start-up line, and a warning where there will be no sparse prefill."""
    if break_even >= NEVER and source == "measured":
        logger.warning(
            "Sparse prefill was not faster than dense at any length that was measured here: every "
            "prompt is read densely. Set break_even to a number of tokens to read longer prompts "
            "sparsely, or delete %s to have it measured anew at the next start",
            cache_file(),
        )
    logger.info(
        "Sparse attention active: coverage %g, break-even %s (%s), patterns %s, "
        "decode %s, softmax %s, kernels %s%s%s",
        config.coverage,
        "never" if break_even >= NEVER else f"{break_even} tokens",
        source,
        config.patterns or "adaptive",
        config.decode,
        config.softmax,
        kernels,
        ", mean correction" if config.mean_correction else "",
        f", dense layers {list(config.dense_layers)}" if config.dense_layers else "",
    )


def fit_patterns(config: SparseConfig, model: Model) -> PatternFile | None:
    """The pattern file of the settings, or None where they name none.

    Raises:
        ValueError: the file cannot be used, or it or `dense_layers` does not fit the model.
    """
    config.check_layers(model.layers)
    if config.patterns is None:
        return None
    pattern_file = PatternFile.load(config.patterns)
    pattern_file.check_model(
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_size=model.head_size,
    )
    return pattern_file


def fit_phi(config: SparseConfig, model: Model, pattern_file: PatternFile | None) -> None:
    """Raise ValueError where softmax is "unified" and phi is not known for every layer."""
    if config.softmax != "unified":
        return
    missing = [i for i in range(model.layers) if pattern_file is None or i not in pattern_file.phi]
    if missing:
        why = (
            "no pattern file is given"
            if pattern_file is None
            else f"{config.patterns!r} has none for the layers {missing}"
        )
        raise ValueError(
            f"{SECTION}[\"softmax\"] is 'unified', which needs phi of every layer and head, and "
            f"{why}. `vllm-sparse calibrate MODEL -o FILE` measures it and writes it to a pattern "
            'file; then set "patterns" to FILE. "online" and "lazy" need none'
        )


def count_flagged(flagged: torch.Tensor) -> None:
    """Move what the decode kernels counted into STATS, and say once if it is not nothing."""
    if count := int(flagged):
        STATS.softmax_flagged += count
        flagged.zero_()
        log.once(logger, logging.WARNING, FLAGGED)


@functools.cache
def size_pool() -> int:
    """Give the kernels' pool as many threads as torch has here, on the same cores; how many."""
    threads = torch.get_num_threads()
    cores = compat.worker_cores(threads)
    cpu.set_threads(threads, cores)
    logger.debug("The kernels' %d threads run on the cores %s", threads, cores or "(not pinned)")
    return threads
