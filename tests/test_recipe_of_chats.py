"""The recipe of docs/chats.md, word for word, on a small model: a folder of chats becomes a model that chats."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmfoundry.cli.main import main
from llmfoundry.data.chat_template import CHATML
from tests.data.chat_tokenizer import tokenizer, turns
from tests.hf.theirs import MOE, Case
from tests.pages import ROOT, blocks

PAGE = ROOT / "docs" / "chats.md"
PUBLISHED = "allenai/OLMoE-1B-7B-0924-Instruct"
QUESTION = "What do you sell?"


def small(folder: Path) -> str:
    """A small OLMoE with a tokenizer, as `transformers` saves it."""
    own = tokenizer(CHATML)
    settings = MOE | {"num_experts": 4, "vocab_size": len(own), "max_position_embeddings": 256,
                      "eos_token_id": own.eos_token_id}  # fmt: skip
    made = Case("olmoe", "", settings).build()
    made.lm_head.weight.data *= 20  # it is frozen, and has to tell tokens apart surely
    made.save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


def test_four_commands_make_a_model_that_chats_is_measured_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "cache"))
    example, file, commands = (block.text for block in blocks(PAGE))
    recipe = yaml.safe_load(file.replace(PUBLISHED, small(tmp_path / "base")))
    shrunk = {"max_seq_len": 64, "global_train_batch_size": 8, "max_duration": "40ba", "eval_interval": "40ba",
              "save_interval": "40ba", "precision": "fp32"}  # fmt: skip
    recipe |= shrunk
    recipe["optimizer"]["lr"] = 1.0e-2
    Path("chat.yaml").write_text(yaml.safe_dump(recipe))
    Path("chats").mkdir()
    lines = (json.dumps(json.loads(example) | {"id": n}) for n in range(40))
    Path("chats/mine.jsonl").write_text("".join(f"{line}\n" for line in lines))

    train, chat, evaluate, convert = commands.splitlines()
    said = {}
    for command in (train, chat, evaluate, convert):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
        said[command] = capsys.readouterr().out
    assert said[chat] == "Tea and tea only.\n"
    assert re.search(r"0\.\d+ nats per token", said[evaluate])

    own = AutoTokenizer.from_pretrained("out/chat")
    model = AutoModelForCausalLM.from_pretrained("out/chat")
    prompt = own.apply_chat_template(turns(QUESTION), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = own.convert_tokens_to_ids("<|im_end|>")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=[end, own.eos_token_id])
    assert own.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True) + "\n" == said[chat]
