"""Qwen2 (biases on q, k and v) and Qwen3 (QK-norm per head), dense.

Source: Yang et al. 2024, arXiv:2407.10671; Qwen team 2025, arXiv:2505.09388.
"""

from __future__ import annotations

from llmfoundry.hf.decoder import Decoder, windows_of, windows_to
from llmfoundry.hf.family import ConfigDict, Theirs
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.model.transformer import CausalLMConfig


class Qwen2(Decoder):
    """The Qwen2 family. The later layers may have a window."""

    model_type = "qwen2"
    title = "Qwen2"
    architecture = "Qwen2ForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return fixed biases: on q, k and v, not on the output."""
        return {"bias": True, "out_bias": False}

    def windows(self, theirs: Theirs) -> list[int]:
        """Return the window of each layer, from `layer_types`, which includes the other keys."""
        for key in ("use_sliding_window", "max_window_layers"):
            theirs[key]
        return windows_of(theirs["layer_types"], theirs["sliding_window"])

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face windows."""
        return their_windows(config)


class Qwen3(Qwen2):
    """The Qwen3 family: biases on all attention projections or on none."""

    model_type = "qwen3"
    title = "Qwen3"
    architecture = "Qwen3ForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return biases and QK-norm."""
        bias = bool(theirs["attention_bias"])
        return {"bias": bias, "out_bias": bias, "qk_norm": True}

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face settings for biases and windows."""
        return super().their_attention(attention, config) | {"attention_bias": bool(attention.bias)}


def their_windows(config: CausalLMConfig) -> ConfigDict:
    """Return which layers have a window, as a list and under the older keys: none before `max_window_layers`."""
    types, window = windows_to(config)
    return {
        "layer_types": types,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": types.index("sliding_attention") if window is not None else config.n_layers,
    }
