"""LLM Foundry's own YAMLs, unedited: each is planned as it is, and trains two steps when it is shrunk by overrides.

Theirs are tried where LLMFOUNDRY_FOUNDRY_YAMLS names a copy of their scripts/train; files of ours that hold each of
their constructs, always. Names of models, tokenizers and data are small local folders (foundry_hub.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from foundry_hub import LENGTH, VOCAB, build

from llmfoundry.cli.command import read_run_config
from llmfoundry.cli.train import train_main
from llmfoundry.settings import leaves, load_yaml

FOLDER = os.environ.get("LLMFOUNDRY_FOUNDRY_YAMLS", "")
OURS = Path(__file__).parent / "foundry"
FILES = sorted(OURS.glob("*.yaml")) + (sorted(Path(FOLDER).rglob("*.yaml")) if FOLDER else [])
TRAINED = [path for path in FILES if not path.name.startswith("t5")]
each_file = pytest.mark.parametrize("path", TRAINED, ids=lambda path: f"{path.parent.name}/{path.stem}")
SMALL = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": LENGTH}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def _in_hub(hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(hub)
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RUN_NAME", raising=False)


@each_file
def test_an_unedited_file_is_understood(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(path), "--explain"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.count("\n") >= len(list(leaves(load_yaml(path)))), "a line for each key"


# A plan traces every kind of block, which takes seconds: one of ours, and all of theirs.
PLANNED = [path for path in TRAINED if path.parent != OURS or path.stem == "pretrain_moe"]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_unedited_file_is_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(path), "--dry-run"]) == 0, capsys.readouterr().err
    assert "parameters: " in capsys.readouterr().out


def shrunk(path: Path, out: Path) -> list[str]:
    """Overrides that make a file small."""
    data = load_yaml(path)
    said = [
        "max_duration=2ba", "global_train_batch_size=2", "device_train_microbatch_size=1", "device_eval_batch_size=2",
        "precision=fp32", f"save_folder={out}", "save_interval=1ba", "eval_interval=2ba", "eval_subset_num_batches=1",
        f"max_seq_len={LENGTH}", "log_to_console=false", "scheduler.t_warmup=0ba",
    ]  # fmt: skip
    model = data["model"]
    assert isinstance(model, dict)
    if "max_seq_len" in yaml.safe_load(path.read_text()).get("variables", {}):
        said.append(f"variables.max_seq_len={LENGTH}")
    if "d_model" in model:
        said += [f"model.{key}={value}" for key, value in SMALL.items()]
        if "kv_n_heads" in model.get("attn_config", {}):
            said.append("model.attn_config.kv_n_heads=2")
    if isinstance(data.get("icl_tasks"), list):  # its user is to name the data
        said.append("icl_tasks:=eval/yamls/tasks.yaml")
    if data.get("load_path") is not None:
        said.append("load_path=null")
    for loader in ("train_loader", "eval_loader"):
        dataset = data[loader].get("dataset", {}) if loader in data else {}  # type: ignore[union-attr]
        if dataset.get("preprocessing_fn") == "my.import.path:my_preprocessing_fn":
            said += [f"{loader}.dataset.hf_kwargs.data_dir=my-chats", f"{loader}.dataset.preprocessing_fn=null"]
    return said


@each_file
def test_a_file_shrunk_by_overrides_trains(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(path), *shrunk(path, tmp_path / "run")]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/train/total" in line] == [1, 2]


def their_parameters(model: dict[str, object], experts: int) -> int:
    """What LLM Foundry's MPT has, by its description; with `experts`, MegaBlocks' dMoE in each block."""
    read = {"expansion_ratio": 4, "no_bias": False, "learned_pos_emb": True} | model
    d, layers, bias = int(read["d_model"]), int(read["n_layers"]), not read["no_bias"]  # type: ignore[call-overload]
    hidden = int(read["expansion_ratio"] * d)  # type: ignore[operator]
    attention = model.get("attn_config", {})
    assert isinstance(attention, dict)
    kv = attention.get("kv_n_heads", read["n_heads"]) * d // read["n_heads"]
    block = d * (d + 2 * kv) + d * d + (2 * d + 2 * kv if bias else 0)
    norm = 2 * d if bias else d
    if experts:
        block += experts * d + experts * 2 * d * hidden + (d if bias else 0)
    else:
        block += 2 * d * hidden + (hidden + d if bias else 0)
    positions = read["learned_pos_emb"] and not attention.get("alibi") and not attention.get("rope")
    total = read["vocab_size"] * d + layers * (block + 2 * norm) + norm  # type: ignore[operator]
    return int(total + (read["max_seq_len"] * d if positions else 0))  # type: ignore[operator]


def _is_dense_mpt(path: Path) -> bool:
    model = load_yaml(path)["model"]
    return isinstance(model, dict) and "d_model" in model and "ffn_config" not in model


NATIVE = [path for path in TRAINED if _is_dense_mpt(path)]


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("path", NATIVE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_model_has_as_many_parameters_as_theirs(path: Path, experts: int) -> None:
    block = [] if not experts else ["model.ffn_config.ffn_type=mb_dmoe", f"model.ffn_config.moe_num_experts={experts}"]
    config = read_run_config(str(path), block)
    model = load_yaml(path)["model"]
    assert isinstance(model, dict)
    assert config.model.n_params() == their_parameters(model, experts)


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("t5")], ids=lambda path: path.stem)
def test_an_encoder_decoder_is_refused_by_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(path), "--dry-run"]) == 2
    assert "hf_t5: encoder-decoder models are not trained here" in capsys.readouterr().err
