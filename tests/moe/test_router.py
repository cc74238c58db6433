"""The router against formulas written out, and what must not change a token's way."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmfoundry.config import ConfigError, check
from llmfoundry.hf.family import read_config
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.router import Router, RouterConfig, router_logits, statistics

B, S, D, E = 3, 10, 16, 8


def build(**settings: object) -> Router:
    router = Router(RouterConfig.model_validate({"moe_num_experts": E, "moe_top_k": 2} | settings), D)
    torch.nn.init.normal_(router.weight)
    return router


def inputs() -> Tensor:
    return torch.randn(B, S, D)


def test_softmax_weights_are_the_scores_of_the_chosen() -> None:
    router, x = build(), inputs()
    found = router(x)
    scores = (x.view(-1, D) @ router.weight.T).softmax(-1)
    best = scores.topk(2)
    assert torch.equal(found.experts, best.indices)
    torch.testing.assert_close(found.weights, best.values)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_normalised_weights_have_norm_one_times_the_scaling(p: float) -> None:
    found = build(moe_normalize_expert_weights=p, moe_routed_scaling=2.5)(inputs())
    norm = torch.linalg.vector_norm(found.weights, p, dim=-1)
    torch.testing.assert_close(norm, torch.full_like(norm, 2.5))


def test_the_loss_free_bias_chooses_and_does_not_weigh() -> None:
    router, x = build(moe_score_fn="sigmoid", moe_bias_update_rate=0.001), inputs()
    assert router.expert_bias is not None
    router.expert_bias[5] = 10.0
    found = router(x)
    assert (found.experts == 5).any(1).all(), "everyone takes the expert with the high bias"
    scores = (x.view(-1, D) @ router.weight.T).sigmoid()
    torch.testing.assert_close(found.weights, scores.gather(1, found.experts))


def test_a_cast_of_the_model_keeps_the_small_steps_of_the_bias() -> None:
    router = build(moe_score_fn="sigmoid", moe_bias_update_rate=0.001)
    assert router.expert_bias is not None
    router.expert_bias.fill_(1.001)  # bfloat16 has no number between 1 and 1.0078
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.expert_bias, torch.full_like(router.expert_bias, 1.001))


@pytest.mark.parametrize(("score_fn", "counted"), [("sigmoid", 2), ("softmax", 1)])
def test_experts_come_from_the_best_groups(score_fn: str, counted: int) -> None:
    router = build(moe_score_fn=score_fn, moe_n_groups=4, moe_topk_groups=2, moe_top_k=3)
    found = router(inputs())
    for token in range(B * S):
        groups = found.scores[token].view(4, 2)
        best = groups.topk(counted, dim=1).values.sum(1).topk(2).indices
        allowed = torch.full((4, 2), float("-inf"))
        allowed[best] = groups[best]
        assert set(found.experts[token].tolist()) == set(allowed.flatten().topk(3).indices.tolist())


def test_low_precision_input_is_scored_in_float32() -> None:
    router = build().bfloat16()
    x = inputs().bfloat16()
    found = router(x)
    assert found.logits.dtype == found.weights.dtype == torch.float32
    torch.testing.assert_close(found.logits, x.view(-1, D).float() @ router.weight.float().T)


def test_the_gradient_of_low_precision_input_is_that_of_float32() -> None:
    router, x = build().bfloat16(), inputs().bfloat16().requires_grad_()
    router(x).logits.square().sum().backward()
    copy, weight = x.detach().float().requires_grad_(), router.weight.detach().float().requires_grad_()
    (copy.view(-1, D) @ weight.T).square().sum().backward()
    assert copy.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad, copy.grad.bfloat16())
    torch.testing.assert_close(router.weight.grad, weight.grad.bfloat16())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_frozen_router_costs_no_weight_gradient(device: str) -> None:
    """With adapters, the gradient passes through the router, whose weight is not trained."""
    router, x = build().bfloat16().to(device), inputs().bfloat16().to(device).requires_grad_()
    flops, gradients = [], []
    for trained in (True, False):
        router.weight.requires_grad_(trained)
        loss = router(x).logits.square().sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
        gradients.append(x.grad)
        x.grad = router.weight.grad = None
    assert torch.equal(*gradients) and flops[1] * 2 == flops[0] > 0


def test_jitter_follows_the_row_wherever_it_is_computed() -> None:
    router, x, keys = build(moe_jitter_eps=0.2), inputs(), torch.tensor([7, 11, 13])
    whole = router(x, keys).logits.view(B, S, E)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(router(x[order], keys[order]).logits.view(B, S, E), whole[order])
    assert not torch.equal(router(x, keys + 1).logits.view(B, S, E), whole)
    router.eval()
    plain = router(x).logits
    assert torch.equal(plain, build_like(router, x)), "none in evaluation"
    spread = whole.view(-1, E) / plain
    assert spread.median().item() == pytest.approx(1.0, abs=0.05)


def build_like(router: Router, x: Tensor) -> Tensor:
    return x.view(-1, D) @ router.weight.T


def test_jitter_without_keys_is_an_error() -> None:
    with pytest.raises(ValueError, match="keys"):
        build(moe_jitter_eps=0.1)(inputs())


def test_statistics_are_sums_over_tokens() -> None:
    found = build()(inputs())
    stats = statistics(found)
    assert stats.load.sum() == B * S * 2 and not stats.load.requires_grad
    torch.testing.assert_close(stats.score_sum, found.scores.sum(0))
    torch.testing.assert_close(stats.z_sum, found.logits.exp().sum(-1).log().square().sum())
    torch.testing.assert_close(stats.entropy_sum, -(found.scores * found.scores.log()).sum())


def test_uniform_assignment_is_even() -> None:
    found = build(uniform_expert_assignment=True)(torch.randn(2, 16, D))
    assert torch.equal(statistics(found).load, torch.full((E,), 2 * 16 * 2 / E))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"moe_top_k": 9}, "moe_top_k=9 exceeds moe_num_experts=8; lower moe_top_k or add experts"),
        ({"moe_n_groups": 3}, "does not divide into moe_n_groups=3"),
        ({"moe_n_groups": 4, "moe_topk_groups": 5}, "moe_topk_groups=5 exceeds moe_n_groups=4"),
        ({"moe_n_groups": 8, "moe_topk_groups": 1}, "raise moe_topk_groups"),
    ],
)
def test_impossible_routing_is_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        build(**settings)


TOP_1 = {"moe_top_k": 1, "moe_normalize_expert_weights": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        TOP_1,
        TOP_1 | {"moe_normalize_expert_weights": 2.0},
        TOP_1 | {"moe_score_fn": "sigmoid", "moe_routed_scaling": 2.5},
        TOP_1 | {"moe_n_groups": 4, "moe_topk_groups": 1},
        TOP_1 | {"moe_bias_update_rate": 0.001},
    ],
)
def test_weights_that_are_always_one_are_refused(settings: dict[str, object]) -> None:
    """The router would get no gradient from the loss."""
    model = {"d_model": D, "n_heads": 2, "n_layers": 1, "vocab_size": 16}
    block = {"ffn_type": "moe", "moe_num_experts": E}
    config = check(CausalLMConfig, model | {"ffn_config": block | settings})
    with pytest.raises(ConfigError, match=r"^model.ffn_config.moe_normalize_.*=\d with moe_top_k=1 .* write "):
        config.check_trainable()
    adapted = check(
        CausalLMConfig,
        model | {"ffn_config": block | settings | {"moe_bias_update_rate": 0}, "lora": {"rank": 2, "alpha": 2.0}},
    )
    adapted.check_trainable()  # the router stays as it is


@pytest.mark.parametrize(("model_type", "more"), [("mixtral", {}), ("qwen3_moe", {"norm_topk_prob": True})])
def test_an_imported_model_can_be_used_but_not_trained(model_type: str, more: dict[str, object]) -> None:
    _, config = read_config({"model_type": model_type, "num_experts_per_tok": 1, "num_hidden_layers": 2} | more)
    with pytest.raises(ConfigError, match="moe_top_k=1"):
        config.check_trainable()


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_top_k": 1},
        {"moe_top_k": 1, "moe_score_fn": "sigmoid"},
        {"moe_top_k": 1, "uniform_expert_assignment": True},
        {"moe_normalize_expert_weights": 1.0},
        {"moe_normalize_expert_weights": 2.0, "moe_score_fn": "sigmoid"},
        {"moe_normalize_expert_weights": 1.0, "moe_top_k": E},
        {"moe_normalize_expert_weights": 1.0, "moe_n_groups": 4, "moe_topk_groups": 1},
    ],
)
def test_every_other_router_gets_a_gradient_through_its_weights(settings: dict[str, object]) -> None:
    router = build(**settings)
    weights = router(inputs()).weights
    (weights * torch.randn_like(weights)).sum().backward()
    assert router.weight.grad is not None and router.weight.grad.norm() > 1e-3


def test_one_expert_has_nothing_to_choose() -> None:
    assert build(moe_num_experts=1, **TOP_1)(inputs()).weights.unique().tolist() == [1.0]


@pytest.mark.gpu
def test_gradients_on_bf16_tensor_cores_are_those_of_float32() -> None:
    x = torch.randn(500, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(64, 256, device="cuda") / 16).bfloat16().requires_grad_()
    grad = torch.randn(500, 64, device="cuda")
    found = torch.autograd.grad(router_logits(x, weight, None), (x, weight), grad)
    true = grad.double() @ weight.double(), grad.double().t() @ x.double()
    for a, b in zip(found, true, strict=True):
        # The result is rounded to bf16, half of 2^-8; the operands keep 16 bits.
        assert ((a.double() - b).norm() / b.norm()) < 2**-9
