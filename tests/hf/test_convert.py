"""convert.py and what it makes: usable checkpoints, there and back, adapters, mixtures grown from dense models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from theirs import CASES, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.inference import eval_main, generate_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError, dump
from llmfoundry.hf import files, from_pretrained
from llmfoundry.hf.family import read_config
from llmfoundry.hf.pieces import Spec, whole_of
from tests.full_disk import full_disk

TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))


def make(kind: str, folder: Path) -> Path:
    """A tiny Hugging Face folder with a tokenizer."""
    next(case for case in CASES if case.model_type == kind).build().save_pretrained(folder)
    words = {"<end>": 0} | {chr(33 + i): 1 + i for i in range(90)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return make("mixtral", tmp_path / "mixtral")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make("llama", tmp_path / "llama")


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        return model(TOKENS).logits


def test_there_and_back_is_the_same_to_the_bit(mixtral: Path, tmp_path: Path) -> None:
    assert convert_main(["from-hf", str(mixtral), str(tmp_path / "ours")]) == 0
    assert convert_main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    one, two = tensors(mixtral), tensors(tmp_path / "back")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["model_type"] == "mixtral" and settings["eos_token_id"] == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (mixtral / "tokenizer.json").read_bytes()


def test_another_dtype_is_asked_for(mixtral: Path, tmp_path: Path) -> None:
    assert convert_main(["from-hf", str(mixtral), str(tmp_path / "ours")]) == 0
    assert convert_main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    one, two = tensors(mixtral), tensors(tmp_path / "back")
    assert all(torch.equal(one[name].bfloat16(), two[name]) for name in one)


def test_a_converted_checkpoint_writes_text_and_is_evaluated(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = str(tmp_path / "ours")
    assert convert_main(["from-hf", str(mixtral), ours]) == 0
    assert generate_main(["--checkpoint", ours, "--prompt", "ab", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    true = AutoModelForCausalLM.from_pretrained(mixtral).generate(
        torch.tensor([[65, 66]]), max_new_tokens=4, do_sample=False, eos_token_id=0, pad_token_id=0
    )
    text = PreTrainedTokenizerFast.from_pretrained(mixtral).decode(true[0], skip_special_tokens=True)
    assert text in capsys.readouterr().out
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abc" * 200)
    dataset = (
        f"eval_loader.dataset={{name: text_files, path: {tmp_path / 'texts'}, split: train, validation_fraction: 0.0}}"
    )
    assert eval_main(["--checkpoint", ours, dataset, "max_seq_len=32", "model.max_seq_len=64"]) == 0


def recipe(tmp_path: Path, model: dict[str, object], tokenizer: Path, **more: object) -> Path:
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(tmp_path / "cache")}
    config = {
        "max_seq_len": 32,
        "model": model,
        "tokenizer": {"name": str(tokenizer)},
        "train_loader": {"dataset": text | {"split": "train"}},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "scheduler": {"name": "constant_with_warmup"},
        "max_duration": "2ba",
        "global_train_batch_size": 4,
        "save_folder": str(tmp_path / "run"),
        "log_to_console": False,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config | more))
    return path


def model_of(folder: Path, tmp_path: Path) -> dict[str, object]:
    assert convert_main(["from-hf", str(folder), str(tmp_path / "for_its_config")]) == 0
    return yaml.safe_load((tmp_path / "for_its_config" / "config.yaml").read_text())["model"]


def first_loss(tmp_path: Path) -> float:
    return json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss/train/ce"]


@pytest.mark.parametrize("way", ["hf", "converted"])
def test_training_starts_from_a_checkpoint(mixtral: Path, tmp_path: Path, way: str) -> None:
    model = model_of(mixtral, tmp_path)
    start = {"load_path": f"hf:{mixtral}"} if way == "hf" else {
        "load_path": str(tmp_path / "for_its_config"), "load_weights_only": True,
    }  # fmt: skip
    path = recipe(tmp_path, model, mixtral, optimizer={"name": "adamw", "lr": 1e-9}, **start)
    assert train_main([str(path)]) == 0
    trained = load_file(next((tmp_path / "run" / "checkpoints" / "latest").glob("model-*.safetensors")))
    true = from_pretrained(mixtral).model.state_dict()
    assert all((trained[name] - true[name]).abs().max() < 1e-6 for name in true)


def edit_nothing(recipe: Path) -> None:
    pass


def edit_rate(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("lr: 1.0e-05", "lr: 3.0e-05") + "seed: 5\n")


def comment_only(recipe: Path) -> None:
    recipe.write_text("# my run\n" + recipe.read_text())


@pytest.mark.parametrize("edit", [edit_nothing, edit_rate, comment_only])
def test_a_recipe_is_edited_and_pointed_at_other_data(
    llama: Path, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    ours = tmp_path / "ours"
    assert convert_main(["from-hf", str(llama), str(ours)]) == 0
    edit(ours / "config.yaml")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abc" * 200)
    begin = [str(ours / "config.yaml"), f"load_path={ours}", "load_weights_only=true", "max_duration=1ba",
             "max_seq_len=16", "global_train_batch_size=2"]  # fmt: skip
    where = [f"train_loader.dataset.path={tmp_path / 'texts'}", f"save_folder={tmp_path / 'run'}"]
    assert train_main([*begin, *where]) == 0
    run = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert run["train_loader"]["dataset"]["shuffle"] is None, "a recipe of ours has our defaults"
    assert generate_main(["--checkpoint", str(ours), "--prompt", "ab", "--max-new-tokens", "2"]) == 0
    assert convert_main(["to-hf", str(ours), str(tmp_path / "back")]) == 0
    evaluated = [f"eval_loader.dataset.path={tmp_path / 'texts'}", "eval_loader.dataset.split=train"]
    assert eval_main(["--checkpoint", str(ours), "max_seq_len=16", *evaluated]) == 0


@pytest.mark.parametrize("why", ["eval_interval=0ba", "eval_loader=null"])
def test_evaluation_data_is_needed_only_where_an_evaluation_is_due(llama: Path, tmp_path: Path, why: str) -> None:
    text = {"name": "text_files", "path": str(tmp_path / "is-not-there")}
    model = model_of(llama, tmp_path)
    path = recipe(tmp_path, model, llama, eval_loader={"dataset": text})
    assert train_main([str(path)]) == 2
    assert train_main([str(path), why]) == 0
    assert train_main([str(path), why, "eval_first=true"]) == 2


def test_the_settings_of_weights_are_not_edited_unseen(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    assert convert_main(["from-hf", str(llama), str(ours)]) == 0
    begin = [str(ours / "config.yaml"), f"load_path={ours}", "load_weights_only=true",
             f"save_folder={tmp_path / 'run'}", "model.attn_config.rope_theta=5000.0"]  # fmt: skip
    assert train_main(begin) == 2
    assert "model.attn_config.rope_theta: 5000.0 differs from 10000.0" in capsys.readouterr().err
    (ours / "converted.yaml").write_text((ours / "converted.yaml").read_text() + "seed: 5\n")
    assert convert_main(["to-hf", str(ours), str(tmp_path / "back")]) == 2
    assert "converted.yaml: has " in capsys.readouterr().err


NOTES = {
    "llama": ({}, "Hugging Face export: as Llama"),
    "mixtral": ({}, "Hugging Face export: as Mixtral"),
    "sigmoid": (
        {"ffn_config": {"moe_score_fn": "sigmoid", "moe_n_groups": 2}},
        "Hugging Face export: with modelling code of its own",
    ),
    "alibi": (
        {"attn_config": {"rope": False, "alibi": True}},
        "Hugging Face export: with modelling code of its own, loaded with ",
    ),
    "soft cap": ({"final_logit_softcapping": 30.0}, "Hugging Face export: with modelling code of its own"),
    "experts in turn": (
        {"ffn_config": {"uniform_expert_assignment": True}},
        "Hugging Face export: not possible; the nearest family, Mixtral, lacks ffn_config.uniform_expert_assignment=",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_a_recipe_exports_as_is_said_before_it_trains(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    changes, says = NOTES[name]
    case = next(case for case in CASES if case.model_type == ("llama" if name in ("llama", "soft cap") else "mixtral"))
    _, config = read_config(AutoConfig.for_model(case.model_type, **case.settings).to_dict())
    model = dump(config)
    for key, value in changes.items():
        model[key] = {**model[key], **value} if isinstance(value, dict) else value
    model.get("ffn_config", {}).pop("moe_capacity_factor", None)
    path = recipe(tmp_path, model, make(case.model_type, tmp_path / "theirs"), max_duration="1ba")
    caplog.set_level("INFO")
    if name in ("llama", "experts in turn"):  # the same sentences; what is slow is the plan beside them
        assert train_main([str(path), "--dry-run"]) == 0
        assert says in capsys.readouterr().out
    assert train_main([str(path)]) == 0
    assert says in caplog.text


def test_another_model_is_named_before_anything_changes(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(mixtral, tmp_path) | {"n_layers": 1}
    assert train_main([str(recipe(tmp_path, model, mixtral, load_path=f"hf:{mixtral}"))]) == 2
    assert "model.n_layers: 1 differs from 2 of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_adapters_leave_as_peft_reads_them_and_as_part_of_the_weights(mixtral: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = model_of(mixtral, tmp_path) | {"lora": {"rank": 2, "alpha": 4.0}}
    assert train_main([str(recipe(tmp_path, model, mixtral, load_path=f"hf:{mixtral}"))]) == 0
    run = str(tmp_path / "run")
    assert convert_main(["to-hf", run, str(tmp_path / "whole"), "--model-type", "mixtral"]) == 0
    assert convert_main(["to-hf", run, str(tmp_path / "adapters"), "--adapters"]) == 0
    base = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        before = base(TOKENS).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")(TOKENS).logits
    assert (adapted - before).abs().max() > 1e-3
    assert (adapted - logits(tmp_path / "whole")).abs().max() < 1e-4


@pytest.mark.parametrize("more", [[], ["granularity=2", "scale_in=weights"]], ids=["copies", "shards"])
def test_a_grown_mixture_begins_as_the_dense_model(llama: Path, tmp_path: Path, more: list[str]) -> None:
    plan = ["moe_num_experts=4", "moe_top_k=2", *more]
    assert convert_main(["upcycle", str(llama), str(tmp_path / "grown"), *plan]) == 0
    assert convert_main(["to-hf", str(tmp_path / "grown"), str(tmp_path / "theirs")]) == 0
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert settings["model_type"] in ("mixtral", "qwen3_moe", "olmoe")
    assert (logits(tmp_path / "theirs") - logits(llama)).abs().max() < 1e-5  # float32 weights, summed in float64
    assert convert_main(["from-hf", str(llama), str(tmp_path / "dense")]) == 0
    assert convert_main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "again"), *plan]) == 0
    one, two = (load_file(tmp_path / name / "model-00000.safetensors") for name in ("grown", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def change(folder: Path, name: str, value: Tensor | None, new: str | None = None) -> None:
    found = load_file(folder / "model.safetensors")
    old = found.pop(name, None)
    if value is not None:
        found[name] = value
    if new is not None and old is not None:
        found[new] = old
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def settings(folder: Path, **more: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def index(folder: Path, file: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


Q = "model.layers.1.self_attn.q_proj.weight"
MISTAKES = {
    "missing": (lambda f: change(f, Q, None, "model.layers.1.self_attn.q_prj.weight"),
                f"tensor '{Q}' is missing; the nearest that is there is 'model.layers.1.self_attn.q_prj.weight'"),
    "extra": (lambda f: change(f, "model.layers.7.mlp.up_proj.weight", torch.zeros(2, 2)),
              "tensor 'model.layers.7.mlp.up_proj.weight' has no place"),
    "shape": (lambda f: change(f, Q, torch.zeros(3, 3)), "has shape [3, 3], but config.json makes it [32, 32]"),
    "cut": (cut, "is cut short"),
    "header": (no_header, "is cut short or not a safetensors file"),
    "outside": (lambda f: index(f, "../elsewhere.safetensors"), "which is outside of this folder"),
    "gone": (lambda f: index(f, "model-00001-of-00002.safetensors"), "is missing"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle"),
    "type": (lambda f: settings(f, model_type="vit"), "model_type 'vit' is not supported; supported are "),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file; name a Hugging Face model"),
    "adapters": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "these are adapters; merge them"),
    "ours": (lambda f: (f / "config.json").rename(f / "config.yaml"), "a checkpoint of this framework, which is used"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "quantised": (lambda f: settings(f, quantization_config={"quant_method": "fp8"}), "these weights are quantised"),
    "activation": (lambda f: settings(f, hidden_act="mish"), "activation 'mish' is not supported"),
    "scaling": (lambda f: settings(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
                "rope_type 'dynamic' is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    spoil, says = MISTAKES[mistake]
    spoil(llama)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert convert_main(["from-hf", str(llama), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and says in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with full_disk(4096):
        assert convert_main(["from-hf", str(llama), str(tmp_path / "ours")]) == 2
    assert "ours: cannot be written: File too large; make room, or name another disk" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_in_use_is_not_written_to(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert convert_main(["from-hf", str(llama), str(tmp_path / "mine")]) == 2
    assert "is in use" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_what_no_family_can_hold_is_said(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(mixtral, tmp_path)
    model["ffn_config"] |= {"uniform_expert_assignment": True}
    assert train_main([str(recipe(tmp_path, model, mixtral))]) == 0
    assert convert_main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "no supported family can hold this model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_of_ours_is_refused(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_main(["from-hf", str(mixtral), str(tmp_path / "ours")]) == 0
    shutil.copytree(tmp_path / "ours", tmp_path / "flipped")
    file = tmp_path / "flipped" / "model-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert convert_main(["to-hf", str(tmp_path / "flipped"), str(tmp_path / "out")]) == 2
    assert "model-00000.safetensors: has changed since it was written" in capsys.readouterr().err
    file.write_bytes(content[:-5])
    assert convert_main(["to-hf", str(tmp_path / "flipped"), str(tmp_path / "out")]) == 2
    assert f"model-00000.safetensors: has {len(content) - 5} bytes of {len(content)}" in capsys.readouterr().err
    file.unlink()
    assert convert_main(["to-hf", str(tmp_path / "flipped"), str(tmp_path / "out")]) == 2
    assert "model-00000.safetensors: is missing" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # rows as they are; transposed and interleaved
def test_tensors_beyond_buffers_and_blocks_are_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make(kind, tmp_path / "theirs")
    assert convert_main(["from-hf", str(theirs), str(tmp_path / "ours")]) == 0
    monkeypatch.setattr(files, "_ALIGNED", 2**12)
    monkeypatch.setattr(files, "BUFFER_BYTES", 2**12 + 2**8)  # less than most matrices have
    monkeypatch.setattr(files, "BLOCK_BYTES", 2**6)  # less than a row
    assert convert_main(["from-hf", str(theirs), str(tmp_path / "small")]) == 0
    assert convert_main(["to-hf", str(tmp_path / "small"), str(tmp_path / "back")]) == 0
    name = "model-00000.safetensors"
    assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    before, after = tensors(theirs), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(llama: Path) -> None:
    folder = files.Folder(llama)
    os.truncate(llama / "model.safetensors", (llama / "model.safetensors").stat().st_size - 1)
    with pytest.raises(ConfigError, match="model.safetensors: has become shorter while it was read"):
        for name, spec in folder.specs.items():
            whole_of(spec, folder.parts(name))


def test_a_disk_that_refuses_direct_writes_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_ALIGNED", 8)  # no block of any disk: the kernel refuses such a write
    values = torch.randn(3, 1000)
    filed = files.write_files(
        tmp_path, {"x": {"a": Spec(values.dtype, (3, 1000))}}, lambda name, at, out: out.copy_(values), hashed=True
    )
    assert torch.equal(load_file(tmp_path / "x")["a"], values)
    assert filed["x"].sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
