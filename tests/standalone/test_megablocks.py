"""MegaBlocks' layers by our kernels, held to its formulas written out for one token at a time."""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

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
    clear_router_zloss,
    dMoE,
    from_megatron,
    get_load_balancing_loss,
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
    clear_router_zloss()


# Of MegaBlocks 0.10, in its order. Defaults that are functions or depend on the machine are in another test.
THEIRS: dict[str, object] = {
    **{"hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 1, "bias": True, "return_bias": True},
    **{"activation_fn": ..., "moe_num_experts": 1, "moe_top_k": 1, "moe_capacity_factor": 1},
    **{"moe_normalize_expert_weights": None, "moe_loss_weight": 0.1, "moe_jitter_eps": None, "moe_lbl_in_fp32": False},
    **{"moe_expert_model_parallelism": False, "expert_parallel_group": None, "pipeline_model_parallel_size": 1},
    **{"num_layers_per_virtual_pipeline_stage": None, "memory_optimized_mlp": False, "mlp_type": "mlp"},
    **{"mlp_impl": "grouped", "fp16": True, "bf16": False, "device": ..., "init_method": ...},
    **{"output_layer_init_method": ..., "uniform_expert_assignment": False, "shared_expert": False},
    **{"fc_cls": torch.nn.Linear, "fc_kwargs": {}, "remat_act_fn": True, "shared_expert_hidden_size": 4096},
    **{"shared_expert_weighted_sum": False, "moe_zloss_weight": 0, "moe_zloss_in_fp32": False},
}


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


def test_arguments_are_theirs_by_name_order_and_default() -> None:
    args = Arguments()
    assert [field.name for field in fields(args)] == list(THEIRS)
    assert {name: getattr(args, name) for name, value in THEIRS.items() if value is not ...} == {
        name: value for name, value in THEIRS.items() if value is not ...
    }
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(args.activation_fn(x), F.gelu(x, approximate="tanh"))
    assert torch.empty(2, device=args.device).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    drawn = torch.empty(10_000)
    for method in (args.init_method, args.output_layer_init_method):
        method(drawn)
        assert abs(drawn.mean()) < 0.001 and drawn.std() == pytest.approx(0.02, rel=0.05)


def test_arguments_come_from_megatron_by_name() -> None:
    args = from_megatron(SimpleNamespace(hidden_size=D, moe_top_k=3, fp16=False, unknown=1))
    assert (args.hidden_size, args.moe_top_k, args.dtype) == (D, 3, torch.float32)
    assert args.ffn_hidden_size == 4096


@pytest.mark.parametrize(
    ("more", "dtype"),
    [({"fp16": True}, torch.float16), ({"bf16": True}, torch.bfloat16), ({}, torch.float32)],
    ids=["fp16", "bf16", "float32"],
)
def test_parameters_have_the_dtype_of_the_arguments(more: dict[str, object], dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in dMoE(arguments(**more)).parameters()} == {dtype}


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
    kept = get_load_balancing_loss()  # MegaBlocks' own formula takes it as it is
    assert [(load.shape, scores.shape) for load, scores in kept] == [((E,), (S * B, E))] * 2
    tokens_per_expert, expert_scores = torch.cat([a for a, _ in kept]), torch.cat([b for _, b in kept], dim=1)
    torch.testing.assert_close(scale * torch.dot(tokens_per_expert, expert_scores.mean(0)), expected)
    batched_load_balancing_loss(args).backward()
    assert all(layer.router.weight.grad.norm() > 0 for layer in layers)
    clear_load_balancing_loss()
    assert batched_router_zloss(args).shape == (2,), "each of the two losses is cleared by its own function"
    clear_router_zloss()
    with pytest.raises(ValueError, match="no layer has run in training"):
        batched_router_zloss(args)
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
    dMoE(arguments(moe_loss_weight=0, moe_zloss_weight=0.1))(torch.randn(S, B, D))
    assert get_load_balancing_loss() == [] and batched_load_balancing_loss(silent) == 0.0


@pytest.mark.parametrize("kind", [dMoE, MoE])
def test_autocast_and_a_batch_without_tokens(kind: type[dMoE]) -> None:
    args = arguments(return_bias=False)
    layer, x = kind(args), torch.randn(S, B, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.nn.functional.linear(x, torch.eye(D)))
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), layer(x), rtol=0.1, atol=0.02)
    clear_load_balancing_loss()
    layer(x[:0])
    assert batched_load_balancing_loss(args) == 0.0
    clear_load_balancing_loss()


def test_jitter_is_for_training() -> None:
    layer, x = dMoE(arguments(moe_jitter_eps=0.4, bias=False)), torch.randn(S, B, D)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_capacity_knows_no_gated_shared_expert() -> None:
    with pytest.raises(ConfigError, match="shared_expert=True of MoE has no gate here"):
        MoE(arguments(mlp_type="glu", bias=False, shared_expert=True))


def test_jitter_reaches_the_router_alone() -> None:
    alone = dMoE(arguments(moe_jitter_eps=0.4, bias=False, moe_num_experts=1, moe_top_k=1))
    x = torch.randn(S, B, D)
    assert torch.equal(alone(x), alone(x)), "the one expert has the weight 1, and sees x as it is"


def test_uniform_assignment_takes_experts_in_turn_and_weights_of_the_best() -> None:
    args = arguments(uniform_expert_assignment=True, bias=False)
    layer, x = dMoE(args), torch.randn(S, B, D)
    tokens, state = x.view(-1, D), layer.state_dict()
    best = (tokens @ state["router.layer.weight"].T).softmax(-1).topk(2).values
    slots = (torch.arange(S * B * 2) % E).view(-1, 2)
    rows = [
        sum(best[t, k] * _expert(state, int(slots[t, k]), tokens[t], args, dropless=True) for k in range(2))
        for t in range(S * B)
    ]
    torch.testing.assert_close(layer(x).view(-1, D), torch.stack(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "mlp_type"), [(dMoE, "mlp"), (dMoE, "glu"), (MoE, "mlp")])
def test_a_shared_expert_is_added(kind: type[dMoE], mlp_type: str) -> None:
    args = arguments(bias=False, mlp_type=mlp_type, shared_expert=True, shared_expert_hidden_size=8,
                     moe_capacity_factor=0)  # fmt: skip
    layer, x = kind(args), torch.randn(S, B, D)
    state = layer.state_dict()
    up, down = (state[f"shared_expert.{name}.weight"] for name in ("up_proj", "down_proj"))
    hidden = x @ up.T
    if mlp_type == "glu":
        hidden = args.activation_fn(x @ state["shared_expert.gate_proj.weight"].T) * hidden
    else:
        hidden = args.activation_fn(hidden)
    assert up.shape == (8, D)
    routed = layer(x) - hidden @ down.T
    capacity = S * B * 2 if kind is MoE else None
    torch.testing.assert_close(routed, formula(layer, x, args, capacity), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [dMoE, MoE])
@pytest.mark.parametrize("more", [{}, {"bias": False, "shared_expert": True}], ids=["bias", "shared expert"])
@pytest.mark.parametrize("mlp_type", ["mlp", "glu"])
def test_state_dicts_have_their_names_and_come_back(kind: type[dMoE], more: dict[str, object], mlp_type: str) -> None:
    more = more | {"mlp_type": "mlp" if kind is MoE else mlp_type}
    one, two = kind(arguments(**more)), kind(arguments(**more))
    state = one.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["router.layer.weight"] == (E, D)
    assert shapes["experts.mlp.w2"] == ((E * FF, D) if kind is dMoE else (E, FF, D))
    names = {"router.layer.weight", "experts.mlp.w1", "experts.mlp.w2"}
    gated = more["mlp_type"] == "glu"
    names |= {"experts.mlp.v1"} if gated else set()
    if "shared_expert" in more:
        names |= {f"shared_expert.{name}.weight" for name in ("up_proj", "down_proj", *["gate_proj"] * gated)}
    else:
        names |= {"experts.bias"}
    assert set(shapes) == names
    two.load_state_dict(state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"activation_fn": torch.tanh}, "activation_fn=.* is not one of silu, gelu"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2 is not supported"),
        ({"num_layers_per_virtual_pipeline_stage": 1}, "num_layers_per_virtual_pipeline_stage=1 is not supported"),
        ({"moe_expert_model_parallelism": True}, "needs a process group"),
        ({"fc_cls": torch.nn.Bilinear}, "fc_cls=.* is not supported"),
        ({"fc_kwargs": {"a": 1}}, "fc_kwargs=.* is not supported"),
        ({"shared_expert_weighted_sum": True}, "shared_expert_weighted_sum=True is not supported"),
        ({"mlp_type": "gru"}, "mlp_type='gru' is neither mlp nor glu"),
        ({"mlp_impl": "dense"}, "mlp_impl='dense' is neither grouped nor sparse"),
        ({"activation_fn": None}, "activation_fn=None is not one of silu, gelu"),
        ({"shared_expert": True}, "shared_expert=True has biases"),
        ({"moe_top_k": 9}, "moe_top_k=9 exceeds moe_num_experts=4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
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
    x, other = torch.randn(2, S, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    rank, own = dist.get_rank(), E // 2
    for kind, more in [(dMoE, {"mlp_type": "glu"}), (dMoE, {}), (MoE, {"moe_capacity_factor": 0})]:
        torch.manual_seed(0)
        whole = kind(arguments(**more)).double()
        torch.manual_seed(0)
        part = kind(arguments(**more, moe_expert_model_parallelism=True)).double()  # None: the group of all ranks
        named = kind(arguments(**more, moe_expert_model_parallelism=True, expert_parallel_group=dist.group.WORLD))
        assert part.experts.w1.shape[0] == own and named.expert_group is part.expert_group
        (here, bias), (expected, _) = part(x if rank == 0 else other), whole(x if rank == 0 else other)
        torch.testing.assert_close(here, expected, rtol=1e-12, atol=1e-12)
        losses = get_load_balancing_loss()
        assert bias is part.bias and len(losses) == 2
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12), "of this rank's tokens"
        clear_load_balancing_loss()
        here.square().sum().backward()
        sum(whole(tokens)[0].square().sum() for tokens in (x, other)).backward()
        for name in ("w1", "w2"):
            theirs = getattr(whole.experts, name).grad[rank * own : (rank + 1) * own]
            torch.testing.assert_close(getattr(part.experts, name).grad, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.dist
def test_expert_parallelism_over_two_ranks() -> None:
    run_ranks([2], _on_two_ranks)
