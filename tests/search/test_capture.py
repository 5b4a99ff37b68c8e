"""What a layer's attention is shown as, against transformers' own attention and our own model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from vllm_sparse.search import capture as module
from vllm_sparse.search.capture import ModelError, capture, load_model, model_info


def hidden(path: str, implementation: str, ids: list[int]) -> torch.Tensor:
    model = AutoModel.from_pretrained(path, attn_implementation=implementation).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_the_model_computes_what_it_computes_without_us(model: str, request):
    path = request.getfixturevalue(model)
    ids = torch.randint(0, 512, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = load_model(path)
    seen = []
    capture(ours, ids, lambda inputs: seen.append((inputs.layer, inputs.window)))
    with torch.inference_mode():
        out = ours(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    torch.testing.assert_close(out, hidden(path, "eager", ids), atol=2e-4, rtol=1e-4)
    windows = [None, None, None, None] if model == "llama" else [128, 128, None, 128, 128, None]
    assert seen == list(enumerate(windows))


def test_what_is_shown_is_what_attention_was_made_of(llama: str):
    ids = list(range(200))
    model = load_model(llama)
    info = model_info(model, llama)
    assert (info.layers, info.heads, info.kv_heads, info.head_size) == (4, 4, 2, 64)
    assert info.rope["rope_theta"] == 10000.0

    def check(inputs):
        assert inputs.q.shape == (200, 4, 64) and inputs.k.shape == (200, 2, 64)
        logits = torch.einsum("qhd,khd->hqk", inputs.q, inputs.k.repeat_interleave(2, 1))
        logits = (logits * inputs.scale).masked_fill(
            torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf
        )
        truth = torch.einsum("hqk,khd->qhd", logits.softmax(-1), inputs.v.repeat_interleave(2, 1))
        torch.testing.assert_close(inputs.out, truth, atol=1e-5, rtol=1e-4)

    capture(model, ids, check)


def test_the_retrieval_model_is_seen_as_its_own_forward_pass_sees_it(tmp_path):
    from retrieval.checkpoint import build_checkpoint
    from retrieval.forward import capture_qkv
    from retrieval.prompts import needle_prompt

    build_checkpoint(tmp_path, "plain", max_positions=4096)
    ids = needle_prompt(300).token_ids
    truth = capture_qkv(tmp_path, ids)
    seen = []
    capture(load_model(str(tmp_path)), ids, lambda inputs: seen.append((inputs.q, inputs.v)))
    assert len(seen) == len(truth)
    for (q, v), (true_q, _, true_v) in zip(seen, truth, strict=True):
        torch.testing.assert_close(q, true_q, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(v, true_v, atol=2e-3, rtol=1e-3)


def test_what_cannot_be_loaded_or_run_says_why(tmp_path, llama, monkeypatch):
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load_model(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="allowed: cpu, cuda"):
        load_model(llama, device="tpu")
    with pytest.raises(ModelError, match="allowed: float32"):
        load_model(llama, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="torch finds no GPU"):
            load_model(llama, device="cuda")
    other = AutoModel.from_pretrained(llama, attn_implementation="sdpa")
    with pytest.raises(ModelError, match="attention interface"):
        capture(other, [1, 2, 3], lambda inputs: None)
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ModelError, match="soft-capping"):
        module._attention(torch.nn.Identity(), q, q, q, None, softcap=30.0)


def test_nothing_is_seen_after_an_error(llama: str):
    def fail(inputs):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        capture(load_model(llama), [1, 2, 3], fail)
    assert module._visit is None
