"""The balance losses against their formulas, and that they add up over microbatches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmfoundry.layers.ffn import RouterStats
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.balance import (
    Balance,
    load_balance_loss,
    named,
    summary,
    update_expert_bias,
    updated_bias,
    z_loss,
)
from llmfoundry.moe.layer import MoEConfig

T, E, K, L = 64, 4, 2, 3


def draw(tokens: int = T) -> tuple[Tensor, Tensor]:
    """(L, T, E) scores, and the (L, E) loads that they make."""
    scores = torch.randn(L, tokens, E).softmax(-1)
    chosen = scores.topk(K, dim=-1).indices
    load = torch.stack([torch.bincount(layer.flatten(), minlength=E) for layer in chosen]).float()
    return scores, load


def test_the_loss_is_switchs_mean_over_layers() -> None:
    scores, load = draw()
    by_layer = [E * (load[i] / (T * K) @ scores[i].mean(0)) for i in range(L)]
    found = load_balance_loss(scores.sum(1), load) / T
    torch.testing.assert_close(found, torch.stack(by_layer).mean())


def test_even_routing_costs_one() -> None:
    even = torch.full((L, E), T / E)
    assert (load_balance_loss(even, K * even) / T).item() == pytest.approx(1.0)


def test_parts_over_a_global_load_add_up_to_the_whole() -> None:
    scores, load = draw()
    whole = load_balance_loss(scores.sum(1), load)
    parts = [load_balance_loss(part.sum(1), load) for part in scores.split(T // 4, dim=1)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_the_z_loss_is_the_mean_over_layers() -> None:
    assert z_loss(torch.tensor([1.0, 2.0, 6.0])).item() == pytest.approx(3.0)


def test_the_bias_moves_towards_even_load() -> None:
    moved = updated_bias(torch.zeros(4), torch.tensor([10.0, 2.0, 6.0, 6.0]), 0.5)
    assert moved.tolist() == [-0.5, 0.5, 0.0, 0.0]


def model_config(**ffn: object) -> CausalLMConfig:
    block = MoEConfig.model_validate({"moe_num_experts": E, "moe_top_k": K, "ffn_act_fn": {"name": "silu"}} | ffn)
    return CausalLMConfig(d_model=8, n_heads=2, n_layers=L, vocab_size=16, ffn_config=block)


def test_each_layers_router_gets_its_own_update() -> None:
    config = model_config(moe_bias_update_rate=0.25, moe_score_fn="sigmoid", first_k_dense=1)
    model, balance = config.build(), Balance.of(config)
    assert balance is not None
    load = torch.tensor([[9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 9.0]])
    update_expert_bias(model, load, balance)
    biases = [module.expert_bias.tolist() for name, module in model.named_modules() if name.endswith("router")]
    assert biases == [[-0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, -0.25]]


def test_a_dense_model_has_no_balance() -> None:
    assert Balance.of(CausalLMConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=16)) is None


def test_the_summary_shows_what_is_uneven() -> None:
    balance = Balance.of(model_config())
    assert balance is not None
    load = torch.full((L, E), T * K / E)
    load[1] = torch.tensor([T * K * 0.5, T * K * 0.5, 0, 0])
    even = torch.full((L, E), T / E)
    stats = RouterStats(load, even, torch.full((L,), 4.0 * T), torch.full((L,), 0.5 * T))
    shown = named(summary(stats, T, balance).tolist())
    assert shown["moe/max_load"] == pytest.approx(0.5 * E) and shown["moe/min_load"] == 0.0
    assert shown["moe/z_loss"] == pytest.approx(4.0) and shown["moe/router_entropy"] == pytest.approx(0.5)
    assert sum(shown["moe/load"]) == pytest.approx(1.0, abs=1e-5)
