"""LLMFoundryForCausalLM: a decoder whose config.json uses the keys of the YAML that it was trained with.

This file is saved beside the weights. It needs only torch and transformers:
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). Plain PyTorch operations, for any device.
Shapes: B rows, S new tokens, P all tokens so far, D d_model, H query heads, G key-value heads, C head size, T = B*S, E
experts, K experts per token, F hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Settings = dict[str, Any]  # a block of config.json
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # by version

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "swiglu_oss": lambda x: x * torch.sigmoid(1.702 * x),
}


class LLMFoundryConfig(PretrainedConfig):
    """The model's config; every key that is not transformers' own is a key of `model` in the YAML."""

    model_type = "llmfoundry"
    attribute_map = {  # noqa: RUF012  as in transformers
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }


def _norm(said: Settings, size: int) -> nn.Module:
    if said["norm_type"].endswith("rmsnorm"):
        return nn.RMSNorm(size, said["norm_eps"])
    return nn.LayerNorm(size, said["norm_eps"], bias=not said["no_bias"])


class Activation:
    """`act(h)`, or `act(gate) * up` with `h = [gate; up]` if gated; gated blocks compute in float32."""

    def __init__(self, ffn: Settings, gated: bool, limit: float | None = None) -> None:
        act = ffn["ffn_act_fn"]
        self.gated, self.name = gated, act["name"]
        if act["name"] == "gelu" and act.get("approximate") == "tanh":
            self.name = "gelu_tanh"
        self.limit = 7.0 if limit is None and self.name == "swiglu_oss" else limit

    def __call__(self, h: Tensor) -> Tensor:
        if not self.gated:
            return ACTIVATIONS[self.name](h)
        gate, up = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.name == "swiglu_oss":
            up = up + 1
        return (ACTIVATIONS[self.name](gate) * up).to(h.dtype)


class Dense(nn.Module):
    """A feed-forward block: w2(act(w1 x))."""

    def __init__(self, said: Settings, ffn: Settings, hidden: int, gated: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(said["d_model"], hidden * (2 if gated else 1), bias=ffn["bias"])
        self.w2 = nn.Linear(hidden, said["d_model"], bias=ffn["bias"])
        self.act = Activation(ffn, gated)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        return self.w2(self.act(self.w1(x)))


class Router(nn.Module):
    """Selects each token's K experts and the weights of their outputs; computes in float32."""

    def __init__(self, said: Settings, ffn: Settings) -> None:
        super().__init__()
        n_experts = ffn["moe_num_experts"]
        self.ffn = ffn
        self.weight = nn.Parameter(torch.empty(n_experts, said["d_model"]))
        self.bias = nn.Parameter(torch.empty(n_experts)) if ffn["moe_router_bias"] else None
        moves = ffn["moe_bias_update_rate"] is not None
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(n_experts) if moves else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (T, D) -> (T, K) twice
        ffn, dtype = self.ffn, torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        scores = logits.softmax(-1) if ffn["moe_score_fn"] == "softmax" else logits.sigmoid()
        chosen_by = scores if self.expert_bias is None else scores + self.expert_bias.to(dtype)
        groups, kept = ffn["moe_n_groups"], ffn["moe_topk_groups"]
        if kept is not None and kept < groups:
            grouped = chosen_by.unflatten(-1, (groups, -1))
            counted = min(2 if ffn["moe_score_fn"] == "sigmoid" else 1, grouped.shape[-1])
            best = grouped.topk(counted).values.sum(-1).topk(kept).indices
            out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
            chosen_by = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
        experts = chosen_by.topk(ffn["moe_top_k"]).indices
        weights = scores.gather(1, experts)
        if ffn["moe_normalize_expert_weights"] is not None:
            p = ffn["moe_normalize_expert_weights"]
            weights = weights / (torch.linalg.vector_norm(weights, p, -1, keepdim=True) + 1e-20)
        return weights * ffn["moe_routed_scaling"], experts


class Experts(nn.Module):
    """The stacked weights of all experts."""

    def __init__(self, said: Settings, ffn: Settings) -> None:
        super().__init__()
        n_experts, d_model, hidden = ffn["moe_num_experts"], said["d_model"], ffn["ffn_hidden_size"]
        gated, bias = ffn["mlp_type"] == "glu", ffn["bias"] and ffn["moe_bias"] == "experts"
        rows = hidden * (2 if gated else 1)
        self.w1 = nn.Parameter(torch.empty(n_experts, rows, d_model))
        self.w2 = nn.Parameter(torch.empty(n_experts, d_model, hidden))
        self.b1 = nn.Parameter(torch.empty(n_experts, rows)) if bias else None
        self.b2 = nn.Parameter(torch.empty(n_experts, d_model)) if bias else None
        self.act = Activation(ffn, gated, ffn["ffn_act_limit"])

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:  # (T, D), (T, K) twice -> (T, D)
        y = torch.zeros_like(x, dtype=weights.dtype)
        for expert in experts.unique().tolist():
            rows, slots = (experts == expert).nonzero(as_tuple=True)
            h = F.linear(x[rows], self.w1[expert], None if self.b1 is None else self.b1[expert])
            h = F.linear(self.act(h), self.w2[expert], None if self.b2 is None else self.b2[expert])
            y.index_add_(0, rows, h * weights[rows, slots, None])
        return y.to(x.dtype)


class MoE(nn.Module):
    """A mixture of experts, with an optional shared expert."""

    def __init__(self, said: Settings, ffn: Settings) -> None:
        super().__init__()
        self.router, self.experts = Router(said, ffn), Experts(said, ffn)
        hidden = ffn["shared_expert_hidden_size"] or ffn["ffn_hidden_size"]
        self.shared_expert = Dense(said, ffn, hidden, ffn["mlp_type"] == "glu") if ffn["shared_expert"] else None
        self.shared_expert_gate = nn.Linear(said["d_model"], 1, bias=False) if ffn["shared_expert_gate"] else None
        one_bias = ffn["bias"] and ffn["moe_bias"] == "output"
        self.output_bias = nn.Parameter(torch.empty(said["d_model"])) if one_bias else None

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        tokens = x.flatten(0, 1)
        y = self.experts(tokens, *self.router(tokens)).view_as(x)
        if self.output_bias is not None:
            y = y + self.output_bias
        if self.shared_expert is None:
            return y
        shared = self.shared_expert(x)
        return y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)


def _ffn(said: Settings, layer: int) -> nn.Module:
    """Build the feed-forward block of a layer."""
    ffn = said["ffn_config"]
    if "moe_num_experts" not in ffn:
        return Dense(said, ffn, ffn["ffn_hidden_size"], ffn["ffn_type"] in ("mptglu", "glu"))
    after = layer - ffn["first_k_dense"]
    if after < 0 or after % ffn["moe_layer_freq"]:
        return Dense(said, ffn, ffn["dense_ffn_hidden_size"], ffn["mlp_type"] == "glu")
    return MoE(said, ffn)


class Attention(nn.Module):
    """Grouped-query attention: H query heads over G key-value heads."""

    def __init__(self, said: Settings, layer: int) -> None:
        super().__init__()
        attn = self.attn = said["attn_config"]
        self.layer, self.n_heads = layer, said["n_heads"]
        self.kv_heads = {"multihead_attention": self.n_heads, "multiquery_attention": 1}.get(
            attn["attn_type"], attn["kv_n_heads"]
        )
        self.head_dim = attn["head_dim"] or said["d_model"] // self.n_heads
        self.scale = self.head_dim**-0.5 if attn["softmax_scale"] is None else attn["softmax_scale"]
        rows = (self.n_heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(said["d_model"], rows, bias=attn["bias"])
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, said["d_model"], bias=attn["out_bias"])
        if attn["qk_norm"] or attn["qk_ln"]:
            self.q_norm = _norm(said, self.head_dim * (self.n_heads if attn["qk_ln"] else 1))
            self.k_norm = _norm(said, self.head_dim * (self.kv_heads if attn["qk_ln"] else 1))
        self.sinks = nn.Parameter(torch.empty(self.n_heads)) if attn["sinks"] else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor, cache: Any) -> Tensor:
        """(B, S, D) -> (B, S, D). `bias` is added to the scores; the lowest number masks a key."""
        attn, clip = self.attn, self.attn["clip_qkv"]
        qkv = self.wqkv(x)
        if clip is not None and not attn["clip_qkv_after_norm"]:
            qkv = qkv.clamp(-clip, clip)
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.n_heads, self.kv_heads, self.kv_heads), dim=2)  # (B, S, H or G, C)
        if attn["qk_norm"]:
            q, k = self.q_norm(q), self.k_norm(k)
        if attn["qk_ln"]:
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        if clip is not None and attn["clip_qkv_after_norm"]:
            q, k, v = q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (each.repeat_interleave(self.n_heads // self.kv_heads, dim=1) for each in (k, v))  # (B, H, P, C)
        cap = attn["attn_logit_softcapping"]
        if cap is None and self.sinks is None:
            y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=self.scale)
        else:
            scores = (q.to(bias.dtype) @ k.to(bias.dtype).transpose(-1, -2)) * self.scale
            scores = (scores if cap is None else cap * torch.tanh(scores / cap)) + bias
            if self.sinks is not None:
                column = self.sinks.to(bias.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
                weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            y = (weights @ v.to(bias.dtype)).to(q.dtype)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, S, H, C) by cos and sin (S, 1, C / 2)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    one, two = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1).to(x.dtype)


def _rope(said: Settings, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of these positions, (S, 1, C / 2) each."""
    attn = said["attn_config"]
    theta, dim, scaling = (
        attn["rope_theta"],
        attn["head_dim"] or said["d_model"] // said["n_heads"],
        attn["rope_scaling"],
    )
    wavelength = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    inv_freq, kind, magnitude = 1.0 / wavelength, scaling["type"], 1.0
    if kind == "linear":
        inv_freq = inv_freq / scaling["factor"]
    elif kind == "llama3":
        low, high, length = (
            scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        turns = length * inv_freq / (2 * math.pi)  # rotations over the original length
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = (1 - smooth) * inv_freq / scaling["factor"] + smooth * inv_freq
    elif kind == "yarn":
        inv_freq, magnitude = _yarn(scaling, theta, dim, wavelength)
    angles = positions.to(torch.float32)[:, None] * inv_freq
    return (angles.cos() * magnitude)[:, None], (angles.sin() * magnitude)[:, None]


def _yarn(scaling: Settings, theta: float, dim: int, wavelength: Tensor) -> tuple[Tensor, float]:
    """Return the frequencies (C / 2,) and the attention factor (Peng et al. 2023, arXiv:2309.00071)."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = (
        dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    at = torch.arange(dim // 2, dtype=torch.float32, device=wavelength.device)
    ramp = ((at - low) / (high - low)).clamp(0, 1)
    inv_freq = ramp / (factor * wavelength) + (1 - ramp) / wavelength

    def stretched(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    magnitude = scaling["attention_factor"]
    if magnitude is None and scaling["mscale"] and scaling["mscale_all_dim"]:
        magnitude = stretched(scaling["mscale"]) / stretched(scaling["mscale_all_dim"])
    return inv_freq, stretched(1.0) if magnitude is None else magnitude


class Block(nn.Module):
    """A pre-norm block: x + attn(norm_1(x)), then x + ffn(norm_2(x))."""

    def __init__(self, said: Settings, layer: int) -> None:
        super().__init__()
        self.norm_1, self.attn = _norm(said, said["d_model"]), Attention(said, layer)
        self.norm_2, self.ffn = _norm(said, said["d_model"]), _ffn(said, layer)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor, cache: Any) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.attn(self.norm_1(x), rope, bias, cache)
        return x + self.ffn(self.norm_2(x))


class LLMFoundryForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its language-modeling head."""

    config_class = LLMFoundryConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012  as in transformers
    accepts_loss_kwargs = False  # the loss is the mean over the labels of this batch

    def __init__(self, config: LLMFoundryConfig) -> None:
        super().__init__(config)
        said = self.said = config.to_dict()
        self.wte = nn.Embedding(said["vocab_size"], said["d_model"])
        self.wpe = nn.Embedding(said["max_seq_len"], said["d_model"]) if said["learned_pos_emb"] else None
        self.blocks = nn.ModuleList(Block(said, layer) for layer in range(said["n_layers"]))
        self.norm_f = _norm(said, said["d_model"])
        # A tied head has no module of its own; it uses the embedding's weight.
        tied = said.get("tie_word_embeddings", True)
        self.lm_head = None if tied else nn.Linear(said["d_model"], said["vocab_size"], bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.wte

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, or None if it is tied to the embedding."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                (nn.init.ones_ if name == "weight" else nn.init.zeros_)(parameter)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits and, given labels, the mean loss. Arguments are as in transformers.

        Args:
            attention_mask: (B, P), 1 for tokens and 0 for padding.
            position_ids: (B, S), used only by learned positions: RoPE and ALiBi depend only on differences.
            past_key_values: earlier keys and values; renamed to `cache` in transformers 5.20.
            others: arguments that some versions of `generate` add, and settings that are off.

        Raises:
            ValueError: if an argument would change what is returned.
        """
        for key, value in others.items():
            if key not in ("cache_position", "return_dict") and value is not None and value is not False:
                raise ValueError(f"{key} is not supported by this model; leave it out")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, D)
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        offset = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(offset, offset + x.shape[1], device=x.device)  # (S,)
        if self.wpe is not None:
            if position_ids is None and attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
            x = x + self.wpe(positions if position_ids is None else position_ids)
        rope = _rope(self.said, positions) if self.said["attn_config"]["rope"] else None
        biases: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            window = self._window(layer)
            if window not in biases:
                biases[window] = self._bias(window, positions, attention_mask, x.dtype)
            x = block(x, rope, biases[window].to(x.device), cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = self.norm_f(x[:, kept])
        logits = F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)  # (B, S, V)
        cap = self.said["final_logit_softcapping"]
        if cap is not None:
            logits = (cap * torch.tanh(logits.to(torch.promote_types(x.dtype, torch.float32)) / cap)).to(x.dtype)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})

    def _window(self, layer: int) -> int:
        """Return how many earlier tokens a token of this layer attends to; -1: all."""
        pattern = self.said["attn_window_pattern"]
        return pattern[layer % len(pattern)] if pattern else self.said["attn_config"]["sliding_window_size"]

    def _bias(self, window: int, positions: Tensor, padding: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the attention bias, (B or 1, H or 1, S, P), with the lowest number where a key is masked."""
        attn, dtype = self.said["attn_config"], torch.promote_types(dtype, torch.float32)
        i, j = positions[:, None], torch.arange(int(positions[-1]) + 1, device=positions.device)
        seen = (j <= i)[None, None]
        if window >= 0:
            seen = seen & (i - j <= window)
        if padding is not None and padding.dim() == 2:
            seen = seen & padding[:, None, None, : len(j)].bool()
        bias = torch.zeros((), dtype=dtype, device=positions.device)
        if attn["alibi"]:
            n_heads = self.said["n_heads"]
            power = 2 ** math.ceil(math.log2(n_heads))
            exponents = torch.arange(1, power + 1, dtype=torch.float32, device=positions.device)
            slopes = 1.0 / 2 ** (exponents * (attn["alibi_bias_max"] / power))
            if power != n_heads:
                slopes = torch.cat((slopes[1::2], slopes[::2]))[:n_heads]
            bias = slopes[:, None, None] * (j - i)  # (H, S, P)
        # Not -inf: a row of padding would become NaN.
        return torch.where(seen, bias.to(dtype), torch.finfo(dtype).min)
