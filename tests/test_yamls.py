"""Every YAML that is shipped: it parses, has the published size, builds, and trains when shrunk."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

import llmfoundry.callbacks  # noqa: F401  registers those that the YAMLs name
from llmfoundry.cli.train import train_main
from llmfoundry.config import check
from llmfoundry.settings import load_yaml
from llmfoundry.train.config import RunConfig
from tests.shrunk import shrunk

YAMLS = sorted((Path(__file__).resolve().parents[1] / "yamls").glob("*.yaml"))
each_yaml = pytest.mark.parametrize("path", YAMLS, ids=[path.stem for path in YAMLS])

# All and active parameters as their authors give them, in billions and to the digits given.
PUBLISHED = {
    "olmoe-1b-7b": ("6.9", "1.3"),
    "mixtral-8x7b": ("46.7", "12.9"),
    "qwen3-30b-a3b": ("30.5", "3.3"),
    "dbrx-132b": ("132", "36"),
}
# The same architectures in the words of `transformers`.
THEIRS = {
    "olmoe-1b-7b": {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 50304,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    },
    "dbrx-132b": {
        "model_type": "dbrx", "d_model": 6144, "n_layers": 40, "n_heads": 48, "max_seq_len": 32768,
        "vocab_size": 100352, "attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"hidden_size": 6144, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
}  # fmt: skip


@each_yaml
def test_parses(path: Path) -> None:
    check(RunConfig, load_yaml(path))


@pytest.mark.parametrize("name", PUBLISHED)
def test_fits_on_as_many_gpus_as_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(path for path in YAMLS if path.stem == name)
    said = re.search(r"Estimated to fit on (\d+) or more H100", path.read_text(encoding="utf-8"))
    assert said is not None
    assert train_main([str(path), "--dry-run"]) == 0
    assert f"\nfits from {said[1]} GPU(s) " in capsys.readouterr().out


@each_yaml
def test_first_line_says_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@each_yaml
def test_builds_on_meta_and_counts_as_built(path: Path) -> None:
    config = check(RunConfig, load_yaml(path)).model
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == config.n_params()
    assert config.n_active_params() <= config.n_params()


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_the_published_one(name: str) -> None:
    config = check(RunConfig, load_yaml(_path(name))).model
    for count, published in zip((config.n_params(), config.n_active_params()), PUBLISHED[name], strict=True):
        digits = len(published.partition(".")[2])
        rounded, cut = f"{count / 1e9:.{digits}f}", f"{math.floor(count / 10 ** (9 - digits)) / 10**digits}"
        assert published in (rounded, cut)  # Qwen cut 3.353 to 3.3; the others round


@pytest.mark.parametrize("name", THEIRS)
def test_size_is_that_of_transformers(name: str) -> None:
    config = check(RunConfig, load_yaml(_path(name))).model
    words = dict(THEIRS[name])
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(words.pop("model_type"), **words))
    assert config.n_params() == sum(p.numel() for p in theirs.parameters())


@each_yaml
def test_two_steps_shrunk(path: Path, tmp_path: Path) -> None:
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(tmp_path / "cache")}
    changes = {
        "train_loader.dataset": text | {"split": "train"},
        "eval_loader.dataset": text | {"split": "validation", "validation_fraction": 0.2},
        "save_folder": str(tmp_path / "run"),
    }
    OmegaConf.save(shrunk(path, changes | _shrunk_data(path.stem, text, tmp_path)), tmp_path / path.name)
    assert train_main([str(tmp_path / path.name)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    costs = [value for key, value in summary.items() if key.endswith("nats_per_token")]
    assert (
        summary["steps"] == 2 and all(map(math.isfinite, costs)) and (costs or path.stem in ("finetune", "lora", "dpo"))
    )


def _shrunk_data(name: str, text: dict[str, object], folder: Path) -> dict[str, object]:
    """What the YAMLs with data of a kind of their own read instead."""
    if name == "mixture":
        parts = [text | {"label": label, "seed": seed} for seed, label in enumerate(("python", "words"))]
        held_out = [{"label": part["label"], "dataset": text | {"seed": part["seed"], "split": "validation"}}
                    for part in parts]  # fmt: skip
        return {"train_loader.dataset": None, "train_loader.datasets": parts, "eval_loader": None,
                "eval_loaders": held_out}  # fmt: skip
    if name == "dpo":
        (folder / "pairs").mkdir()
        pairs = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(40)]
        (folder / "pairs" / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        pairs_here = {"path": str(folder / "pairs"), "split": "train", "cache_dir": str(folder / "cache")}
        return {"train_loader.dataset": pairs_here, "load_path": None, "load_weights_only": False,
                "eval_loader": None}  # fmt: skip
    if name in ("finetune", "lora"):
        (folder / "chats").mkdir()
        lines = "".join(json.dumps({"prompt": f"{i} + 1 =", "response": f" {i + 1}"}) + "\n" for i in range(40))
        (folder / "chats" / "train.jsonl").write_text(lines)
        mine = {"path": str(folder / "chats"), "split": "train", "cache_dir": str(folder / "cache")}
        return {"train_loader.dataset": mine, "eval_loader": None, "load_path": None, "load_weights_only": False}
    return {}


def test_dense_and_moe_differ_in_one_block_of_the_model() -> None:
    dense, moe = load_yaml(_path("dense")), load_yaml(_path("moe"))
    assert {key for key in dense if dense[key] != moe[key]} == {"model", "save_folder"}
    assert {key for key in dense["model"] if dense["model"][key] != moe["model"][key]} == {"ffn_config"}


def _path(name: str) -> Path:
    return next(path for path in YAMLS if path.stem == name)
