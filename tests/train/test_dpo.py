"""DPO: the loss and its gradients are those of the formula, on any split of the batch."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from llmfoundry.cli.opening import open_hugging_face
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError, check
from llmfoundry.data import LoaderConfig
from llmfoundry.data.loader import Batch
from llmfoundry.layers.lora import adapters, adapters_off
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.train.config import RunConfig
from llmfoundry.train.loss import DPO
from llmfoundry.train.step import StepResult, train_step
from tests.data.chat_templates import plain
from tests.data.chat_tokenizer import tokenizer, turns
from tests.train.test_finetuning_run import recipe  # noqa: F401  a fixture

BETA, PAIRS, LENGTH, VOCAB = 0.3, 6, 10, 61


def _model(lora: bool) -> CausalLM:
    keys = {
        "d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": LENGTH,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True},
        "ffn_config": {"ffn_type": "moe", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 4,
                       "moe_top_k": 2, "moe_loss_weight": 0.0},
        "init_config": {"name": "normal_", "init_std": 0.3},
    }  # fmt: skip
    config = check(CausalLMConfig, keys | ({"lora": {"rank": 3, "alpha": 6.0}} if lora else {}))
    model = config.build().double()
    init_weights(model, 1)
    with torch.no_grad():  # adapters that do something
        for _, _, b in adapters(model):
            b.normal_(std=0.2)
    return model


def _batch() -> Batch:
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (PAIRS, 2 * LENGTH), generator=random)
    labels = torch.randint(0, VOCAB, (PAIRS, 2 * LENGTH), generator=random)
    return Batch(
        tokens, labels.masked_fill(torch.rand(labels.shape, generator=random) < 0.4, -100), torch.arange(PAIRS)
    )


def _log_likelihood(model: CausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(tokens[None]).logits[0]
    return -F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def _by_hand(model: CausalLM, reference: CausalLM | None) -> dict[str, Tensor]:
    """The loss of TRL's `sigmoid`, one sequence at a time, and its gradients."""
    losses, rewards, batch = [], [], _batch()
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        halves = list(zip(tokens.split(LENGTH), labels.split(LENGTH), strict=True))
        policy = [_log_likelihood(model, *half) for half in halves]
        with torch.no_grad(), adapters_off(model):
            frozen = [_log_likelihood(reference or model, *half) for half in halves]
        logratios = (policy[0] - policy[1]) - (frozen[0] - frozen[1])
        losses.append(-F.logsigmoid(BETA * logratios))
        rewards.append(
            torch.stack([BETA * (ours - theirs).detach() for ours, theirs in zip(policy, frozen, strict=True)])
        )
    loss = torch.stack(losses).mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chosen, rejected = torch.stack(rewards).unbind(1)
    margins = chosen - rejected
    metrics = torch.stack([chosen.mean(), rejected.mean(), margins.mean(), (margins > 0).double().mean()])
    return found | {"loss": loss.detach(), "metrics": metrics}


def _step(
    model: CausalLM, reference: CausalLM | None, microbatch: int, batch: Batch | None = None
) -> tuple[StepResult, dict[str, Tensor]]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    grads: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        grads.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    result = train_step(
        model, optimizer, batch or _batch(), microbatch_rows=microbatch, max_grad_norm=None, balance=None,
        objective=DPO(BETA, reference),
    )  # fmt: skip
    return result, grads


@pytest.mark.parametrize("microbatch", [PAIRS, 4, 1])
@pytest.mark.parametrize("lora", [True, False])
def test_loss_and_gradients_are_those_of_the_formula(lora: bool, microbatch: int) -> None:
    model = _model(lora)
    reference = None
    if not lora:
        reference = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    true = _by_hand(model, reference)
    result, grads = _step(model, reference, microbatch)
    torch.testing.assert_close(result.total.double(), true.pop("loss"), rtol=1e-6, atol=1e-6)  # kept in float32
    torch.testing.assert_close(result.metrics.double(), true.pop("metrics"), rtol=1e-5, atol=1e-5)
    assert grads.keys() == true.keys() and any("lora_A" in name for name in grads) == lora
    for name, value in true.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("chats", [False, True])
def test_a_step_is_that_of_trl(chats: bool, tmp_path: Path) -> None:
    """Rows, loss, rewards and gradient of one batch, from the same file, policy and reference."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    own = tokenizer(plain("chatml"))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = []
    for name in ("policy", "reference"):
        models.append(LlamaForCausalLM(LlamaConfig(vocab_size=len(own), initializer_range=0.2, **shape)))
        models[-1].save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    said = [("What is 2 + 2?", "4.", "I do not know"), ("a", "b", "c d e"), ("yes", "Grüße", ""), ("d\n", " e ", "f")]
    # TRL tokenizes a prompt and its answer joined: no token of these goes over the end of the prompt.
    rows = [{"prompt": f"{a}?", "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in said]
    if chats:
        rows = [{"prompt": turns("!s", a), **{key: [{"role": "assistant", "content": row[key].strip()}]
                 for key in ("chosen", "rejected")}} for (a, _, _), row in zip(said, rows, strict=True)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    args = trl.DPOConfig(
        str(tmp_path / "out"), beta=BETA, per_device_train_batch_size=4, use_cpu=True, report_to=[], max_length=None,
        gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        models[0], models[1], args, train_dataset=Dataset.from_list(rows), processing_class=own
    )  # fmt: skip
    loss = trainer.compute_loss(models[0].eval(), next(iter(trainer.get_train_dataloader())))
    loss.backward()

    policy, reference = (open_hugging_face(str(tmp_path / name), "fp32").model for name in ("policy", "reference"))
    data = {"path": str(tmp_path / "pairs.jsonl"), "cache_dir": str(tmp_path / "c"), "validation_fraction": 0.0}
    loader = check(LoaderConfig, {"name": "preferences", "dataset": data})
    batch = loader.build(own, seed=0, max_seq_len=64, sequence_ids=False).batch(0, 4)
    result, grads = _step(policy, reference, 4, batch)
    torch.testing.assert_close(result.total, loss.detach(), rtol=1e-5, atol=1e-6)
    name = next(name for name in grads if name.endswith("wte.weight") or "embed" in name)
    torch.testing.assert_close(grads[name], models[0].model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)


def _preferences(recipe: Path, **keys: object) -> Path:  # noqa: F811
    config = yaml.safe_load(recipe.read_text())
    rows = [
        {"prompt": f"say {word}", "chosen": f"{word} yes", "rejected": f"{word} no"} for word in ("a", "b", "c", "d")
    ]
    data = recipe.parent / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["train_loader"] = {
        "name": "preferences", "dataset": {"path": str(data), "cache_dir": str(recipe.parent / "c")}
    }  # fmt: skip
    config |= {"loss": {"name": "dpo", "beta": 0.5}, "max_duration": "12ba", "global_train_batch_size": 4} | keys
    path = recipe.parent / "dpo.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _metrics(recipe: Path) -> list[dict[str, float]]:  # noqa: F811
    return [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_reference_drops_nothing() -> None:
    plain, batch = _model(lora=True), _batch()
    dropping = plain.config.model_copy(update={"resid_pdrop": 0.3}).build().double()
    dropping.load_state_dict(plain.state_dict())
    dpo = DPO(BETA)
    (pairs,) = dpo.microbatches(batch, PAIRS)
    assert torch.equal(dpo.reference(dropping, pairs), dpo.reference(plain, pairs)) and dropping.training
    assert not torch.equal(dpo.forward(dropping, pairs).nats, dpo.forward(plain, pairs).nats)


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_learns_to_prefer_the_chosen(recipe: Path, lora: bool) -> None:  # noqa: F811
    path = _preferences(recipe)
    config = yaml.safe_load(path.read_text())
    config["model"] |= {"lora": {"rank": 4, "alpha": 8.0}} if lora else {}
    path.write_text(yaml.safe_dump(config))
    assert train_main([str(path)]) in (0, None)
    lines = _metrics(recipe)
    assert lines[0]["loss/train/total"] == pytest.approx(0.6931, abs=1e-3), "nothing is preferred yet"
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss/train/total"] < 0.6 and lines[-1]["rewards/accuracies"] == 1.0
    assert lines[-1]["rewards/margins"] == pytest.approx(
        lines[-1]["rewards/chosen"] - lines[-1]["rewards/rejected"], abs=1e-4
    )


def test_a_run_with_a_reference_of_its_own_resumes_bitwise_and_evaluates(recipe: Path) -> None:  # noqa: F811
    held_out = recipe.parent / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "say e", "chosen": "e yes", "rejected": "e no"}) + "\n")
    evaluation = {"path": str(held_out), "split": "validation", "preprocessing_fn": {"response": "chosen"},
                  "cache_dir": str(recipe.parent / "c")}  # fmt: skip
    path = str(_preferences(recipe, eval_loader={"name": "finetuning", "dataset": evaluation}, eval_interval="6ba"))
    assert train_main([path]) == 0
    whole = _metrics(recipe)
    assert whole[-1]["metrics/eval/LanguageCrossEntropy"] > 0
    assert train_main([path, f"save_folder={recipe.parent / 'parts'}", "save_interval=5ba"]) == 0
    checkpoints = recipe.parent / "parts" / "checkpoints"
    for later in checkpoints.glob("step-1*"):  # as if it had been killed after step 5
        shutil.rmtree(later)
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step-5")
    assert train_main([path, f"save_folder={recipe.parent / 'parts'}", "save_interval=5ba", "autoresume=true"]) == 0
    again = [json.loads(line) for line in (recipe.parent / "parts" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss/train/total", "rewards/margins"):
        assert [line[name] for line in again] == [line[name] for line in whole], name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": {"name": "cross_entropy"}}, "loss=cross_entropy does not fit the data of train_loader"),
        ({"load_path": None}, "loss=dpo needs load_path, .* or model.lora"),
        ({"train_loader": {"name": "text", "dataset": {"name": "synthetic"}}}, "it needs name: preferences"),
    ],
)
def test_mistakes_are_named(recipe: Path, keys: dict[str, object], message: str) -> None:  # noqa: F811
    config = yaml.safe_load(_preferences(recipe, **keys).read_text())
    with pytest.raises(ConfigError, match=message):
        check(RunConfig, config)
