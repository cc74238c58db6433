"""Small tasks of every kind, a tokenizer and a model whose answers differ: what the tests of evaluation share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from llmfoundry.config import check
from llmfoundry.data.tokenizer import train_bpe
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

WORDS = (
    "the a red green blue cat dog bird runs sits sleeps under over near table chair tree house big small old".split()
)


def sentence(dice: random.Random, n: int, after: str | None = None) -> str:
    """Words of which most are followed by the next one of the list."""
    words = [dice.choice(WORDS) if after is None else follower(dice, after)]
    while len(words) < n:
        words.append(follower(dice, words[-1]))
    return " ".join(words)


def follower(dice: random.Random, word: str) -> str:
    """Mostly the next word of the list."""
    return WORDS[(WORDS.index(word) + 1) % len(WORDS)] if dice.random() < 0.8 else dice.choice(WORDS)


def write_tasks(folder: Path) -> list[dict[str, object]]:
    """Write the data of tasks of every kind; returns their settings, with paths relative to `folder`."""
    dice = random.Random(5)
    rows: dict[str, list[dict[str, object]]] = {"choice": [], "schema": [], "words": [], "write": [], "think": []}
    for i in range(23):
        query = sentence(dice, 5)
        choices = [sentence(dice, 1 + i % 3) for _ in range(4)]
        choices[i % 4] = sentence(dice, 1 + i % 3, after=query.split()[-1])
        rows["choice"].append({"query": f"{query} ", "choices": choices, "gold": i % 4})
    for i in range(13):
        options = [sentence(dice, 4), sentence(dice, 4)]
        continuation = sentence(dice, 2, after=options[i % 2].split()[-1])
        rows["schema"].append({"context_options": options, "continuation": continuation, "gold": i % 2})
    for i in range(17):
        context = sentence(dice, 6)
        continuation = sentence(dice, 1 + i % 2, after=context.split()[-1])
        rows["words"].append({"context": context, "continuation": continuation, "category": WORDS[i % 3]})
    for _ in range(11):
        context = sentence(dice, 4)
        answer = sentence(dice, 2, after=context.split()[-1])
        rows["write"].append({"context": context, "answer": answer, "aliases": [answer.split()[0], dice.choice(WORDS)]})
    for _ in range(9):
        thought, context = sentence(dice, 2), sentence(dice, 4)
        rows["think"].append({"context": context, "chain_of_thought": thought, "answer": dice.choice(WORDS[:9])})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = ["InContextLearningMultipleChoiceAccuracy", "InContextLearningMCExpectedCalibrationError"]
    lm = ["InContextLearningLMAccuracy", "InContextLearningLMExpectedCalibrationError"]
    return [
        {"label": "choice", "dataset_uri": "choice.jsonl", "num_fewshot": [0, 3], "icl_task_type": "multiple_choice",
         "metric_names": both, "question_prelimiter": "Question: ", "continuation_delimiter": "\nAnswer: "},
        {"label": "schema", "dataset_uri": "schema.jsonl", "num_fewshot": [0, 2], "icl_task_type": "schema",
         "metric_names": both, "question_prelimiter": "- "},
        {"label": "words", "dataset_uri": "words.jsonl", "num_fewshot": [0, 4], "icl_task_type": "language_modeling",
         "metric_names": lm, "has_categories": True, "prompt_string": "What comes next?"},
        {"label": "write", "dataset_uri": "write.jsonl", "num_fewshot": [0, 2],
         "icl_task_type": "generation_task_with_answers", "continuation_delimiter": "",
         "early_stopping_criteria": ["chair"]},
        {"label": "think", "dataset_uri": "think.jsonl", "num_fewshot": [1], "batch_size": 2,
         "icl_task_type": "generation_task_with_answers", "cot_delimiter": " the ", "do_normalization": False},
    ]  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A BPE that has learned the words."""
    dice = random.Random(1)
    trained = train_bpe([sentence(dice, 50) + "\nQuestion: x\nAnswer: y\n" for _ in range(20)], 400)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")


def model(vocab_size: int, max_seq_len: int = 256, experts: bool = True) -> CausalLM:
    """A model that has not learned anything, but whose answers differ."""
    settings: dict[str, object] = {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": vocab_size, "max_seq_len": max_seq_len,
        "norm_type": "rmsnorm", "no_bias": True, "tie_word_embeddings": False,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True},
        "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 48, "ffn_act_fn": {"name": "silu"}},
    }  # fmt: skip
    if experts:
        settings["ffn_config"] = {
            "ffn_type": "moe", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 4,
            "moe_top_k": 2, "moe_normalize_expert_weights": 1.0,
        }  # fmt: skip
    made = check(CausalLMConfig, settings).build()
    dice = torch.Generator().manual_seed(4)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.05, generator=dice)
    return made.eval()


def teach(model: CausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = 150) -> CausalLM:
    """Train a model on sentences, so that some of its answers are right."""
    dice = random.Random(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.tensor([tokenizer(sentence(dice, 40))["input_ids"][:24] for _ in range(16)])
        found = model(ids[:, :-1], ids[:, 1:].contiguous())
        optimizer.zero_grad()
        (found.loss_sum / ids[:, 1:].numel()).backward()
        optimizer.step()
    return model.eval()
