"""The mixture layer: it is the dense block when there is one expert, and drops nothing when there are many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmfoundry.config import check
from llmfoundry.layers.ffn import MLP, GLUConfig, MLPConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoE, MoEConfig

B, S, D, F = 2, 9, 16, 24


def config(**settings: object) -> MoEConfig:
    base = {"ffn_hidden_size": F, "bias": False, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 8, "moe_top_k": 2}
    return MoEConfig.model_validate(base | settings)


def build(**settings: object) -> MoE:
    layer = config(**settings).build(D, 1, 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def outcome(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x).y
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mlp_type", ["glu", "mlp"])
def test_one_expert_is_the_dense_block(mlp_type: str, bias: bool, backend: str) -> None:
    moe = build(moe_num_experts=1, moe_top_k=1, mlp_type=mlp_type, bias=bias, moe_impl=backend).double()
    dense_config = GLUConfig if mlp_type == "glu" else MLPConfig
    dense = MLP(dense_config(ffn_hidden_size=F, bias=bias, ffn_act_fn=config().ffn_act_fn), D).double()
    names = {"w1.weight": "w1", "w2.weight": "w2", "w1.bias": "b1", "w2.bias": "b2"}
    experts = dict(moe.experts.named_parameters())
    dense.load_state_dict({name: experts[names[name]][0].detach() for name in dense.state_dict()})
    x = torch.randn(B, S, D, dtype=torch.float64)
    (y, dx), (true_y, true_dx) = outcome(moe, x), outcome(dense, x)
    torch.testing.assert_close(y, true_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, true_dx, rtol=1e-12, atol=1e-12)
    for name, parameter in dense.named_parameters():
        grad = experts[names[name]].grad
        assert grad is not None and parameter.grad is not None
        torch.testing.assert_close(grad[0], parameter.grad, rtol=1e-12, atol=1e-12)


def test_every_token_meets_all_of_its_experts_however_uneven_the_load() -> None:
    layer, x = build().double(), torch.randn(B, S, D, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight[3] += 5 * x.mean((0, 1))  # crowd one expert
    routing, y = layer.router(x), layer(x).y.view(-1, D)
    w1, w2 = layer.experts.w1, layer.experts.w2
    for token in range(B * S):
        expected = torch.zeros(D, dtype=torch.float64)
        for weight, expert in zip(routing.weights[token], routing.experts[token], strict=True):
            gate, up = (w1[expert] @ x.view(-1, D)[token]).chunk(2)
            expected += weight * (w2[expert] @ (nn.functional.silu(gate) * up))
        torch.testing.assert_close(y[token], expected, rtol=1e-12, atol=1e-12)


def test_the_shared_expert_meets_every_token() -> None:
    layer, x = build(shared_expert=True, shared_expert_gate=True, shared_expert_hidden_size=40), torch.randn(B, S, D)
    assert layer.shared_expert is not None and layer.shared_expert_gate is not None
    with torch.no_grad():
        whole = layer(x).y
        shared = torch.sigmoid(layer.shared_expert_gate(x)) * layer.shared_expert(x).y
        layer.shared_expert_gate = layer.shared_expert = None
        torch.testing.assert_close(whole, layer(x).y + shared)


def test_forward_writes_nothing_to_the_layer() -> None:
    layer, x = build(moe_bias_update_rate=0.1), torch.randn(B, S, D)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    attributes = set(vars(layer)) | set(vars(layer.router)) | set(vars(layer.experts))
    first = layer(x)
    assert set(vars(layer)) | set(vars(layer.router)) | set(vars(layer.experts)) == attributes
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x).y, first.y)


def test_layers_interleave_as_the_config_says() -> None:
    block = config(first_k_dense=1, moe_layer_freq=2, dense_ffn_hidden_size=48)
    kinds = ["mixture" if isinstance(block.for_layer(i), MoEConfig) else "dense" for i in range(6)]
    assert kinds == ["dense", "mixture", "dense", "mixture", "dense", "mixture"]
    assert block.for_layer(0).ffn_hidden_size == 48


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mlp_type": "mlp", "bias": True},
        {"shared_expert": True, "shared_expert_gate": True},
        {"moe_router_bias": 1},
    ],
)
def test_parameters_are_counted_without_building(settings: dict[str, object]) -> None:
    settings = {key: bool(value) if key == "moe_router_bias" else value for key, value in settings.items()}
    block = config(**settings)
    built = block.build(D, 1, 0)
    assert sum(parameter.numel() for parameter in built.parameters()) == block.n_params(D)
    one_expert = block.expert.n_params(D)
    assert block.n_params(D) - block.n_active_params(D) == 6 * one_expert


def test_llm_foundrys_own_mixture_has_exact_gelu_no_biases_and_no_balance_loss() -> None:
    """As its code builds it, which scripts/bench/foundry_parity.py runs; MegaBlocks' kinds have other defaults."""
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 32}
    found = {}
    for kind in ("torch_dmoe", "mb_dmoe"):
        ffn = check(CausalLMConfig, {**sizes, "ffn_config": {"ffn_type": kind, "moe_num_experts": 4}}).ffn(0)
        assert isinstance(ffn, MoEConfig)
        found[kind] = (ffn.ffn_act_fn.key, bool(ffn.bias), ffn.has_output_bias, ffn.moe_loss_weight)
    assert found == {"torch_dmoe": ("gelu", False, False, 0.0), "mb_dmoe": ("gelu_tanh", True, True, 0.1)}
