"""MPT checkpoints as LLM Foundry's own code saves them; llmfoundry's YAML uses the same keys.

Supports learned positions, ALiBi, RoPE, grouped-query attention, biases, gated blocks, and MegaBlocks' mixtures. No
code from the folder is run. This format is only written on request, because only LLM Foundry reads it.
Source: LLM Foundry v0.22, models/mpt; MegaBlocks 0.10, layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from llmfoundry.config import ConfigError, check, dump
from llmfoundry.hf.families.mpt import is_foundrys
from llmfoundry.hf.family import ConfigDict, Family, Value, said_of_any_model
from llmfoundry.hf.pieces import Pieces, Spec
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig, GLUConfig, MLPConfig
from llmfoundry.layers.rope import RopeScaling
from llmfoundry.model import foundry_words as words
from llmfoundry.model.config import InitConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig

_NORMS = "norm_1", "norm_2"
_WRAPPER = "norm_attn_norm"
# Settings that do not affect what the model computes: dropout, devices, kernels, balance loss, parallelism.
_DROPPED = {
    "init_device", "use_pad_tok_in_ffn", "loss_fn", "verbose", "tokenizer_name", "name", "fuse_norm_attn_norm",
    "param_init_fn", "init_nonlinearity",
}  # fmt: skip
_DROPPED_ATTENTION = {"attn_pdrop", "attn_impl", "fused_qkv", "verbose"}
_DROPPED_FFN = {
    "fc_type", "return_bias", "memory_optimized_mlp", "mlp_impl", "remat_act_fn", "fp16", "bf16", "device",
    "device_mesh", "fc_cls", "fc_kwargs", "expert_parallel_group", "moe_expert_model_parallelism", "moe_world_size",
    "moe_weight_parallelism", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "moe_lbl_in_fp32", "moe_zloss_in_fp32", "num_layers", "hidden_size", "init_method", "output_layer_init_method",
    "lbl_process_group", "bias",
}  # fmt: skip
# Settings that are not supported here, and the values at which they have no effect.
_NEUTRAL_ATTENTION: dict[str, tuple[Value, ...]] = {
    "prefix_lm": (None, False), "nope": (None, False), "kv_dim": (None,), "seq_parallel_world_size": (None, 1),
    "reuse_kv_layer_idx": (None,), "reuse_kv_x_layer_idx": (None,),
}  # fmt: skip
_NEUTRAL_FFN: dict[str, tuple[Value, ...]] = {"shared_expert_weighted_sum": (None, False)}
_NORM_NAMES = {"triton_rmsnorm": "rmsnorm"}
_DENSE = "mptmlp", "mptglu"
_MIXTURES = "mb_dmoe", "mb_moe", "torch_dmoe"
_LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
_SIZES = "d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "tie_word_embeddings", "norm_eps"


class FoundryMPT(Family):
    """LLM Foundry's MPT: a dense model or a mixture."""

    model_type = "mpt_foundry"  # for requests by name; its config.json says mpt
    title = "LLM Foundry's MPT"
    architecture = "MPTForCausalLM"
    prefix = "transformer."
    embedding = "transformer.wte.weight"
    buffers = r".*\.rotary_embedding\.(inv_freq|scale)|.*\.rotary_emb\.inv_freq|.*\.attn_bias"
    sizes = {key: key for key in _SIZES}
    turn = None

    def reads(self, data: Mapping[str, object]) -> bool:
        """Return whether LLM Foundry wrote the config."""
        return is_foundrys(data)

    def read(self, data: Mapping[str, object], where: str) -> CausalLMConfig:
        """Convert a config.json to an llmfoundry config. Missing keys get the defaults of LLM Foundry."""
        said = cast(ConfigDict, {key: value for key, value in data.items() if not key.startswith("_")})
        _drop(said, _DROPPED | said_of_any_model())
        attention, ffn, init = (_part(said, key, where) for key in ("attn_config", "ffn_config", "init_config"))
        fc_type = said.pop("fc_type", None) or "torch"
        if (fc_type.get("name") if isinstance(fc_type, dict) else fc_type) != "torch":
            raise ConfigError(f"{where}: fc_type={fc_type!r} is not supported, only torch")
        no_bias = said.setdefault("no_bias", False)
        attention_bias = said.pop("attention_bias", None)
        head_dim, overrides = said.pop("head_dim", None), said.pop("block_overrides", None)
        norm_type = str(said.get("norm_type", "low_precision_layernorm")).lower()
        attention = _attention(attention, f"{where}: attn_config")
        qk_gn = attention.pop("qk_gn", False)
        positions = bool(attention.get("alibi") or attention.get("rope"))
        learned = said.pop("learned_pos_emb", True)
        ours: words.Tree = {
            **{"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50368, "max_seq_len": 2048},
            **said,
            "norm_type": _NORM_NAMES.get(norm_type, norm_type),
            "learned_pos_emb": bool(learned) and not positions,
            "attn_config": attention
            | {"bias": not no_bias if attention_bias is None else attention_bias, "out_bias": not no_bias},
            "ffn_config": _ffn(ffn, f"{where}: ffn_config"),
            "init_config": _init(init),
        }
        try:
            words.head_dim(ours, head_dim)
            words.block_overrides(ours, overrides)
            words.group_norm(ours, qk_gn)
            words.layer_norm(ours)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix('model.')}") from None
        return check(CausalLMConfig, ours, where=where)

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to LLM Foundry settings; `write_config` finds what they cannot express."""
        attention = config.attention
        if not isinstance(attention, GroupedQueryConfig):
            raise ConfigError("softmax attention")
        return {
            "model_type": "mpt",
            **self.sizes_to(config),
            "norm_type": config.norm_type,
            "no_bias": config.no_bias,
            "attention_bias": attention.bias,
            "learned_pos_emb": config.has_learned_positions,
            "final_logit_softcapping": config.final_logit_softcapping,
            "logit_scale": config.logit_scale,
            "embedding_fraction": config.embedding_fraction,
            "attn_config": {
                "attn_type": "grouped_query_attention",
                "kv_n_heads": attention.kv_heads(config.n_heads),
                "attn_pdrop": 0.0,
                "attn_impl": "torch",
                "qk_ln": attention.qk_ln,
                "qk_gn": attention.qk_norm,
                "clip_qkv": attention.clip_qkv,
                "softmax_scale": attention.softmax_scale,
                "attn_logit_softcapping": attention.attn_logit_softcapping,
                "attn_uses_sequence_id": attention.attn_uses_sequence_id,
                "sliding_window_size": attention.sliding_window_size,
                "alibi": attention.alibi,
                "alibi_bias_max": attention.alibi_bias_max,
                "rope": attention.rope,
                "rope_theta": attention.rope_theta,
                "rope_impl": "hf",
                "rope_hf_config": _their_scaling(attention.rope_scaling) if attention.rope else {"type": "no_scaling"},
            },
            "ffn_config": _their_ffn(config.ffn(config.n_layers - 1), config.no_bias),
        }

    def layout_of(self, specs: Mapping[str, Spec]) -> str:
        """Return how the tensors differ from the usual layout, as space-separated words.

        wrapped: norms and attention of a layer are in one module, as with `fuse_norm_attn_norm`.
        split: q, k and v are three matrices.
        apart: each expert's matrices are stored for `x @ w`, (E, D, F), as in MegaBlocks' MoE.
        """
        experts = (spec for name, spec in specs.items() if name.endswith(".ffn.experts.mlp.w1"))
        found = {
            "wrapped": any(f".{_WRAPPER}." in name for name in specs),
            "split": any(name.endswith(".attn.Wk.weight") for name in specs),
            "apart": any(len(spec.shape) == 3 for spec in experts),
        }
        return " ".join(word for word, there in found.items() if there)

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add the mapping of every tensor. See `layout_of` for `layout`."""
        pieces.add("wte.weight", self.embedding)
        if config.has_learned_positions:
            pieces.add("wpe.weight", "transformer.wpe.weight")
        for layer in range(config.n_layers):
            ours, theirs = f"blocks.{layer}", f"transformer.blocks.{layer}"
            inner = f"{theirs}.{_WRAPPER}" if "wrapped" in layout else theirs
            for norm in _NORMS:
                _add(pieces, f"{ours}.{norm}", f"{inner}.{norm}")
            self._add_attention(config, pieces, f"{ours}.attn", f"{inner}.attn", split="split" in layout)
            ffn = config.ffn(layer)
            if isinstance(ffn, MoEConfig):
                _add_mixture(ffn, pieces, f"{ours}.ffn", f"{theirs}.ffn", apart="apart" in layout)
            elif isinstance(ffn, MLPConfig):
                _add_dense(ffn, pieces, f"{ours}.ffn", f"{theirs}.ffn")
        _add(pieces, "norm_f", "transformer.norm_f")
        if not config.tie_word_embeddings:
            pieces.add("lm_head.weight", self.head)

    def _add_attention(self, config: CausalLMConfig, pieces: Pieces, ours: str, theirs: str, split: bool) -> None:
        attention = config.attention
        assert isinstance(attention, GroupedQueryConfig)
        _add(pieces, f"{ours}.out_proj", f"{theirs}.out_proj")
        for norm in "q", "k":
            _add(pieces, f"{ours}.{norm}_norm", f"{theirs}.{norm}_ln")
        _add(pieces, f"{ours}.wq", f"{theirs}.Wq")  # in layers that reuse keys and values
        if not split:
            _add(pieces, f"{ours}.wqkv", f"{theirs}.Wqkv")
            return
        start, head_dim = 0, attention.rotary_dim(config.d_model, config.n_heads)
        kv_heads = attention.kv_heads(config.n_heads)
        for name, heads in (("Wq", config.n_heads), ("Wk", kv_heads), ("Wv", kv_heads)):
            _add(pieces, f"{ours}.wqkv", f"{theirs}.{name}", slice(start, start + heads * head_dim))
            start += heads * head_dim


def _drop(block: ConfigDict, keys: set[str]) -> None:
    for key in keys & block.keys():
        del block[key]


def _drop_neutral(block: ConfigDict, neutral: Mapping[str, tuple[Value, ...]], where: str) -> None:
    """Remove settings that are at a value without effect.

    Raises:
        ConfigError: if one has another value.
    """
    for key in neutral.keys() & block.keys():
        value = block.pop(key)
        if value not in neutral[key]:
            raise ConfigError(f"{where}: {key}={value!r} is not supported, only {neutral[key][-1]!r}")


def _part(said: ConfigDict, key: str, where: str) -> ConfigDict:
    part = said.pop(key, None)
    if part is not None and not isinstance(part, dict):
        raise ConfigError(f"{where}: {key} must be a mapping, found {part!r}")
    return dict(part or {})


def _attention(said: ConfigDict, where: str) -> ConfigDict:
    """Convert to llmfoundry's `attn_config`, without biases."""
    _drop(said, _DROPPED_ATTENTION)
    _drop_neutral(said, _NEUTRAL_ATTENTION, where)
    tuning = _part(said, "attn_temperature_tuning", where)
    _drop_neutral(tuning, {"attn_scale": (None, 0, 0.0)}, f"{where}: attn_temperature_tuning")
    impl, dail, hf = (
        said.pop("rope_impl", "dail"),
        _part(said, "rope_dail_config", where),
        _part(said, "rope_hf_config", where),
    )
    if said.get("rope") and impl == "dail":
        _drop_neutral(dail, {"type": ("original",), "pos_idx_in_fp32": (True,)}, f"{where}: rope_dail_config")
    elif said.get("rope") and hf.get("type", "no_scaling") != "no_scaling":
        keys = {"linear": ("factor",), "llama3": _LLAMA3}.get(str(hf["type"]))
        if keys is None:
            raise ConfigError(f"{where}: rope_hf_config: type={hf['type']!r} is not supported, only linear and llama3")
        said["rope_scaling"] = {"type": hf["type"]} | {key: hf[key] for key in keys if key in hf}
    said["clip_qkv"] = said.get("clip_qkv") or None
    return said


def _ffn(said: ConfigDict, where: str) -> ConfigDict:
    """Convert to llmfoundry's `ffn_config`."""
    kind = said.setdefault("ffn_type", "mptmlp")
    if kind not in _DENSE + _MIXTURES:
        raise ConfigError(f"{where}: ffn_type={kind!r} is not supported, only {', '.join(_DENSE + _MIXTURES)}")
    _drop(said, _DROPPED_FFN if kind == "mb_moe" else _DROPPED_FFN | {"moe_capacity_factor"})
    _drop_neutral(said, _NEUTRAL_FFN, where)
    for key in ("ffn_act_fn", "ffn_hidden_size"):  # null means the default
        if said.get(key) is None:
            said.pop(key, None)
    if kind in _MIXTURES:
        for key in ("moe_jitter_eps", "moe_normalize_expert_weights"):
            said[key] = said.get(key) or None  # 0 is off
        said.setdefault("moe_num_experts", 1)
    if kind == "torch_dmoe":  # saved without biases, and with the activation of the dense blocks
        return {"ffn_act_fn": {"name": "gelu"}, "bias": False, **said}
    return said


def _init(said: ConfigDict) -> ConfigDict:
    """Convert to llmfoundry's `init_config`, used only for training from scratch. Unsupported keys are dropped."""
    known: ConfigDict = {
        key: value for key, value in said.items() if key in InitConfig.model_fields and value is not None
    }
    if known.get("name") not in ("baseline_", "normal_"):
        known.pop("init_std", None)
    try:
        InitConfig.model_validate(known)
    except ValueError:
        return {}
    return known


def _their_scaling(scaling: RopeScaling) -> ConfigDict:
    said = dump(scaling)
    return {"type": "no_scaling"} if said["type"] == "none" else cast(ConfigDict, said)


def _their_ffn(ffn: FFNConfig, no_bias: bool) -> ConfigDict:
    act = ffn.ffn_act_fn
    said: ConfigDict = {
        "ffn_hidden_size": ffn.ffn_hidden_size,
        "ffn_act_fn": {"name": "gelu", "approximate": "tanh" if act.key == "gelu_tanh" else "none"}
        if act.key.startswith("gelu")
        else {"name": act.name},
    }
    if not isinstance(ffn, MoEConfig):
        return said | {"ffn_type": "mptglu" if isinstance(ffn, GLUConfig) else "mptmlp"}
    said |= {
        "mlp_type": ffn.mlp_type,
        "moe_num_experts": ffn.moe_num_experts,
        "moe_top_k": ffn.moe_top_k,
        "moe_jitter_eps": ffn.moe_jitter_eps,
        "moe_normalize_expert_weights": ffn.moe_normalize_expert_weights,
        "uniform_expert_assignment": ffn.uniform_expert_assignment,
    }
    if not ffn.bias and not no_bias:
        return said | {"ffn_type": "torch_dmoe"}
    said |= {"ffn_type": "mb_dmoe", "moe_loss_weight": ffn.moe_loss_weight, "moe_zloss_weight": ffn.moe_zloss_weight}
    if ffn.shared_expert:
        said |= {"shared_expert": True, "shared_expert_hidden_size": ffn.shared_expert_hidden_size}
    return said


def _add(pieces: Pieces, ours: str, theirs: str, rows: slice = slice(None)) -> None:
    """Map a weight and its bias, as far as they exist, to these rows of the llmfoundry tensor."""
    for leaf in ("weight", "bias"):
        if f"{ours}.{leaf}" in pieces.shapes:
            pieces.add(f"{ours}.{leaf}", f"{theirs}.{leaf}", at=(rows,))


def _add_dense(ffn: MLPConfig, pieces: Pieces, ours: str, theirs: str) -> None:
    if ffn.gated:
        _add(pieces, f"{ours}.w1", f"{theirs}.gate_proj", slice(0, ffn.hidden_size))
        _add(pieces, f"{ours}.w1", f"{theirs}.up_proj", slice(ffn.hidden_size, None))
    else:
        _add(pieces, f"{ours}.w1", f"{theirs}.up_proj")
    _add(pieces, f"{ours}.w2", f"{theirs}.down_proj")


def _add_mixture(ffn: MoEConfig, pieces: Pieces, ours: str, theirs: str, apart: bool) -> None:
    """Map the experts. MegaBlocks' dMoE stacks their rows, (E F, D), w2 transposed; its MoE stores (E, D, F)."""
    size, up = ffn.expert.hidden_size, {"w1": slice(0, ffn.expert.hidden_size)}
    if ffn.gated:
        up["v1"] = slice(size, None)
    pieces.add(f"{ours}.router.weight", f"{theirs}.router.layer.weight")
    if apart:
        for name, rows in up.items():
            pieces.add(f"{ours}.experts.w1", f"{theirs}.experts.mlp.{name}", (slice(None), rows), transposed=True)
        pieces.add(f"{ours}.experts.w2", f"{theirs}.experts.mlp.w2", transposed=True)
    for expert in () if apart else range(ffn.moe_num_experts):
        there = (slice(expert * size, None),)
        for name, rows in up.items():
            pieces.add(f"{ours}.experts.w1", f"{theirs}.experts.mlp.{name}", (expert, rows), there)
        pieces.add(f"{ours}.experts.w2", f"{theirs}.experts.mlp.w2", (expert,), there, transposed=True)
    if ffn.has_output_bias:
        pieces.add(f"{ours}.output_bias", f"{theirs}.experts.bias")
    if ffn.shared is not None:
        _add_dense(ffn.shared, pieces, f"{ours}.shared_expert", f"{theirs}.shared_expert")
