"""Qwen2 (biases on queries, keys and values) and Qwen3 (a norm on each head of queries and keys), dense.

Source: Yang et al. 2024, arXiv:2407.10671; Qwen team 2025, arXiv:2505.09388.
"""

from __future__ import annotations

from llmfoundry.hf.decoder import Decoder, windows_of, windows_to
from llmfoundry.hf.family import ConfigDict, Theirs
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.model.transformer import CausalLMConfig


class Qwen2(Decoder):
    """Later layers may have a window."""

    model_type = "qwen2"
    title = "Qwen2"
    architecture = "Qwen2ForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """The biases are no setting."""
        return {"bias": True, "out_bias": False}

    def windows(self, theirs: Theirs) -> list[int]:
        """As `layer_types` says, which the other keys are folded into."""
        for key in ("use_sliding_window", "max_window_layers"):
            theirs[key]
        return windows_of(theirs["layer_types"], theirs["sliding_window"])

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """The windows."""
        return their_windows(config)


class Qwen3(Qwen2):
    """All biases of attention or none."""

    model_type = "qwen3"
    title = "Qwen3"
    architecture = "Qwen3ForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """A norm on each head."""
        bias = bool(theirs["attention_bias"])
        return {"bias": bias, "out_bias": bias, "qk_norm": True}

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Biases and windows."""
        return super().their_attention(attention, config) | {"attention_bias": bool(attention.bias)}


def their_windows(config: CausalLMConfig) -> ConfigDict:
    """Which layers have a window, in a list and in the older words: none before `max_window_layers`."""
    types, window = windows_to(config)
    return {
        "layer_types": types,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": types.index("sliding_attention") if window is not None else config.n_layers,
    }
