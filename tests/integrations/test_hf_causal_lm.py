"""`model: {name: hf_causal_lm}` as a model of ours, or as the module of transformers where ours cannot be it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import DbrxConfig, LlamaConfig, MptConfig

from llmfoundry.config import ConfigError
from llmfoundry.integrations.foundry_yaml import Untranslated, translate
from tests.hf.theirs import MOE, Case


@pytest.fixture
def llama(tmp_path: Path) -> str:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def run_of(name: str, **model: object) -> dict[str, object]:
    block = {"name": "hf_causal_lm", "pretrained_model_name_or_path": name, **model}
    return {"model": block, "run_name": "a", "save_folder": "b", "max_seq_len": 32}


@pytest.mark.parametrize(
    ("modules", "kind", "targets"),
    [
        (["q_proj", "k_proj", "v_proj"], "causal_lm", ["attn.wqkv"]),
        (["q_proj", "v_proj"], "transformers", ["q_proj", "v_proj"]),
        ("all-linear", "causal_lm", "all-linear"),
    ],
)
def test_adapters_are_on_the_layers_that_are_named(
    llama: str, modules: list[str] | str, kind: str, targets: list[str] | str
) -> None:
    """Queries, keys and values are one matrix of ours; adapters of two of them need the module of transformers."""
    peft = {"r": 2, "lora_alpha": 4, "target_modules": modules}
    data, notes = translate(run_of(llama, peft_config=peft, config_overrides={"max_position_embeddings": 64}))
    model = data["model"]
    assert isinstance(model, dict) and model["lora"]["target_modules"] == targets and model["max_seq_len"] == 64
    assert (model["name"] == "transformers") == (kind == "transformers")
    said = [note.said for note in notes if note.path == "model.peft_config"]
    why = "q_proj is a part of one matrix here (attn.wqkv); name k_proj too to train an llmfoundry model"
    assert (why in said) == (kind == "transformers")
    assert not any(note.path == "model.name" for note in notes), "each note is on the key that it is about"


@pytest.mark.parametrize(
    ("peft", "says"),
    [
        ({"target_modules": ["qproj"]}, "target_modules: nothing is called"),
        ({"target_modules": "("}, r"target_modules: '\(' is not a valid pattern: missing \)"),
        (
            {"target_modules": "q_proj"},
            "target_modules: 'q_proj' matches no whole name, such as model.layers.0.mlp.*"
            r"; name modules by their ends in a list, \[q_proj\]",
        ),
        ({"r": 8}, "target_modules: is missing, and peft would choose"),
        ({"target_modules": "all-linear", "use_dora": True}, "use_dora: is not supported"),
        # Each of these was taken for the default that it is not.
        ({"target_modules": "all-linear", "init_lora_weights": False}, "init_lora_weights: False is not supported"),
        ({"target_modules": "all-linear", "inference_mode": True}, "inference_mode: True is not supported"),
        ({"target_modules": "all-linear", "bias": True}, "bias: True is not supported"),
    ],
)
def test_adapters_that_cannot_be_are_refused(llama: str, peft: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=f"model.peft_config.{says}"):
        translate(run_of(llama, peft_config=peft))


@pytest.mark.parametrize(("tokenizer", "allowed"), [("bpe", False), ("gpt2", True)])
def test_another_tokenizer_is_taken_only_where_one_is_named(llama: str, tokenizer: str, allowed: bool) -> None:
    """bpe is the checkpoint's own: trained anew, its ids would mean nothing to the weights."""
    data, _ = translate(run_of(llama) | {"tokenizer": {"name": tokenizer}})
    assert data.get("load_allow") == (["tokenizer"] if allowed else None)


def test_a_module_of_transformers_that_cannot_do_as_asked_is_said(llama: str, tmp_path: Path) -> None:
    """One document in a row; and experts are trained by our kernels alone."""
    apart = {"attn_config": {"attn_uses_sequence_id": True}}
    peft = {"target_modules": ["q_proj", "v_proj"]}
    _, notes = translate(run_of(llama, peft_config=peft, config_overrides=apart))
    assert any(note.said.endswith("so each example has a row of its own") for note in notes)
    Case("mixtral", "", MOE | {"num_local_experts": 4}).build().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="^model.peft_config.target_modules: q_proj is a part .*; name k_proj too"):
        translate(run_of(str(tmp_path), peft_config=peft))


def test_what_is_at_pefts_defaults_is_accepted(llama: str) -> None:
    peft = {"target_modules": "all-linear", "use_dora": False, "modules_to_save": None, "rank_pattern": {}}
    model = translate(run_of(llama, peft_config=peft))[0]["model"]
    assert isinstance(model, dict) and model["lora"] == {"rank": 8, "alpha": 8, "target_modules": "all-linear"}


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_theta"])
def test_rotation_and_settings_that_a_file_leaves_out_may_be_overridden(llama: str, old: bool) -> None:
    path = Path(llama) / "config.json"
    settings = json.loads(path.read_text())
    del settings["attention_dropout"]
    if old:  # as files of transformers 4 have it
        settings |= {"rope_theta": settings.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    path.write_text(json.dumps(settings))
    overrides = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "attention_dropout": 0.1}
    model = translate(run_of(llama, config_overrides=overrides))[0]["model"]
    assert isinstance(model, dict)
    attention = model["attn_config"]
    assert attention["rope_theta"] == 5e5 and attention["attn_pdrop"] == 0.1
    assert (attention["rope_scaling"]["type"], attention["rope_scaling"]["factor"]) == ("linear", 2.0)
    with pytest.raises(ConfigError, match="config_overrides.nonsense: .* has no such setting"):
        translate(run_of(llama, config_overrides={"nonsense": 1}))


def test_settings_inside_a_block_are_known_or_refused(tmp_path: Path) -> None:
    """MPT has a block `attn_config`; what it drops of the residual stream is no part of it."""
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 50, "max_seq_len": 64}
    MptConfig(**sizes, architectures=["MptForCausalLM"]).save_pretrained(tmp_path)
    wrong = {"attn_config": {"rope": True, "clip_qvk": 6}, "nonsense": 1}
    with pytest.raises(ConfigError) as error:
        translate(run_of(str(tmp_path), config_overrides=wrong))
    paths = [line.split(": ")[0].removeprefix("model.config_overrides.") for line in str(error.value).splitlines()]
    assert paths == ["nonsense", "attn_config.rope", "attn_config.clip_qvk"]
    dropped = {"resid_pdrop": 0.2, "emb_pdrop": 0.1}
    model = translate(run_of(str(tmp_path), config_overrides=dropped))[0]["model"]
    assert isinstance(model, dict) and dropped.items() <= model.items()


def test_what_else_is_wrong_is_told_beside_a_model_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Untranslated) as error:
        translate(run_of(str(tmp_path / "nowhere")) | {"tp_config": {"strategy": "ffn"}})
    assert len(str(error.value).splitlines()) == 2
    assert dict(error.value.rest["model"])["name"] == "causal_lm"  # type: ignore[call-overload]


def test_overrides_of_a_nested_block_leave_the_rest_of_it(tmp_path: Path) -> None:
    ffn = {"moe_num_experts": 6, "moe_top_k": 3, "ffn_hidden_size": 24}
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 50, "max_seq_len": 64}
    config = DbrxConfig(**sizes, attn_config={"kv_n_heads": 1, "clip_qkv": 8.0}, ffn_config=ffn).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["DbrxForCausalLM"]}))
    over = {"ffn_config": {"moe_jitter_eps": 0.1}, "attn_config": {"clip_qkv": 4.0}}
    model = translate(run_of(str(tmp_path), pretrained=False, config_overrides=over))[0]["model"]
    assert isinstance(model, dict) and ffn.items() <= model["ffn_config"].items()
    assert model["ffn_config"]["moe_jitter_eps"] == 0.1
    assert (model["attn_config"]["clip_qkv"], model["attn_config"]["kv_n_heads"]) == (4.0, 1)
    whole = translate(run_of(str(tmp_path), pretrained=False, ffn_config={"ffn_type": "mptmlp"}))[0]["model"]
    assert whole["ffn_config"] == {"ffn_type": "mptmlp"}, "a block of ours takes the place of theirs"
