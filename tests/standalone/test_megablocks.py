"""MegaBlocks' layers by our kernels, held to its formulas written out for one token at a time."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmfoundry.config import ConfigError
from llmfoundry.standalone import megablocks
from llmfoundry.standalone.megablocks import (
    Arguments,
    MoE,
    batched_load_balancing_loss,
    batched_router_zloss,
    clear_load_balancing_loss,
    dMoE,
)
from tests.parallel.ranks import run_ranks

S, B, D, FF, E = 5, 2, 16, 24, 4
BASE = {
    **{"hidden_size": D, "ffn_hidden_size": FF, "moe_num_experts": E, "moe_top_k": 2, "fp16": False, "device": "cpu"},
    **{"init_method": partial(torch.nn.init.normal_, std=0.5)},
    **{"output_layer_init_method": partial(torch.nn.init.normal_, std=0.5)},
}


@pytest.fixture(autouse=True)
def _no_losses_left() -> None:
    clear_load_balancing_loss()


def arguments(**more: object) -> Arguments:
    return Arguments(**BASE | more)


def formula(layer: dMoE, x: Tensor, args: Arguments, capacity: int | None = None) -> Tensor:
    """MegaBlocks' mixture from its own state dict, slot by slot; without the bias."""
    state = layer.state_dict()
    tokens = x.reshape(-1, D)
    scores = (tokens @ state["router.layer.weight"].T).softmax(-1)
    weights, experts = scores.topk(args.moe_top_k)
    if args.moe_normalize_expert_weights:
        weights = weights / weights.norm(p=args.moe_normalize_expert_weights, dim=-1, keepdim=True)
    taken = [0] * E
    y = torch.zeros_like(tokens)
    for t in range(len(tokens)):
        for k in range(args.moe_top_k):
            e = int(experts[t, k])
            taken[e] += 1
            if capacity is not None and taken[e] > capacity:
                continue
            y[t] += weights[t, k] * _expert(state, e, tokens[t], args, dropless=capacity is None)
    return y.view_as(x)


def _expert(state: dict[str, Tensor], e: int, token: Tensor, args: Arguments, dropless: bool) -> Tensor:
    if not dropless:
        return args.activation_fn(token @ state["experts.mlp.w1"][e]) @ state["experts.mlp.w2"][e]
    w1, w2 = (state[f"experts.mlp.{name}"].view(E, FF, D)[e] for name in ("w1", "w2"))
    a = args.activation_fn(w1 @ token)
    if args.mlp_type == "glu":
        a = a * (state["experts.mlp.v1"].view(E, FF, D)[e] @ token)
    return a @ w2


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mlp_type": "glu"},
        {"mlp_type": "glu", "activation_fn": F.silu, "moe_normalize_expert_weights": 1},
        {"moe_top_k": 1},
        {"moe_top_k": 4, "activation_fn": torch.relu, "moe_normalize_expert_weights": 2.0},
    ],
    ids=["defaults", "glu", "swiglu, normalised", "top 1", "all, relu, 2-norm"],
)
def test_dmoe_is_the_formula(more: dict[str, object]) -> None:
    args = arguments(**more)
    layer, x = dMoE(args), torch.randn(S, B, D)
    y, bias = layer(x)
    torch.testing.assert_close(y, formula(layer, x, args), rtol=1e-4, atol=1e-4)
    assert bias is layer.bias and bias.tolist() == [0.0] * D


@pytest.mark.parametrize(("factor", "top_k"), [(1, 1), (0.5, 2), (2, 2), (0, 2)])
def test_moe_drops_beyond_its_capacity_in_token_order(factor: float, top_k: int) -> None:
    args = arguments(moe_capacity_factor=factor, moe_top_k=top_k, bias=False)
    layer, x = MoE(args), torch.randn(S, B, D)
    capacity = int(factor * S * B * top_k / E) if factor else S * B * top_k
    torch.testing.assert_close(layer(x), formula(layer, x, args, capacity), rtol=1e-4, atol=1e-4)


def test_the_bias_is_one_per_layer_and_may_be_added() -> None:
    layer = dMoE(arguments(return_bias=False))
    x = torch.randn(S, B, D)
    before = layer(x)
    with torch.no_grad():
        layer.bias += 1.0
    torch.testing.assert_close(layer(x), before + 1.0)
    assert dMoE(arguments(bias=False)).bias is None
    assert dMoE(arguments(bias=False))(x).shape == x.shape, "without a bias only the output is returned"


def test_the_losses_are_theirs() -> None:
    args = arguments(num_layers=2, moe_loss_weight=0.3, moe_zloss_weight=0.7)
    layers = [dMoE(args) for _ in range(2)]
    x = torch.randn(S, B, D)
    expected, expected_z = torch.zeros(()), []
    for layer in layers:
        layer(x)
        logits = x.view(-1, D) @ layer.router.weight.T
        counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=E).float()
        scale = E * 0.3 / (2 * S * B * 2)  # E * weight / (layers * tokens * top_k)
        expected = expected + scale * torch.dot(counts, logits.softmax(-1).mean(0))
        expected_z.append(0.7 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(batched_load_balancing_loss(args), expected)
    torch.testing.assert_close(batched_router_zloss(args), torch.stack(expected_z))
    batched_load_balancing_loss(args).backward()
    assert all(layer.router.weight.grad.norm() > 0 for layer in layers)
    clear_load_balancing_loss()
    with pytest.raises(ValueError, match="0 layers have run in training, and num_layers=2"):
        batched_load_balancing_loss(args)


def test_a_forward_that_is_computed_again_counts_once() -> None:
    args = arguments()
    layer, x = dMoE(args), torch.randn(S, B, D, requires_grad=True)
    y, _ = checkpoint(layer, x, use_reentrant=False)
    before = batched_load_balancing_loss(args).item()
    y.sum().backward()
    assert batched_load_balancing_loss(args).item() == before


def test_nothing_is_kept_in_evaluation_or_without_weights() -> None:
    dMoE(arguments()).eval()(torch.randn(S, B, D))
    silent = arguments(moe_loss_weight=0, moe_zloss_weight=0)
    dMoE(silent)(torch.randn(S, B, D))
    assert megablocks.get_load_balancing_loss() == [] and batched_load_balancing_loss(silent) == 0.0


def test_jitter_is_for_training() -> None:
    layer, x = dMoE(arguments(moe_jitter_eps=0.4, bias=False)), torch.randn(S, B, D)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", [dMoE, MoE])
@pytest.mark.parametrize("more", [{}, {"mlp_type": "glu", "bias": False, "shared_expert": True}], ids=["mlp", "glu"])
def test_state_dicts_have_their_names_and_come_back(kind: type[dMoE], more: dict[str, object]) -> None:
    one, two = kind(arguments(**more)), kind(arguments(**more))
    state = one.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["router.layer.weight"] == (E, D)
    assert shapes["experts.mlp.w2"] == ((E * FF, D) if kind is dMoE else (E, FF, D))
    assert ("experts.bias" in shapes) != bool(more)
    two.load_state_dict(state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"activation_fn": torch.tanh}, "activation_fn=.* is none of silu, gelu"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2 is not supported"),
        ({"moe_expert_model_parallelism": True}, "needs expert_parallel_group"),
        ({"shared_expert": True}, "shared_expert=True has biases"),
        ({"moe_top_k": 9}, "moe_top_k=9 exceeds moe_num_experts=4"),
    ],
    ids=["activation", "pipeline", "no group", "shared expert", "top k"],
)
def test_what_is_not_supported_is_named(more: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        dMoE(arguments(**more))


def test_code_written_for_megablocks_runs_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "megablocks"]:
        monkeypatch.delitem(sys.modules, name)
    megablocks.install()
    code = """
from megablocks.layers import dmoe, moe
from megablocks.layers.arguments import Arguments
from megablocks.layers.dmoe import dMoE
import megablocks.layers.moe as losses
args = Arguments(hidden_size=16, ffn_hidden_size=24, moe_num_experts=4, fp16=False, device="cpu")
layer = dmoe.dMoE(args)
out, bias = layer(x)
(out.sum() + losses.batched_load_balancing_loss(args)).backward()
moe.clear_load_balancing_loss()
"""
    names: dict[str, object] = {"x": torch.randn(S, B, D)}
    exec(code, names)
    assert isinstance(names["layer"], dMoE) and names["layer"].experts.w1.grad is not None
    for name in [name for name in sys.modules if name.split(".")[0] == "megablocks"]:
        del sys.modules[name]


def _on_two_ranks() -> None:
    more = {"bias": False, "mlp_type": "glu"}
    torch.manual_seed(0)
    whole = dMoE(arguments(**more)).double()
    torch.manual_seed(0)
    part = dMoE(arguments(**more, moe_expert_model_parallelism=True, expert_parallel_group=dist.group.WORLD)).double()
    assert part.experts.w1.shape[0] == E // 2
    x, dy = torch.randn(2, S, B, D, dtype=torch.float64).unbind()
    rank = dist.get_rank()
    y = part(x if rank == 0 else dy)
    torch.testing.assert_close(y, whole(x if rank == 0 else dy), rtol=1e-12, atol=1e-12)


@pytest.mark.dist
def test_expert_parallelism_over_two_ranks() -> None:
    run_ranks([2], _on_two_ranks)
