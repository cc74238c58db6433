"""OLMoE: many small experts, and a QK-norm over all heads together.

Source: Muennighoff et al. 2024, arXiv:2409.02060.
"""

from __future__ import annotations

from llmfoundry.hf.decoder import Decoder, as_mixture, mixture_of, mixture_to
from llmfoundry.hf.family import ConfigDict, Theirs
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.model.transformer import CausalLMConfig


class Olmoe(Decoder):
    """The OLMoE family. `transformers` applies `clip_qkv` after the norm."""

    model_type = "olmoe"
    title = "OLMoE"
    architecture = "OlmoeForCausalLM"
    layouts = ("each", "stacked")

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return norms, clipping and biases."""
        clip = theirs["clip_qkv"]
        return super().attention(theirs) | {"qk_ln": True, "clip_qkv": clip, "clip_qkv_after_norm": clip is not None}

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the MoE settings."""
        return mixture_of(theirs, "num_experts", "intermediate_size") | {
            "moe_normalize_expert_weights": 1.0 if theirs["norm_topk_prob"] else None
        }

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face settings for clipping and biases."""
        return super().their_attention(attention, config) | {"clip_qkv": attention.clip_qkv}

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face MoE settings."""
        moe = as_mixture(ffn)
        return mixture_to(moe, "num_experts", "intermediate_size") | {
            "norm_topk_prob": moe.moe_normalize_expert_weights is not None
        }
