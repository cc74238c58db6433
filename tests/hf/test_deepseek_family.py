"""DeepSeek-V2 and V3 against `transformers`, beside what every family is held to: the bias, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import tensors_in
from theirs import CASES, Case
from transformers import AutoConfig, AutoModelForCausalLM

from llmfoundry.cli.convert import convert_main
from llmfoundry.config import ConfigError, check, dump
from llmfoundry.hf import from_pretrained
from llmfoundry.hf.facts import facts
from llmfoundry.hf.family import read_config, write_config
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig

V2, V3 = "deepseek_v2", "deepseek_v3"


def case_of(model_type: str, about: str) -> Case:
    return next(case for case in CASES if case.model_type == model_type and case.about == about)


def test_a_stream_keeps_the_bias_in_float32_beside_weights_in_bfloat16(tmp_path: Path) -> None:
    """As published: a bias of 8 bits would tie experts."""
    theirs = case_of(V3, "as published").build()
    biases = {name: value.clone() for name, value in theirs.named_buffers() if "correction" in name}
    theirs = theirs.to(torch.bfloat16)
    for name, value in theirs.named_buffers():
        if name in biases:
            value.data = biases[name]
    theirs.save_pretrained(tmp_path / "theirs")
    assert convert_main(["from-hf", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert convert_main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    one, two = (tensors_in(tmp_path / name) for name in ("theirs", "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {one[name].dtype for name in biases} == {torch.float32} == {two[name].dtype for name in biases}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(value, biases[name]) for name, value in again.named_buffers() if name in biases)


def test_the_predictor_of_the_token_after_next_is_passed_over(tmp_path: Path) -> None:
    theirs = case_of(V3, "one group, all mixtures, tied").build()
    theirs.save_pretrained(tmp_path)
    found, n_layers = load_file(tmp_path / "model.safetensors"), theirs.config.num_hidden_layers
    names = ("eh_proj.weight", "input_layernorm.weight")
    more = {f"model.layers.{n_layers}.{name}": torch.zeros(3) for name in names}
    save_file(found | more, tmp_path / "model.safetensors", {"format": "pt"})
    ours = from_pretrained(tmp_path).model
    assert torch.equal(ours.state_dict()["wte.weight"], found["model.embed_tokens.weight"])
    save_file(found | {name: more[name] for name in more if "eh_proj" not in name}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(ConfigError, match=f"layers.{n_layers}.input_layernorm.weight' has no place"):
        from_pretrained(tmp_path)


def test_a_model_whose_bias_still_moves_is_written_and_goes_on_so() -> None:
    _, ours = read_config(AutoConfig.for_model(V3, **case_of(V3, "as published").settings).to_dict())
    moving = check(CausalLMConfig, dump(ours) | {"ffn_config": dump(ours.ffn_config) | {"moe_bias_update_rate": 0.001}})
    family, data = write_config(moving)
    _, again = read_config(data)
    assert family.model_type == V3 and facts(again) == facts(moving)
    assert isinstance(again.ffn_config, MoEConfig) and again.ffn_config.moe_bias_update_rate == 0.001
    assert "moe_bias_update_rate" not in write_config(ours)[1]


MISTAKES = {
    "mlp_bias=True is not supported": (V2, {"mlp_bias": True}),
    "norm_topk_prob=True is not supported": (V2, {"norm_topk_prob": True}),
    "topk_method='noaux_tc' is not supported, only 'greedy', 'group_limited_greedy'": (V2, {"topk_method": "noaux_tc"}),
    "scoring_func='sigmoid' is not supported": (V2, {"scoring_func": "sigmoid"}),
    "moe_layer_freq=2 is not supported": (V2, {"moe_layer_freq": 2}),
    "num_key_value_heads=2 is not supported, only 4": (V3, {"num_key_value_heads": 2}),
    "scoring_func='softmax' is not supported": (V3, {"scoring_func": "softmax"}),
    "n_shared_experts=0 is not supported": (V3, {"n_shared_experts": 0}),
    "no layer is a mixture": (V3, {"first_k_dense_replace": 3}),
    "n_group must be a whole number, found None": (V3, {"n_group": None}),
    "rope_type 'dynamic' is not supported": (
        V3, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("says", MISTAKES)
def test_a_setting_that_ours_has_no_word_for_is_named(says: str) -> None:
    model_type, settings = MISTAKES[says]
    case = next(case for case in CASES if case.model_type == model_type)
    data = AutoConfig.for_model(model_type, **case.settings).to_dict()
    with pytest.raises(ConfigError) as error:
        read_config(data | settings)
    assert says in str(error.value)


LACKING = {
    "ffn_config.ffn_type='moe'": {"moe_layer_freq": 2, "first_k_dense": 0},  # in a layer that theirs makes dense
    "moe_score_fn='softmax'": {"moe_score_fn": "softmax"},
    "bias=True": {"bias": True},
    "shared_expert_hidden_size=30 that is a multiple of ffn_hidden_size=24": {"shared_expert_hidden_size": 30},
    "shared_expert_hidden_size=None": {"shared_expert": False, "shared_expert_hidden_size": None},
}


@pytest.mark.parametrize("says", LACKING)
def test_a_model_that_theirs_cannot_be_is_not_written(says: str) -> None:
    _, ours = read_config(AutoConfig.for_model(V3, **case_of(V3, "as published").settings).to_dict())
    other = check(CausalLMConfig, dump(ours) | {"ffn_config": dump(ours.ffn_config) | LACKING[says]})
    with pytest.raises(ConfigError, match="deepseek_v3, which lacks") as error:
        write_config(other, V3)
    assert says in str(error.value)


LITE = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 27, "q_lora_rank": None, "vocab_size": 102400,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "max_position_embeddings": 163840, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip
V2_WHOLE = {
    "hidden_size": 5120, "num_attention_heads": 128, "num_hidden_layers": 60, "vocab_size": 102400,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0, "max_position_embeddings": 163840,
}  # fmt: skip
OLD_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
PUBLISHED = {  # what config.json says beside: keys of old files, in their words
    "DeepSeek-V2-Lite": (V2, 15.7, LITE | {
        "rope_theta": 10000, "rope_scaling": OLD_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1, "ep_size": 1,
    }),
    "DeepSeek-V2": (V2, 235.7, V2_WHOLE),
    "DeepSeek-V3": (V3, 671.0, {
        "rope_theta": 10000, "rope_scaling": OLD_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "moe_layer_freq": 1,
        "max_position_embeddings": 163840,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters(name: str) -> None:
    model_type, billions, settings = PUBLISHED[name]
    family, ours = read_config(json.loads(json.dumps(settings | {"model_type": model_type})))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    assert family.model_type == model_type
    assert ours.n_params() == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours.n_params() / 1e9 == pytest.approx(billions, abs=0.06)
    _, again = read_config(write_config(ours, model_type)[1])
    assert facts(again) == facts(ours)
