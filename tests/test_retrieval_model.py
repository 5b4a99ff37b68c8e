"""The constructed checkpoint answers its questions, and its heads are of the kinds they claim."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

transformers = pytest.importorskip("transformers")

from retrieval import prompts  # noqa: E402
from retrieval.checkpoint import build_checkpoint  # noqa: E402
from retrieval.density import block_count, by_kind, model_densities, read_kinds, tile_scores  # noqa: E402
from retrieval.forward import LayerInputs, load_model, logits, run_layers  # noqa: E402
from retrieval.prompts import Question  # noqa: E402
from retrieval.vocabulary import COUNT_TEMPLATE, EOS, SYMBOLS, VOCABULARY  # noqa: E402

QUESTIONS_1K = [
    *(prompts.needle_prompt(1024, depth, seed) for seed, depth in enumerate((0, 0.25, 0.5, 1))),
    prompts.needle_prompt(1000, 0.7, 5, words=4),
    prompts.needle_prompt(1024, 0.4, 6, distractors=9),
    prompts.two_hop_prompt(1024, (0.2, 0.8), 7),
    prompts.two_hop_prompt(1024, (0.9, 0.1), 8, distractors=4),
    prompts.averaging_prompt(1024, 9),
    prompts.averaging_prompt(1024, 10, shares=(0.6, 0.4), late_minority=True),
    prompts.averaging_prompt(1024, 11, shares=(0.4, 0.3, 0.3)),
]
QUESTIONS_4K = [
    prompts.needle_prompt(4096, 0.3, 12, distractors=3),
    prompts.averaging_prompt(4096, 13, late_minority=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("plain"), "plain")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(folder: Path, request: pytest.FixtureRequest) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=request.param).eval()


def margins(scores: torch.Tensor, wanted: list[int]) -> list[float]:
    """By how much each wanted token leads all others: scores [len(wanted), words]."""
    found = []
    for row, token in zip(scores.float(), wanted, strict=True):
        others = row.clone()
        others[token] = float("-inf")
        found.append(float(row[token] - others.max()))
    return found


@pytest.mark.parametrize(
    "question", QUESTIONS_1K + QUESTIONS_4K, ids=lambda q: f"{q.kind}-{len(q.token_ids)}"
)
def test_answers(model: transformers.LlamaForCausalLM, question: Question) -> None:
    wanted = [*question.answer_ids, VOCABULARY.id(EOS)]
    ids = torch.tensor([question.token_ids + question.answer_ids])
    with torch.no_grad():
        scores = model(ids, logits_to_keep=len(wanted)).logits[0]
    assert min(margins(scores, wanted)) > 2


def test_own_forward_agrees_with_transformers(folder: Path) -> None:
    question = QUESTIONS_1K[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model(torch.tensor([question.token_ids])).logits[0, -3:]
    ours = logits(load_model(folder), question.token_ids, last=3)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "lean"])
def test_answers_in_bfloat16_with_rounded_rotations(kind: str, tmp_path: Path) -> None:
    model = load_model(build_checkpoint(tmp_path, kind, dtype="bfloat16"), torch.bfloat16)
    for question in (QUESTIONS_1K[0], QUESTIONS_1K[7], QUESTIONS_1K[9]):
        scores = logits(model, question.token_ids)
        assert min(margins(scores, question.answer_ids[:1])) > 2


def test_tokenizer_round_trip(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for question in QUESTIONS_1K:
        assert tokenizer(question.prompt).input_ids == question.token_ids
        assert tokenizer.decode(question.token_ids, skip_special_tokens=True) == question.prompt
        assert tokenizer.decode(question.answer_ids) == question.answer
        assert question.is_right(question.answer + " more")
        assert not question.is_right("more " + question.answer)


@pytest.mark.parametrize("length", [200, 1023, 1024, 16384 - 7])
def test_prompt_length_and_depth_are_exact(length: int) -> None:
    for depth in (0.0, 0.5, 1.0):
        question = prompts.needle_prompt(length, depth, seed=3)
        assert len(question.token_ids) == length
        (place,) = question.evidence
        assert question.token_ids[place] == question.answer_ids[0]
        assert abs(place / length - depth) < 30 / length
    assert len(prompts.two_hop_prompt(length).token_ids) == length
    assert len(prompts.averaging_prompt(length).token_ids) == length
    assert len(prompts.haystack_ids(length)) == length


def test_averaging_counts() -> None:
    question = prompts.averaging_prompt(8192, 4, shares=(0.4, 0.3, 0.3), late_minority=True)
    haystack = question.prompt.split()
    counts = {symbol: haystack.count(symbol) for symbol in SYMBOLS}
    best, *rest = sorted(counts, key=counts.__getitem__, reverse=True)
    assert best == question.answer
    assert counts[best] / sum(counts.values()) == pytest.approx(0.4, abs=0.01)
    late = haystack[-2000:]
    assert late.count(best) < min(late.count(symbol) for symbol in rest if counts[symbol])


def test_questions_on_one_text_share_it() -> None:
    depths = (0.0, 0.5, 1.0)
    tally, *needles = prompts.questions_on_one_text(2049, depths, seed=5, words=2)
    assert len(tally.token_ids) == 2049
    assert tally.kind == "averaging"
    text = 2049 - 40
    for depth, question in zip(depths, needles, strict=True):
        assert question.token_ids[:text] == tally.token_ids[:text]
        assert [question.token_ids[i] for i in question.evidence] == question.answer_ids[:2]
        assert abs(question.evidence[0] / 2049 - depth) < 0.03
    counts = {symbol: tally.prompt.split().count(symbol) for symbol in SYMBOLS}
    assert max(counts, key=counts.__getitem__) == tally.answer
    assert sum(counts.values()) == len(tally.evidence)


def test_bad_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        prompts.needle_prompt(20)
    with pytest.raises(ValueError, match="depths"):
        prompts.needle_prompt(500, depth=1.5)
    with pytest.raises(ValueError, match="shares"):
        prompts.averaging_prompt(500, shares=(0.3, 0.7))
    with pytest.raises(ValueError, match="distinct words"):
        prompts.needle_prompt(4000, distractors=20, words=8)


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind='dense'"):
        build_checkpoint(tmp_path, "dense")
    with pytest.raises(ValueError, match="dtype='int8'"):
        build_checkpoint(tmp_path, dtype="int8")


def find(kinds: list[list[str]], kind: str) -> list[tuple[int, int]]:
    return [(i, j) for i, layer in enumerate(kinds) for j, name in enumerate(layer) if name == kind]


def probabilities(layers: list[LayerInputs], layer: int, head: int, rows: int) -> torch.Tensor:
    """Attention [rows, T] of the last `rows` queries."""
    inputs = layers[layer]
    group = inputs.q.shape[1] // inputs.k.shape[1]
    start = len(inputs.q) - rows
    return tile_scores(inputs.q[:, head], inputs.k[:, head // group], start, rows)


def test_kinds_of_heads(folder: Path) -> None:
    kinds = read_kinds(folder)
    question = prompts.needle_prompt(2048, 0.35, 21)
    layers = [inputs for inputs, _ in run_layers(load_model(folder), question.token_ids)]
    rows = 256
    positions = torch.arange(2048 - rows, 2048)

    ((layer, head),) = find(kinds, "previous")
    mass = probabilities(layers, layer, head, rows)
    assert float(mass[range(rows), positions - 1].min()) > 0.98

    for layer, head in find(kinds, "slash"):
        mass = probabilities(layers, layer, head, rows)
        best = mass.argmax(1)
        assert len((positions - best).unique()) == 1
        assert float(mass[range(rows), best].min()) > 0.9

    for layer, head in find(kinds, "window"):
        mass = probabilities(layers, layer, head, rows)
        # The widest window of this checkpoint is 64; the logit has fallen far at four widths.
        assert float((mass[:, 0] + mass.flip(1)[:, : 256 + rows].sum(1)).min()) > 0.97
        assert 0.2 < float(mass[:, 0].mean()) < 0.95

    for layer, head in find(kinds, "local"):
        mass = probabilities(layers, layer, head, 1)[0]
        assert float(mass[-512:].sum()) > 0.95
        assert float(mass[0]) < 0.01

    ((layer, head),) = find(kinds, "retrieve")
    mass = probabilities(layers, layer, head, rows)
    assert float(mass[-1, question.evidence].sum()) > 0.9
    assert float(mass[:-30, 0].min()) > 0.95, "at rest on the sink where nothing is asked"

    ((layer, head),) = find(kinds, "vertical")
    mass = probabilities(layers, layer, head, rows)
    special = set(VOCABULARY.ids(VOCABULARY.special))
    columns = [i for i, token in enumerate(question.token_ids) if token in special]
    assert float((mass[:, columns].sum(1) + mass[:, 0]).min()) > 0.9
    assert float(mass[:, columns].sum(1).mean()) > 0.4

    ((layer, head),) = find(kinds, "same_word")
    mass = probabilities(layers, layer, head, rows)
    tokens = torch.tensor(question.token_ids)
    same = tokens[positions][:, None] == tokens
    assert float(((mass * same).sum(1) + mass[:, 0]).mean()) > 0.9


def test_counting_head_is_broad(folder: Path) -> None:
    question = prompts.averaging_prompt(2048, 22, shares=(0.4, 0.3, 0.3))
    layers = [inputs for inputs, _ in run_layers(load_model(folder), question.token_ids)]
    ((layer, head),) = find(read_kinds(folder), "count")
    mass = probabilities(layers, layer, head, 128)
    counted = mass[-1, question.evidence]
    assert float(counted.sum()) > 0.95
    assert float(counted.max() / counted.min()) < 2
    assert float(mass[: -len(COUNT_TEMPLATE) - 1, 0].min()) > 0.9
    assert block_count(mass[-1:], 0.95, 64) > 0.85 * 2048 / 64


def test_block_count_takes_the_fewest_blocks() -> None:
    mass = torch.tensor([[0.5, 0.0, 0.1, 0.1, 0.3, 0.0], [0.5, 0.2, 0.0, 0.0, 0.3, 0.0]])
    assert block_count(mass, 0.5, block=2) == 1
    assert block_count(mass, 0.85, block=2) == 2
    assert block_count(mass, 1.0, block=4) == 2


def test_densities_by_kind(folder: Path) -> None:
    ids = prompts.needle_prompt(4096, 0.5, 23).token_ids
    kinds = by_kind(model_densities(folder, ids, tiles=8))
    assert kinds["window"][1] < 0.12 < 0.4 < kinds["vertical"][1]
    assert kinds["retrieve"][2] > 0.95
    assert kinds["all"][0] == 24
