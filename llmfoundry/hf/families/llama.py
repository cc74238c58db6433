"""Llama (also SmolLM and all that were saved as Llama), and Mistral: the same with a window.

Source: Touvron et al. 2023, arXiv:2307.09288; Jiang et al. 2023, arXiv:2310.06825.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError
from llmfoundry.hf.decoder import Decoder, windows_to
from llmfoundry.hf.family import ConfigDict, Theirs
from llmfoundry.layers.attention import FULL, GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.model.transformer import CausalLMConfig


class Llama(Decoder):
    """Biases in attention or in the feed-forward block are settings."""

    model_type = "llama"
    title = "Llama"
    architecture = "LlamaForCausalLM"

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """A gated block."""
        return super().ffn(theirs) | {"bias": theirs["mlp_bias"]}

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """A gated block."""
        return super().their_ffn(ffn, config) | {"mlp_bias": bool(ffn.bias)}


class Mistral(Decoder):
    """No biases; all layers may have one window."""

    model_type = "mistral"
    title = "Mistral"
    architecture = "MistralForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """No biases."""
        return {}

    def windows(self, theirs: Theirs) -> list[int]:
        """The same for all layers."""
        return [window_of(theirs["sliding_window"])]

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """The window."""
        types, window = windows_to(config)
        if window is not None and "full_attention" in types:
            raise ConfigError("attn_window_pattern")
        return {"sliding_window": window}


def window_of(sliding_window: object) -> int:
    """Our window: theirs counts the token itself, and null is all."""
    return sliding_window - 1 if isinstance(sliding_window, int) else FULL
