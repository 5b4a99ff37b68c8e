"""Speculative decoding on a GPU: layers of draft models, and tokens that are verified."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cuda_layer import HEADS, Layer
from gpu_cases import HAS_GPU
from vllm.compilation.backends import set_model_tag

from vllm_sparse import compat
from vllm_sparse.patterns import ADAPTIVE, PatternError, PatternFile

pytestmark = pytest.mark.skipif(HAS_GPU, reason="stands in for a GPU; here is one")


@pytest.fixture
def layer(llama, monkeypatch):
    return lambda **settings: Layer(llama, monkeypatch, **settings)


@pytest.fixture
def file(tmp_path) -> str:
    """Phi, and dense heads in layer 0, of a model that `llama` is (4 layers) or is not."""

    def save(layers: int = 4) -> str:
        path = tmp_path / f"{layers}.json"
        dense = {"kind": "dense"}
        PatternFile(
            model={"name": "m", "layers": layers, "heads": 4, "kv_heads": 2, "head_size": 64},
            layers={0: {0: dense, 1: dense}}, phi={i: [0.0] * 4 for i in range(layers)},
        ).save(path)  # fmt: skip
        return str(path)

    return save


def test_drafts_take_nothing_of_the_targets_patterns(layer, file):
    """Layer 0 of a draft model is not the target's; nor need it have the file's shape."""
    settings = {"softmax": "unified", "break_even": 0, "speculated": 2}
    target = layer(patterns=file(), **settings).impl
    assert target.always_dense and target.phi is not None
    with pytest.raises(PatternError, match="of another model"):
        layer(patterns=file(layers=3), **settings)
    with set_model_tag("eagle_head"):
        draft = layer(patterns=file(layers=3), dense_layers=[0], **settings)
    assert draft.impl.patterns == (ADAPTIVE,) * HEADS
    assert draft.impl.phi is None and not draft.impl.always_dense
    out, want, _ = draft.step([(50, 1), (3, 1)])
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)


def test_a_draft_that_counts_its_layers_after_the_targets_is_one(layer, file):
    made = layer(patterns=file(), softmax="unified", break_even=0, speculated=2)
    made.layer.layer_name = "model.layers.4.self_attn.attn"
    made.impl.workspace = made.impl.patterns = made.impl.phi = None  # as if it were new
    made.impl._prepare(made.layer, torch.device("cpu"))
    assert made.impl.patterns == (ADAPTIVE,) * HEADS and made.impl.phi is None


@pytest.mark.parametrize(
    "speculates, runner, tag, draft",
    [
        (False, "generate", None, False),
        (True, "generate", None, False),
        (True, "draft", None, True),
        (True, "generate", "eagle_head", True),
        (True, "generate", "draft_model", True),
        (True, "generate", "self_decoder", False),  # a part of a target
    ],
)
def test_what_a_draft_is(speculates, runner, tag, draft):
    config = SimpleNamespace(
        speculative_config=SimpleNamespace() if speculates else None,
        model_config=SimpleNamespace(runner_type=runner),
    )
    if tag is None:
        assert compat.makes_draft(config) == draft
        return
    with set_model_tag(tag):
        assert compat.makes_draft(config) == draft


def test_sequences_that_verify_come_first(layer):
    """Or else prompts would lie between them, and each stretch of them were a segment."""
    assert layer(speculated=3, break_even=0).builder.reorder_batch_threshold == 4
    assert layer(break_even=0).builder.reorder_batch_threshold == 1


def test_the_device_may_spread_speculated_tokens_otherwise_than_the_host_thinks(layer):
    """With adaptive verification the host knows their sum alone."""
    made = layer(coverage=1.0, break_even=200, speculated=39)
    made.cache.copy_(torch.randn(made.cache.shape))
    build = made.builder.build

    def spread(prefix: int, common):
        metadata = build(prefix, common)
        # What the host has for 20, 20, 66 is 2, 38, 66 on the device.
        starts, lens = metadata.query_start_loc, metadata.seq_lens
        new = torch.tensor([2, 38, 66], dtype=torch.int32)
        old = starts[1:] - starts[:-1]
        starts[1:] = new.cumsum(0)
        lens += new - old
        segment = metadata.segments[0]
        segment.metadata.query_start_loc.copy_(starts[:3])
        return metadata

    made.builder.build = spread
    out, want, metadata = made.step([(300, 20), (250, 20), (180, 66)], [False, False, True])
    assert [(s.sparse, s.decodes) for s in metadata.segments] == [(False, True), (True, False)]
    assert metadata.segments[0].metadata.max_query_len == 40
    torch.testing.assert_close(out, want, rtol=4e-3, atol=4e-3)
