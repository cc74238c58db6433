"""Qwen2-MoE (a gated shared expert) and Qwen3-MoE; some layers may be dense.

Source: Yang et al. 2024, arXiv:2407.10671; Qwen team 2025, arXiv:2505.09388.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError
from llmfoundry.hf.decoder import Decoder, as_mixture, mixture_of, mixture_to, windows_of, windows_to
from llmfoundry.hf.families.llama import window_of
from llmfoundry.hf.families.qwen import their_windows
from llmfoundry.hf.family import ConfigDict, Theirs
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig


class _QwenMoE(Decoder):
    """What both share: which layers are mixtures, and whether routing weights are normalized."""

    layouts = ("each", "stacked")

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the MoE settings."""
        return mixture_of(theirs, "num_experts", "moe_intermediate_size") | {
            "moe_normalize_expert_weights": 1.0 if theirs["norm_topk_prob"] else None,
            "dense_ffn_hidden_size": theirs["intermediate_size"],
            **_which_layers(theirs),
        }

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face MoE settings."""
        kinds = [config.ffn(layer) for layer in range(config.n_layers)]
        moe = as_mixture(next((kind for kind in kinds if isinstance(kind, MoEConfig)), ffn))
        return mixture_to(moe, "num_experts", "moe_intermediate_size") | {
            "norm_topk_prob": moe.moe_normalize_expert_weights is not None,
            "intermediate_size": moe.dense_ffn_hidden_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, kind in enumerate(kinds) if not isinstance(kind, MoEConfig)],
        }


class Qwen2MoE(_QwenMoE):
    """The Qwen2-MoE family: a shared expert, scaled by a gate of its own."""

    model_type = "qwen2_moe"
    title = "Qwen2-MoE"
    architecture = "Qwen2MoeForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return the biases: on q, k and v, or none."""
        return {"bias": bool(theirs["qkv_bias"]), "out_bias": False}

    def windows(self, theirs: Theirs) -> list[int]:
        """Return the window of each layer, from `layer_types`."""
        for key in ("use_sliding_window", "max_window_layers"):
            theirs[key]
        return windows_of(theirs["layer_types"], theirs["sliding_window"])

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the MoE settings, with the shared expert."""
        return super().ffn(theirs) | {
            "shared_expert": True,
            "shared_expert_gate": True,
            "shared_expert_hidden_size": theirs["shared_expert_intermediate_size"],
        }

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face settings for biases and windows."""
        return {"qkv_bias": bool(attention.bias)} | their_windows(config)

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face MoE settings, with the shared expert."""
        said = super().their_ffn(ffn, config)
        shared = as_mixture(ffn).shared if isinstance(ffn, MoEConfig) else None
        return said | {"shared_expert_intermediate_size": shared.hidden_size if shared else 1}

    def add_mixture(self, ffn: MoEConfig, pieces: Pieces, ours: str, theirs: str, layout: str) -> None:
        """Map the experts and the shared expert."""
        super().add_mixture(ffn, pieces, ours, theirs, layout)
        self.add_gated(pieces, f"{ours}.shared_expert", f"{theirs}.mlp.shared_expert")
        pieces.add(f"{ours}.shared_expert_gate.weight", f"{theirs}.mlp.shared_expert_gate.weight")


class Qwen3MoE(_QwenMoE):
    """The Qwen3-MoE family: QK-norm per head; no shared expert."""

    model_type = "qwen3_moe"
    title = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return biases and QK-norm."""
        return super().attention(theirs) | {"qk_norm": True}

    def windows(self, theirs: Theirs) -> list[int]:
        """Return the window of all layers."""
        theirs["use_sliding_window"]
        return [window_of(theirs["sliding_window"])]

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face settings for biases and the window."""
        types, window = windows_to(config)
        if window is not None and "full_attention" in types:
            raise ConfigError("attn_window_pattern")
        return super().their_attention(attention, config) | {
            "sliding_window": window, "use_sliding_window": window is not None,
        }  # fmt: skip


def _which_layers(theirs: Theirs) -> dict[str, object]:
    """Convert a step and a list of dense layers to `first_k_dense` and `moe_layer_freq`."""
    n_layers, step, dense = (
        theirs.int("num_hidden_layers"),
        theirs.int("decoder_sparse_step"),
        theirs["mlp_only_layers"],
    )
    assert isinstance(dense, list)
    sparse = [layer for layer in range(n_layers) if layer not in dense and (layer + 1) % step == 0]
    if not sparse:
        raise ConfigError("config.json: no layer is a mixture")
    first, freq = sparse[0], sparse[1] - sparse[0] if len(sparse) > 1 else n_layers
    if sparse != list(range(first, n_layers, freq)):
        raise ConfigError(
            f"config.json: mixtures in layers {sparse} are not supported: they must follow each other in even steps "
            "up to the last layer (decoder_sparse_step, mlp_only_layers)"
        )
    return {"first_k_dense": first, "moe_layer_freq": freq}
