"""DeepSeek-V2 and V3: multi-head latent attention, and many small experts beside shared experts.

V2 scores experts by softmax, V3 by sigmoid plus a bias that balances the load; both may first choose groups of experts.
The latents' norms use an eps of 1e-6 whatever `rms_norm_eps` is, here and in the Hugging Face code.
Source: DeepSeek-AI 2024, arXiv:2405.04434 and arXiv:2412.19437.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.decoder import Decoder, activation_of, init_of, rope_of, rope_to
from llmfoundry.hf.family import ConfigDict, Theirs, Value
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.latent_attention import LatentConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig

_HEAD_SIZES = "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
_LINEAR = {
    "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "out_proj": "o_proj",
}  # fmt: skip


class _DeepSeek(Decoder):
    """What V2 and V3 share. The first layers are dense, all others mixtures."""

    layouts = ("each", "stacked")

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        bias = bool(theirs["attention_bias"])
        theirs.must_be("num_key_value_heads", theirs["num_attention_heads"])
        theirs["head_dim"]  # always qk_rope_head_dim in the Hugging Face code
        data = {
            **self.sizes_of(theirs),
            "norm_type": "rmsnorm",
            "no_bias": True,
            "attn_config": {"attn_type": "multihead_latent_attention", "bias": bias, "out_bias": bias}
            | {key: theirs[key] for key in _HEAD_SIZES}
            | rope_of(theirs["rope_parameters"])
            | self.attention(theirs),
            "ffn_config": _mixture_of(theirs) | self.ffn(theirs),
            "init_config": init_of(theirs["initializer_range"]),
        }
        return check(CausalLMConfig, data, where="config.json")

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return the keys of `attn_config` beyond sizes, biases and RoPE."""
        return {}

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to Hugging Face settings."""
        attention = config.attention
        mixtures = [ffn for ffn in map(config.ffn, range(config.n_layers)) if isinstance(ffn, MoEConfig)]
        if not isinstance(attention, LatentConfig) or not mixtures:
            raise ConfigError("mixtures of experts with attn_type=multihead_latent_attention")
        moe, init_std = mixtures[0], config.init_config.init_std
        hidden, shared = moe.expert.hidden_size, moe.shared
        if shared is None or shared.hidden_size % hidden:
            size = None if shared is None else shared.hidden_size
            raise ConfigError(f"shared_expert_hidden_size={size} that is a multiple of ffn_hidden_size={hidden}")
        return {
            **self.sizes_to(config),
            "num_key_value_heads": config.n_heads,
            "hidden_act": self.their_activation(moe),
            "initializer_range": 0.02 if init_std is None else init_std,
            "attention_bias": bool(attention.bias),
            **{key: getattr(attention, key) for key in _HEAD_SIZES},
            **rope_to(attention.rope_theta, attention.rope_scaling),
            "intermediate_size": moe.dense_ffn_hidden_size,
            "moe_intermediate_size": hidden,
            "n_shared_experts": shared.hidden_size // hidden,
            "n_routed_experts": moe.moe_num_experts,
            "num_experts_per_tok": moe.moe_top_k,
            "routed_scaling_factor": moe.moe_routed_scaling,
            "first_k_dense_replace": config.n_layers - len(mixtures),
            "moe_layer_freq": 1,
            "n_group": moe.moe_n_groups,
            "topk_group": moe.moe_topk_groups or moe.moe_n_groups,
            **self.their_mixture(attention, moe),
        }

    def their_mixture(self, attention: LatentConfig, moe: MoEConfig) -> ConfigDict:
        """Return the inverse of `attention` and `ffn`, including keys that only inference servers read."""
        raise NotImplementedError

    def add_attention(self, config: CausalLMConfig, pieces: Pieces, ours: str, theirs: str) -> None:
        """Map the attention tensors; all have the same shape on both sides."""
        for name, their_name in _LINEAR.items():
            for kind in ("weight", "bias"):
                if f"{ours}.{name}.{kind}" in pieces.shapes:
                    pieces.add(f"{ours}.{name}.{kind}", f"{theirs}.{their_name}.{kind}")

    def add_mixture(self, ffn: MoEConfig, pieces: Pieces, ours: str, theirs: str, layout: str) -> None:
        """Map the experts, the shared experts, which are one dense block, and V3's bias."""
        super().add_mixture(ffn, pieces, ours, theirs, layout)
        self.add_gated(pieces, f"{ours}.shared_expert", f"{theirs}.mlp.shared_experts")
        if f"{ours}.router.expert_bias" in pieces.shapes:
            pieces.add(f"{ours}.router.expert_bias", f"{theirs}.mlp.gate.e_score_correction_bias")


class DeepSeekV2(_DeepSeek):
    """The DeepSeek-V2 family: softmax scores, never normalized; a group is ranked by its best expert."""

    model_type = "deepseek_v2"
    title = "DeepSeek-V2"
    architecture = "DeepseekV2ForCausalLM"

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the routing keys of `ffn_config`."""
        _one_of(theirs, "scoring_func", "softmax", None)
        _one_of(theirs, "norm_topk_prob", False, None)  # `transformers` ignores it, the authors' code does not
        _one_of(theirs, "mlp_bias", False)  # it would give biases to dense and shared blocks, but not to experts
        _one_of(theirs, "topk_method", "greedy", "group_limited_greedy")
        groups = theirs["n_group"], theirs["topk_group"]
        if theirs["topk_method"] == "greedy":
            return {}
        return dict(zip(("moe_n_groups", "moe_topk_groups"), groups, strict=True))

    def their_mixture(self, attention: LatentConfig, moe: MoEConfig) -> ConfigDict:
        """Return the Hugging Face routing settings."""
        if not attention.rope_interleaved:
            raise ConfigError("attn_config.rope_interleaved=False")
        return {
            "topk_method": "group_limited_greedy" if moe.moe_n_groups > 1 else "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
        }


class DeepSeekV3(_DeepSeek):
    """The DeepSeek-V3 family: sigmoid scores; a group is ranked by its two best experts.

    `e_score_correction_bias` is llmfoundry's `expert_bias`. Published checkpoints have one more layer, for multi-token
    prediction, which has an `eh_proj`. It is ignored, as in `transformers`.
    """

    model_type = "deepseek_v3"
    title = "DeepSeek-V3"
    architecture = "DeepseekV3ForCausalLM"

    def weights(self, names: Iterable[str], config: CausalLMConfig) -> set[str]:
        """Return all weights except those of the multi-token prediction layer."""
        found, predictor = super().weights(names, config), f"model.layers.{config.n_layers}."
        if f"{predictor}eh_proj.weight" not in found:
            return found
        return {name for name in found if not name.startswith(predictor)}

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return whether RoPE rotates adjacent dims."""
        return {"rope_interleaved": bool(theirs["rope_interleave"])}

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the routing keys of `ffn_config`. The bias is frozen unless the file has llmfoundry's update rate."""
        _one_of(theirs, "scoring_func", "sigmoid", None)
        _one_of(theirs, "topk_method", "noaux_tc", None)
        for key in ("num_nextn_predict_layers", "num_mtp_layers"):  # two names of one setting; not built here
            theirs[key]
        return {
            "moe_score_fn": "sigmoid",
            "moe_bias_update_rate": theirs["moe_bias_update_rate"] or 0.0,
            "moe_normalize_expert_weights": 1.0 if theirs["norm_topk_prob"] else None,
            "moe_n_groups": theirs.int("n_group"),
            "moe_topk_groups": theirs.int("topk_group"),
        }

    def their_mixture(self, attention: LatentConfig, moe: MoEConfig) -> ConfigDict:
        """Return the Hugging Face routing settings."""
        return {
            "rope_interleave": attention.rope_interleaved,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": moe.moe_normalize_expert_weights is not None,
            "num_nextn_predict_layers": 0,
            **({"moe_bias_update_rate": moe.moe_bias_update_rate} if moe.moe_bias_update_rate else {}),
        }


def _mixture_of(theirs: Theirs) -> dict[str, object]:
    """Return the `ffn_config` keys that V2 and V3 share. `transformers` has no balance loss for them."""
    _one_of(theirs, "moe_layer_freq", 1, None)
    hidden, n_shared = theirs.int("moe_intermediate_size"), theirs.int("n_shared_experts")
    dense = theirs.int("first_k_dense_replace")
    if n_shared < 1:
        raise ConfigError(f"config.json: n_shared_experts={n_shared} is not supported, only 1 and more")
    if dense >= theirs.int("num_hidden_layers"):
        raise ConfigError("config.json: no layer is a mixture (first_k_dense_replace)")
    return {
        "ffn_type": "moe",
        "ffn_act_fn": {"name": activation_of(theirs["hidden_act"])},
        "ffn_hidden_size": hidden,
        "dense_ffn_hidden_size": theirs["intermediate_size"],
        "first_k_dense": dense,
        "moe_num_experts": theirs["n_routed_experts"],
        "moe_top_k": theirs.int("num_experts_per_tok"),
        "moe_routed_scaling": theirs["routed_scaling_factor"],
        "moe_loss_weight": 0.0,
        "shared_expert": True,
        "shared_expert_hidden_size": hidden * n_shared,
    }


def _one_of(theirs: Theirs, key: str, *values: Value) -> None:
    if theirs[key] not in values:
        raise ConfigError(f"config.json: {key}={theirs[key]!r} is not supported, only {', '.join(map(repr, values))}")
