"""GPT-Neo: learned positions, LayerNorm, scores that are not scaled, and a window in every other layer.

Source: Black et al. 2021, GPT-Neo, doi:10.5281/zenodo.5297715.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.decoder import activation_of, activation_to, init_of, shortest_pattern
from llmfoundry.hf.family import ConfigDict, Family, Theirs, Value
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import FULL, GroupedQueryConfig
from llmfoundry.model.transformer import CausalLMConfig

_BIASED = {
    "norm_1": "ln_1", "norm_2": "ln_2",
    "attn.out_proj": "attn.attention.out_proj", "ffn.w1": "mlp.c_fc", "ffn.w2": "mlp.c_proj",
}  # fmt: skip
_KINDS = ("global", "local")


class GPTNeo(Family):
    """The GPT-Neo family. The `attn.attention.bias` tensors in old files are masks, not weights."""

    model_type = "gpt_neo"
    title = "GPT-Neo"
    architecture = "GPTNeoForCausalLM"
    prefix = "transformer."
    embedding = "transformer.wte.weight"
    sizes = {
        "d_model": "hidden_size", "n_heads": "num_heads", "n_layers": "num_layers", "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings", "norm_eps": "layer_norm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
    }  # fmt: skip
    buffers = r".*\.attn\.attention\.(masked_)?bias"

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        for key in ("attention_types", "resid_dropout", "embed_dropout", "classifier_dropout"):
            theirs[key]  # the first is expanded to attention_layers; the others only affect training
        kinds, window = theirs["attention_layers"], theirs.int("window_size")
        if not isinstance(kinds, list) or not set(kinds) <= set(_KINDS) or len(kinds) != theirs.int("num_layers"):
            raise ConfigError(f"config.json: attention_layers={kinds!r} must name global or local for each layer")
        data = {
            **self.sizes_of(theirs),
            "norm_type": "layernorm",
            "attn_window_pattern": shortest_pattern([window - 1 if kind == "local" else FULL for kind in kinds]),
            "attn_config": {"attn_type": "multihead_attention", "softmax_scale": 1.0, "bias": False},
            "ffn_config": {
                "ffn_type": "mptmlp",
                "ffn_act_fn": {"name": activation_of(theirs["activation_function"])},
                "ffn_hidden_size": theirs["intermediate_size"] or 4 * theirs.int("hidden_size"),
            },
            "init_config": init_of(theirs["initializer_range"]),
        }
        return check(CausalLMConfig, data, where="config.json")

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to Hugging Face settings."""
        if not isinstance(config.attention, GroupedQueryConfig) or not config.has_learned_positions:
            raise ConfigError("learned positions")
        windows = [config.window(layer) for layer in range(config.n_layers)]
        sizes = sorted({window for window in windows if window != FULL})
        if len(sizes) > 1:
            raise ConfigError(f"windows of several sizes {sizes}")
        activation = activation_to(config.ffn(0))
        kinds: list[Value] = [_KINDS[window != FULL] for window in windows]
        return {
            **self.sizes_to(config),
            "attention_types": [[[kind], 1] for kind in kinds],
            "attention_layers": kinds,
            "window_size": sizes[0] + 1 if sizes else 256,
            "intermediate_size": config.ffn(0).ffn_hidden_size,
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
                for name, their_name in _BIASED.items():
                    pieces.add(f"{ours}.{name}.{kind}", f"{theirs}.{their_name}.{kind}")
            for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(number * config.d_model, (number + 1) * config.d_model)
                pieces.add(f"{ours}.attn.wqkv.weight", f"{theirs}.attn.attention.{name}.weight", at=(rows,))
        for kind in ("weight", "bias"):
            pieces.add(f"norm_f.{kind}", f"transformer.ln_f.{kind}")
        if not config.tie_word_embeddings:
            pieces.add("lm_head.weight", self.head)
