"""MPT against `transformers`, beside what every family is held to: the settings that its code passes over."""

from __future__ import annotations

import pytest
import torch
from theirs import MPT
from transformers import AutoConfig, AutoModelForCausalLM

from llmfoundry.config import ConfigError, check, dump
from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import read_config, write_config
from llmfoundry.model.transformer import CausalLMConfig

MISTAKES = {
    "attn_config: alibi_bias_max=16 is not supported, only 8": {"attn_config": {"alibi_bias_max": 16}},
    "attn_config: alibi=False is not supported": {"attn_config": {"alibi": False}},
    "attn_config: qk_ln=True is not supported": {"attn_config": {"qk_ln": True}},
    "attn_config: prefix_lm=True is not supported": {"attn_config": {"prefix_lm": True}},
    "attn_config: attn_type='multiquery_attention' is not": {"attn_config": {"attn_type": "multiquery_attention"}},
    "no_bias=False is not supported": {"no_bias": False},
    "expansion_ratio=2 is not supported": {"expansion_ratio": 2},
    "logit_scale='inv_sqrt_d_model' is not supported": {"logit_scale": "inv_sqrt_d_model"},
    "norm_type='rmsnorm' is not supported": {"norm_type": "rmsnorm"},
}


@pytest.mark.parametrize("says", MISTAKES)
def test_a_setting_that_their_code_passes_over_is_named(says: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(MPT | {"model_type": "mpt"} | MISTAKES[says])
    assert says in str(error.value)


LACKING = {
    "attn_config.alibi_bias_max=16": {"attn_config": {"alibi": True, "alibi_bias_max": 16}},
    "ffn_config.ffn_hidden_size=64": {"ffn_config": {"ffn_type": "mptmlp", "ffn_hidden_size": 64}},
    "norm_bias=True": {"no_bias": False},
    "attn_config.kv_n_heads=2": {
        "attn_config": {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("says", LACKING)
def test_a_model_that_theirs_cannot_be_is_not_written(says: str) -> None:
    _, ours = read_config(MPT | {"model_type": "mpt"})
    with pytest.raises(ConfigError, match="mpt, which lacks") as error:
        write_config(check(CausalLMConfig, dump(ours) | LACKING[says]), "mpt")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("billions", "settings"),
    [
        (6.65, {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}),
        (29.96, {"d_model": 7168, "n_heads": 64, "n_layers": 48, "vocab_size": 50432, "max_seq_len": 8192}),
    ],
    ids=["MPT-7B", "MPT-30B"],
)
def test_published_models_have_as_many_parameters(billions: float, settings: dict[str, object]) -> None:
    old_keys = {"verbose": 0, "init_config": {"name": "kaiming_normal_"}, "tokenizer_name": "EleutherAI/gpt-neox-20b"}
    family, ours = read_config(settings | old_keys | {"model_type": "mpt", "init_device": "meta"})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **settings))
    assert ours.n_params() == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours.n_params() / 1e9 == pytest.approx(billions, abs=0.01)
    _, again = read_config(write_config(ours)[1])
    assert family.model_type == "mpt" and facts(again) == facts(ours)
