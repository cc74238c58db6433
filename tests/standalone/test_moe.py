"""`llmfoundry.MoE`: the layer by itself, in plain tensors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from llmfoundry import MoE
from llmfoundry.config import ConfigError
from llmfoundry.kernels.experts import experts_ffn
from tests.parallel.ranks import run_ranks

D, F, E, K = 16, 24, 4, 2
SETTINGS = {"ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": K, "ffn_act_fn": {"name": "silu"}}


def test_it_is_the_formula() -> None:
    layer = MoE(D, **SETTINGS, init_std=0.5)
    x = torch.randn(3, 5, D)
    y, _, load = layer(x)
    tokens = x.view(-1, D)
    scores = (tokens @ layer.router.weight.T).softmax(-1)
    weights, experts = scores.topk(K)
    for t, token in enumerate(tokens):
        expected = torch.zeros(D)
        for weight, e in zip(weights[t], experts[t], strict=True):
            gate, up = (layer.experts.w1[e] @ token).chunk(2)
            expected += weight * (layer.experts.w2[e] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(y.view(-1, D)[t], expected, rtol=1e-4, atol=1e-5)
    assert load.tolist() == torch.bincount(experts.flatten(), minlength=E).tolist()


@pytest.mark.parametrize("shape", [(7, D), (2, 3, D), (2, 2, 2, D), (0, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = MoE(D, **SETTINGS)
    x = torch.randn(shape, requires_grad=True)
    y, loss, load = layer(x)
    (y.sum() + loss).backward()
    assert y.shape == x.shape and load.sum() == K * x.numel() // D
    assert all(p.grad is not None for p in layer.parameters())
    assert loss.isfinite()


def test_the_loss_is_the_balance_loss_per_token() -> None:
    layer = MoE(D, **SETTINGS, moe_loss_weight=0.5)
    x = torch.randn(64, D)
    _, loss, load = layer(x)
    mean = (x @ layer.router.weight.T).softmax(-1).mean(0)
    torch.testing.assert_close(loss, 0.5 * E * (load / load.sum() * mean).sum())


def test_dtype_and_seed() -> None:
    one, two = (MoE(D, **SETTINGS, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    same = MoE(D, **SETTINGS, dtype=torch.bfloat16, seed=1)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert torch.equal(one.experts.w1, same.experts.w1) and not torch.equal(one.experts.w1, two.experts.w1)
    assert one(torch.randn(4, D, dtype=torch.bfloat16)).y.dtype == torch.bfloat16


def test_under_autocast_it_computes_as_a_linear_layer_would() -> None:
    """Before, what a linear layer under autocast gave (bf16) met float32 weights and was refused."""
    layer = MoE(D, **SETTINGS, shared_expert=True, init_std=0.2)
    low = copy.deepcopy(layer).bfloat16()
    low.router.weight.data = layer.router.weight.data
    x = torch.randn(5, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, loss, _ = layer(torch.nn.functional.linear(x, torch.eye(D)))
    assert y.dtype == torch.bfloat16 and torch.equal(y, low(x.bfloat16()).y)
    (y.float().sum() + loss).backward()
    assert x.grad is not None and {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in layer.parameters())


def test_input_that_does_not_fit_is_named() -> None:
    layer = MoE(D, **SETTINGS)
    with pytest.raises(ValueError, match=r"x has the shape \(3, 15\); its last size must be d_model=16"):
        layer(torch.randn(3, 15))
    with pytest.raises(ValueError, match="x is torch.bfloat16 and the layer torch.float32; convert one"):
        layer(torch.randn(3, D, dtype=torch.bfloat16))
    for size in ("16", 0, 16.0):
        with pytest.raises(ValueError, match="d_model=.*: must be a whole number, 1 or more"):
            MoE(size, **SETTINGS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"moe_topk": 2}, "moe_topk: unknown key .did you mean 'moe_top_k'"),
        ({"moe_top_k": 9}, "moe_top_k=9 exceeds moe_num_experts=4"),
        ({"ffn_act_fn": {"name": "swish"}}, "ffn_act_fn"),
        ({"ffn_type": "mptglu"}, "ffn_type='mptglu' is not a mixture of experts; write one of moe, mb_dmoe"),
        ({"ffn_type": 3}, "ffn_type=3 is not a mixture of experts"),
        ({"first_k_dense": 1}, "first_k_dense=1 belongs to a whole model, and this is one layer; leave it out"),
        ({"moe_lbl_scope": "global_batch"}, "moe_lbl_scope='global_batch' belongs to a whole model"),
    ],
)
def test_a_mistake_is_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MoE(D, **SETTINGS | settings)


def test_each_kind_of_mixture_has_its_own_defaults() -> None:
    assert MoE(D, moe_num_experts=E).config.mlp_type == "glu"
    config = MoE(D, moe_num_experts=E, ffn_type="mb_dmoe").config
    assert (config.mlp_type, config.moe_loss_weight, config.ffn_act_fn.key) == ("mlp", 0.1, "gelu_tanh")
    assert MoE(D, moe_num_experts=E, ffn_type="mb_moe").config.moe_capacity_factor == 1.0


def test_the_bias_of_experts_moves_towards_even_load() -> None:
    layer = MoE(D, **SETTINGS, moe_bias_update_rate=0.25)
    load = layer(torch.randn(7, D)).load
    assert layer.router.expert_bias is not None and not layer.router.expert_bias.any()
    layer.update_expert_bias(load)
    torch.testing.assert_close(layer.router.expert_bias, 0.25 * torch.sign(7 * K / E - load))
    with pytest.raises(ValueError, match="no bias to move; give it moe_bias_update_rate"):
        MoE(D, **SETTINGS).update_expert_bias(load)


def test_jitter_draws_its_own_keys() -> None:
    layer = MoE(D, **SETTINGS, moe_jitter_eps=0.3)
    x = torch.randn(2, 8, D)
    assert not torch.equal(layer(x).y, layer(x).y)
    layer.eval()
    assert torch.equal(layer(x).y, layer(x).y)


def _on_two_ranks() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 6, D, dtype=torch.float64), torch.randn(2, 6, D, dtype=torch.float64)
    whole = MoE(D, **SETTINGS, dtype=torch.float64, init_std=0.5)
    whole(x).y.backward(dy)
    rank, group = dist.get_rank(), dist.group.WORLD
    part = MoE(D, **SETTINGS, dtype=torch.float64, init_std=0.5, expert_group=group)
    assert part.experts.w1.shape[0] == E // 2
    part(x[rank]).y.backward(dy[rank])
    for name in ("w1", "w2"):
        mine = slice(rank * E // 2, (rank + 1) * E // 2)
        expected = getattr(whole.experts, name).grad[mine]
        torch.testing.assert_close(getattr(part.experts, name).grad, expected, rtol=1e-12, atol=1e-12)
    dist.all_reduce(part.router.weight.grad)
    torch.testing.assert_close(part.router.weight.grad, whole.router.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.dist
def test_experts_divide_among_ranks() -> None:
    run_ranks([2], _on_two_ranks)


def test_the_grouped_operator_is_public() -> None:
    layer = MoE(D, **SETTINGS, init_std=0.5)
    x = torch.randn(6, D)
    routing = layer.router(x.unsqueeze(0))
    y = experts_ffn(
        x, routing.weights, routing.experts, layer.experts.w1, layer.experts.w2,
        activation="silu", gated=True, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(y, layer(x).y, rtol=1e-5, atol=1e-6)
