"""Puts our methods under vLLM's linear layers, by vLLM's own way of replacing layer classes."""

from __future__ import annotations

from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from vllm_sparse import compat
from vllm_sparse.config import SECTION, SparseConfig
from vllm_sparse.plugin import BACKEND

from .choice import VLLM
from .method import FlatEmbeddingMethod, FlatLinearMethod, count_left

LINEAR = (
    "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear",
    "ReplicatedLinear", "RowParallelLinear",
)  # fmt: skip
EMBEDDINGS = ("ParallelLMHead", "VocabParallelEmbedding")


def install() -> None:
    """Replace the layer classes in this process, once. Layers of models that do not ask for it
    stay as they are.

    Raises:
        ValueError: a vLLM without replaceable layers, or another plugin has replaced them.
    """
    replaceable = compat.replaceable_layers()
    if replaceable is None:
        raise ValueError(
            f'{SECTION}["linear"] needs a vLLM whose linear layers can be replaced (0.32 can); '
            'upgrade vllm, or leave "linear" out'
        )
    plugged, replaced = replaceable
    for names, module in ((LINEAR, linear), (EMBEDDINGS, vocab_parallel_embedding)):
        for name in names:
            there = replaced.get(name)
            if there is None:
                plugged.register_oot(name=name)(_ours(getattr(module, name)))
            elif not getattr(there, "of_vllm_sparse", False):
                raise ValueError(
                    f'{SECTION}["linear"] replaces vLLM\'s {name}, which {there.__module__} has '
                    'replaced already; uninstall that plugin, or leave "linear" out'
                )


def _ours(base: type) -> type:
    """The class that is made in place of `base`: the same, but for what multiplies."""

    def __init__(self, *args, **kwargs):
        base.__init__(self, *args, **kwargs)
        adopt(self)

    # vLLM and LoRA look at names of classes.
    return type(base.__name__, (base,), {"__init__": __init__, "of_vllm_sparse": True})


def adopt(layer) -> None:
    """Give a layer our method where the settings in force ask for it, and it has vLLM's plain one.

    The layer's parameters were made by vLLM's own method, which stays the one that loads them:
    vLLM chooses loaders by the name of the method's class.
    """
    vllm_config = get_current_vllm_config_or_none()
    setting = setting_of(vllm_config)
    if setting == VLLM:
        return
    plain = type(layer.quant_method)
    if plain is linear.UnquantizedLinearMethod:
        layer.quant_method = FlatLinearMethod(setting)
    elif plain is vocab_parallel_embedding.UnquantizedEmbeddingMethod:
        output = isinstance(layer, vocab_parallel_embedding.ParallelLMHead)
        layer.quant_method = FlatEmbeddingMethod(setting, output or tied(vllm_config))
    else:
        count_left("linear_quantized")


def tied(vllm_config) -> bool:
    """Whether the model's embedding is its output layer as well."""
    text_config = getattr(vllm_config.model_config, "hf_text_config", None)
    return bool(getattr(text_config, "tie_word_embeddings", False))


def setting_of(vllm_config) -> str:
    """`linear` of the configuration that a model is being made under; "vllm" without ours."""
    if vllm_config is None:
        return VLLM
    if getattr(vllm_config.attention_config.backend, "name", None) != BACKEND:
        return VLLM
    return SparseConfig.from_additional_config(vllm_config.additional_config).linear
