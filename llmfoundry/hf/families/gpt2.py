"""GPT-2: learned positions, LayerNorm, biases, and matrices stored as (in, out), transposed relative to llmfoundry's.

Source: Radford et al. 2019.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.decoder import activation_of, activation_to, init_of
from llmfoundry.hf.family import ConfigDict, Family, Theirs
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.model.transformer import CausalLMConfig

_LINEAR = {"attn.wqkv": "attn.c_attn", "attn.out_proj": "attn.c_proj", "ffn.w1": "mlp.c_fc", "ffn.w2": "mlp.c_proj"}
_NORMS = {"norm_1": "ln_1", "norm_2": "ln_2"}


class GPT2(Family):
    """The GPT-2 family. The `attn.bias` tensors in old files are masks, not weights."""

    model_type = "gpt2"
    title = "GPT-2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    embedding = "transformer.wte.weight"
    sizes = {
        "d_model": "n_embd", "n_heads": "n_head", "n_layers": "n_layer", "vocab_size": "vocab_size",
        "max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon", "tie_word_embeddings": "tie_word_embeddings",
    }  # fmt: skip
    buffers = r".*\.attn\.(masked_)?bias"

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        theirs.must_be("scale_attn_weights", True)
        theirs.must_be("scale_attn_by_inverse_layer_idx", False)
        theirs.must_be("add_cross_attention", False)
        data = {
            **self.sizes_of(theirs),
            "norm_type": "layernorm",
            "attn_config": {"attn_type": "multihead_attention"},
            "ffn_config": {
                "ffn_type": "mptmlp",
                "ffn_act_fn": {"name": activation_of(theirs["activation_function"])},
                "ffn_hidden_size": theirs["n_inner"] or 4 * theirs.int("n_embd"),
            },
            "init_config": init_of(theirs["initializer_range"]),
        }
        return check(CausalLMConfig, data, where="config.json")

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to Hugging Face settings."""
        if not isinstance(config.attention, GroupedQueryConfig) or not config.has_learned_positions:
            raise ConfigError("learned positions")
        activation = activation_to(config.ffn(0))
        return {
            **self.sizes_to(config),
            "n_ctx": config.max_seq_len,  # llama.cpp's name for n_positions
            "n_inner": config.ffn(0).ffn_hidden_size,
            "activation_function": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
            "initializer_range": config.init_config.init_std or 0.02,
        }

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add the mapping of every tensor."""
        pieces.add("wte.weight", self.embedding)
        pieces.add("wpe.weight", "transformer.wpe.weight")
        for layer in range(config.n_layers):
            ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
            for kind in ("weight", "bias"):
                for name, their_name in _NORMS.items():
                    pieces.add(f"{ours}.{name}.{kind}", f"{theirs}.{their_name}.{kind}")
                for name, their_name in _LINEAR.items():
                    pieces.add(f"{ours}.{name}.{kind}", f"{theirs}.{their_name}.{kind}", transposed=kind == "weight")
        for kind in ("weight", "bias"):
            pieces.add(f"norm_f.{kind}", f"transformer.ln_f.{kind}")
        if not config.tie_word_embeddings:
            pieces.add("lm_head.weight", self.head)
