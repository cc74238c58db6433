"""LLM Foundry's words for a model that have others here: the block `model`, changed in place.

Each function takes the block and a value that was taken out of it, and returns what it became, in words.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError

Tree = dict[str, object]

_LAYER_NORM_EPS = 1e-5


def attention_of(model: Tree) -> Tree:
    """The block `attn_config`, made if it is missing."""
    attention = model.setdefault("attn_config", {})
    if not isinstance(attention, dict):
        raise ConfigError(f"model.attn_config: must be a mapping, found {attention!r}")
    return attention


def group_norm(model: Tree, value: object) -> list[str]:
    """`qk_gn` normalises each head."""
    if not value:
        return ["left out: off is the default"]
    attention_of(model)["qk_norm"] = value
    return [f"model.attn_config.qk_norm: {value}", *_layer_norm(model)]


def head_dim(model: Tree, value: object) -> list[str]:
    """`model.head_dim`. Scores are scaled by d_model / n_heads there, whatever the heads' size is."""
    if value is None:
        return ["left out: d_model / n_heads is the default"]
    attention, sizes = attention_of(model), (model.get("d_model"), model.get("n_heads"))
    attention["head_dim"] = value
    said = [f"model.attn_config.head_dim: {value}"]
    d_model, n_heads = sizes
    if isinstance(d_model, int) and isinstance(n_heads, int) and n_heads > 0 and value != d_model / n_heads:
        if attention.get("softmax_scale") is None:
            attention["softmax_scale"] = (d_model / n_heads) ** -0.5
            said.append(f"model.attn_config.softmax_scale: {attention['softmax_scale']}")
    return said


def kv_dim(model: Tree, value: object) -> list[str]:
    """The size of what keys and values are projected from: of self-attention, the model's."""
    if value not in (None, model.get("d_model")):
        raise ConfigError(
            f"model.attn_config.kv_dim: {value!r} is of cross-attention, which is not built; leave it out"
        )
    return ["left out: keys and values are projected from d_model"]


def layer_norm(model: Tree) -> list[str]:
    """`qk_ln` is a LayerNorm there, whatever the model's norm is; returns notes."""
    attention = model.get("attn_config")
    if not isinstance(attention, dict) or not attention.get("qk_ln"):
        return []
    return [f"model.attn_config.qk_ln=True: sets {said}, as it does there" for said in _layer_norm(model)]


def _layer_norm(model: Tree) -> list[str]:
    attention, said = attention_of(model), []
    if "layernorm" not in str(model.get("norm_type", "layernorm")) and "norm_type" not in attention:
        attention["norm_type"] = "layernorm"
        said.append("model.attn_config.norm_type: layernorm")
    if model.get("norm_eps", _LAYER_NORM_EPS) != _LAYER_NORM_EPS and "norm_eps" not in attention:
        attention["norm_eps"] = _LAYER_NORM_EPS
        said.append(f"model.attn_config.norm_eps: {_LAYER_NORM_EPS}")
    return said
