"""The folder in which the commands of the documentation run: what a reader has, small.

The shipped YAMLs are shrunk, names of the hub are small models in local folders, and the data that pages speak of is
there. So commands run word for word.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf

from llmfoundry.data.chat_template import CHATML
from tests.data.chat_tokenizer import tokenizer, turns
from tests.hf.theirs import LLAMA_LIKE, MOE, Case
from tests.integrations.composer_fixtures import (
    MODELS,
    build,
    composer_state,
    foundry_config,
    theirs,
    tokenizer_files,
    write_sharded,
)
from tests.integrations.foundry_hub import build as foundry_hub
from tests.pages import ROOT, blocks
from tests.shrunk import shrunk

HUB = {
    "allenai/OLMoE-1B-7B-0924": ("olmoe", MOE | {"num_experts": 4}),
    "allenai/OLMoE-1B-7B-0924-Instruct": ("olmoe", MOE | {"num_experts": 4}),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", MOE | {"num_local_experts": 4}),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", MOE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
    "HuggingFaceTB/SmolLM2-135M": ("llama", LLAMA_LIKE),
}
SENTENCES = [f"The {a} {b} the {c}." for a in ("cat", "dog", "owl") for b in ("sees", "likes") for c in ("sun", "sea")]
WHOLE_FILES = ("moe", "dense", "finetune", "lora", "dpo", "olmoe-1b-7b", "qwen3-30b-a3b", "dbrx-132b")


def fill(folder: Path) -> None:
    """Write everything but what commands make: runs/, ckpt/ and out/."""
    foundry_hub(folder)
    _models(folder)
    _texts(folder)
    _yamls(folder)
    _evaluation(folder)
    _composer(folder)
    for name in ("scripts", "README.md"):
        (folder / name).symlink_to(ROOT / name)


def _models(folder: Path) -> None:
    own = tokenizer(CHATML)
    own.save_pretrained(folder / "tok")
    for name, (kind, settings) in HUB.items():
        size = {"vocab_size": len(own), "eos_token_id": own.eos_token_id, "max_position_embeddings": 4096}
        Case(kind, "", settings | size).build().save_pretrained(folder / name)
        own.save_pretrained(folder / name)


def _texts(folder: Path) -> None:
    text = " ".join(SENTENCES * 6)
    for name in ("library", "texts", "data/train", "data/val", "data/web"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            (folder / name / f"{number}.txt").write_text(f"{name} {number}: {text}")
    chats = [{"messages": turns(f"{i} + 1 =", str(i + 1))} for i in range(24)]
    pairs = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(24)]
    _jsonl(folder / "chats" / "train.jsonl", chats[:20])
    _jsonl(folder / "chats" / "validation.jsonl", chats[20:])
    _jsonl(folder / "pairs" / "train.jsonl", pairs)
    _jsonl(folder / "prompts.jsonl", [{"prompt": "The cat"}, {"prompt": "The dog likes"}])
    (folder / "keep.py").write_text('def keep(text: str) -> bool:\n    return "5:" not in text\n')


def _yamls(folder: Path) -> None:
    (folder / "yamls").mkdir()
    library = {"name": "text_files", "path": "library"}  # in place of Python's
    for name in WHOLE_FILES:
        changes: dict[str, object] = {"eval_subset_num_batches": 2, "variables.max_seq_len": 256}
        if name in ("moe", "dense"):
            changes |= {"train_loader.dataset": library, "eval_loader.dataset": library | {"split": "validation"}}
        OmegaConf.save(shrunk(ROOT / "yamls" / f"{name}.yaml", changes), folder / "yamls" / f"{name}.yaml")
    (folder / "run.yaml").write_text((folder / "yamls" / "moe.yaml").read_text())
    foundry = OmegaConf.load(ROOT / "tests" / "integrations" / "foundry" / "pretrain_mpt.yaml")
    for key, value in {
        "variables.max_seq_len": 64, "model.d_model": 32, "model.n_layers": 1, "model.vocab_size": 300,
        "max_duration": "2ba", "global_train_batch_size": 2, "precision": "fp32", "save_folder": "runs/mpt",
        "scheduler.t_warmup": "1ba",
    }.items():  # fmt: skip
        OmegaConf.update(foundry, key, value)
    OmegaConf.save(foundry, folder / "your.yaml")


def _evaluation(folder: Path) -> None:
    """The files of docs/evaluation.md, as they stand there."""
    page = ROOT / "docs" / "evaluation.md"
    (questions,) = blocks(page, "json")
    (folder / "capitals.jsonl").write_text(questions.text)
    tasks, gauntlet, _, models = blocks(page, "yaml")
    for name, block in (("tasks", tasks), ("gauntlet", gauntlet), ("models", models)):
        (folder / f"{name}.yaml").write_text(block.text)


def _composer(folder: Path) -> None:
    source = build(MODELS["dense"])
    stored = {
        "huggingface": {
            "model": {"config": {"file_extension": ".json", "content": foundry_config(MODELS["dense"])}},
            "tokenizer": tokenizer_files(folder / "tokenizer"),
        }
    }
    state = composer_state(theirs(source), stored)
    torch.save(state, folder / "ep0-ba1000-rank0.pt")
    write_sharded(folder / "ep0-ba1000", state)
    config = {"max_seq_len": 16, "model": MODELS["dense"], "max_duration": "1ba"}
    (folder / "mpt.yaml").write_text(yaml.safe_dump(config))


def _jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
