"""Models of transformers as they are: what our own model cannot express, under our trainer, checkpoints and exports."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llmfoundry import hf
from llmfoundry.cli.command import read_run_config
from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.inference import generate_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError
from llmfoundry.eval.generate import new_tokens
from llmfoundry.hf.family import known_families, read_config
from llmfoundry.model.transformer import Cache
from tests import forks
from tests.integrations.foundry_hub import TEXTS
from tests.integrations.foundry_hub import tokenizer as small_tokenizer

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "layer_types": None,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1,
    "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip
KINDS = ["gemma2", "gpt_neox", "phi", "starcoder2"]  # scaled embeddings and softcaps; partial rotation; others
# Experts that are merged, two of them with a first layer without; heads with a bias; what is split of one matrix.
STORED_OTHERWISE = ["glm4_moe", "phimoe", "jamba", "olmo_hybrid", "modernbert-decoder", "hrm_text"]
TOKENS = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


def saved(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(0)
    default = AutoConfig.for_model(kind)
    own = default.to_dict().keys() | default.attribute_map.keys()
    config = AutoConfig.for_model(kind, **{key: value for key, value in (SMALL | MIXTURE).items() if key in own})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_are_the_modules(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert kind not in known_families()
    theirs = saved(kind, tmp_path / "theirs", tokenizer)
    ours = hf.from_pretrained(tmp_path / "theirs").model
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    labels = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], 1)
    out = ours(TOKENS, labels)
    out.loss_sum.backward()
    (theirs(TOKENS, labels=TOKENS).loss * 24).backward()
    for name, parameter in theirs.named_parameters():
        found = dict(ours.named_parameters())[f"module.{name}"].grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", *STORED_OTHERWISE])
def test_there_and_back_gives_the_same_bits(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    theirs = saved(kind, tmp_path / "theirs", tokenizer)
    ours = hf.from_pretrained(tmp_path / "theirs").model
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert convert_main(["from-hf", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert convert_main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.model_type == kind
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    names = [safe_open(tmp_path / folder / "model.safetensors", "pt").keys() for folder in ("theirs", "again")]
    assert sorted(names[0]) == sorted(names[1])


def test_the_layer_that_predicts_further_tokens_is_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """GLM-4.5's files have one more layer than its config.json says; `transformers` passes over it by name."""
    caplog.set_level("INFO")
    saved("glm4_moe", tmp_path, tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"model.layers.46.eh_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    hf.from_pretrained(tmp_path)
    assert "left out, as in transformers: 1 (e.g. model.layers.46" in caplog.text
    save_file(weights | {"model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="layers.3.mlp.up_proj.weight' has no place"):
        hf.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["mamba", "jamba", "minimax"])
def test_states_of_their_own_do_not_change_greedy_text(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of a module whose past is no cache of keys and values, or a mixed one."""
    theirs = saved(kind, tmp_path, tokenizer)
    ours = hf.from_pretrained(tmp_path).model.eval()
    found = [*new_tokens(ours, TOKENS[0].tolist(), Cache(2), 5, lambda logits: int(logits.argmax()), ())]
    wanted = theirs.generate(TOKENS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found == wanted[0, TOKENS.shape[1] :].tolist()


@pytest.mark.parametrize("kind, says", [("roberta", "is_decoder: true"), ("xlnet", "cannot be trained as a causal")])
def test_models_that_see_the_answer_are_refused(kind: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_config({"model_type": kind, "vocab_size": 300})


def test_a_number_that_json_lacks_is_read() -> None:
    settings = SMALL | {"model_type": "falcon_h1", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    _, config = read_config(settings)
    assert config.hf_config["time_step_limit"] == settings["time_step_limit"]  # and is written as it was
    with pytest.raises(ConfigError, match="time_step_limit"):
        read_config(settings | {"time_step_limit": "long"})


def run_of(tmp_path: Path, name: str, **model: object) -> list[str]:
    """The YAML of a run on a Hugging Face model, in LLM Foundry's words."""
    (tmp_path / "texts").mkdir(exist_ok=True)
    (tmp_path / "texts" / "a.txt").write_text("\n".join(TEXTS * 20))
    data = {
        "max_seq_len": 32,
        "model": {"name": "hf_causal_lm", "pretrained_model_name_or_path": name, **model},
        "tokenizer": {"name": name},
        "train_loader": {"dataset": {"name": "text_files", "path": str(tmp_path / "texts")}},
        "optimizer": {"name": "adamw", "lr": 1.0e-3}, "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
        "max_duration": "4ba", "eval_interval": 0, "global_train_batch_size": 4, "save_folder": str(tmp_path / "run"),
        "precision": "fp32",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    return [str(tmp_path / "run.yaml")]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/train/total"] for line in lines if "loss/train/total" in line]


def test_a_pretrained_one_trains_resumes_generates_and_leaves(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = saved("gemma2", tmp_path / "theirs", tokenizer)
    yaml_file = run_of(tmp_path, str(tmp_path / "theirs"))
    assert train_main([*yaml_file, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Hugging Face export: as gemma2, unchanged" in said and "not planned for modules of transformers" in said
    assert train_main([*yaml_file, "max_duration=2ba", f"save_folder={tmp_path}/cut"]) == 0
    assert train_main([*yaml_file, f"save_folder={tmp_path}/cut", "autoresume=true"]) == 0
    assert train_main(yaml_file) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    batch = read_run_config(str(tmp_path / "run" / "config.yaml"), []).train_loader.build(
        tokenizer, seed=17, max_seq_len=32, sequence_ids=False
    ).batch(0, 4)  # fmt: skip
    with torch.no_grad():
        first = torch.nn.functional.cross_entropy(theirs(batch.tokens).logits.flatten(0, 1), batch.labels.flatten())
    assert losses(tmp_path / "run")[0] == pytest.approx(first.item(), abs=1e-5)
    assert convert_main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    capsys.readouterr()
    greedy = ["--prompt", TEXTS[0][:12], "--max-new-tokens", "6", "--temperature", "0"]
    assert generate_main(["--checkpoint", str(tmp_path / "run"), *greedy]) == 0
    ids = torch.tensor([tokenizer.encode(TEXTS[0][:12])])
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=0)
    assert capsys.readouterr().out.strip() == tokenizer.decode(wanted[0], skip_special_tokens=True).strip()


def test_a_setting_that_our_model_lacks_is_no_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama is a family of ours, but without words for this activation."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SMALL | {"hidden_act": "gelu_fast"})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert train_main(run_of(tmp_path, str(tmp_path / "theirs"))) == 0
    assert len(losses(tmp_path / "run")) == 4


def test_from_its_config_alone_it_learns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    saved("starcoder2", tmp_path / "theirs", tokenizer)
    yaml_file = run_of(tmp_path, str(tmp_path / "theirs"), pretrained=False)
    init = ["model.init_config.name=normal_", "model.init_config.init_std=0.02"]
    assert train_main([*yaml_file, "max_duration=30ba", *init]) == 0
    found = losses(tmp_path / "run")
    assert 5.5 < found[0] < 6.0, "about ln 300 at first"
    assert found[-1] < 4.5


def test_its_adapters_leave_as_peft_reads_them(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    saved("phi", tmp_path / "theirs", tokenizer)
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    assert train_main(run_of(tmp_path, str(tmp_path / "theirs"), peft_config=peft)) == 0
    words = ["to-hf", str(tmp_path / "run"), str(tmp_path / "peft"), "--adapters"]
    assert convert_main([*words, "--base-model", str(tmp_path / "theirs")]) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), tmp_path / "peft")
    assert convert_main(["to-hf", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(adapted(TOKENS).logits, merged(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.dist
def test_two_ranks_train_as_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    saved("gemma2", tmp_path / "theirs", tokenizer)
    yaml_file = run_of(tmp_path, str(tmp_path / "theirs"))
    assert train_main(yaml_file) == 0
    command = [*forks.TORCHRUN, "--standalone", "--nproc-per-node", "2", "scripts/train.py", *yaml_file]
    found = forks.run(*command, f"save_folder={tmp_path}/two", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), abs=1e-5)
