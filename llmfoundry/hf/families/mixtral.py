"""Mixtral: Mistral with a mixture of experts in place of the feed-forward block.

Source: Jiang et al. 2024, arXiv:2401.04088.
"""

from __future__ import annotations

from llmfoundry.hf.decoder import Decoder, mixture_of, mixture_to
from llmfoundry.hf.families.llama import Mistral
from llmfoundry.hf.family import ConfigDict, Theirs
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig


class Mixtral(Mistral):
    """The Mixtral family. In `transformers`, `router_jitter_noise` also affects the experts; here, only the router."""

    model_type = "mixtral"
    title = "Mixtral"
    architecture = "MixtralForCausalLM"
    layouts = ("each", "stacked")
    names = Decoder.names | {
        "mixture": "block_sparse_moe", "router": "block_sparse_moe.gate", "gate": "w1", "up": "w3", "down": "w2",
    }  # fmt: skip

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the MoE settings."""
        jitter = theirs["router_jitter_noise"] or None
        return mixture_of(theirs, "num_local_experts", "intermediate_size") | {
            "moe_normalize_expert_weights": 1.0, "moe_jitter_eps": jitter,
        }  # fmt: skip

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face MoE settings."""
        said = mixture_to(ffn, "num_local_experts", "intermediate_size")
        assert isinstance(ffn, MoEConfig)
        return said | {"router_jitter_noise": ffn.moe_jitter_eps or 0.0}

    def add_mixture(self, ffn: MoEConfig, pieces: Pieces, ours: str, theirs: str, layout: str) -> None:
        """Map the experts; stacked ones have other names than single ones."""
        if layout != "stacked":
            super().add_mixture(ffn, pieces, ours, theirs, layout)
            return
        pieces.add(f"{ours}.router.weight", f"{theirs}.mlp.gate.weight")
        pieces.add(f"{ours}.experts.w1", f"{theirs}.mlp.experts.gate_up_proj")
        pieces.add(f"{ours}.experts.w2", f"{theirs}.mlp.experts.down_proj")
