"""Replacing vLLM's layer classes: in which processes, once, and what prevents it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.utils import _all_lora_classes
from vllm.model_executor import custom_op
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from vllm_sparse import plugin
from vllm_sparse.linear import layers

MAKE = {
    "ColumnParallelLinear": lambda: linear.ColumnParallelLinear(64, 96),
    "MergedColumnParallelLinear": lambda: linear.MergedColumnParallelLinear(64, [64, 32]),
    "QKVParallelLinear": lambda: linear.QKVParallelLinear(64, 32, 4, 2),
    "ReplicatedLinear": lambda: linear.ReplicatedLinear(64, 96),
    "RowParallelLinear": lambda: linear.RowParallelLinear(64, 96),
    "ParallelLMHead": lambda: vocab_parallel_embedding.ParallelLMHead(128, 64),
    "VocabParallelEmbedding": lambda: vocab_parallel_embedding.VocabParallelEmbedding(128, 64),
}
NAMES = sorted(MAKE)


@pytest.fixture(autouse=True)
def registry(monkeypatch) -> dict:
    """What replaces vLLM's layers: nothing, and as before when the test is over."""
    plugin.register()
    there: dict = {}
    monkeypatch.setattr(custom_op, "op_registry_oot", there)
    monkeypatch.setattr(
        parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1, device_group=None)
    )
    return there


def configure(model: str, **settings):
    """What vLLM does before it starts any process."""
    more = {"additional_config": {"sparse": settings}} if settings else {}
    args = EngineArgs(model=model, skip_tokenizer_init=True, attention_backend="sparse", **more)
    return args.create_engine_config()


def test_installing_twice_is_installing_once(registry):
    layers.install()
    first = dict(registry)
    assert sorted(first) == NAMES
    layers.install()
    assert registry == first
    assert all(each.of_vllm_sparse and each.name == name for name, each in first.items())


@pytest.mark.parametrize("setting", ["flat", "auto"])
def test_the_setting_installs(setting: str, llama, registry):
    configure(llama, linear=setting)
    assert sorted(registry) == NAMES


@pytest.mark.parametrize("settings", [{}, {"linear": "vllm"}, {"coverage": 0.9}], ids=json.dumps)
def test_other_settings_do_not(settings: dict, llama, registry):
    configure(llama, **settings)
    assert registry == {}


@pytest.mark.parametrize("value", ["fast", "FLAT", "", None, True, 1, ["flat"]], ids=repr)
def test_a_bad_value_is_refused(value, llama, registry):
    with pytest.raises(ValueError) as error:
        configure(llama, linear=value)
    said = str(error.value)
    assert '["linear"]' in said and repr(value) in said
    assert '"vllm", "flat" or "auto"' in said
    assert registry == {}


@pytest.mark.parametrize("name", NAMES)
def test_another_plugins_classes_are_not_replaced(name: str, llama, registry):
    there = type(name, (torch.nn.Module,), {"__module__": "another_plugin.layers"})
    registry[name] = there
    with pytest.raises(ValueError) as error:
        configure(llama, linear="flat")
    assert registry[name] is there
    said = str(error.value)
    assert f"vLLM's {name}, which another_plugin.layers has replaced" in said
    assert 'leave "linear" out' in said


def test_a_vllm_whose_layers_cannot_be_replaced(llama, monkeypatch):
    monkeypatch.delattr(custom_op, "PluggableLayer")
    with pytest.raises(ValueError, match=r'"linear"\] needs a vLLM .*upgrade vllm, or leave'):
        configure(llama, linear="flat")


def accepting(layer, packed: int) -> set[str]:
    """The LoRA layers that would take a layer's place."""
    config, modules = LoRAConfig(max_lora_rank=8), ["x"] * packed
    return {
        each.__name__
        for each in _all_lora_classes
        if each.can_replace_layer(
            source_layer=layer, lora_config=config, packed_modules_list=modules, model_config=None
        )
    }


@pytest.mark.parametrize("packed", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_lora_takes_the_same_layers(name: str, packed: int, llama, registry):
    theirs = accepting(MAKE[name](), packed)
    with set_current_vllm_config(configure(llama, linear="flat")):
        layer = MAKE[name]()
    assert type(layer) is registry[name]
    assert accepting(layer, packed) == theirs
    fits = {"QKVParallelLinear": (1, 3), "ParallelLMHead": ()}
    assert bool(theirs) == (packed in fits.get(name, (1, 2, 3)))


def in_fresh_process(code: str, stdin: bytes = b"") -> str:
    """The last line that `python -c code` writes."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=stdin, capture_output=True, timeout=120, cwd="/", env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode().splitlines()[-1]


REGISTER = (
    "from vllm_sparse import plugin; plugin.register();"
    "from vllm.model_executor.custom_op import op_registry_oot as there;"
    "found = sorted(n for n, c in there.items() if getattr(c, 'of_vllm_sparse', False));"
    "print(json.dumps([found, 'vllm_sparse.linear' in sys.modules]))"
)


def test_a_process_that_is_handed_such_a_configuration_replaces_them(llama):
    # As the engine core and workers do: the configuration arrives before plugins are loaded.
    given = pickle.dumps(configure(llama, linear="flat").attention_config)
    code = f"import json, pickle, sys; config = pickle.load(sys.stdin.buffer); {REGISTER}"
    assert json.loads(in_fresh_process(code, given)) == [NAMES, True]


@pytest.mark.parametrize("when", ["before", "after"])
def test_models_that_do_not_ask_are_served_beside_another_plugin(when: str, llama):
    given = pickle.dumps(configure(llama).attention_config)
    other = (
        "from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot as there;"
        "from vllm.model_executor.layers.linear import RowParallelLinear as base;"
        "other = type('RowParallelLinear', (base,), {});"
        "PluggableLayer.register_oot(name='RowParallelLinear')(other)"
    )
    ours = "from vllm_sparse import plugin; plugin.register()"
    order = [other, ours] if when == "before" else [ours, other]
    code = "; ".join(["import pickle, sys; config = pickle.load(sys.stdin.buffer)", *order])
    code += "; print(there['RowParallelLinear'] is other)"
    assert in_fresh_process(code, given) == "True"


def test_any_other_process_does_not_even_load_them():
    assert json.loads(in_fresh_process(f"import json, sys; {REGISTER}")) == [[], False]
