"""gpt-oss: biases everywhere, attention sinks, windows in every other layer, and a clamped SwiGLU.

The gate and up projections of an expert are interleaved columns of one matrix (E, D, 2F), transposed relative to
llmfoundry's.
Source: OpenAI 2025, arXiv:2508.10925.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError
from llmfoundry.hf.decoder import Decoder, as_mixture, mixture_of, mixture_to, windows_of, windows_to
from llmfoundry.hf.family import ConfigDict, Theirs
from llmfoundry.hf.pieces import Pieces
from llmfoundry.kernels.activations import SWIGLU_OSS_ALPHA, clamp_limit
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig


class GptOss(Decoder):
    """The gpt-oss family. Only unquantized (bfloat16) weights are read and written, not the published MXFP4 ones."""

    model_type = "gpt_oss"
    title = "gpt-oss"
    architecture = "GptOssForCausalLM"
    names = Decoder.names | {"router": "mlp.router"}

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return the attention settings, with sinks."""
        return super().attention(theirs) | {"sinks": True}

    def windows(self, theirs: Theirs) -> list[int]:
        """Return the window of each layer, from `layer_types`."""
        return windows_of(theirs["layer_types"], theirs["sliding_window"])

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the MoE settings. A softmax over the selected logits equals normalized softmax scores."""
        theirs.must_be("swiglu_alpha", SWIGLU_OSS_ALPHA)
        return mixture_of(theirs, "num_local_experts", "intermediate_size") | {
            "ffn_act_fn": {"name": "swiglu_oss"},
            "ffn_act_limit": theirs["swiglu_limit"],
            "bias": True,
            "moe_router_bias": True,
            "moe_normalize_expert_weights": 1.0,
        }

    def their_activation(self, ffn: FFNConfig) -> str:
        """Return silu: `hidden_act` is ignored by the Hugging Face code, which always uses its own activation."""
        if ffn.ffn_act_fn.key != "swiglu_oss":
            raise ConfigError(f"ffn_act_fn.name={ffn.ffn_act_fn.name}")
        return "silu"

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return biases and windows. If no layer has a window, `sliding_window`, which is required, is max_seq_len."""
        types, window = windows_to(config)
        return super().their_attention(attention, config) | {
            "layer_types": types, "sliding_window": window or config.max_seq_len,
        }  # fmt: skip

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the MoE settings."""
        moe = as_mixture(ffn)
        return mixture_to(moe, "num_local_experts", "intermediate_size") | {
            "swiglu_alpha": SWIGLU_OSS_ALPHA,
            "swiglu_limit": clamp_limit("swiglu_oss", moe.ffn_act_limit),
        }

    def add_mixture(self, ffn: MoEConfig, pieces: Pieces, ours: str, theirs: str, layout: str) -> None:
        """Map the interleaved, transposed experts."""
        hidden = pieces.shapes[f"{ours}.experts.w2"][2]
        every, gate, up = slice(None), slice(0, hidden), slice(hidden, 2 * hidden)
        even, odd = slice(0, None, 2), slice(1, None, 2)
        for kind in ("weight", "bias"):
            pieces.add(f"{ours}.router.{kind}", f"{theirs}.mlp.router.{kind}")
        experts = f"{theirs}.mlp.experts"
        for rows, columns in ((gate, even), (up, odd)):
            pieces.add(f"{ours}.experts.w1", f"{experts}.gate_up_proj", (every, rows), (every, every, columns), True)
            pieces.add(f"{ours}.experts.b1", f"{experts}.gate_up_proj_bias", (every, rows), (every, columns))
        pieces.add(f"{ours}.experts.w2", f"{experts}.down_proj", transposed=True)
        pieces.add(f"{ours}.experts.b2", f"{experts}.down_proj_bias")
