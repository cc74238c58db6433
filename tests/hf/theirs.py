"""Tiny random models, made by `transformers` itself: at least three of each family."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
LLAMA_LIKE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
FULL_THEN_WINDOW = ["full_attention", "sliding_attention"]
MOE = LLAMA_LIKE | {"num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
GPT_NEO = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]], "window_size": 5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DBRX = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": VOCAB,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}  # fmt: skip
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 64}
DEEPSEEK = LLAMA_LIKE | {
    "num_key_value_heads": 4, "num_hidden_layers": 3, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 10, "moe_intermediate_size": 24, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
}  # fmt: skip


class Case(NamedTuple):
    """A model of `transformers`: its type, its settings, and a name for the test."""

    model_type: str
    about: str
    settings: dict[str, object]

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model, with weights of a size that makes every part matter."""
        config = AutoConfig.for_model(self.model_type, **self.settings)
        config._experts_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                module, _, leaf = name.rpartition(".")
                is_norm = leaf == "weight" and ("norm" in module.rpartition(".")[2] or ".ln_" in name)
                centre = 1.0 if is_norm else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + centre)
                if name.endswith("embed_positions.weight"):
                    parameter[:2] = 0.0  # OPT's rows for padding, which are written as zeros
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):  # moves the choice of experts
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        return model.to(dtype)


def in_float64(theirs: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Where their code says float32 it shall mean float64: else its rounding would hide a difference.

    Angles of rotation stay float32, as ours are.
    """
    module = sys.modules[type(theirs).__module__]
    exact = {"float32": torch.float64, "float": torch.float64}
    monkeypatch.setattr(module, "torch", SimpleNamespace(**vars(torch) | exact))
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def in_single(forward: Callable[..., object]) -> Callable[..., object]:
        def rotary(*args: Tensor, **kwargs: object) -> object:
            with monkeypatch.context() as back:
                back.setattr(torch.Tensor, "float", single)
                back.setattr(module, "torch", torch)
                return forward(*args, **kwargs)

        return rotary

    for part in theirs.modules():
        if "Rotary" in type(part).__name__:
            part.forward = in_single(part.forward)
    return theirs.double()


def _cases(model_type: str, base: dict[str, object], variants: dict[str, dict[str, object]]) -> list[Case]:
    return [Case(model_type, about, base | settings) for about, settings in variants.items()]


CASES = [
    *_cases("llama", LLAMA_LIKE, {
        "grouped": {"tie_word_embeddings": False},
        "all heads, tied, llama3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        "one key head, biases, yarn": {
            "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN,
        },
        "wide heads, linear": {"head_dim": 12, "rope_parameters": LINEAR, "hidden_act": "gelu"},
    }),
    *_cases("mistral", LLAMA_LIKE, {
        "no window": {"sliding_window": None},
        "window": {"sliding_window": 5},
        "window, tied, wide heads": {"sliding_window": 7, "tie_word_embeddings": True, "head_dim": 16},
    }),
    *_cases("qwen2", LLAMA_LIKE, {
        "grouped, tied": {"tie_word_embeddings": True},
        "all heads": {"num_key_value_heads": 4},
        "later layers windowed": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    }),
    *_cases("qwen3", LLAMA_LIKE | {"head_dim": 8}, {
        "grouped": {},
        "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
        "wide heads, yarn": {"head_dim": 16, "rope_parameters": YARN},
    }),
    *_cases("mixtral", MOE, {
        "four experts": {"num_local_experts": 4},
        "window, all heads": {"num_local_experts": 4, "sliding_window": 5, "num_key_value_heads": 4},
        "top 1, tied": {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    }),
    *_cases("qwen2_moe", MOE | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}, {
        "shared expert": {"num_experts": 4},
        "normalised, first dense": {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
        "every second": {"num_experts": 5, "decoder_sparse_step": 2, "num_hidden_layers": 4, "qkv_bias": False},
    }),
    *_cases("qwen3_moe", MOE | {"moe_intermediate_size": 24, "head_dim": 8}, {
        "not normalised": {"num_experts": 4, "norm_topk_prob": False},
        "normalised, tied": {"num_experts": 6, "norm_topk_prob": True, "tie_word_embeddings": True},
        "biases, one dense": {"num_experts": 4, "attention_bias": True, "mlp_only_layers": [0]},
    }),
    *_cases("olmoe", MOE, {
        "all heads": {"num_experts": 4, "num_key_value_heads": 4},
        "normalised, grouped": {"num_experts": 5, "norm_topk_prob": True},
        "clipped, biases, tied": {
            "num_experts": 4, "clip_qkv": 0.5, "attention_bias": True, "tie_word_embeddings": True,
        },
    }),
    *_cases("gpt_oss", MOE | {"head_dim": 8, "sliding_window": 5, "rope_parameters": YARN | {"truncate": False}}, {
        "window first": {"num_local_experts": 4},
        "full first": {"num_local_experts": 4, "layer_types": FULL_THEN_WINDOW, "num_key_value_heads": 4},
        "tied, top 3": {"num_local_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    }),
    *_cases("dbrx", DBRX, {
        "grouped, clipped": {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 500000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "all heads, 2-norm": {
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 500000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 3,
                           "moe_normalize_expert_weights": 2.0},
        },
        "one key head, gelu, not normalised": {
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 500000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 5, "moe_top_k": 1,
                           "moe_normalize_expert_weights": None, "ffn_act_fn": {"name": "gelu"}},
        },
    }),
    *_cases("gpt2", GPT2, {
        "tied": {},
        "untied, narrow": {"tie_word_embeddings": False, "n_inner": 40},
        "relu": {"activation_function": "relu", "n_head": 2},
    }),
    *_cases("opt", OPT, {
        "tied": {},
        "untied, wide": {"tie_word_embeddings": False, "ffn_dim": 128},
        "gelu": {"activation_function": "gelu", "num_attention_heads": 2},
    }),
    *_cases("gpt_neo", GPT_NEO, {
        "every other layer windowed, tied": {},
        "untied, narrow": {"tie_word_embeddings": False, "intermediate_size": 40},
        "three layers, the last one windowed": {
            "num_layers": 3, "attention_types": [[["global"], 2], [["local"], 1]], "window_size": 3,
        },
    }),
    # At most 8 heads (or 6, of 8's slopes): slopes are powers of two then, exact in the float32 that they are kept in.
    *_cases("mpt", MPT, {
        "tied": {},
        "clipped, untied": {"attn_config": {"clip_qkv": 0.3}, "tie_word_embeddings": False},
        "six heads, scale": {"d_model": 48, "n_heads": 6, "attn_config": {"softmax_scale": 0.3}},
        "eight heads, clipped, other eps": {
            "n_heads": 8, "attn_config": {"clip_qkv": 0.5}, "layer_norm_epsilon": 1e-3, "norm_type": "layernorm",
        },
    }),
    *_cases("deepseek_v3", DEEPSEEK, {
        "as published": {
            "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "plain queries, biases, halves, not normalised": {
            "q_lora_rank": None, "n_group": 2, "topk_group": 1, "n_shared_experts": 2, "attention_bias": True,
            "rope_interleave": False, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        },
        "one group, all mixtures, tied": {
            "q_lora_rank": 20, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0,
            "tie_word_embeddings": True, "num_hidden_layers": 2,
        },
    }),
    *_cases("deepseek_v2", DEEPSEEK, {
        "as published": {
            "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0, "n_shared_experts": 2,
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
        "lite": {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
        "biases, tied, gelu": {
            "q_lora_rank": 20, "n_shared_experts": 1, "attention_bias": True, "routed_scaling_factor": 2.0,
            "tie_word_embeddings": True, "hidden_act": "gelu",
        },
    }),
]  # fmt: skip
