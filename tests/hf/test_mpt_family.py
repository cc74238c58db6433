"""MPT against `transformers`: what every family is held to, and the settings that its code passes over."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_families as every_family
import torch
from theirs import VOCAB, Case
from transformers import AutoConfig, AutoModelForCausalLM

from llmfoundry.config import ConfigError, check, dump
from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import read_config, write_config
from llmfoundry.model.config import CausalLMConfig

SIZES = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 64}
# At most 8 heads (or 6, of 8's slopes): slopes are powers of two then, exact in the float32 that they are kept in.
CASES = [
    Case("mpt", "tied", SIZES),
    Case("mpt", "clipped, untied", SIZES | {"attn_config": {"clip_qkv": 0.3}, "tie_word_embeddings": False}),
    Case("mpt", "six heads, scale", SIZES | {"d_model": 48, "n_heads": 6, "attn_config": {"softmax_scale": 0.3}}),
    Case("mpt", "eight heads, clipped, other eps", SIZES | {
        "n_heads": 8, "attn_config": {"clip_qkv": 0.5}, "layer_norm_epsilon": 1e-3, "norm_type": "layernorm",
    }),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.about)


@each_case
def test_logits_are_theirs(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every_family.test_logits_are_theirs(case, tmp_path, monkeypatch)


@each_case
def test_loss_and_every_gradient_are_theirs(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every_family.test_loss_and_every_gradient_are_theirs(case, tmp_path, monkeypatch)


@each_case
def test_there_and_back_is_the_same_to_the_bit(case: Case, tmp_path: Path) -> None:
    every_family.test_there_and_back_is_the_same_to_the_bit(case, tmp_path)


@each_case
def test_the_names_of_a_live_model_are_read_too(case: Case, tmp_path: Path) -> None:
    every_family.test_the_names_of_a_live_model_are_read_too(case, tmp_path)


@each_case
def test_greedy_text_is_theirs(case: Case, tmp_path: Path) -> None:
    every_family.test_greedy_text_is_theirs(case, tmp_path)


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
        read_config(SIZES | {"model_type": "mpt"} | MISTAKES[says])
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
    _, ours = read_config(SIZES | {"model_type": "mpt"})
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
