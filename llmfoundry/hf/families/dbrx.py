"""DBRX: LayerNorm without biases, clipped q, k and v, and all experts' rows in one matrix.

Published checkpoints store `rope_theta` in `attn_config`, but `transformers` 5 only reads its own top-level setting.
Here `attn_config.rope_theta` is used if the top-level setting is at its default; two different values are an error.
Source: Databricks 2024, DBRX.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.decoder import activation_of, activation_to, as_mixture, balance_of, init_of, rope_of, rope_to
from llmfoundry.hf.family import ConfigDict, Family, Theirs
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.model.transformer import CausalLMConfig

_DEFAULT_THETA = 10000.0
_SIZES = "d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "tie_word_embeddings"


class Dbrx(Family):
    """The DBRX family; every layer is a mixture."""

    model_type = "dbrx"
    title = "DBRX"
    architecture = "DbrxForCausalLM"
    prefix = "transformer."
    embedding = "transformer.wte.weight"
    sizes = {key: key for key in _SIZES}

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        attention, ffn = theirs.part("attn_config"), theirs.part("ffn_config")
        rope = rope_of(theirs["rope_parameters"])
        published = float(attention["rope_theta"] or _DEFAULT_THETA)  # type: ignore[arg-type]
        if rope["rope_theta"] == _DEFAULT_THETA:
            rope["rope_theta"] = published
        elif published not in (_DEFAULT_THETA, rope["rope_theta"]):
            raise ConfigError(
                f"config.json: rope_parameters.rope_theta={rope['rope_theta']} and attn_config.rope_theta={published} "
                "differ; keep one"
            )
        ffn["hidden_size"]  # always equal to d_model
        activation, top_k = ffn["ffn_act_fn"], ffn.int("moe_top_k")
        assert isinstance(activation, dict)
        data = {
            **self.sizes_of(theirs),
            "norm_type": "layernorm",
            "norm_eps": 1e-5,
            "no_bias": True,
            "attn_config": {
                "attn_type": "grouped_query_attention",
                "kv_n_heads": attention["kv_n_heads"],
                "clip_qkv": attention["clip_qkv"],
                "rope": True,
                **rope,
            },
            "ffn_config": {
                "ffn_type": "moe",
                "ffn_act_fn": {"name": activation_of(activation.get("name"))},
                "ffn_hidden_size": ffn["ffn_hidden_size"],
                "moe_num_experts": ffn["moe_num_experts"],
                "moe_top_k": top_k,
                "moe_normalize_expert_weights": ffn["moe_normalize_expert_weights"],
                "moe_jitter_eps": ffn["moe_jitter_eps"] or None,
                "moe_loss_weight": balance_of(theirs, ffn["moe_loss_weight"], top_k),
                "moe_lbl_layers": "together",
            },
            "init_config": init_of(theirs["initializer_range"]),
        }
        return check(CausalLMConfig, data, where="config.json")

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to Hugging Face settings."""
        attention, moe = config.attention, as_mixture(config.ffn(0))
        if not isinstance(attention, GroupedQueryConfig) or not attention.rope:
            raise ConfigError("rotary softmax attention")
        kv_heads = attention.kv_heads(config.n_heads)
        return {
            **self.sizes_to(config),
            **rope_to(attention.rope_theta, attention.rope_scaling),
            "attn_config": {
                "kv_n_heads": kv_heads,
                "clip_qkv": attention.clip_qkv,
                "rope_theta": attention.rope_theta,
            },
            "ffn_config": {
                "ffn_act_fn": {"name": activation_to(moe)},
                "ffn_hidden_size": moe.ffn_hidden_size,
                "moe_num_experts": moe.moe_num_experts,
                "moe_top_k": moe.moe_top_k,
                "moe_normalize_expert_weights": moe.moe_normalize_expert_weights,
                "moe_jitter_eps": moe.moe_jitter_eps,
                "moe_loss_weight": moe.moe_loss_weight / moe.moe_top_k,
            },
            "initializer_range": config.init_config.init_std or 0.02,
        }

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add the mapping of every tensor."""
        pieces.add("wte.weight", self.embedding)
        for layer in range(config.n_layers):
            ours, theirs = f"blocks.{layer}", f"transformer.blocks.{layer}"
            attention = f"{theirs}.norm_attn_norm"
            pieces.add(f"{ours}.norm_1.weight", f"{attention}.norm_1.weight")
            pieces.add(f"{ours}.attn.wqkv.weight", f"{attention}.attn.Wqkv.weight")
            pieces.add(f"{ours}.attn.out_proj.weight", f"{attention}.attn.out_proj.weight")
            pieces.add(f"{ours}.norm_2.weight", f"{attention}.norm_2.weight")
            pieces.add(f"{ours}.ffn.router.weight", f"{theirs}.ffn.router.layer.weight")
            self._add_experts(pieces, f"{ours}.ffn.experts", f"{theirs}.ffn.experts.mlp")
        pieces.add("norm_f.weight", "transformer.norm_f.weight")
        if not config.tie_word_embeddings:
            pieces.add("lm_head.weight", self.head)

    def _add_experts(self, pieces: Pieces, ours: str, theirs: str) -> None:
        """Map the experts. w1 is the gate, v1 the up projection; all three are (E F, D), so w2 is transposed."""
        n_experts, _, hidden = pieces.shapes[f"{ours}.w2"]
        for e in range(n_experts):
            there = (slice(e * hidden, None),)
            pieces.add(f"{ours}.w1", f"{theirs}.w1", (e, slice(0, hidden)), there)
            pieces.add(f"{ours}.w1", f"{theirs}.v1", (e, slice(hidden, 2 * hidden)), there)
            pieces.add(f"{ours}.w2", f"{theirs}.w2", (e,), there, transposed=True)
