"""OPT: learned positions, LayerNorm, biases, ReLU.

The position table begins with two padding rows that no token uses; they are not read, and written as zeros.
Source: Zhang et al. 2022, arXiv:2205.01068.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.decoder import activation_of, activation_to, init_of
from llmfoundry.hf.family import ConfigDict, Family, Theirs
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.model.transformer import CausalLMConfig

_PADDING_ROWS = 2
_LINEAR = {"attn.out_proj": "self_attn.out_proj", "ffn.w1": "fc1", "ffn.w2": "fc2"}
_NORMS = {"norm_1": "self_attn_layer_norm", "norm_2": "final_layer_norm"}


class OPT(Family):
    """The OPT family: pre-norm models, that is, all sizes but OPT-350m."""

    model_type = "opt"
    title = "OPT"
    architecture = "OPTForCausalLM"
    prefix = "model."
    embedding = "model.decoder.embed_tokens.weight"
    sizes = {
        "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
        "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings",
        "tie_word_embeddings": "tie_word_embeddings",
    }  # fmt: skip

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        theirs.must_be("do_layer_norm_before", True)
        theirs.must_be("_remove_final_layer_norm", False)
        theirs.must_be("word_embed_proj_dim", theirs.int("hidden_size"))
        theirs.must_be("layer_norm_elementwise_affine", True)
        theirs.must_be("enable_bias", True)
        theirs.must_be("layerdrop", 0.0)
        theirs["dropout"]  # only affects training
        data = {
            **self.sizes_of(theirs),
            "norm_type": "layernorm",
            "attn_config": {"attn_type": "multihead_attention"},
            "ffn_config": {
                "ffn_type": "mptmlp",
                "ffn_act_fn": {"name": activation_of(theirs["activation_function"])},
                "ffn_hidden_size": theirs.int("ffn_dim"),
            },
            "init_config": init_of(theirs["init_std"]),
        }
        return check(CausalLMConfig, data, where="config.json")

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to Hugging Face settings."""
        if not isinstance(config.attention, GroupedQueryConfig) or not config.has_learned_positions:
            raise ConfigError("learned positions")
        return {
            **self.sizes_to(config),
            "ffn_dim": config.ffn(0).ffn_hidden_size,
            "word_embed_proj_dim": config.d_model,
            "activation_function": activation_to(config.ffn(0)),
            "init_std": config.init_config.init_std or 0.02,
            "dropout": 0.0,
        }

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add the mapping of every tensor."""
        pieces.add("wte.weight", self.embedding)
        positions = "model.decoder.embed_positions.weight"
        pieces.add("wpe.weight", positions, there=(slice(_PADDING_ROWS, None),))
        pieces.leave(positions, rows=_PADDING_ROWS)
        for layer in range(config.n_layers):
            ours, theirs = f"blocks.{layer}", f"model.decoder.layers.{layer}"
            for kind in ("weight", "bias"):
                for name, their_name in (_NORMS | _LINEAR).items():
                    pieces.add(f"{ours}.{name}.{kind}", f"{theirs}.{their_name}.{kind}")
                for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
                    rows = slice(number * config.d_model, (number + 1) * config.d_model)
                    pieces.add(f"{ours}.attn.wqkv.{kind}", f"{theirs}.self_attn.{name}.{kind}", at=(rows,))
        for kind in ("weight", "bias"):
            pieces.add(f"norm_f.{kind}", f"model.decoder.final_layer_norm.{kind}")
        if not config.tie_word_embeddings:
            pieces.add("lm_head.weight", self.head)
