"""CoPE in plain torch: the formula, the cache, padding, training, and its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from vllm_sparse.models import CoPEConfig, CoPEForCausalLM  # noqa: E402
from vllm_sparse.models.cope_torch import CoPEAttention  # noqa: E402

VOCAB = 97


def small_config(**changed) -> CoPEConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "cope_positions": 7,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return CoPEConfig(**(sizes | changed))


def scattered(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights with gates all over (0, 1), and tables that matter as much as keys do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                std = 1.0 if name.endswith("pos_emb") else 2 * parameter.shape[1] ** -0.5
                parameter.normal_(0, std, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def model() -> CoPEForCausalLM:
    return scattered(CoPEForCausalLM(small_config()))


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def scores(model: CoPEForCausalLM, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def written_out(attention: CoPEAttention, hidden: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence, hidden [T, hidden], in fp64 and loops: a query and a key at a
    time, each position as a sum of its own."""
    weight = {name: p.detach().double() for name, p in attention.named_parameters()}
    x, size, group = hidden.double(), attention.head_dim, attention.group
    table = weight["pos_emb"]
    rows = []
    for i in range(len(x)):
        heads = []
        queries = weight["q_proj.weight"] @ x[i]
        for head in range(len(queries) // size):
            q = queries[head * size : (head + 1) * size]
            own = slice(head // group * size, (head // group + 1) * size)
            keys = [weight["k_proj.weight"][own] @ x[j] for j in range(i + 1)]
            values = [weight["v_proj.weight"][own] @ x[j] for j in range(i + 1)]
            gates = [1 / (1 + math.exp(-float(q @ k) / math.sqrt(size))) for k in keys]
            weights = []
            for j in range(i + 1):
                position = min(sum(gates[j:]), len(table) - 1)
                low, high = math.floor(position), math.ceil(position)
                share = position - low
                embedding = share * table[high] + (1 - share) * table[low]
                weights.append(math.exp(float(q @ (keys[j] + embedding)) / math.sqrt(size)))
            total = sum(weights)
            heads.append(sum(w / total * v for w, v in zip(weights, values, strict=True)))
        rows.append(weight["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("positions", [1, 2, 7, 64])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attention_is_the_formula(positions: int, length: int) -> None:
    attention = scattered(CoPEAttention(small_config(cope_positions=positions), 0), positions)
    hidden = torch.randn(length, 48, generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        ours, _ = attention(hidden[None])
    torch.testing.assert_close(
        ours[0].double(), written_out(attention, hidden), atol=2e-5, rtol=2e-5
    )


def test_positions_matter(model: CoPEForCausalLM) -> None:
    """Else nothing here would show anything of them."""
    without = scattered(CoPEForCausalLM(small_config()))
    with torch.no_grad():
        for layer in without.model.layers:
            layer.self_attn.pos_emb.zero_()
    ids = tokens(1, 20)
    assert (scores(model, ids) - scores(without, ids))[:, 2:].abs().amax(-1).min() > 0.1


def test_cached_steps_equal_one_pass(model: CoPEForCausalLM) -> None:
    ids = tokens(2, 24)
    whole = scores(model, ids)
    cache = transformers.DynamicCache(config=model.config)
    parts = [scores(model, part, past_key_values=cache) for part in ids.split([9, 1, 1, 6, 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_generate_equals_recomputation(model: CoPEForCausalLM) -> None:
    ids = tokens(1, 10)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for _ in range(12):
        ids = torch.cat([ids, scores(model, ids)[:, -1:].argmax(-1)], 1)
    assert generated.tolist() == ids.tolist()
    assert len(set(ids[0, 10:].tolist())) > 3


def test_left_padding_changes_nothing(model: CoPEForCausalLM) -> None:
    sequences = [tokens(n, seed=n) for n in (5, 12, 8)]
    ids = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, 12 - len(sequence) :] = sequence
        mask[row, 12 - len(sequence) :] = 1
    padded = scores(model, ids, attention_mask=mask)
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    for row, sequence in enumerate(sequences):
        alone = scores(model, sequence[None])[0]
        torch.testing.assert_close(padded[row, 12 - len(sequence) :], alone, atol=1e-4, rtol=1e-4)
        own = model.generate(
            sequence[None], attention_mask=torch.ones(1, len(sequence)), max_new_tokens=6,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert generated[row, 12:].tolist() == own[0, len(sequence) :].tolist()


def test_gradients_reach_the_tables() -> None:
    """From their zeros, which positions beyond the first query's leave; and then the gates too."""
    model = CoPEForCausalLM(small_config())
    tables = [layer.self_attn.pos_emb for layer in model.model.layers]
    assert all(not table.any() for table in tables)
    ids = tokens(2, 16)
    model(ids, labels=ids).loss.backward()
    for table in tables:
        assert table.grad.isfinite().all()
        assert (table.grad.abs().amax(1) > 0).all(), "gates of about 1/2 reach every position"


def test_gradients_are_those_of_differences() -> None:
    """Through the gates and the sums too: a step along the gradient changes what it says."""
    attention = scattered(CoPEAttention(small_config(), 0)).double()
    hidden = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(3)).double()
    aim = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(4)).double()

    def loss() -> torch.Tensor:
        return (attention(hidden)[0] * aim).sum()

    for parameter in (attention.pos_emb, attention.q_proj.weight, attention.k_proj.weight):
        (gradient,) = torch.autograd.grad(loss(), parameter)
        step = 1e-3 * gradient / gradient.norm()
        with torch.no_grad():
            parameter += step
            ahead = loss()
            parameter -= 2 * step
            behind = loss()
            parameter += step
        expected = 2 * float((gradient * step).sum())
        # The logits are fp32 within.
        assert float(ahead - behind) == pytest.approx(expected, rel=0.02)


def test_checkpoints_come_back_through_auto_classes(model: CoPEForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CoPEConfig and config.cope_positions == 7
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is CoPEForCausalLM
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = tokens(1, 11)
    assert torch.equal(scores(loaded, ids), scores(model, ids))


@pytest.mark.parametrize("positions", [0, -3, 2.5, "many", None])
def test_a_table_without_positions_is_refused(positions) -> None:
    with pytest.raises(ValueError, match=f"cope_positions: got {positions!r}"):
        CoPEForCausalLM(small_config(cope_positions=positions))
