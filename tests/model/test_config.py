import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmfoundry.config import ConfigError, check, dump
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoE

SMALL = {"d_model": 48, "n_heads": 6, "n_layers": 3, "vocab_size": 90, "max_seq_len": 32}
ATTENTION = [
    {},
    {"rope": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2, "bias": True},
    {"rope": True, "attn_type": "grouped_query_attention", "kv_n_heads": 3, "head_dim": 16, "qk_norm": True},
    {"attn_type": "multiquery_attention", "qk_ln": True, "out_bias": True, "sinks": True},
]
FFN = [
    {},
    {"ffn_type": "mptglu", "ffn_hidden_size": 40},
    {"ffn_type": "mptmlp", "bias": False},
]
TOP = [
    {},
    {"no_bias": True, "norm_type": "rmsnorm", "tie_word_embeddings": False},
    {"no_bias": True, "tie_word_embeddings": False, "expansion_ratio": 2.5},
]


MOE = {"ffn_type": "moe", "ffn_hidden_size": 20, "moe_num_experts": 8, "moe_top_k": 2}
MIXTURES = [
    {},
    {"mlp_type": "mlp", "bias": True, "moe_top_k": 3},
    {"first_k_dense": 1, "shared_expert": True, "shared_expert_gate": True},
    {"moe_layer_freq": 2, "dense_ffn_hidden_size": 33, "bias": False},
]


def _config(**keys: object) -> CausalLMConfig:
    config = check(ModelConfig, SMALL | keys)
    assert isinstance(config, CausalLMConfig)
    return config


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("ffn", "top"), list(itertools.product(FFN, TOP)))
def test_counts_as_built(attention: dict[str, object], ffn: dict[str, object], top: dict[str, object]) -> None:
    config = _config(attn_config=attention, ffn_config=ffn, **top)
    with torch.device("meta"):
        model = config.build()
    assert config.n_params() == config.n_active_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("top", TOP)
def test_mixtures_count_as_built(mixture: dict[str, object], top: dict[str, object]) -> None:
    config = _config(ffn_config=MOE | mixture, **top)
    with torch.device("meta"):
        model = config.build()
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    top_k = int(str(mixture.get("moe_top_k", 2)))
    experts = [block.ffn.experts for block in model.blocks if isinstance(block.ffn, MoE)]
    of_experts = sum(p.numel() for each in experts for p in each.parameters())
    assert config.n_params() - config.n_active_params() == of_experts * (8 - top_k) // 8


@pytest.mark.parametrize("attention", ATTENTION[1:])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(attention: dict[str, object], tied: bool) -> None:
    config = _config(
        attn_config=attention,
        no_bias=True,
        norm_type="rmsnorm",
        tie_word_embeddings=tied,
        learned_pos_emb=False,
    )
    length = 32
    with torch.device("meta"):
        model, tokens = config.build(), torch.zeros(2, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens).logits
        assert logits is not None
        logits.sum().backward()
    no_products = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1)
    dims = config.attention.score_dims(48, 6)
    ours = config.flops_per_token(length) - 6 * no_products
    # torch counts attention as if it were not causal: twice ours.
    assert ours + 6 * 3 * dims * length == counter.get_total_flops() / tokens.numel()


def test_a_window_counts_the_keys_that_it_lets_see() -> None:
    windows = {"attn_window_pattern": [3, -1]}
    config, full = _config(**windows), _config()
    assert [config.window(layer) for layer in range(3)] == [3, -1, 3]
    exact = torch.ones(32, 32).tril().triu(-3).sum().item() / 32
    # The convention takes S / 2 for causal attention, which is (S + 1) / 2 exactly: it leaves out half of the
    # keys of one token in S. So with a window, half of 4.
    saved = 2 * (16 - (exact - 2 / 32))
    difference = full.flops_per_token() - config.flops_per_token()
    assert difference == pytest.approx(12 * config.attention.score_dims(48, 6) * saved)


def test_full_size_model_counts_without_being_built() -> None:
    llama_8b = check(ModelConfig, {
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 128256, "max_seq_len": 8192,
        "no_bias": True, "norm_type": "rmsnorm", "tie_word_embeddings": False,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 8, "rope": True},
        "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 14336},
    })  # fmt: skip
    assert llama_8b.n_params() == 8_030_261_248


def test_defaults_are_llm_foundrys() -> None:
    config = _config()
    assert config.has_learned_positions and config.tie_word_embeddings and not config.no_bias
    assert (config.ffn(0).ffn_type, config.ffn(0).ffn_hidden_size, config.ffn(0).bias) == (
        "mptmlp",
        192,
        True,
    )
    assert not _config(attn_config={"rope": True}).has_learned_positions


def test_dump_and_check_are_inverse() -> None:
    config = _config(attn_config=ATTENTION[2], ffn_config=FFN[1], attn_window_pattern=[4, -1])
    assert check(ModelConfig, dump(config)) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"d_model": 50}, "d_model=50 is not divisible by n_heads=6"),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 4}}, "kv_n_heads=4"),
        ({"attn_config": {"rope": True}, "learned_pos_emb": True}, "keep one"),
        ({"attn_config": {"sliding_window_size": 4}, "attn_window_pattern": [4, -1]}, "keep one"),
        ({"attn_window_pattern": []}, "must list windows"),
        ({"ffn_config": {"ffn_type": "mptglu", "ffn_hiden_size": 4}}, "did you mean 'ffn_hidden_size'"),
        ({"init_config": {"name": "normal_"}}, "needs init_std"),
        ({"init_config": {"name": "kaiming_normal_", "init_std": 0.02}}, "does not use init_std"),
        ({"n_layers": 0}, "n_layers"),
        ({"vocab_size": "90"}, "vocab_size"),
    ],
)
def test_mistakes_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**keys)
