"""A folder in which the names of LLM Foundry's YAMLs are small local things: models, tokenizers, datasets, MDS."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmfoundry.data.mds import MDSWriter

VOCAB = 300
LENGTH = 64  # tokens in a row of the shrunk runs
TEXTS = [f"The {a} {b} {c} the {a}." for a in ("cat", "dog", "owl") for b in ("sees", "likes") for c in ("not", "all")]
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 1024}),
    "EleutherAI/gpt-neo-125M": ("gpt_neo", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 1]], "window_size": 8,
    }),
    "facebook/opt-2.7b": ("opt", {
        "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    }),
    "meta-llama/Meta-Llama-3-8B": ("llama", _LLAMA),
    "meta-llama/Meta-Llama-3.1-8B": ("llama", _LLAMA | {"max_position_embeddings": 8192}),
    "mosaicml/mpt-7b": ("mpt", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 128,
    }),
    "mosaicml/mpt-30b": ("mpt", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 128,
    }),
    "databricks/dbrx-instruct": ("dbrx", {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 4096, "vocab_size": VOCAB,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
    }),
}  # fmt: skip
_DATASETS = ("mosaicml/dolly_hhrlhf", "mosaicml/instruct-v3", "HuggingFaceH4/databricks_dolly_15k", "my-chats")


def build(root: Path) -> Path:
    """Fill a folder; returns it. Names are relative to it, as the hub's are to the hub."""
    words = tokenizer()
    for name, (kind, settings) in MODELS.items():
        config = AutoConfig.for_model(kind, **settings, bos_token_id=0, eos_token_id=0, pad_token_id=None)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        words.save_pretrained(root / name)
    words.save_pretrained(root / "EleutherAI/gpt-neox-20b")
    for name in _DATASETS:
        for split in ("train", "test", "validation"):
            _jsonl(root / name / f"{split}.jsonl", [{"prompt": f"{split}: {t}", "response": t[::-1]} for t in TEXTS])
    _jsonl(root / "finetune_example" / "train.jsonl", [{"query": text, "gold": 1} for text in TEXTS])
    (root / "finetune_example" / "preprocessing.py").write_text(
        'def multiple_choice(row):\n    return {"prompt": row["query"], "response": "ABC"[row["gold"]]}\n'
    )
    draw = np.random.default_rng(0)
    for folder, splits in (("my-copy-c4", ("train", "train_small", "val", "val_small")),
                           ("my-adaptation-data", ("train_small", "val_small"))):  # fmt: skip
        for split in splits:
            with MDSWriter(root / folder / split, {"tokens": "ndarray:int32"}) as writer:
                for row in draw.integers(1, 257, (8, LENGTH)).astype("int32"):
                    writer.write({"tokens": row})
    for split in ("train", "val"):
        with MDSWriter(root / "my_data" / split, {"prompt": "str", "response": "str"}) as examples:
            for text in TEXTS:
                examples.write({"prompt": f"{split}: {text}", "response": text[::-1]})
    _tasks(root / "eval" / "yamls")
    return root


def _tasks(folder: Path) -> None:
    """A task and a gauntlet, under every name that a YAML of theirs or ours gives them."""
    rows: list[dict[str, object]] = [
        {"query": t, "choices": ["one", "two"], "gold": i % 2} for i, t in enumerate(TEXTS)
    ]
    _jsonl(folder / "choices.jsonl", rows)
    task = {
        "label": "choices", "dataset_uri": "choices.jsonl", "num_fewshot": [0], "icl_task_type": "multiple_choice",
        "continuation_delimiter": " ",
    }  # fmt: skip
    gauntlet = {
        "weighting": "EQUAL", "subtract_random_baseline": True, "rescale_accuracy": True,
        "categories": [
            {"name": "all", "benchmarks": [{"name": "choices", "num_fewshot": 0, "random_baseline": 0.5}]}
        ],
    }  # fmt: skip
    for name in ("tasks.yaml", "tasks_v0.2.yaml"):
        (folder / name).write_text(yaml.safe_dump({"icl_tasks": [task]}))
    for name in ("eval_gauntlet.yaml", "eval_gauntlet_v0.2.yaml"):
        (folder / name).write_text(yaml.safe_dump({"eval_gauntlet": gauntlet}))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` entries at most."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def _jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
