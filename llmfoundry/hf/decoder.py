"""What Llama and later architectures share: setting and tensor names, RoPE scaling, attention windows, MoE settings.

Each family overrides only what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.family import ConfigDict, Family, Theirs, Value
from llmfoundry.hf.pieces import Pieces
from llmfoundry.layers.attention import FULL, GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.layers.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig

# `transformers` activation names to llmfoundry's. When writing, the first match is used.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_SCALINGS: dict[str, type[RopeScaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
_SPARSE = "full_attention", "sliding_attention"


class Decoder(Family):
    """Base of the families with RMSNorm, rotary grouped-query attention and a gated feed-forward block."""

    sizes = {
        "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
        "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
        "tie_word_embeddings": "tie_word_embeddings",
    }  # fmt: skip
    # Hugging Face submodule names under `model.layers.N.`, keyed by the names that `add_pieces` uses.
    names: ClassVar[dict[str, str]] = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attention": "self_attn",
        "mlp": "mlp",
        "mixture": "mlp",
        "router": "mlp.gate",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
    }

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        windows = self.windows(theirs)
        pattern = shortest_pattern(windows)
        data = {
            **self.sizes_of(theirs),
            "norm_type": "rmsnorm",
            "no_bias": True,
            "attn_window_pattern": pattern if len(pattern) > 1 else None,
            "attn_config": {
                "attn_type": "grouped_query_attention",
                "kv_n_heads": theirs["num_key_value_heads"] or theirs["num_attention_heads"],
                "head_dim": theirs["head_dim"],
                "rope": True,
                "sliding_window_size": pattern[0] if len(pattern) == 1 else FULL,
            }
            | rope_of(theirs["rope_parameters"])
            | self.attention(theirs),
            "ffn_config": {"ffn_act_fn": {"name": activation_of(theirs["hidden_act"])}} | self.ffn(theirs),
            "init_config": init_of(theirs["initializer_range"]),
        }
        return check(CausalLMConfig, data, where="config.json")

    def attention(self, theirs: Theirs) -> dict[str, object]:
        """Return the keys of `attn_config` beyond the head counts and RoPE."""
        bias = bool(theirs["attention_bias"])
        return {"bias": bias, "out_bias": bias}

    def ffn(self, theirs: Theirs) -> dict[str, object]:
        """Return the keys of `ffn_config` beyond the activation."""
        return {"ffn_type": "mptglu", "ffn_hidden_size": theirs["intermediate_size"]}

    def windows(self, theirs: Theirs) -> list[int]:
        """Return the sliding window of each layer, or a single one for all layers."""
        return [FULL]

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to Hugging Face settings."""
        attention, ffn = config.attention, config.ffn(config.n_layers - 1)
        if not isinstance(attention, GroupedQueryConfig) or not attention.rope:
            raise ConfigError("rotary softmax attention")
        init_std = config.init_config.init_std
        return {
            **self.sizes_to(config),
            "num_key_value_heads": attention.kv_heads(config.n_heads),
            "head_dim": attention.rotary_dim(config.d_model, config.n_heads),
            "hidden_act": self.their_activation(ffn),
            **rope_to(attention.rope_theta, attention.rope_scaling),
            "initializer_range": 0.02 if init_std is None else init_std,
            **self.their_attention(attention, config),
            **self.their_ffn(ffn, config),
        }

    def their_attention(self, attention: GroupedQueryConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face settings for biases and windows; the inverse of `attention` and `windows`."""
        return {"attention_bias": bool(attention.bias)}

    def their_activation(self, ffn: FFNConfig) -> str:
        """Return the Hugging Face name of the activation."""
        return activation_to(ffn)

    def their_ffn(self, ffn: FFNConfig, config: CausalLMConfig) -> ConfigDict:
        """Return the Hugging Face settings of the feed-forward block; the inverse of `ffn`."""
        return {"intermediate_size": ffn.ffn_hidden_size}

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add the mapping of every tensor."""
        pieces.add("wte.weight", self.embedding)
        for layer in range(config.n_layers):
            ours, theirs = f"blocks.{layer}", f"{self.prefix}layers.{layer}"
            pieces.add(f"{ours}.norm_1.weight", f"{theirs}.{self.names['norm_1']}.weight")
            self.add_attention(config, pieces, f"{ours}.attn", f"{theirs}.{self.names['attention']}")
            pieces.add(f"{ours}.norm_2.weight", f"{theirs}.{self.names['norm_2']}.weight")
            ffn = config.ffn(layer)
            if isinstance(ffn, MoEConfig):
                self.add_mixture(ffn, pieces, f"{ours}.ffn", theirs, layout)
            else:
                self.add_gated(pieces, f"{ours}.ffn", f"{theirs}.{self.names['mlp']}")
        pieces.add("norm_f.weight", f"{self.prefix}norm.weight")
        if not config.tie_word_embeddings:
            pieces.add("lm_head.weight", self.head)

    def add_attention(self, config: CausalLMConfig, pieces: Pieces, ours: str, theirs: str) -> None:
        """Map the attention tensors: q, k and v are slices of `wqkv`; all others have the same shape on both sides."""
        attention = config.attention
        assert isinstance(attention, GroupedQueryConfig)
        head, kv = attention.rotary_dim(config.d_model, config.n_heads), attention.kv_heads(config.n_heads)
        ends = [config.n_heads * head, (config.n_heads + kv) * head, (config.n_heads + 2 * kv) * head]
        for kind in ("weight", "bias") if attention.bias else ("weight",):
            for name, start, end in zip("qkv", [0, *ends], ends, strict=False):
                pieces.add(f"{ours}.wqkv.{kind}", f"{theirs}.{name}_proj.{kind}", (slice(start, end),))
        for kind in ("weight", "bias") if attention.out_bias else ("weight",):
            pieces.add(f"{ours}.out_proj.{kind}", f"{theirs}.o_proj.{kind}")
        if attention.qk_norm or attention.qk_ln:
            for name in ("q_norm", "k_norm"):
                pieces.add(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
        if attention.sinks:
            pieces.add(f"{ours}.sinks", f"{theirs}.sinks")

    def add_gated(self, pieces: Pieces, ours: str, theirs: str) -> None:
        """Map a dense gated block: `gate_proj` and `up_proj` are the two halves of `w1`."""
        hidden = pieces.shapes[f"{ours}.w1.weight"][0] // 2
        for kind in ("weight", "bias") if f"{ours}.w1.bias" in pieces.shapes else ("weight",):
            pieces.add(f"{ours}.w1.{kind}", f"{theirs}.{self.names['gate']}.{kind}", (slice(0, hidden),))
            pieces.add(f"{ours}.w1.{kind}", f"{theirs}.{self.names['up']}.{kind}", (slice(hidden, 2 * hidden),))
            pieces.add(f"{ours}.w2.{kind}", f"{theirs}.{self.names['down']}.{kind}")

    def add_mixture(self, ffn: MoEConfig, pieces: Pieces, ours: str, theirs: str, layout: str) -> None:
        """Map the experts, stored either as one tensor per expert (`each`) or stacked as in llmfoundry (`stacked`)."""
        pieces.add(f"{ours}.router.weight", f"{theirs}.{self.names['router']}.weight")
        if layout == "stacked":
            stacked = f"{theirs}.mlp.experts"
            pieces.add(f"{ours}.experts.w1", f"{stacked}.gate_up_proj")
            pieces.add(f"{ours}.experts.w2", f"{stacked}.down_proj")
            return
        hidden = pieces.shapes[f"{ours}.experts.w2"][2]
        experts, names = f"{theirs}.{self.names['mixture']}.experts", self.names
        for e in range(ffn.moe_num_experts):
            pieces.add(f"{ours}.experts.w1", f"{experts}.{e}.{names['gate']}.weight", (e, slice(0, hidden)))
            pieces.add(f"{ours}.experts.w1", f"{experts}.{e}.{names['up']}.weight", (e, slice(hidden, 2 * hidden)))
        for e in range(ffn.moe_num_experts):
            pieces.add(f"{ours}.experts.w2", f"{experts}.{e}.{names['down']}.weight", (e,))


def activation_of(name: Value) -> str:
    """Return the llmfoundry name of a Hugging Face activation."""
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ConfigError(f"config.json: activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_to(ffn: FFNConfig) -> str:
    """Return the Hugging Face name of a block's activation."""
    found = [theirs for theirs, ours in _ACTIVATIONS.items() if ours == ffn.ffn_act_fn.key]
    if not found:
        raise ConfigError(f"ffn_act_fn.name={ffn.ffn_act_fn.name}")
    return found[0]


def init_of(initializer_range: Value) -> dict[str, object]:
    """Return `init_config` for a Hugging Face `initializer_range`."""
    return {"name": "normal_", "init_std": float(initializer_range)} if initializer_range else {}  # type: ignore[arg-type]


def rope_of(parameters: Value) -> dict[str, object]:
    """Convert Hugging Face `rope_parameters` to `rope_theta` and `rope_scaling`."""
    if not isinstance(parameters, dict):
        raise ConfigError(f"config.json: rope_parameters must be a mapping, found {parameters!r}")
    said = {key: value for key, value in parameters.items() if value is not None}
    kind, theta = said.pop("rope_type", "default"), said.pop("rope_theta", 10000.0)
    said.pop("type", None)
    if said.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor is not supported; all dims of a head rotate")
    rope: dict[str, object] = {"rope_theta": float(theta)}  # type: ignore[arg-type]
    if kind == "default":
        said.pop("original_max_position_embeddings", None)  # unused without scaling
    elif kind not in _SCALINGS:
        raise ConfigError(
            f"config.json: rope_type {kind!r} is not supported; supported are default, {', '.join(_SCALINGS)}"
        )
    else:
        fields = _SCALINGS[str(kind)].model_fields
        scaling: dict[str, object] = {"type": kind}
        for key in [key for key in said if key in fields]:
            value = said.pop(key)
            is_length = key == "original_max_position_embeddings"
            scaling[key] = (
                float(value) if isinstance(value, int) and not isinstance(value, bool) and not is_length else value
            )
        rope["rope_scaling"] = scaling
    if said:
        key, value = next(iter(said.items()))
        raise ConfigError(f"config.json: rope_parameters.{key}={value!r} is not supported with rope_type {kind!r}")
    return rope


def rope_to(theta: float, scaling: RopeScaling) -> ConfigDict:
    """Return `rope_parameters`, plus the same settings under the names that `transformers` before version 5 reads.

    Without a top-level `rope_theta`, those versions silently use their default theta.
    """
    kind = next((kind for kind, known in _SCALINGS.items() if isinstance(scaling, known)), "default")
    said = {k: v for k, v in scaling.model_dump(mode="json").items() if k != "type" and v is not None}
    return {
        "rope_parameters": {"rope_theta": theta, "rope_type": kind, **said},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, "type": kind, **said},
    }


def shortest_pattern(values: Sequence[int]) -> list[int]:
    """Return the shortest list whose repetition yields `values`."""
    for length in range(1, len(values) + 1):
        if all(value == values[i % length] for i, value in enumerate(values)):
            return list(values[:length])
    return [FULL]


def windows_of(layer_types: Value, sliding_window: Value) -> list[int]:
    """Return the window of each layer. Hugging Face windows include the current token; llmfoundry windows do not."""
    if not isinstance(layer_types, list) or not set(layer_types) <= set(_SPARSE):
        raise ConfigError(
            f"config.json: layer_types={layer_types!r} is not supported; supported are {', '.join(_SPARSE)}"
        )
    if "sliding_attention" in layer_types and not (isinstance(sliding_window, int) and sliding_window > 0):
        raise ConfigError(f"config.json: layers of sliding_attention need sliding_window, found {sliding_window!r}")
    window = sliding_window - 1 if isinstance(sliding_window, int) else FULL
    return [window if kind == "sliding_attention" else FULL for kind in layer_types]


def windows_to(config: CausalLMConfig) -> tuple[list[Value], int | None]:
    """Return `layer_types` and `sliding_window`.

    Raises:
        ConfigError: if the layers have windows of several sizes, which Hugging Face configs cannot express.
    """
    windows = [config.window(layer) for layer in range(config.n_layers)]
    sizes = sorted({window for window in windows if window != FULL})
    if len(sizes) > 1:
        raise ConfigError(f"windows of several sizes {sizes}")
    types: list[Value] = ["full_attention" if window == FULL else "sliding_attention" for window in windows]
    return types, sizes[0] + 1 if sizes else None


def mixture_of(theirs: Theirs, n_experts: str, hidden: str) -> dict[str, object]:
    """Return the `ffn_config` keys that every MoE family has: number of experts, top-k, and the balance loss."""
    top_k = theirs.int("num_experts_per_tok")
    return {
        "ffn_type": "moe",
        "ffn_hidden_size": theirs[hidden],
        "moe_num_experts": theirs[n_experts],
        "moe_top_k": top_k,
        "moe_loss_weight": balance_of(theirs, theirs["router_aux_loss_coef"], top_k),
        "moe_lbl_layers": "together",
    }


def balance_of(theirs: Theirs, coefficient: Value, top_k: int) -> float:
    """Convert `router_aux_loss_coef` to `moe_loss_weight`.

    The Hugging Face loss averages over all layers together and counts each token K times, once per selected expert. It
    is added only if `output_router_logits` is set. Most configs carry a coefficient that is never applied, such as 0.9
    in gpt-oss, which would dominate the gradient.
    """
    if not theirs["output_router_logits"]:
        return 0.0
    return _rounded(float(coefficient or 0.0) * top_k)  # type: ignore[arg-type]


def mixture_to(ffn: FFNConfig, n_experts: str, hidden: str) -> ConfigDict:
    """Return the Hugging Face MoE settings; the inverse of `mixture_of`."""
    moe = as_mixture(ffn)
    return {
        hidden: moe.ffn_hidden_size,
        n_experts: moe.moe_num_experts,
        "num_experts_per_tok": moe.moe_top_k,
        "router_aux_loss_coef": _rounded(moe.moe_loss_weight / moe.moe_top_k),
    }


def as_mixture(ffn: FFNConfig) -> MoEConfig:
    """Return `ffn` as a MoEConfig.

    Raises:
        ConfigError: if it is not a mixture of experts.
    """
    if not isinstance(ffn, MoEConfig):
        raise ConfigError(f"ffn_type={ffn.ffn_type}")
    return ffn


def _rounded(value: float) -> float:
    """Round to 12 digits, so that converting to Hugging Face and back gives the same number."""
    return float(f"{value:.12g}")
