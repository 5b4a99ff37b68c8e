"""Trains a small CoPE model to count, beside the same model with RoPE, and serves it with vLLM.

    python examples/cope_counting.py train -o checkpoints/cope      # about two minutes a model
    python examples/cope_counting.py ask checkpoints/cope           # the checkpoint in vLLM

    # Three variables take about six minutes a model:
    python examples/cope_counting.py train -o checkpoints/cope3 --variables 3 --operations 32 \
        --layers 3 --hidden 128 --rate 7e-4 --steps 4000

The task is that of counting_task.py: what is a variable's value at the end of a program? `train`
prints in how many programs either model is wrong, at the longest length that it was trained on and
at twice and four times that, and writes the CoPE model as a Hugging Face checkpoint with a
tokenizer of words. `ask` gives the checkpoint to vLLM and compares its answers with plain torch's
and with the right ones. Or serve it, and ask in words:

    vllm serve checkpoints/cope --dtype float32 --kv-cache-memory-bytes 268435456
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"max_tokens": 1,
        "model": "checkpoints/cope", "temperature": 0, "prompt": "set a inc a pass inc a print a"}'

Everything is drawn from `--seed`: the same torch on the same machine trains the same model, unless
`--minutes` ends it sooner.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from counting_task import EOS, IDS, WORDS, Program, random_program, save_tokenizer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vllm_sparse.models import CoPEConfig, CoPEForCausalLM

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="CoPE learns to count.",
)
console = Console(highlight=False, soft_wrap=True)

MODELS = ("cope", "rope")
TASK_FILE = "counting.json"
IGNORED = -100  # the label of a token behind which nothing is asked
BATCH = 32
WARM_UP_STEPS = 100
# Shares of a training: programs grow until the first, the learning rate falls from the second on.
GROWN, FALLING = 0.5, 0.6
# Until then programs may have fewer variables: counting is learned first, telling apart later.
FEWER = 0.3
# The tables begin as zeros, where every position looks the same: they are to get away from it.
TABLE_RATE = 6e-3
# Programs that measure an error are those of another seed than any training's.
HELD_OUT_SEED = 1_000_000
POSITIONS = 32
LONGEST_SERVED = 4096  # tokens


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how long: `steps` batches, or `minutes` where they are over sooner."""

    operations: int
    variables: int
    layers: int
    hidden: int
    heads: int
    rate: float
    steps: int
    minutes: float | None
    seed: int

    @property
    def busy(self) -> int:
        """Most operations of a program that do something, however long it is."""
        return self.operations * 3 // 4


def build(kind: str, recipe: Recipe) -> PreTrainedModel:
    """A new model, `cope` or `rope`: they differ in positions and in nothing else."""
    torch.manual_seed(recipe.seed)
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": recipe.hidden,
        "intermediate_size": 4 * recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "head_dim": 64,  # the least that the kernels know
        "max_position_embeddings": LONGEST_SERVED,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": IDS[EOS],
        "pad_token_id": IDS[EOS],
    }
    if kind == "cope":
        return CoPEForCausalLM(CoPEConfig(cope_positions=POSITIONS, **sizes))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def tensors(programs: list[Program]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, T], padded at their end, and the labels [N, T] of what is to follow them."""
    longest = max(len(program.words) for program in programs)
    ids = torch.full((len(programs), longest), IDS[EOS])
    labels = torch.full_like(ids, IGNORED)
    for row, program in enumerate(programs):
        ids[row, : len(program.words)] = torch.tensor(program.token_ids)
        for place, answer in program.answers.items():
            labels[row, place] = IDS[str(answer)]
    return ids, labels


def fit(model: PreTrainedModel, recipe: Recipe, label: str) -> tuple[int, float]:
    """Train a model to answer every `print` of random programs. Returns steps and CPU seconds."""
    tables = [p for name, p in model.named_parameters() if name.endswith("pos_emb")]
    others = [p for name, p in model.named_parameters() if not name.endswith("pos_emb")]
    groups = [{"params": others, "lr": recipe.rate}, {"params": tables, "lr": TABLE_RATE}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98))
    rates = [group["lr"] for group in optimizer.param_groups]
    rng = random.Random(recipe.seed)
    shortest = recipe.variables + 2
    started, cpu_started = time.perf_counter(), time.process_time()
    model.train()
    step = 0
    with tqdm(total=recipe.steps, desc=label, unit="step") as bar:
        while (done := progress(step, started, recipe)) < 1:
            longest = shortest + (recipe.operations - shortest) * min(1.0, 0.1 + done / GROWN)
            length = rng.randint(shortest, round(longest))
            batch = [
                random_program(length, variables_now(done, recipe, rng), rng, recipe.busy)
                for _ in range(BATCH)
            ]
            ids, labels = tensors(batch)
            asked = labels != IGNORED
            hidden = model.model(ids, use_cache=False).last_hidden_state[asked]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[asked])
            factor = min((step + 1) / WARM_UP_STEPS, (1 - done) / (1 - FALLING), 1.0)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return step, time.process_time() - cpu_started


def variables_now(done: float, recipe: Recipe, rng: random.Random) -> int:
    """How many variables the next program has."""
    if recipe.variables == 1 or done >= FEWER:
        return recipe.variables
    return rng.randint(1, recipe.variables)


def progress(step: int, started: float, recipe: Recipe) -> float:
    """The share of the training that is over, by its steps or its minutes."""
    if recipe.minutes is None:
        return step / recipe.steps
    minutes = (time.perf_counter() - started) / 60
    return max(step / recipe.steps, minutes / recipe.minutes)


def held_out(operations: int, variables: int, busy: int, number: int) -> list[Program]:
    """Programs that no training saw, but for chance; the same ones at every call."""
    rng = random.Random(HELD_OUT_SEED + operations)
    return [random_program(operations, variables, rng, busy) for _ in range(number)]


@torch.no_grad()
def answers(model: PreTrainedModel, programs: list[Program]) -> Iterator[str]:
    """The word that a model puts behind each program."""
    model.eval()
    for start in range(0, len(programs), BATCH):
        batch = programs[start : start + BATCH]
        ids, _ = tensors(batch)
        last = torch.tensor([len(program.words) - 1 for program in batch])
        hidden = model.model(ids, use_cache=False).last_hidden_state
        best = model.lm_head(hidden[torch.arange(len(batch)), last]).argmax(-1)
        yield from (WORDS[token] for token in best.tolist())


def error(found: list[str], programs: list[Program]) -> float:
    """Share of the programs whose answer is another."""
    wrong = sum(word != str(p.answer) for word, p in zip(found, programs, strict=True))
    return wrong / len(programs)


def save(model: PreTrainedModel, folder: Path, recipe: Recipe) -> None:
    """Write a checkpoint that vLLM loads, and what it was trained for."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    task = {
        "operations": recipe.operations,
        "variables": recipe.variables,
        "busy": recipe.busy,
    }
    (folder / TASK_FILE).write_text(json.dumps(task, indent=2) + "\n")


@app.command()
def train(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the CoPE checkpoint.")],
    variables: Annotated[int, typer.Option(min=1, max=5)] = 1,
    operations: Annotated[int, typer.Option(min=16, help="Of the longest program.")] = 64,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    hidden: Annotated[int, typer.Option(min=16)] = 64,
    heads: Annotated[int, typer.Option(min=1)] = 2,
    rate: Annotated[float, typer.Option(min=1e-6, help="The learning rate.")] = 2e-3,
    steps: Annotated[int, typer.Option(min=1, help=f"Batches of {BATCH} programs.")] = 1500,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="At most, for each model.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first pair of models.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of models, seed by seed.")] = 1,
    programs: Annotated[int, typer.Option(min=1, help="That an error is measured on.")] = 512,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train CoPE and RoPE on the same programs, compare them, and save the first CoPE model."""
    torch.set_num_threads(threads)
    lengths = [operations, 2 * operations, 4 * operations]
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "seed", "steps", "CPU s"):
        table.add_column(heading)
    for times, length in zip((1, 2, 4), lengths, strict=True):
        table.add_column(f"{times}x ({length})", justify="right")
    for number in range(seed, seed + seeds):
        recipe = Recipe(operations, variables, layers, hidden, heads, rate, steps, minutes, number)
        for kind in MODELS:
            model = build(kind, recipe)
            done, seconds = fit(model, recipe, f"{kind}, seed {number}")
            if kind == "cope" and number == seed:
                save(model, output, recipe)
            errors = []
            for length in lengths:
                asked = held_out(length, variables, recipe.busy, programs)
                errors.append(f"{error(list(answers(model, asked)), asked):.1%}")
            table.add_row(kind, str(number), str(done), f"{seconds:.0f}", *errors)
    console.print(
        f"Programs of {variables} variable(s), in training of up to {operations} operations; "
        f"{layers} layers of {hidden}, {heads} heads. Wrong answers among {programs} programs:"
    )
    console.print(table)
    console.print(f"The CoPE model of seed {seed} is in {output}")


@app.command()
def ask(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that `train` wrote.")],
    programs: Annotated[int, typer.Option(min=1, help="Of each length.")] = 64,
) -> None:
    """Answer programs that were held out with vLLM. Fails where vLLM's answers are not torch's."""
    if not (folder / TASK_FILE).exists():
        raise typer.BadParameter(f"{folder} has no {TASK_FILE}; give a folder that `train` wrote")
    task = json.loads((folder / TASK_FILE).read_text())
    from vllm import LLM, SamplingParams

    lengths = [task["operations"] * times for times in (1, 2, 4)]
    asked = {
        length: held_out(length, task["variables"], task["busy"], programs) for length in lengths
    }
    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=LONGEST_SERVED,
        # On a CPU vLLM takes 0.92 of all memory for KV unless told otherwise.
        kv_cache_memory_bytes=256 * 2**20,
        # Compiling would take longer than the answers.
        enforce_eager=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1)
    model = CoPEForCausalLM.from_pretrained(folder)
    table = Table(box=None, pad_edge=False)
    for heading in ("operations", "programs", "wrong in vLLM", "wrong in torch", "vLLM = torch"):
        table.add_column(heading, justify="right")
    differ = 0
    for length, questions in asked.items():
        outputs = llm.generate([question.prompt for question in questions], sampling)
        served = [output.outputs[0].text.strip() for output in outputs]
        plain = list(answers(model, questions))
        equal = sum(a == b for a, b in zip(served, plain, strict=True))
        differ += len(questions) - equal
        wrong = [f"{error(found, questions):.1%}" for found in (served, plain)]
        table.add_row(str(length), str(len(questions)), *wrong, f"{equal} of {len(questions)}")
    console.print(table)
    if differ:
        console.print(f"[red]FAILED:[/] vLLM answers {differ} programs in another way than torch")
        raise typer.Exit(1)


# vLLM's engine runs in processes that are spawned, and import this file.
if __name__ == "__main__":
    app()
