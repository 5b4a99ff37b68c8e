"""Measures phi, the constant maximum of each head that decode with softmax "unified" works with.

Where a model normalises its queries and keys (QK-norm), how large a logit can be is known from the
weights: |q . k| <= D max|gain of q| max|gain of k|, as RMSNorm leaves a vector of length sqrt(D)
and rotary embedding does not change it. Where that bound fits the window, phi is 0 and no row can
ever leave. Elsewhere the highest logit and the log-sum-exp of every row of some prompts are
followed, and phi is put between their extremes.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_sparse.kernels.softmax_modes import HIGH, LOW
from vllm_sparse.patterns import PatternFile

from .capture import LayerInputs, capture, load_model, model_info

ROWS = 256  # query rows whose logits are there at a time: 256 x T x 4 bytes a head
MARGIN = 8.0  # of the window, that a head too wide for it keeps free above what was seen
ROUNDING = 1.02  # norms and products in bfloat16 may end so far above the bound


@dataclass
class Extremes:
    """Over all rows seen: the highest logit of each head [H], and its lowest log-sum-exp [H]."""

    high: torch.Tensor
    low: torch.Tensor

    def phi(self) -> torch.Tensor:
        """The middle of the window's place; of a head that is too wide, no overflow."""
        middle = (self.high + self.low) / 2
        return torch.maximum(middle, self.high - (HIGH - MARGIN))

    def too_wide(self) -> int:
        """Heads of which some row seen leaves the window of phi."""
        return int((self.low - self.phi() < LOW).sum())


@dataclass
class Calibration:
    """phi of every layer, and where it comes from."""

    phi: dict[int, list[float]]
    proven: dict[int, float]  # layers with QK-norm: the most that |logit| can be
    tokens: int  # that the other layers were measured on
    wide: dict[int, int] = field(default_factory=dict)  # heads too wide for any phi, by layer


def extremes(inputs: LayerInputs) -> Extremes:
    """Over every row of one layer and prompt, exactly, some rows at a time."""
    length, heads, _ = inputs.q.shape
    group = heads // inputs.k.shape[1]
    high = torch.full((heads,), -torch.inf)
    low = torch.full((heads,), torch.inf)
    for begin in range(0, length, ROWS):
        end = min(begin + ROWS, length)
        hidden = torch.ones(end - begin, end, dtype=torch.bool, device=inputs.q.device)
        hidden = hidden.triu(begin + 1)
        for head in range(heads):
            k = inputs.k[:end, head // group].float()
            scores = inputs.q[begin:end, head].float() @ k.T * inputs.scale
            scores.masked_fill_(hidden, -torch.inf)
            high[head] = max(float(high[head]), float(scores.max()))
            low[head] = min(float(low[head]), float(scores.logsumexp(1).min()))
    return Extremes(high, low)


def measure(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    wanted: Callable[[int], bool],
    note: Callable[[], None] = lambda: None,
) -> dict[int, Extremes]:
    """The extremes of the `wanted` layers over all prompts; `note` is called once a layer."""
    found: dict[int, Extremes] = {}

    def visit(inputs: LayerInputs) -> None:
        if wanted(inputs.layer):
            new = extremes(inputs)
            old = found.get(inputs.layer, new)
            found[inputs.layer] = Extremes(
                torch.maximum(old.high, new.high), torch.minimum(old.low, new.low)
            )
        note()

    for prompt in prompts:
        capture(model, prompt, visit)
    return found


def gain(norm: torch.nn.Module, size: int) -> float | None:
    """The largest |factor| that an RMSNorm over `size` puts on a dimension; None: it is none."""
    if "RMSNorm" not in type(norm).__name__:
        return None
    weight = getattr(norm, "weight", None)
    if weight is None or weight.numel() != size:
        return None  # a norm over all heads together bounds no single one
    with torch.no_grad():
        unit = torch.eye(size, dtype=weight.dtype, device=weight.device) * math.sqrt(size)
        answered = norm(unit).float()
        factors = answered.diagonal() / math.sqrt(size)
        # That it is what its name says: it keeps directions, and does not look at the length.
        alike = torch.allclose(norm(4 * unit).float(), answered, rtol=1e-2, atol=1e-2)
        kept = float((answered - answered.diagonal().diag_embed()).abs().max()) < 1e-3
    return float(factors.abs().max()) if alike and kept else None


def proven_bounds(model: torch.nn.Module, head_size: int) -> dict[int, float]:
    """The most that |logit| can be, of every layer whose queries and keys pass an RMSNorm."""
    stretch = 1.0
    for module in model.modules():  # YaRN and others scale what they rotate
        stretch = max(stretch, float(getattr(module, "attention_scaling", 1.0) or 1.0))
    bounds = {}
    for module in model.modules():
        layer, norms = getattr(module, "layer_idx", None), ("q_norm", "k_norm")
        if layer is None or not all(hasattr(module, name) for name in norms):
            continue
        gains = [gain(getattr(module, name), head_size) for name in norms]
        if None in gains:
            continue
        scale = float(getattr(module, "scaling", head_size**-0.5))
        bounds[layer] = ROUNDING * head_size * gains[0] * gains[1] * scale * stretch**2
    return bounds


def calibrate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    note: Callable[[], None] = lambda: None,
) -> Calibration:
    """phi of every layer of a loaded model (`capture.load_model`)."""
    info = model_info(model, "model")
    # Both sides of the window are as wide; a row's log-sum-exp is no lower than its lowest logit.
    limit = min(HIGH, -LOW)
    bounds = proven_bounds(model, info.head_size)
    proven = {layer: bound for layer, bound in bounds.items() if bound <= limit}
    phi = {layer: [0.0] * info.heads for layer in proven}
    wide, tokens = {}, 0
    if len(proven) < info.layers:
        tokens = sum(map(len, prompts))
        measured = measure(model, prompts, lambda layer: layer not in proven, note)
        for layer, found in measured.items():
            phi[layer] = [round(value, 3) for value in found.phi().tolist()]
            if heads := found.too_wide():
                wide[layer] = heads
    return Calibration(dict(sorted(phi.items())), proven, tokens, wide)


def write(path: Path, name: str, model: torch.nn.Module, found: Calibration) -> PatternFile:
    """Add phi to the pattern file at `path`, or write one that has nothing else.

    Raises:
        PatternError: what lies there is no pattern file, or one of another model.
    """
    info = model_info(model, name)
    settings = {
        "phi_tokens": found.tokens,
        "phi_proven_layers": sorted(found.proven),
        "phi_heads_too_wide": sum(found.wide.values()),
    }
    tools = {"phi_vllm-sparse": importlib.metadata.version("vllm-sparse")}
    if not path.exists():
        made = PatternFile(model=info, settings=settings, tools=tools, phi=found.phi)
    else:
        made = PatternFile.load(path)
        made.check_model(
            layers=info.layers, heads=info.heads, kv_heads=info.kv_heads, head_size=info.head_size,
            rope=dict(info.rope),
        )  # fmt: skip
        # Through validation again, as a copy would not be.
        data = made.model_dump(mode="json", exclude_none=True)
        data |= {"phi": found.phi, "settings": made.settings | settings}
        made = PatternFile.parse(data | {"tools": made.tools | tools}, str(path))
    made.save(path)
    return made


def random_prompts(vocabulary: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids drawn evenly: where no text is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def text_prompts(name: str, files: Iterable[Path], length: int) -> list[list[int]]:
    """The first `length` tokens of each file, by the model's own tokenizer.

    Raises:
        ValueError: a file cannot be read, or is empty.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    prompts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompt {str(file)!r} cannot be read: {error}") from error
        # Of an empty text some tokenizers make the token that begins every text.
        if not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"prompt {str(file)!r} is empty; give text")
        prompts.append(list(tokenizer(text)["input_ids"])[:length])
    return prompts


def run(
    name: str,
    output: Path,
    *,
    files: Sequence[Path] = (),
    length: int = 4096,
    samples: int = 2,
    device: str = "cpu",
    dtype: str | None = None,
) -> tuple[Calibration, PatternFile]:
    """Load a model, calibrate it and write the file; shows a bar where there is a terminal.

    Raises:
        ValueError: a model, prompt or file that cannot be used (ModelError, PatternError too).
    """
    from tqdm import tqdm

    model = load_model(name, device=device, dtype=dtype)
    if files:
        prompts = text_prompts(name, files, length)
    else:
        vocabulary = model.config.get_text_config().vocab_size
        prompts = random_prompts(vocabulary, samples, length)
    layers = model_info(model, name).layers
    with tqdm(total=layers * len(prompts), desc="calibrating", unit="layer", disable=None) as bar:
        found = calibrate(model, prompts, bar.update)
    return found, write(output, name, model, found)
