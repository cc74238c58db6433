"""Each Triton kernel of the experts against its plain reference: float32 in the interpreter, bf16 on a GPU.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, M = T*K rows in expert order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from llmfoundry.kernels import grouped as grouped_file  # noqa: E402
from llmfoundry.kernels import hopper as hopper_file  # noqa: E402
from llmfoundry.kernels import tune  # noqa: E402
from llmfoundry.kernels import up as up_file  # noqa: E402
from llmfoundry.kernels import up_backward as up_backward_file  # noqa: E402
from llmfoundry.kernels import weight_grad as weight_grad_file  # noqa: E402
from llmfoundry.kernels.gather import (  # noqa: E402
    Biases,
    dots_reference,
    expert_sums,
    expert_sums_reference,
    gather,
    gather_and_dots,
    gather_reference,
    slot_sums,
    slot_sums_reference,
    sum_rows,
    sum_rows_reference,
)
from llmfoundry.kernels.grouped import grouped, grouped_reference  # noqa: E402
from llmfoundry.kernels.narrow import (  # noqa: E402
    narrow,
    narrow_grad,
    narrow_grad_reference,
    narrow_reference,
)
from llmfoundry.kernels.routing import Order, sort_by_expert  # noqa: E402
from llmfoundry.kernels.tiles import Beside, Tiles, tile_rows, tile_rows_reference  # noqa: E402
from llmfoundry.kernels.up import up, up_reference  # noqa: E402
from llmfoundry.kernels.up_backward import up_backward, up_backward_reference  # noqa: E402
from llmfoundry.kernels.weight_grad import weight_grad, weight_grad_reference  # noqa: E402
from tests.kernels.devices import DEVICES  # noqa: E402

ROUTINGS = ["natural", "hot", "empty", "none"]
GATES = [(True, "silu"), (True, "gelu"), (False, "relu2"), (False, "gelu_tanh")]
# Of the result's norm. float32: sums of a few dozen products as three TF32 products each. bf16: the product of rounded
# operands is exact, and the result is rounded to 8 bits (2^-9 = 2e-3 at most), twice where a rounded h is read.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


class Drawn(NamedTuple):
    """The inputs of every kernel; rows that have no expert hold NaN, which must not spread."""

    x: Tensor  # (T, D)
    weights: Tensor  # (T, K) float32
    w1: Tensor  # (E, 2F or F, D)
    w2: Tensor  # (E, D, F)
    order: Order
    tiles: Tiles
    on_host: Tiles
    n_rows: int  # with an expert

    @property
    def x_rows(self) -> Tensor:
        """(M, D)"""
        rows = self.x[self.order.row_slot.long() // self.weights.shape[1]]
        return torch.where(torch.arange(len(rows), device=rows.device)[:, None] < self.n_rows, rows, torch.nan)


def draw(device: str, routing: str, gated: bool = True, d: int = 48, f: int = 40, e: int = 5, k: int = 2) -> Drawn:
    large = device == "cuda"
    few = 70 if routing == "hot" else 23  # several steps over the rows of one expert
    t, d, f = (300, d * 8, f * 8) if large else (few, d, f)
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(t, e, generator=g)
    if routing == "hot":
        scores[:, 0] += 1
    if routing == "empty":
        scores[:, : e // 2] = -1
    experts = scores.topk(k, 1).indices
    if routing == "none":
        experts[torch.rand(t, k, generator=g) < 0.3] = e
    x = torch.randn(t, d, generator=g)
    w1 = torch.randn(e, f * (2 if gated else 1), d, generator=g) / d**0.5
    w2 = torch.randn(e, d, f, generator=g) / f**0.5
    dtype = torch.bfloat16 if large else torch.float32
    order = sort_by_expert(experts.to(device), e)
    weights = torch.rand(t, k, generator=g).to(device)
    on_host = tile_rows_reference(order.expert_start.cpu(), t * k)
    return Drawn(
        *(v.to(device, dtype) for v in (x,)), weights, w1.to(device, dtype), w2.to(device, dtype), order,
        tile_rows(order.expert_start, t * k), on_host, int(order.expert_start[-1]),
    )  # fmt: skip


def assert_close(found: Tensor, true: Tensor, n_rows: int | None = None) -> None:
    found, dtype = found[:n_rows].double(), found.dtype
    true = true[:n_rows].double()
    assert found.isfinite().all()
    error = float((found - true).norm() / true.norm().clamp_min(1e-30))
    assert error <= TOLERANCE.get(dtype, 1e-5), error


def whole(*tensors: Tensor) -> list[Tensor]:
    """The same values in float64: the truth is not rounded."""
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_moved_and_summed(device: str, routing: str) -> None:
    drawn = draw(device, routing)
    order, n = drawn.order, drawn.n_rows
    m = order.row_slot.numel()
    assert torch.equal(gather(drawn.x, order, m)[:n], gather_reference(drawn.x, order, m)[:n])
    rows = drawn.x_rows
    assert_close(sum_rows(rows, order, 2), sum_rows_reference(rows, order, 2))
    parts = torch.rand(3, m, device=device)
    assert_close(slot_sums(parts, order), slot_sums_reference(parts, order))
    assert not sum_rows(rows, order, 2).isnan().any(), "rows without an expert are not read"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_biases_meet_tokens_and_their_gradients(device: str, routing: str) -> None:
    """Also where a token is too wide for one program, with every kind of row."""
    for d in (48, 2056 if device == "cpu" else 264) if routing == "none" else (48,):  # eight times as wide on a GPU
        drawn = draw(device, routing, d=d, f=8)
        order, m = drawn.order, drawn.order.row_slot.numel()
        experts = torch.searchsorted(order.expert_start, order.slot_row, right=True).view(-1, 2) - 1
        biases = Biases(drawn.x[: len(drawn.w2)].contiguous(), experts, drawn.weights)
        rows, dots = gather_and_dots(drawn.x, order, m, biases)
        assert torch.equal(rows[: drawn.n_rows], gather(drawn.x, order, m)[: drawn.n_rows])
        assert_close(dots.sum(0), dots_reference(drawn.x.double(), biases))
        assert_close(slot_sums(dots[:, :0].new_zeros(1, m), order, dots), dots.double().sum(0))
        found = sum_rows(drawn.x_rows, order, 2, biases)
        assert_close(found, sum_rows_reference(drawn.x_rows.float(), order, 2, biases))
        for weights in (None, drawn.weights):
            found = expert_sums(drawn.x_rows, order, weights)
            true = expert_sums_reference(drawn.x_rows.double(), order, weights)
            assert_close(found, true)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("gated", "activation"), GATES)
def test_up_and_its_backward(device: str, routing: str, gated: bool, activation: str) -> None:
    drawn = draw(device, routing, gated)
    kind = {"activation": activation, "gated": gated}
    n, (x, w1, w2) = drawn.n_rows, whole(drawn.x_rows, drawn.w1, drawn.w2)
    h, a = up(drawn.x_rows, drawn.weights, drawn.order.row_slot, drawn.tiles, drawn.w1, **kind)
    true_h, true_a = up_reference(x, drawn.weights.double(), drawn.order.row_slot, drawn.on_host, w1, **kind)
    assert_close(h, true_h, n)
    assert_close(a, true_a, n)
    dy = drawn.x_rows.flip(1)
    dh, again, ds = up_backward(dy, h, drawn.weights, drawn.order.row_slot, drawn.tiles, drawn.w2, **kind)
    true_dh, true_again, true_ds = up_backward_reference(
        dy.double(), h.double(), drawn.weights.double(), drawn.order.row_slot, drawn.on_host, w2, **kind
    )
    assert_close(dh, true_dh, n)
    assert_close(again, true_again, n)
    assert_close(ds.sum(0).to(drawn.x.dtype), true_ds.sum(0), n)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_times_their_experts_matrix(device: str, routing: str, transposed: bool) -> None:
    drawn = draw(device, routing)
    w = drawn.w1.transpose(1, 2).contiguous() if transposed else drawn.w1
    found = grouped(drawn.x_rows, w, drawn.tiles, transposed=transposed)
    true = grouped_reference(*whole(drawn.x_rows, w), drawn.on_host, transposed=transposed)
    assert_close(found, true, drawn.n_rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_weight_gradients(device: str, routing: str) -> None:
    drawn = draw(device, routing)
    left, right = drawn.x_rows, drawn.x_rows[:, :24].contiguous()
    assert_close(weight_grad(left, right, drawn.tiles), weight_grad_reference(*whole(left, right), drawn.on_host))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ["natural", "none"])
@pytest.mark.parametrize("rank", [16, 48])
def test_a_low_rank_product_is_added_before_rounding(device: str, routing: str, rank: int) -> None:
    drawn, kind = draw(device, routing), {"activation": "silu", "gated": True}
    n, x, h_rows = drawn.n_rows, drawn.x_rows, torch.cat([drawn.x_rows, drawn.x_rows], 1)
    g = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=g).to(x)  # noqa: E731
    (e, width, _), (_, d, f) = drawn.w1.shape, drawn.w2.shape
    u, h_rows = make(len(x), rank), h_rows[:, :width].contiguous()
    tables = {"up": make(e, width, rank), "down": make(e, d, rank), "dx": make(e, rank, d), "back": make(e, rank, f)}
    ours = {name: Beside(u, v) for name, v in tables.items()}
    true = {name: Beside(u.double(), v.double()) for name, v in tables.items()}
    where = (drawn.weights, drawn.order.row_slot)
    whole_where = (drawn.weights.double(), drawn.order.row_slot, drawn.on_host)

    found = up(x, *where, drawn.tiles, drawn.w1, beside=ours["up"], **kind)
    expected = up_reference(x.double(), *whole_where, drawn.w1.double(), beside=true["up"], **kind)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, n)
    a = found[1]
    assert_close(
        grouped(a, drawn.w2, drawn.tiles, beside=ours["down"]),
        grouped_reference(*whole(a, drawn.w2), drawn.on_host, beside=true["down"]), n,
    )  # fmt: skip
    assert_close(
        grouped(h_rows, drawn.w1, drawn.tiles, transposed=True, beside=ours["dx"]),
        grouped_reference(*whole(h_rows, drawn.w1), drawn.on_host, transposed=True, beside=true["dx"]), n,
    )  # fmt: skip
    dh, _, ds = up_backward(x, found[0], *where, drawn.tiles, drawn.w2, beside=ours["back"], **kind)
    true_dh, _, true_ds = up_backward_reference(
        x.double(), found[0].double(), *whole_where, drawn.w2.double(), beside=true["back"], **kind
    )
    assert_close(dh, true_dh, n)
    assert_close(ds.sum(0).to(x.dtype), true_ds.sum(0), n)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rank", [16, 48])
def test_narrow_products(device: str, routing: str, rank: int) -> None:
    drawn = draw(device, routing)
    config = tune.NARROW.large[0] if device == "cuda" else tune.NARROW.small
    of_grad = tune.NARROW_GRAD.large[0] if device == "cuda" else tune.NARROW_GRAD.small
    a, b, u = drawn.w1[:, :rank], drawn.w1.transpose(1, 2)[..., :rank], drawn.x_rows[:, :rank].contiguous()
    for rows, order in ((drawn.x_rows, None), (drawn.x, drawn.order)):
        for w, turned in ((a.contiguous(), False), (b.contiguous(), True)):
            kind = {"order": order, "transposed": turned, "scale": 0.3}
            found = narrow(rows, w, drawn.tiles, len(u), config=config, **kind)
            assert_close(found, narrow_reference(*whole(rows, w), drawn.on_host, len(u), **kind), drawn.n_rows)
            kind = {"order": order, "wide_first": turned}
            found = narrow_grad(rows, u, drawn.tiles, config=of_grad, **kind)
            assert_close(found, narrow_grad_reference(*whole(rows, u), drawn.on_host, **kind))


RUNS: dict[str, Callable[[Drawn, object], tuple[Tensor, ...]]] = {
    "up": lambda d, c: up(
        d.x_rows, d.weights, d.order.row_slot, d.tiles, d.w1, activation="silu", gated=True, config=c
    ),
    "down": lambda d, c: (grouped(d.x_rows[:, : d.w2.shape[2]].contiguous(), d.w2, d.tiles, config=c),),
    "dx": lambda d, c: (grouped(d.x_rows, d.w2, d.tiles, transposed=True, config=c),),
    "up_backward": lambda d, c: up_backward(
        d.x_rows, torch.cat([d.x_rows, d.x_rows], 1)[:, : d.w1.shape[1]].contiguous(), d.weights, d.order.row_slot,
        d.tiles, d.w2, activation="silu", gated=True, config=c,
    )[:2],
    "dw1": lambda d, c: (weight_grad(d.x_rows, d.x_rows, d.tiles, config=c),),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("turns", [1, 5])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", RUNS)
def test_every_candidate_gives_the_same_bits(
    name: str, routing: str, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tiles in bf16, also in Gluon, handed out at once and in turns: what is fastest decides nothing else."""
    drawn = draw("cuda", routing, e=4)
    candidates = getattr(tune, name.upper())
    first = [v[: drawn.n_rows] for v in RUNS[name](drawn, candidates.large[0])]
    for module in (up_file, grouped_file, up_backward_file, weight_grad_file, hopper_file):
        monkeypatch.setattr(module, "turns", lambda: turns)
    in_gluon = candidates.hopper if tune.runs_gluon(drawn.x.device) else ()
    for config in (*candidates.large, *in_gluon):
        for one, other in zip(first, RUNS[name](drawn, config), strict=True):
            assert torch.equal(one, other[: drawn.n_rows]), config
    for one, other in zip(first, RUNS[name](drawn, candidates.small), strict=True):
        assert_close(one, other[: drawn.n_rows])
