"""A fine-tune against a plain loop over transformers, and the batch that is shown before it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from llmfoundry.cli.train import train_main
from llmfoundry.config import check
from llmfoundry.data import IGNORE
from llmfoundry.data.loader import LoaderConfig
from tests.data.chat_tokenizer import PLAIN, tokenizer

LENGTH, STEPS, ROWS, RATE = 64, 20, 3, 3.0e-3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML of a fine-tune of a tiny Llama, which lies beside it; it saves to `tmp_path/run`."""
    own = tokenizer(CHATML)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(own), initializer_range=0.1, **shape))
    model.save_pretrained(tmp_path / "llama")
    own.save_pretrained(tmp_path / "llama")
    chats = [{"messages": messages} for messages in PLAIN.values()] * 3
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config = {
        "max_seq_len": LENGTH,
        "model": {
            "name": "causal_lm", "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": len(own),
            "max_seq_len": 128, "norm_type": "rmsnorm", "norm_eps": 1.0e-6, "no_bias": True,
            "tie_word_embeddings": False,
            "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True,
                            "attn_uses_sequence_id": True},
            "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 48, "ffn_act_fn": {"name": "silu"}},
        },
        "tokenizer": {"name": str(tmp_path / "llama")},
        "train_loader": {
            "name": "finetuning", "dataset": {"path": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path / "c")}
        },
        "optimizer": {"name": "adamw", "lr": RATE, "betas": [0.9, 0.95], "eps": 1.0e-8, "weight_decay": 0.0},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
        "max_duration": f"{STEPS}ba", "global_train_batch_size": ROWS, "device_train_microbatch_size": 2,
        "load_path": f"hf:{tmp_path / 'llama'}", "load_weights_only": True, "save_folder": str(tmp_path / "run"),
        "log_to_console": False, "callbacks": {"report": {"enabled": False}},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def losses_of_transformers(recipe: Path, folder: Path) -> list[float]:
    """The same rows, each conversation a sequence of its own, in a plain loop."""
    model = LlamaForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    data = yaml.safe_load(recipe.read_text())
    data["train_loader"]["dataset"]["validation_fraction"] = 0.0
    loader = check(LoaderConfig, data["train_loader"]).build(
        tokenizer(CHATML), seed=17, max_seq_len=LENGTH, sequence_ids=True
    )
    losses = []
    for step in range(STEPS):
        batch = loader.batch(step * ROWS, ROWS)
        assert batch.sequence_ids is not None
        total = torch.zeros(())
        for tokens, labels, ids in zip(batch.tokens, batch.labels, batch.sequence_ids, strict=True):
            for document in range(1, int(ids.max()) + 1):
                here = ids == document
                logits = model(tokens[here][None]).logits[0]
                total = total + torch.nn.functional.cross_entropy(logits, labels[here], reduction="sum")
        loss = total / (batch.labels != IGNORE).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_twenty_steps_equal_a_plain_loop_over_transformers(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe)]) == 0
    ours = [json.loads(line)["loss/train/ce"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    theirs = losses_of_transformers(recipe, tmp_path / "llama")
    assert len(ours) == STEPS and theirs[-1] < 0.8 * theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_the_first_batch_can_be_shown(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "--show-batch", "--dry-run"]) == 0
    assert not (tmp_path / "run").exists(), "nothing is trained"
    dry = capsys.readouterr().out
    assert train_main([str(recipe), "--show-batch", "max_duration=1ba"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("the first batch: 3 rows of 64 tokens") and shown in dry
    assert shown.count("row 0") == 1 and "row 2" in shown and "examples" in shown
    assert "<|im_start|>user" in shown
    marked = "".join(re.findall("\x1b\\[32m(.*?)\x1b\\[0m", shown, re.DOTALL))
    assert "<|im_end|>" in marked and "user" not in marked.replace("assistant\nuser\n", "")


def test_learned_positions_start_anew_in_each_example(recipe: Path, tmp_path: Path) -> None:
    """Packed and alone, an example has the same loss: also where positions are embedded."""
    losses, counts = [], []
    for packed in (True, False):
        data = yaml.safe_load(recipe.read_text())
        rows = check(
            LoaderConfig,
            data["train_loader"] | {"dataset": data["train_loader"]["dataset"] | {"validation_fraction": 0.0}},
        ).build(tokenizer(CHATML), seed=17, max_seq_len=LENGTH, sequence_ids=packed)
        counts.append(rows.rows_per_epoch)
        data["model"]["attn_config"] = {"attn_uses_sequence_id": packed}
        data |= {"save_folder": str(tmp_path / f"run-{packed}"), "max_duration": "1ba", "load_path": None,
                 "load_weights_only": False, "global_train_batch_size": counts[-1]}  # fmt: skip
        data["model"]["init_config"] = {"name": "normal_", "init_std": 0.3}
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(data))
        assert train_main([str(tmp_path / "other.yaml")]) == 0
        line = json.loads((tmp_path / f"run-{packed}" / "metrics.jsonl").read_text())
        losses.append(line["loss/train/ce"])
    assert counts[0] < 0.7 * counts[1], "packed into fewer rows"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
