"""The experts' backends in plain PyTorch against each other: outputs and every gradient.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from llmfoundry.kernels.experts import ExpertKind, experts_ffn, resolve_backend
from llmfoundry.kernels.low_rank import ExpertAdapters, LowRank


class Row(NamedTuple):
    """One shape, and how tokens choose."""

    t: int
    d: int
    f: int
    e: int
    k: int
    gated: bool
    activation: str
    routing: str
    biases: bool = False
    limit: float | None = None
    rank: int = 0  # of adapters
    adapted: str = "up down"
    dropout: float = 0.0


ROWS = [
    Row(64, 32, 24, 8, 2, True, "silu", "natural"),
    Row(33, 16, 40, 4, 4, True, "gelu", "natural", biases=True),
    Row(50, 16, 8, 8, 2, False, "relu2", "empty"),
    Row(50, 16, 8, 8, 2, True, "silu", "empty", biases=True),
    Row(29, 24, 16, 8, 1, True, "silu", "one"),
    Row(29, 24, 16, 8, 1, False, "gelu_tanh", "one", biases=True),
    Row(40, 16, 16, 4, 2, True, "silu", "elsewhere", biases=True),
    Row(40, 16, 16, 4, 2, True, "swiglu_oss", "natural", biases=True, limit=0.5),
    Row(1, 8, 8, 1, 1, True, "silu", "natural"),
    Row(0, 8, 8, 4, 2, True, "silu", "natural"),
    Row(64, 32, 24, 8, 2, True, "silu", "natural", rank=3),
    Row(40, 16, 16, 4, 2, True, "swiglu_oss", "elsewhere", biases=True, limit=0.5, rank=4),
    Row(50, 16, 8, 8, 2, False, "relu2", "empty", rank=2, adapted="up"),
    Row(50, 16, 8, 8, 2, True, "gelu", "empty", rank=2, adapted="down"),
    Row(0, 8, 8, 4, 2, True, "silu", "natural", rank=2),
]
each_row = pytest.mark.parametrize("row", ROWS, ids=str)


def draw(row: Row, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors that get gradients, and the experts of each token."""
    halves = 2 if row.gated else 1
    leaves = {
        "x": torch.randn(row.t, row.d, dtype=dtype),
        "weights": torch.rand(row.t, row.k, dtype=dtype),
        "w1": torch.randn(row.e, row.f * halves, row.d, dtype=dtype) / row.d**0.5,
        "w2": torch.randn(row.e, row.d, row.f, dtype=dtype) / row.f**0.5,
    }
    if row.biases:
        leaves |= {
            "b1": torch.randn(row.e, row.f * halves, dtype=dtype),
            "b2": torch.randn(row.e, row.d, dtype=dtype),
        }
    if row.rank and "up" in row.adapted:
        leaves |= {
            "up_a": torch.randn(row.e, row.rank, row.d, dtype=dtype) / row.d**0.5,
            "up_b": torch.randn(row.e, row.f * halves, row.rank, dtype=dtype),
        }
    if row.rank and "down" in row.adapted:
        leaves |= {
            "down_a": torch.randn(row.e, row.rank, row.f, dtype=dtype) / row.f**0.5,
            "down_b": torch.randn(row.e, row.d, row.rank, dtype=dtype),
        }
    scores = torch.rand(row.t, row.e)
    if row.routing == "empty":
        scores[:, : row.e // 2] = -1
    experts = scores.topk(row.k, dim=1).indices
    if row.routing == "one":
        experts[:] = row.e // 2
    if row.routing == "elsewhere":
        experts[torch.rand(row.t, row.k) < 0.4] = row.e
    return leaves, experts


def outcome(row: Row, leaves: dict[str, Tensor], experts: Tensor, **how: object) -> dict[str, Tensor]:
    """The output and the gradient of a fixed projection of it."""
    copies = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    tensors = {name: copies.get(name) for name in ("b1", "b2")}
    if row.rank:
        up, down = (
            LowRank(copies[f"{side}_a"], copies[f"{side}_b"]) if side in row.adapted else None
            for side in ("up", "down")
        )
        how["adapters"] = ExpertAdapters(up, down, 0.3, row.dropout)
    y = experts_ffn(
        copies["x"], copies["weights"], experts, copies["w1"], copies["w2"], **tensors,
        activation=row.activation, gated=row.gated, limit=row.limit, **how,
    )  # fmt: skip
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    y.backward(direction)
    grads = {f"d{name}": copy.grad for name, copy in copies.items()}
    return {"y": y.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


@each_row
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_grouped_equals_reference(row: Row, dtype: torch.dtype, tolerance: float) -> None:
    leaves, experts = draw(row, dtype)
    true = outcome(row, leaves, experts, backend="reference")
    ours = outcome(row, leaves, experts, backend="grouped_mm")
    assert ours.keys() >= true.keys()
    for name, value in true.items():
        scale = value.abs().max().clamp_min(1e-30) if value.numel() else 1.0
        assert ((ours[name] - value).abs() / scale <= tolerance).all(), name


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_an_adapter_beside_the_weight_is_one_inside_it(backend: str) -> None:
    row = Row(64, 32, 24, 8, 2, True, "silu", "elsewhere", biases=True, rank=3)
    leaves, experts = draw(row, torch.float64)
    found = outcome(row, leaves, experts, backend=backend)
    merged = {name: value for name, value in leaves.items() if "_" not in name}
    merged["w1"] = leaves["w1"] + 0.3 * leaves["up_b"] @ leaves["up_a"]
    merged["w2"] = leaves["w2"] + 0.3 * leaves["down_b"] @ leaves["down_a"]
    true = outcome(row._replace(rank=0), merged, experts, backend="reference")
    for weight, side in (("dw1", "up"), ("dw2", "down")):  # W' = W + s B A, so dB = s dW' A^T and dA = s B^T dW'
        true[f"d{side}_b"] = 0.3 * true[weight] @ leaves[f"{side}_a"].transpose(1, 2)
        true[f"d{side}_a"] = 0.3 * leaves[f"{side}_b"].transpose(1, 2) @ true[weight]
    assert found.keys() == true.keys()
    for name, value in true.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
@pytest.mark.parametrize("ratio", [3e-3, 1e-3])
def test_in_bf16_a_small_adapter_acts_as_much_as_it_should(ratio: float, backend: str) -> None:
    row = Row(4096, 64, 64, 4, 2, False, "relu", "natural", rank=4, adapted="up")
    leaves, experts = draw(row, torch.float64)
    leaves = {name: value.bfloat16().double() for name, value in leaves.items()}
    wide = (leaves["up_b"] @ leaves["up_a"]).std() / leaves["w1"].std()
    adapters = ExpertAdapters(LowRank(leaves["up_a"], leaves["up_b"]), None, float(ratio / wide))

    def output(dtype: torch.dtype, with_adapter: bool) -> Tensor:
        of = {name: value.to(dtype) for name, value in leaves.items()}
        used = adapters._replace(up=LowRank(of["up_a"], of["up_b"])) if with_adapter else None
        how = {"activation": "relu", "gated": False, "backend": backend, "adapters": used}
        return experts_ffn(of["x"], of["weights"].to(dtype), experts, of["w1"], of["w2"], **how).double()

    effect = output(torch.float64, True) - output(torch.float64, False)
    found = output(torch.bfloat16, True) - output(torch.bfloat16, False)
    assert effect.norm() < 0.01 * output(torch.float64, False).norm()
    share = float((found * effect).sum() / effect.square().sum())  # 1: as much as it should, but for rounding noise
    assert abs(share - 1) < 0.05
    delta = adapters.scale * leaves["up_b"] @ leaves["up_a"]
    merged = (leaves["w1"] + delta).bfloat16().double() - leaves["w1"]
    left = float((merged * delta).sum() / delta.square().sum())
    assert left == pytest.approx({3e-3: 0.93, 1e-3: 0.57}[ratio], abs=0.03), "inside the weight it would not"


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_dropout_of_what_adapters_see_has_exact_gradients(backend: str) -> None:
    row = Row(40, 16, 12, 4, 2, True, "silu", "elsewhere", rank=3, dropout=0.4)
    leaves, experts = draw(row, torch.float64)

    def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(3)  # the same choice
        return outcome(row, values, experts, backend=backend)

    found = run(leaves)
    direction = torch.linspace(-1, 1, found["y"].numel(), dtype=torch.float64).view_as(found["y"]).cos()
    plain = outcome(row._replace(dropout=0.0), leaves, experts, backend=backend)
    assert (found["y"] - plain["y"]).abs().max() > 0.1
    for name, value in leaves.items():
        step = 1e-6 * torch.randn_like(value)
        ahead, behind = (run(leaves | {name: value + sign * step})["y"] for sign in (1, -1))
        slope = ((ahead - behind) * direction).sum() / 2
        torch.testing.assert_close((found[f"d{name}"] * step).sum(), slope, rtol=1e-5, atol=1e-11)


def test_an_expert_without_tokens_gets_a_gradient_of_zero() -> None:
    row = Row(50, 16, 8, 8, 2, True, "silu", "empty")
    leaves, experts = draw(row, torch.float32)
    found = outcome(row, leaves, experts, backend="grouped_mm")
    for name in ("dw1", "dw2"):
        assert not found[name][: row.e // 2].any() and found[name][row.e // 2 :].any()


def test_twice_gives_the_same_bits() -> None:
    row = ROWS[0]
    leaves, experts = draw(row, torch.float32)
    one, two = (outcome(row, leaves, experts, backend="grouped_mm") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_only_what_backward_needs_is_kept() -> None:
    row = Row(256, 32, 64, 4, 2, True, "silu", "natural")
    leaves, experts = draw(row, torch.float32)
    copies = [leaves[name].requires_grad_() for name in ("x", "weights", "w1", "w2")]
    own = {copy.data_ptr() for copy in copies}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts_ffn(*copies[:2], experts, *copies[2:], activation="silu", gated=True, backend="grouped_mm")
    beside = sum(size for pointer, size in kept.items() if pointer not in own)
    h = row.t * row.k * 2 * row.f * 4
    assert beside <= 1.05 * h, "x is the caller's; h and a few int32 indices are all that is added"


def test_a_backend_that_cannot_run_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    where = (ExpertKind(8, 8), torch.device("cpu"), torch.float32)
    assert resolve_backend("auto", *where) == "grouped_mm"
    with pytest.raises(ValueError, match="moe_impl=triton: .*use moe_impl=auto"):
        resolve_backend("triton", *where)
    with pytest.raises(ValueError, match="moe_impl=fast: unknown"):
        resolve_backend("fast", *where)


@pytest.mark.parametrize(
    ("kind", "why", "falls_back_to"),
    [
        (ExpertKind(64, 64, dropout=True), "no dropout", "grouped_mm"),
        (ExpertKind(64, 60), "multiples of 8", "reference"),
    ],
)
def test_auto_on_a_gpu_runs_experts_that_triton_cannot(
    kind: ExpertKind, why: str, falls_back_to: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as if a GPU of today were there
    where = (torch.device("cuda"), torch.bfloat16)
    for runs in (ExpertKind(64, 64), ExpertKind(64, 64, "swiglu_oss", biased=True, limit=7.0)):
        assert resolve_backend("auto", runs, *where) == "triton"
    assert resolve_backend("auto", kind, *where) == falls_back_to
    assert why in caplog.text
    with pytest.raises(ValueError, match=f"moe_impl=triton: .*{why}.*use moe_impl=auto"):
        resolve_backend("triton", kind, *where)


def test_shapes_that_do_not_fit_are_named() -> None:
    leaves, experts = draw(ROWS[0], torch.float32)
    with pytest.raises(ValueError, match="does not fit w2"):
        experts_ffn(leaves["x"], leaves["weights"], experts, leaves["w1"][:, :-1], leaves["w2"],
                    activation="silu", gated=True, backend="grouped_mm")  # fmt: skip
    with pytest.raises(ValueError, match="unknown; known"):
        experts_ffn(leaves["x"], leaves["weights"], experts, leaves["w1"], leaves["w2"],
                    activation="sigh", gated=True, backend="grouped_mm")  # fmt: skip
