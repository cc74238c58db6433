"""Published architectures at full size: their configs map to ours with exactly as many parameters, on meta."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import read_config, write_config

# Where a published model is the default of its class in `transformers`, there is nothing to add.
PUBLISHED = {
    "Llama-3.1-8B": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }),
    "SmolLM2-135M": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }),
    "Mistral-7B": ("mistral", {}),
    "Qwen2.5-7B": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    }),
    "Qwen3-8B": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    }),
    "Mixtral-8x7B": ("mixtral", {}),
    "Mixtral-8x22B": ("mixtral", {
        "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
        "num_key_value_heads": 8, "vocab_size": 32768,
    }),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", {}),
    "Qwen3-30B-A3B": ("qwen3_moe", {
        "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    }),
    "Qwen3-235B-A22B": ("qwen3_moe", {
        "hidden_size": 4096, "moe_intermediate_size": 1536, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    }),
    "OLMoE-1B-7B": ("olmoe", {"intermediate_size": 1024}),
    "DBRX": ("dbrx", {
        "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {"hidden_size": 6144, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": ("gpt_oss", {}),
    "GPT-2 XL": ("gpt2", {"n_embd": 1600, "n_head": 25, "n_layer": 48}),
}  # fmt: skip
BILLIONS = {  # as their authors round them
    "Llama-3.1-8B": 8.0, "Mistral-7B": 7.2, "Mixtral-8x7B": 46.7, "Mixtral-8x22B": 140.6, "Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen3-30B-A3B": 30.5, "Qwen3-235B-A22B": 235.1, "OLMoE-1B-7B": 6.9, "DBRX": 131.6, "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_theirs(name: str) -> None:
    model_type, settings = PUBLISHED[name]
    theirs = AutoConfig.for_model(model_type, **settings)
    _, ours = read_config(theirs.to_dict())
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(theirs)
    assert ours.n_params() == sum(parameter.numel() for parameter in built.parameters())
    if name in BILLIONS:
        assert ours.n_params() / 1e9 == pytest.approx(BILLIONS[name], abs=0.06)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_goes_there_and_back(name: str) -> None:
    model_type, settings = PUBLISHED[name]
    _, ours = read_config(AutoConfig.for_model(model_type, **settings).to_dict())
    family, data = write_config(ours, model_type)
    _, again = read_config(data)
    assert family.model_type == model_type and facts(again) == facts(ours)
