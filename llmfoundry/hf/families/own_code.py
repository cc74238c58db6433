"""The fallback family: models that no `transformers` class can represent are exported with their own modeling file.

config.json has the keys of the YAML, tensors keep llmfoundry's names, and `modeling_llmfoundry.py` is saved beside
them, so that `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` runs the model without this
package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from llmfoundry.config import ConfigError, check, dump
from llmfoundry.hf.family import ConfigDict, Family, said_of_any_model
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.ffn import GLUConfig, MLPConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MegaBlocksConfig, MoEConfig

_CODE = "modeling_llmfoundry"
_CLASS = "LLMFoundryForCausalLM"
_KINDS = MLPConfig, GLUConfig, MoEConfig, MegaBlocksConfig  # the modeling file implements these, but no plug-ins
_SIZES = "d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "tie_word_embeddings", "norm_eps"


class OwnCode(Family):
    """Any model except those with latent attention, a limited expert capacity, or a plug-in."""

    model_type = "llmfoundry"
    title = "a model with code of its own"
    architecture = _CLASS
    prefix = ""
    embedding = "wte.weight"
    sizes = {key: key for key in _SIZES}
    turn = 1
    code = f"{_CODE}.py"

    def read(self, data: Mapping[str, object], where: str) -> CausalLMConfig:
        """Read the llmfoundry config that config.json holds."""
        words = {key: value for key, value in data.items() if key not in said_of_any_model()}
        config = check(CausalLMConfig, words, where=where)
        _check_code(config)
        return config

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Return the llmfoundry config, with all defaults resolved."""
        _check_code(config)
        hidden = int(config.expansion_ratio * config.d_model)
        filled = config.model_copy(
            update={
                "attn_config": config.attention,
                "ffn_config": config.ffn_config.filled(hidden, not config.no_bias),
                "learned_pos_emb": config.has_learned_positions,
            }
        )
        words = cast(ConfigDict, dump(filled))
        del words["name"], words["lora"]
        auto_map: ConfigDict = {"AutoConfig": f"{_CODE}.LLMFoundryConfig", "AutoModelForCausalLM": f"{_CODE}.{_CLASS}"}
        return {"auto_map": auto_map, **words}

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Map every tensor to itself."""
        for name in pieces.shapes:
            pieces.add(name, name)


def _check_code(config: CausalLMConfig) -> None:
    """Raise ConfigError for settings that the modeling file does not implement."""
    attention = config.attention
    said = {
        "logit_scale": config.logit_scale, "attn_reuse_kv_pattern": config.attn_reuse_kv_pattern,
        "attn_position_pattern": config.attn_position_pattern,
        "attn_config.norm_type": getattr(attention, "norm_type", None),
        "attn_config.norm_eps": getattr(attention, "norm_eps", None),
    }  # fmt: skip
    for key, value in said.items():
        if value is not None:
            raise ConfigError(f"{key}={value!r}")
    if type(config.attn_config) is not GroupedQueryConfig:
        raise ConfigError(f"attn_config.attn_type={config.attn_config.attn_type!r}")
    ffn = config.ffn_config
    if type(ffn) not in _KINDS:
        raise ConfigError(f"ffn_config.ffn_type={ffn.ffn_type!r}")
    if isinstance(ffn, MoEConfig) and ffn.moe_capacity_factor:
        raise ConfigError(f"ffn_config.moe_capacity_factor={ffn.moe_capacity_factor}")
    if isinstance(ffn, MoEConfig) and ffn.uniform_expert_assignment:
        raise ConfigError("ffn_config.uniform_expert_assignment=True")
