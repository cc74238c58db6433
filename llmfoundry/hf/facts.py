"""What a model computes, as a flat dict: two configs with equal facts compute the same function of the same weights.

Facts are normalized: defaults are filled in, aliases resolved, and windows listed per layer. Settings that affect only
training or speed are left out. Comparing facts tells whether another format can represent a model, and whether a YAML
fits a checkpoint.
"""

from __future__ import annotations

from llmfoundry.config import Choice, dump
from llmfoundry.layers.attention import AttentionConfig, GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.layers.norm import NormConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig

Facts = dict[str, object]

# Settings of attention and feed-forward blocks that affect only speed or training.
_NO_FUNCTION = {
    "attn_impl", "attn_uses_sequence_id", "attn_pdrop",
    "moe_impl", "mlp_impl", "moe_loss_weight", "moe_zloss_weight", "moe_lbl_scope", "moe_lbl_accumulation",
    "moe_lbl_layers", "moe_jitter_eps",
}  # fmt: skip
# Covered by other facts.
_SAID_ELSEWHERE = {"sliding_window_size", "first_k_dense", "moe_layer_freq", "dense_ffn_hidden_size"}


def facts(config: CausalLMConfig) -> Facts:
    """Return the facts of a model, keyed by dotted name."""
    if isinstance(settings := getattr(config, "hf_config", None), dict):  # a `transformers` module
        return {f"hf_config.{key}": value for key, value in settings.items()} | {"vocab_size": config.vocab_size}
    found: Facts = {
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "vocab_size": config.vocab_size,
        "norm_type": "rmsnorm" if config.norm.is_rms else "layernorm",
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm.bias and not config.norm.is_rms,
        "tie_word_embeddings": config.tie_word_embeddings,
        "final_logit_softcapping": config.final_logit_softcapping,
        "logit_scale": config.logits_factor,
        "learned_positions": config.max_seq_len if config.has_learned_positions else None,
        "attn_position_pattern": _if_any([config.encodes_positions(layer) for layer in range(config.n_layers)], True),
        "attn_reuse_kv_pattern": _if_any([config.kv_source(layer) for layer in range(config.n_layers)], None),
        "windows": [config.window(layer) for layer in range(config.n_layers)],
    }
    found |= _attention(config.attention, config.d_model, config.n_heads, config.norm)
    for layer in range(config.n_layers):
        found |= {f"ffn_config[layer {layer}].{key}": value for key, value in _ffn(config.ffn(layer)).items()}
    return found


def _if_any(by_layer: list[bool] | list[int | None], usual: bool | None) -> object:
    return None if all(value == usual for value in by_layer) else by_layer


def differences(one: Facts, two: Facts) -> dict[str, tuple[object, object]]:
    """Return the facts that differ, with both values. A setting that differs in several layers is listed once."""
    keys = [key for key in one | two if one.get(key) != two.get(key)]
    if "n_layers" in keys:  # blocks and windows differ in number; compare only those that both have
        keys = [key for key in keys if key in one and key in two and key != "windows"]
    found: dict[str, tuple[object, object]] = {}
    for key in keys:
        prefix, _, rest = key.partition("].")
        name = f"ffn_config.{rest}" if rest and prefix.startswith("ffn_config[") else key
        found.setdefault(name, (one.get(key), two.get(key)))
    return found


def weight_differences(stored: CausalLMConfig, model: CausalLMConfig) -> dict[str, tuple[object, object]]:
    """Return the facts in which a model differs from the checkpoint whose weights it loads.

    A larger vocabulary does not count as a difference, because rows are added to the embedding.
    """
    found = differences(facts(stored), facts(model))
    if stored.vocab_size < model.vocab_size:
        del found["vocab_size"]
    return found


def _attention(attention: AttentionConfig, d_model: int, n_heads: int, norm: NormConfig) -> Facts:
    said = _settings(attention)
    if isinstance(attention, GroupedQueryConfig):
        head_dim = attention.rotary_dim(d_model, n_heads)
        scale = attention.softmax_scale
        said |= {
            "attn_type": "grouped_query_attention",  # multi-head attention is the case of one group per head
            "kv_n_heads": attention.kv_heads(n_heads),
            "head_dim": head_dim,
            "softmax_scale": head_dim**-0.5 if scale is None else scale,
            "clip_qkv_after_norm": attention.clip_qkv is not None and attention.clip_qkv_after_norm,
        }
        own = attention.head_norm(norm)
        said |= {"norm_type": None if own.is_rms == norm.is_rms else own.norm_type}
        said |= {"norm_eps": None if own.eps == norm.eps else own.eps}
    if attention.rope:
        said["rope_scaling"] = _settings(attention.rope_scaling)
    else:
        del said["rope_theta"], said["rope_scaling"]
    return {f"attn_config.{key}": value for key, value in said.items()}


def _ffn(ffn: FFNConfig) -> Facts:
    said = _settings(ffn) | {"ffn_act_fn": ffn.ffn_act_fn.key}
    if isinstance(ffn, MoEConfig):
        shared = ffn.shared
        said["shared_expert_hidden_size"] = None if shared is None else shared.hidden_size
        said["moe_topk_groups"] = ffn.moe_topk_groups or ffn.moe_n_groups
        said["moe_bias"] = ffn.moe_bias if ffn.bias else None
        said["moe_bias_update_rate"] = ffn.moe_bias_update_rate is not None  # the rate matters only in training
    return said


def _settings(choice: Choice) -> Facts:
    """Return a config block as a dict, tagged by its base kind: subclasses that only change defaults are the same."""
    said = {key: value for key, value in dump(choice).items() if key not in _NO_FUNCTION | _SAID_ELSEWHERE}
    named = [kind for kind in type(choice).__mro__ if issubclass(kind, Choice) and kind._names]
    return said | {choice._tag: named[-1]._names[0]}
