"""Twenty steps of AdamW here and in a plain loop over the model of `transformers`: one curve, balance loss and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from theirs import CASES, VOCAB

from llmfoundry.data.loader import Batch
from llmfoundry.hf import from_pretrained
from llmfoundry.hf.family import read_config
from llmfoundry.moe.balance import Balance
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.train.step import train_step

STEPS, ROWS, LENGTH, LR = 20, 4, 16, 3e-3


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, VOCAB, (STEPS, ROWS, 1), generator=generator)
    return list((start + 3 * torch.arange(LENGTH + 1)) % VOCAB)


@pytest.mark.parametrize(
    ("kind", "balanced", "coefficient"),
    [("mixtral", True, 0.05), ("olmoe", True, 0.05), ("gpt_oss", True, 0.05), ("gpt_oss", False, 0.9)],
)
def test_curves_are_the_same(kind: str, balanced: bool, coefficient: float, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == kind)
    settings = {"output_router_logits": balanced, "router_aux_loss_coef": coefficient}
    case = case._replace(settings=case.settings | settings)
    theirs = case.build().train()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", torch.float32).model.train()
    balance = Balance.of(ours.config)
    assert (balance is not None and balance.loss_weight > 0) == balanced

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)

    one, two = optimizer(theirs), optimizer(ours)
    true, found = [], []
    for i, tokens in enumerate(batches()):
        for group in (*one.param_groups, *two.param_groups):  # a warm-up, as in every recipe
            group["lr"] = LR * (i + 1) / STEPS
        output = theirs(tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:].contiguous())
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        one.step()
        one.zero_grad()
        true.append(output.loss.item())
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(ROWS))
        step = train_step(ours, two, batch, microbatch_rows=ROWS, max_grad_norm=1.0, balance=balance)
        found.append(step.total.item())
    assert true[-1] < true[0] - 0.3, "there has to be a curve"
    assert found == pytest.approx(true, abs=1e-4)


MIXTURES = "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "dbrx"  # all whose code has a balance loss


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_balance_loss_that_their_code_leaves_out_is_left_out(kind: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == kind)
    weights = {}
    for applied in (False, True):
        settings = {"output_router_logits": applied, "router_aux_loss_coef": 0.9}
        if kind == "dbrx":
            settings = {**settings, "ffn_config": {**case.settings["ffn_config"], "moe_loss_weight": 0.9}}  # type: ignore[dict-item]
        config = case._replace(settings=case.settings | settings).build().config
        _, ours = read_config(config.to_dict())
        mixture = ours.ffn(ours.n_layers - 1)
        assert isinstance(mixture, MoEConfig)
        weights[applied] = mixture.moe_loss_weight / mixture.moe_top_k
    assert weights == {False: 0.0, True: pytest.approx(0.9)}
