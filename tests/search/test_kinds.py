"""Heads that were built as one kind get what suits it, on prompts that ask for what they do."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import search_prompts
from retrieval.prompts import averaging_prompt

from vllm_sparse.patterns import HeadPattern, PatternFile
from vllm_sparse.search.candidates import DEFAULT, candidates
from vllm_sparse.search.capture import LayerInputs, capture, load_model
from vllm_sparse.search.choose import Goal, choose, layer_candidates
from vllm_sparse.search.evaluate import Layer, causal_blocks, evaluate
from vllm_sparse.search.run import Options, Result, search

LENGTH = 2048


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in search_prompts.prompts(LENGTH).items():
        (folder / name).write_text(text)
    return tuple(sorted(folder.iterdir()))


@pytest.fixture(scope="module")
def found(plain, home, texts, tmp_path_factory) -> Result:
    out = tmp_path_factory.mktemp("found") / "patterns.json"
    options = Options(model=str(plain), out=out, texts=texts, goal=Goal(error=0.03), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        return search(options)


def by_kind(file: PatternFile, plain: Path) -> dict[str, list[HeadPattern]]:
    kinds = json.loads((plain / "heads.json").read_text())["kinds"]
    found = defaultdict(list)
    for layer, heads in enumerate(kinds):
        for head, kind in enumerate(heads):
            found[kind].append(file.layers[layer][head])
    return found


def test_each_kind_gets_what_it_needs(found, plain):
    got = by_kind(found.file, plain)
    for kind in ("previous", "window", "local"):
        assert {p.kind for p in got[kind]} == {"a_shape"}, kind
    # What may stand anywhere is not found by counting from the end.
    assert {p.kind for p in got["retrieve"] + got["hop"]} <= {"block_sparse", "vertical_slash"}
    assert {p.kind for p in got["vertical"]} == {"vertical_slash"}


def test_no_head_is_over_the_bound(found):
    assert max(x for row in found.file.measured["error"] for x in row) <= 0.03
    # All heads together are as right as each of them.
    assert found.check.error["file"] < 0.03
    assert found.check.error["dense"] < 1e-4


def test_the_averaging_head_reads_more_where_it_averages(found, plain):
    (pattern,) = by_kind(found.file, plain)["count"]
    assert pattern.kind == "dense" or pattern.coverage is not None
    density = {}

    def visit(inputs: LayerInputs, head: int, name: str) -> None:
        layer = Layer(inputs)
        _, blocks, columns = layer.attend(found.file.for_layer(inputs.layer))
        density[name] = (blocks[head] + columns[head] / 64) / causal_blocks(layer.length)

    for prompt in found.prompts:
        at_the_averaging_head(plain, prompt.token_ids, partial(visit, name=prompt.name))
    assert density["counting"] > 0.5
    assert max(density["recall"], density["two-hop"]) < density["counting"] / 1.5


def test_a_head_that_always_averages_is_dense(plain, costs):
    # Symbols nearly everywhere, and the question for them every 64 tokens.
    ids = [i for n in range(LENGTH // 64) for i in averaging_prompt(64, n, rate=0.9).token_ids]
    tried = candidates(LENGTH)
    chosen = []

    def visit(inputs: LayerInputs, head: int) -> None:
        heads = layer_candidates(evaluate(inputs, tried), tried, costs, [LENGTH])
        chosen.append(choose(heads, Goal(error=0.03), DEFAULT)[head].chosen.pattern.kind)

    at_the_averaging_head(plain, ids, visit)
    assert chosen == ["dense"]


def at_the_averaging_head(plain: Path, token_ids: list[int], visit) -> None:
    kinds = json.loads((plain / "heads.json").read_text())["kinds"]
    layer = next(i for i, heads in enumerate(kinds) if "count" in heads)
    head = kinds[layer].index("count")
    capture(
        load_model(str(plain)),
        token_ids,
        lambda inputs: visit(inputs, head) if inputs.layer == layer else None,
    )
