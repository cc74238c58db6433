"""Experts and linear layers in e4m3 against float32: on a CPU by the plain references, on a GPU by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmfoundry.kernels import experts_scaled  # noqa: E402
from llmfoundry.kernels.experts import ExpertKind, e4m3_refusal, experts_ffn  # noqa: E402
from llmfoundry.kernels.late import LateGradients  # noqa: E402
from llmfoundry.kernels.routing import sort_by_expert  # noqa: E402
from llmfoundry.kernels.scaled_linear import scaled_linear, scaled_linear_backward  # noqa: E402
from llmfoundry.layers.scaled import ScaledLinear  # noqa: E402

PLACES = [
    pytest.param("cpu", id="reference", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
TOKENS, EXPERTS, TOP_K = 96, 4, 2
D, HIDDEN = (256, 192) if torch.cuda.is_available() else (64, 48)


class Drawn(NamedTuple):
    x: Tensor  # (T, D)
    weights: Tensor  # (T, K)
    experts: Tensor  # (T, K)
    w1: Tensor  # (E, 2F or F, D)
    w2: Tensor  # (E, D, F)
    dy: Tensor  # (T, D)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, self.w1, self.w2]


def draw(device: str, gated: bool = True, empty: bool = False) -> Drawn:
    g = torch.Generator().manual_seed(1)
    experts = torch.rand(TOKENS, EXPERTS, generator=g).topk(TOP_K, 1).indices
    experts[:5, 1] = EXPERTS  # no expert
    if empty:
        experts[experts == 2] = EXPERTS
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    w1 = make(EXPERTS, HIDDEN * (2 if gated else 1), D) * D**-0.5
    drawn = Drawn(
        make(TOKENS, D), torch.rand(TOKENS, TOP_K, generator=g).to(device), experts.to(device), w1,
        make(EXPERTS, D, HIDDEN) * HIDDEN**-0.5, make(TOKENS, D),
    )  # fmt: skip
    for leaf in drawn.leaves:
        leaf.requires_grad_()
    return drawn


def decibels(found: Tensor, true: Tensor) -> float:
    """The ratio of signal to noise."""
    true = true.float()
    return float(10 * torch.log10(true.square().sum() / (found.float() - true).square().sum()))


def run(drawn: Drawn, backend: str, gated: bool = True, activation: str = "silu") -> list[Tensor]:
    """The output, and the gradients of x, routing weights and matrices."""
    unit = {"activation": activation, "gated": gated}
    y = experts_ffn(*drawn[:5], **unit, backend=backend)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, drawn.leaves, drawn.dy)]


@pytest.mark.parametrize("device", PLACES)
def test_every_product_is_25_decibels_above_its_noise(device: str) -> None:
    """Two random operands of e4m3, each 31.5 dB above its own, give 28.5."""
    drawn = draw(device)
    order = sort_by_expert(drawn.experts, EXPERTS)
    run = experts_scaled._passes(drawn.x)
    n_rows, n = drawn.experts.numel(), int(order.expert_start[-1])
    tiles = run.tiles(order.expert_start, n_rows)
    x, dy = (each.detach()[order.row_slot.long() // TOP_K] for each in (drawn.x, drawn.dy))
    w1, w2 = drawn.w1.detach(), drawn.w2.detach()
    dtype = w1.dtype
    h, a = torch.randn(n_rows, 2 * HIDDEN, device=device), torch.randn(n_rows, HIDDEN, device=device)
    rows = {"x": x, "dy": dy, "h": h.to(x), "a": a.to(x)}
    quantised = {name: run.rows(each) for name, each in rows.items()}
    turned = [run.turned_weight(each, run.rows(each).scale.amax(1)) for each in (w1, w2)]
    products = {
        "up": (quantised["x"], run.rows(w1), x, w1.transpose(1, 2)),
        "down": (quantised["a"], run.rows(w2), rows["a"], w2.transpose(1, 2)),
        "da": (quantised["dy"], turned[1], dy, w2),
        "dx": (quantised["h"], turned[0], rows["h"], w1),
    }
    start = order.expert_start.tolist()
    spans = list(zip(start[:-1], start[1:], strict=True))
    for name, (left, right, left_true, right_true) in products.items():
        found = run.product(left, right, tiles, dtype)[:n]
        true = torch.cat([left_true[i:j].float() @ right_true[e].float() for e, (i, j) in enumerate(spans)])
        assert decibels(found, true) > 25, name
    for left_name, right_name in (("dy", "a"), ("h", "x")):
        found = run.weight_grad(quantised[left_name], quantised[right_name], tiles, dtype, None, 0)
        true = torch.stack([rows[left_name][i:j].float().T @ rows[right_name][i:j].float() for i, j in spans])
        assert decibels(found, true) > 25, (left_name, right_name)


@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (False, "relu2")])
@pytest.mark.parametrize("device", PLACES)
def test_outputs_and_gradients_follow_float32(device: str, gated: bool, activation: str) -> None:
    drawn = draw(device, gated, empty=True)
    found, true = (run(drawn, backend, gated, activation) for backend in ("e4m3", "reference"))
    for name, a, b in zip(("y", "dx", "dweights", "dw1", "dw2"), found, true, strict=True):
        assert a.dtype == b.dtype, name
        # Three products follow each other on the way to dw1: 28.5 dB less 5.
        assert decibels(a, b) > 20, name
        assert torch.cosine_similarity(a.flatten().float(), b.flatten().float(), 0) > 0.995, name
    assert found[3][2].eq(0).all(), "an expert without tokens"
    again = run(drawn, "e4m3", gated, activation)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not the same twice"


@pytest.mark.parametrize("device", PLACES)
def test_deferred_weight_gradients_are_the_same(device: str) -> None:
    drawn = draw(device)
    now = run(drawn, "e4m3")
    late = LateGradients()
    w1, w2 = late.weight("w1", drawn.w1), late.weight("w2", drawn.w2)
    y = experts_ffn(*drawn[:3], w1, w2, activation="silu", gated=True, backend="e4m3", late=late, n_rows=TOKENS * TOP_K)
    deferred = torch.autograd.grad(y, drawn.leaves, drawn.dy)
    assert all(torch.equal(a, b) for a, b in zip(now[1:], deferred, strict=True))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("device", PLACES)
def test_what_is_not_finite_reaches_every_gradient(device: str, bad: float) -> None:
    """So that the step is skipped: a conversion to e4m3 would make a large number of an infinite one."""
    for what in ("x", "dy", "w1", "w2"):
        drawn = draw(device)
        with torch.no_grad():
            getattr(drawn, what).view(-1)[7] = bad
        found = run(drawn, "e4m3")
        assert not all(each.isfinite().all() for each in found[1:]), what
        linear = draw(device)
        with torch.no_grad():
            (linear.x if what in ("x", "dy") else linear.w1).view(-1)[7] = bad
        y = scaled_linear(linear.x, linear.w1[0])[0]
        assert not y.isfinite().all(), what


@pytest.mark.parametrize("device", PLACES)
def test_a_linear_layer(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = torch.nn.Linear(64, 48, device=device, dtype=dtype)
    x = torch.randn(2, 24, 64, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 24, 48, device=device, dtype=dtype)

    def both() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]

    true = both()
    layer.__class__ = ScaledLinear
    found = both()
    for name, a, b in zip(("y", "dx", "dw"), found, true, strict=False):
        assert decibels(a, b) > 25, name
    assert torch.equal(found[3], true[3])


def _operands(drawn: Drawn) -> tuple[Tensor, ...]:
    return drawn.x, drawn.weights, drawn.w1, drawn.w2, *sort_by_expert(drawn.experts, EXPERTS)


@pytest.mark.parametrize("device", PLACES)
def test_operators_say_what_they_return(device: str) -> None:
    """For compilers and plans, which see shapes alone."""
    drawn = draw(device)
    checks = "test_faketensor"
    inputs = (*_operands(drawn), "silu", True, TOKENS * TOP_K)
    torch.library.opcheck(experts_scaled._forward, inputs, test_utils=checks)
    _, h, *scales = experts_scaled._forward(*inputs)
    x, weights, w1, w2, *order = inputs[:7]
    back = (drawn.dy, x, weights, h, w1, w2, *scales, *order, "silu", True, TOKENS * TOP_K, True)
    torch.library.opcheck(experts_scaled._backward_rows, back, test_utils=checks)
    _, dy_rows, dy_scale, dh, dh_scale, a, a_scale = experts_scaled._backward_rows(*back)
    grad = (dh, dh_scale, w1, scales[0], *order, TOKENS * TOP_K, TOP_K)
    torch.library.opcheck(experts_scaled._input_gradient, grad, test_utils=checks)
    grad = (dy_rows, dy_scale, a, a_scale, *order[:2], TOKENS * TOP_K, w2.dtype)
    torch.library.opcheck(experts_scaled._weight_gradient, grad, test_utils=checks)
    torch.library.opcheck(scaled_linear, (drawn.x, drawn.w1[0]), test_utils=checks)
    dy, scale = scaled_linear(drawn.x, drawn.w1[0])
    for needs in ((True, True), (False, True), (True, False)):
        grad = (dy, drawn.x, drawn.w1[0], scale, *needs)
        torch.library.opcheck(scaled_linear_backward, grad, test_utils=checks)


def test_what_cannot_be_in_e4m3_is_said() -> None:
    assert e4m3_refusal("auto", ExpertKind(64, 48)) is None
    refusals: list[Callable[[], str | None]] = [
        lambda: e4m3_refusal("grouped_mm", ExpertKind(64, 48)),
        lambda: e4m3_refusal("auto", ExpertKind(64, 40)),
        lambda: e4m3_refusal("auto", ExpertKind(64, 48, biased=True)),
        lambda: e4m3_refusal("auto", ExpertKind(64, 48, "swiglu_oss")),
    ]
    words = ["moe_impl=grouped_mm", "not multiples of 16", "experts with biases", "swiglu_oss with limit=None"]
    for refusal, said in zip(refusals, words, strict=True):
        assert said in str(refusal())
