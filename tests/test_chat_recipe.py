"""From chats to a chatting, evaluated, exported model: the commands of docs/generation.md, word for word."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmfoundry.cli.main import main
from tests.data.chat_tokenizer import turns
from tests.pages import ROOT, blocks
from tests.pages import commands as page_commands

SHRUNK = {
    "variables.max_seq_len": 64, "tokenizer.vocab_size": 300, "model.n_layers": 2, "model.d_model": 64,
    "model.n_heads": 4, "model.vocab_size": 320, "model.ffn_config.ffn_hidden_size": 32, "scheduler.t_warmup": "1ba",
    "max_duration": "2ba", "global_train_batch_size": 4, "callbacks": {}, "eval_interval": "0ba",
}  # fmt: skip
TEXT = {"name": "synthetic", "n_documents": 40, "document_words": 50}


def commands() -> list[list[str]]:
    """Those of the recipe, without `llmfoundry`."""
    recipe, *_ = blocks(ROOT / "docs" / "generation.md", "bash")
    lines = [shlex.split(line) for line in page_commands(recipe)]
    assert {line[0] for line in lines} == {"llmfoundry"}
    return [line[1:] for line in lines]


def shrink(name: str, folder: Path, changes: dict[str, object]) -> None:
    config = OmegaConf.load(ROOT / "yamls" / f"{name}.yaml")
    for key, value in (SHRUNK | changes).items():
        OmegaConf.update(config, key, value, merge=False)
    (folder / "yamls").mkdir(exist_ok=True)
    OmegaConf.save(config, folder / "yamls" / f"{name}.yaml")


def test_four_commands_from_chats_to_an_exported_model_that_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "cache"))
    shrink("moe", tmp_path, {"train_loader.dataset": TEXT, "eval_loader": None})
    shrink("finetune", tmp_path, {"save_interval": "2ba"})
    (tmp_path / "chats").mkdir()
    for split, n in (("train", 24), ("validation", 6)):
        lines = "".join(json.dumps({"messages": turns(f"{i} + 1", str(i + 1))}) + "\n" for i in range(n))
        (tmp_path / "chats" / f"{split}.jsonl").write_text(lines)
    assert main(["train", "yamls/moe.yaml"]) == 0
    train, chat, evaluate, export = commands()
    assert main(train) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n"))
    assert main(chat) == 0
    capsys.readouterr()
    assert main(evaluate) == 0
    assert re.search(r"\d\.\d{4} nats per token", capsys.readouterr().out)
    assert main(export) == 0
    capsys.readouterr()

    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n"))
    assert main([*chat, "--temperature", "0", "--max-new-tokens", "16", "precision=fp32"]) == 0
    said = capsys.readouterr().out
    own = AutoTokenizer.from_pretrained("out/finetune")
    model = AutoModelForCausalLM.from_pretrained("out/finetune")
    prompt = own.apply_chat_template(turns("1 + 1"), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = own.decode(ids, skip_special_tokens=True).partition("<|im_end|>")[0]
    assert len(ids) > 3 and said == f"{answer}\n"
