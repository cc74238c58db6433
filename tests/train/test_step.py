"""One step: the gradient of the balance loss over the global batch, however the batch is cut into microbatches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.config import check, dump
from llmfoundry.data.loader import Batch
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.balance import Balance
from llmfoundry.train import step
from llmfoundry.train.step import train_step

ROWS, LENGTH, VOCAB, E, K, LAYERS = 8, 12, 31, 4, 2, 2
WEIGHT = 3.0  # large, so that the balance loss is most of a router's gradient


def config(**ffn: object) -> CausalLMConfig:
    block = {"ffn_type": "moe", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": E,
             "moe_top_k": K, "moe_loss_weight": WEIGHT} | ffn  # fmt: skip
    shape = {"d_model": 16, "n_heads": 2, "n_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": LENGTH}
    return check(CausalLMConfig, shape | {"ffn_config": block, "init_config": {"name": "normal_", "init_std": 0.3}})


def batch() -> Batch:
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:].contiguous(), torch.arange(ROWS))


def gradients(model_config: CausalLMConfig, rows: int) -> tuple[dict[str, Tensor], list[bool]]:
    """float64 gradients of one step, and whether each forward of the model kept a graph."""
    model = model_config.build().double()
    init_weights(model, seed=1)
    forwards: list[bool] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    found: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.update(_gradients(model)))
    train_step(model, optimizer, batch(), microbatch_rows=rows, max_grad_norm=None, balance=Balance.of(model_config))
    return found, forwards


def _gradients(model: CausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_definition(model_config: CausalLMConfig) -> dict[str, Tensor]:
    """Gradients of cross-entropy plus Switch's loss, written out over all tokens of the batch at once."""
    model = model_config.build().double()
    init_weights(model, seed=1)
    rows = batch()
    out = model(rows.tokens, rows.labels, keys=rows.rows)
    assert out.router is not None
    tokens = ROWS * LENGTH
    f, p = out.router.load / (tokens * K), out.router.score_sum / tokens
    assert (f.max(1).values > 0.3).all(), "the load has to be uneven"
    (out.loss_sum / tokens + WEIGHT * E * (f * p).sum(1).mean()).backward()
    return _gradients(model)


@pytest.mark.parametrize("accumulation", ["count", "keep"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_the_gradient_is_that_of_the_whole_batch(accumulation: str, rows: int) -> None:
    settings = config(moe_lbl_accumulation=accumulation)
    true, (found, forwards) = by_definition(settings), gradients(settings, rows)
    assert found.keys() == true.keys()
    for name, value in true.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    n = -(-ROWS // rows)
    assert forwards == ([True] * n if accumulation == "keep" else [False] * (n - 1) + [True] * n)


def test_the_default_is_the_whole_batch() -> None:
    block = config().ffn(0)
    assert (block.moe_lbl_scope, block.moe_lbl_accumulation) == ("global_batch", "count")


@pytest.mark.parametrize("settings", [{"moe_lbl_scope": "microbatch"}, {"moe_lbl_accumulation": "running"}])
def test_the_cheaper_scopes_cost_no_forward_and_depend_on_microbatches(settings: dict[str, str]) -> None:
    true = by_definition(config())
    for rows, same in ((8, True), (2, False)):
        found, forwards = gradients(config(**settings), rows)
        name = "blocks.0.ffn.router.weight"
        assert torch.allclose(found[name], true[name], rtol=1e-10, atol=1e-12) is same
        assert forwards == [True] * (ROWS // rows)


def test_the_last_running_load_is_that_of_the_whole_batch() -> None:
    model_config = config(moe_lbl_accumulation="running")
    model = model_config.build()
    init_weights(model, seed=1)
    with torch.no_grad():
        loads = [load for _, load in step._forwards(model, batch().split(2), Balance.of(model_config))]
        whole = model(batch().tokens).router
    assert len(loads) == 4 and torch.equal(loads[-1], whole.load)
    assert loads[0].sum() == LAYERS * 2 * LENGTH * K


@pytest.mark.parametrize("rows", [1, 8])
def test_balance_over_the_global_batch_costs_one_reduction(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[torch.Size] = []

    def reduce(tensor: Tensor, group: object = None) -> Tensor:
        reduced.append(tensor.shape)
        return tensor

    monkeypatch.setattr(runtime, "all_reduce_sum", reduce)
    gradients(config(), rows)
    assert [shape for shape in reduced if shape == (LAYERS, E)] == [(LAYERS, E)]
    assert len(reduced) == 3, "beside it: the labels and tokens of the batch, and the step's sums"


def test_dropout_depends_on_seed_step_and_microbatch_alone() -> None:
    drops = {"resid_pdrop": 0.2, "emb_pdrop": 0.2, "attn_config": {"attn_pdrop": 0.2}}
    plain = config().model_copy(update={"ffn_config": check(FFNConfig, {"ffn_hidden_size": 24})})
    dropping = check(CausalLMConfig, dump(plain) | drops)

    def after(rows: int = 4, repeated: bool = False, model_config: CausalLMConfig = dropping, **keys: int) -> Tensor:
        model, rows_of = model_config.build().double(), batch()
        init_weights(model, seed=1)
        torch.rand(torch.randint(1, 9, ()))  # whoever drew before
        if repeated:  # both microbatches are the same rows
            rows_of = Batch(*(None if part is None else torch.cat([part[:4]] * 2) for part in rows_of))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_step(model, optimizer, rows_of, microbatch_rows=rows, max_grad_norm=None, balance=None, **keys)
        return model.wte.weight.detach()

    assert torch.equal(after(), after()) and torch.equal(after(step=3, noise_seed=2), after(step=3, noise_seed=2))
    different = [after(), after(step=1), after(noise_seed=1), after(rows=8), after(model_config=plain)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(different) for b in different[:i])
    assert not torch.allclose(after(repeated=True), after(repeated=True, rows=8)), "each microbatch drops other values"
    same = after(repeated=True, model_config=plain), after(repeated=True, rows=8, model_config=plain)
    torch.testing.assert_close(*same, rtol=1e-10, atol=1e-12)
