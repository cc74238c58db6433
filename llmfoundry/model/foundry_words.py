"""Translates LLM Foundry keys of `model` that have other names here, changing the block in place.

Each function takes the block and the value of a key that was removed from it, and returns what the key became, as lines
of text.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError

Tree = dict[str, object]

_LAYER_NORM_EPS = 1e-5


def attention_of(model: Tree) -> Tree:
    """Return the block `attn_config`, created if it is missing."""
    attention = model.setdefault("attn_config", {})
    if not isinstance(attention, dict):
        raise ConfigError(f"model.attn_config: must be a mapping, found {attention!r}")
    return attention


def group_norm(model: Tree, value: object) -> list[str]:
    """Translate `qk_gn`, which normalizes each head."""
    if not value:
        return ["left out: off is the default"]
    attention_of(model)["qk_norm"] = value
    return [f"model.attn_config.qk_norm: {value}", *_layer_norm(model)]


def head_dim(model: Tree, value: object) -> list[str]:
    """Translate `model.head_dim`. LLM Foundry scales scores by d_model / n_heads, whatever the head size is."""
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
    """Translate `kv_dim`, the input size of keys and values; for self-attention it must be d_model."""
    if value not in (None, model.get("d_model")):
        raise ConfigError(
            f"model.attn_config.kv_dim: {value!r} is for cross-attention, which is not supported; leave it out"
        )
    return ["left out: keys and values are projected from d_model"]


def temperature(model: Tree, value: object) -> list[str]:
    """Translate `attn_temperature_tuning`, which must be off (attn_scale 0)."""
    _without_temperature(value, "model.attn_config")
    return ["left out: attn_scale 0 is off"]


def _without_temperature(value: object, where: str) -> None:
    scale = value.get("attn_scale", 0) if isinstance(value, dict) else value
    if scale not in (None, 0):  # False is 0
        raise ConfigError(
            f"{where}.attn_temperature_tuning: is not supported: queries are not scaled by their position; write "
            "attn_scale: 0.0, or leave it out"
        )


def layer_norm(model: Tree) -> list[str]:
    """Make `qk_ln` a LayerNorm, as in LLM Foundry, whatever the model's norm is; returns notes."""
    attention = model.get("attn_config")
    if not isinstance(attention, dict) or not attention.get("qk_ln"):
        return []
    return _layer_norm(model)


def _layer_norm(model: Tree) -> list[str]:
    attention, said = attention_of(model), []
    if "layernorm" not in str(model.get("norm_type", "layernorm")) and "norm_type" not in attention:
        attention["norm_type"] = "layernorm"
        said.append("model.attn_config.norm_type: layernorm")
    if model.get("norm_eps", _LAYER_NORM_EPS) != _LAYER_NORM_EPS and "norm_eps" not in attention:
        attention["norm_eps"] = _LAYER_NORM_EPS
        said.append(f"model.attn_config.norm_eps: {_LAYER_NORM_EPS}")
    return said


def rope_impl(model: Tree, value: object) -> list[str]:
    """Translate `rope_impl`: `dail` reads only rope_dail_config, `hf` reads only rope_hf_config."""
    if value not in ("dail", "hf"):
        raise ConfigError(f"model.attn_config.rope_impl: {value!r} is not supported; write dail or hf")
    attention = attention_of(model)
    other = "rope_hf_config" if value == "dail" else "rope_dail_config"
    if attention.pop(other, None) is None:
        return ["left out: both rotate alike"]
    return [f"left out, with {other}, which {value} does not read"]


def rope_dail(model: Tree, value: object) -> list[str]:
    """Translate `rope_dail_config`: type `xpos` is not supported; the other keys do not change results."""
    kind = value.get("type", "original") if isinstance(value, dict) else value
    if kind not in (None, "original"):
        raise ConfigError(f"model.attn_config.rope_dail_config.type: {kind!r} is not supported; write original")
    return ["left out: it does not change results"]


def block_overrides(model: Tree, value: object) -> list[str]:
    """Translate `block_overrides`: windows, reused keys and values, and positions, each to a pattern over layers."""
    if value is None:
        return ["left out: all layers are alike"]
    where = "model.block_overrides"
    if not isinstance(value, dict) or not isinstance(value.get("order"), list):
        raise ConfigError(f"{where}: must hold order, a list, and overrides, found {value!r}")
    overrides = value.get("overrides")
    if not isinstance(overrides, dict) or "default" in overrides:
        raise ConfigError(f"{where}.overrides: must map names to settings, and `default` is the layer without any")
    if unknown := value.keys() - {"order", "overrides", "repeat"}:
        raise ConfigError(f"{where}.{min(unknown)}: unknown key")
    names = _expanded(value["order"], f"{where}.order") * _repeats(value, where)
    if len(names) != model.get("n_layers"):
        raise ConfigError(f"{where}: order and repeat give {len(names)} layers, n_layers is {model.get('n_layers')!r}")
    if lost := set(names) - {"default", *overrides}:
        raise ConfigError(f"{where}.order: {min(lost)!r} is not in overrides; it holds {', '.join(sorted(overrides))}")
    settings = {name: _override(override, f"{where}.overrides.{name}") for name, override in overrides.items()}
    attention, said = attention_of(model), []
    usual = {"sliding_window_size": attention.get("sliding_window_size", -1), "reuse_kv_layer_idx": 0, "nope": False}
    for key, ours in (
        ("sliding_window_size", "attn_window_pattern"),
        ("reuse_kv_layer_idx", "attn_reuse_kv_pattern"),
        ("nope", "attn_position_pattern"),
    ):
        by_layer = [settings.get(name, {}).get(key, usual[key]) for name in names]
        if all(each == usual[key] for each in by_layer):
            continue
        model[ours] = [not each for each in by_layer] if key == "nope" else by_layer
        said.append(f"model.{ours}: {model[ours]}")
        attention.pop(key, None)
    return said or ["left out: all layers are alike"]


def _expanded(order: object, where: str) -> list[str]:
    """Flatten a nested order into layer names, applying `repeat`."""
    names: list[str] = []
    for item in order if isinstance(order, list) else [order]:
        if not isinstance(item, dict) or ("name" in item) == ("order" in item):
            raise ConfigError(f"{where}: each item has either a name or an order, found {item!r}")
        if unknown := item.keys() - {"name", "order", "repeat"}:
            raise ConfigError(f"{where}.{min(unknown)}: unknown key")
        inner = [str(item["name"])] if "name" in item else _expanded(item["order"], where)
        names += inner * _repeats(item, where)
    return names


def _repeats(block: Tree, where: str) -> int:
    repeat = block.get("repeat", 1)
    if not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 1:
        raise ConfigError(f"{where}.repeat: must be a whole number, 1 or more, found {repeat!r}")
    return repeat


def _override(override: object, where: str) -> Tree:
    """Return the attention settings of one kind of layer."""
    if not isinstance(override, dict) or override.keys() - {"attn_config"}:
        raise ConfigError(f"{where}: only attn_config can differ between layers, found {override!r}")
    given = override.get("attn_config") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}.attn_config: must be a mapping, found {given!r}")
    settings = dict(given)
    _without_temperature(settings.pop("attn_temperature_tuning", None), f"{where}.attn_config")
    if settings.pop("reuse_kv_x_layer_idx", None) is not None:
        raise ConfigError(
            f"{where}.attn_config.reuse_kv_x_layer_idx: is not supported: a layer projects its keys and values from "
            "its own input; reuse_kv_layer_idx takes those of an earlier layer as they are"
        )
    for key in settings:
        if key not in ("sliding_window_size", "reuse_kv_layer_idx", "nope"):
            raise ConfigError(
                f"{where}.attn_config.{key}: is not supported; use sliding_window_size, reuse_kv_layer_idx or nope"
            )
    step = settings.get("reuse_kv_layer_idx", -1)
    if not isinstance(step, int) or step >= 0:
        raise ConfigError(
            f"{where}.attn_config.reuse_kv_layer_idx: must be negative, how many layers before, found {step!r}"
        )
    return settings
