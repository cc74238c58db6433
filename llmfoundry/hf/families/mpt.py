"""MPT: ALiBi, LayerNorm, no biases, and tensors in llmfoundry's layout under nearly the same names.

`transformers` ignores many MPT settings. Here an ignored setting must have the value that the `transformers` code uses.
Checkpoints that LLM Foundry itself wrote are read in full, by mpt_foundry.py.
Source: MosaicML 2023, MPT-7B; Press et al. 2021, arXiv:2108.12409.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.decoder import init_of
from llmfoundry.hf.family import ConfigDict, Family, Theirs
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.model.transformer import CausalLMConfig

_NAMES = {
    "norm_1": "norm_1", "attn.wqkv": "attn.Wqkv", "attn.out_proj": "attn.out_proj",
    "norm_2": "norm_2", "ffn.w1": "ffn.up_proj", "ffn.w2": "ffn.down_proj",
}  # fmt: skip
# What the `transformers` code does, whatever the config says.
_ATTENTION: ConfigDict = {
    "attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8, "qk_ln": False, "prefix_lm": False,
}  # fmt: skip
_MODEL: ConfigDict = {"expansion_ratio": 4, "no_bias": True, "logit_scale": None, "embedding_fraction": 1.0}
_SIZES = "d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "tie_word_embeddings"
_WORDS = {"block_overrides", "fc_type", "ffn_config", "norm_eps"}  # keys that only LLM Foundry writes
_NORMS = "low_precision_layernorm", "layernorm"  # treated alike by `transformers`


def is_foundrys(data: Mapping[str, object]) -> bool:
    """Return whether LLM Foundry rather than `transformers` wrote a config.json, judging by its class or its keys."""
    if data.get("model_type") != "mpt":
        return False
    architectures = data.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return MPT.architecture not in names and (
        "MPTForCausalLM" in names or bool(data.get("auto_map")) or not _WORDS.isdisjoint(data)
    )


class MPT(Family):
    """The dense MPT family of `transformers`."""

    model_type = "mpt"
    title = "MPT"
    architecture = "MptForCausalLM"
    prefix = "transformer."
    embedding = "transformer.wte.weight"
    sizes = {key: key for key in _SIZES} | {"norm_eps": "layer_norm_epsilon"}

    def reads(self, data: Mapping[str, object]) -> bool:
        """Return whether the config is an MPT one that LLM Foundry did not write."""
        return super().reads(data) and not is_foundrys(data)

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        attention = theirs.part("attn_config")
        for key, value in _ATTENTION.items():
            attention.must_be(key, value)
        for key, value in _MODEL.items():
            theirs.must_be(key, value)
        if theirs["norm_type"] not in _NORMS:
            raise ConfigError(f"config.json: norm_type={theirs['norm_type']!r} is not supported, only {_NORMS}")
        # No effect: ALiBi overrides learned positions, and the others concern speed and loading.
        for part, key in ((theirs, "learned_pos_emb"), (theirs, "init_device"), (attention, "attn_impl")):
            part[key]
        data = {
            **self.sizes_of(theirs),
            "norm_type": "layernorm",
            "no_bias": True,
            "attn_config": {
                "attn_type": "multihead_attention",
                "alibi": True,
                "clip_qkv": attention["clip_qkv"] or None,
                "softmax_scale": attention["softmax_scale"],
                "attn_uses_sequence_id": attention["attn_uses_sequence_id"],
            },
            "ffn_config": {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "gelu"}},
            "init_config": init_of(theirs["initializer_range"]),
        }
        return check(CausalLMConfig, data, where="config.json")

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to Hugging Face settings; `write_config` finds what they cannot express."""
        attention = config.attention
        if not isinstance(attention, GroupedQueryConfig) or not attention.alibi:
            raise ConfigError("attn_config.alibi")
        return {
            "architectures": ["MPTForCausalLM", self.architecture],  # inference servers know the first
            **self.sizes_to(config),
            **_MODEL,
            "norm_type": _NORMS[0],
            "initializer_range": config.init_config.init_std or 0.02,
            "attn_config": {
                **_ATTENTION,
                "clip_qkv": attention.clip_qkv,
                "softmax_scale": attention.softmax_scale,
                "attn_uses_sequence_id": attention.attn_uses_sequence_id,
            },
        }

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add the mapping of every tensor."""
        pieces.add("wte.weight", self.embedding)
        for layer in range(config.n_layers):
            for ours, theirs in _NAMES.items():
                pieces.add(f"blocks.{layer}.{ours}.weight", f"transformer.blocks.{layer}.{theirs}.weight")
        pieces.add("norm_f.weight", "transformer.norm_f.weight")
        if not config.tie_word_embeddings:
            pieces.add("lm_head.weight", self.head)
