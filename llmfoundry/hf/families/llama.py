"""Llama (also SmolLM and other models saved as Llama), and Mistral, which adds a sliding window.

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
    """The Llama family. Attention and feed-forward blocks may have biases."""

    model_type = "llama"
    title = "Llama"
    architecture = "LlamaForCausalLM"

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the settings of the gated block, with its bias."""
        return super().ffn(theirs) | {"bias": theirs["mlp_bias"]}

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face settings of the gated block, with its bias."""
        return super().their_ffn(ffn, config) | {"mlp_bias": bool(ffn.bias)}


class Mistral(Decoder):
    """The Mistral family: no biases, and one optional window for all layers."""

    model_type = "mistral"
    title = "Mistral"
    architecture = "MistralForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return no settings: there are no biases."""
        return {}

    def windows(self, theirs: Theirs) -> list[int]:
        """Return the window of all layers."""
        return [window_of(theirs["sliding_window"])]

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face window."""
        types, window = windows_to(config)
        if window is not None and "full_attention" in types:
            raise ConfigError("attn_window_pattern")
        return {"sliding_window": window}


def window_of(sliding_window: object) -> int:
    """Return llmfoundry's window. The Hugging Face window includes the current token; null means no window."""
    return sliding_window - 1 if isinstance(sliding_window, int) else FULL
