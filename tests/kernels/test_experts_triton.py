"""The Triton experts against plain PyTorch: in Triton's interpreter on a CPU (float32), on the GPU in bf16.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

triton = pytest.importorskip("triton")

from llmfoundry.kernels import grouped, tune, up, up_backward, weight_grad  # noqa: E402
from llmfoundry.kernels.experts import experts_ffn  # noqa: E402
from llmfoundry.kernels.experts_triton import experts_ffn_triton  # noqa: E402
from llmfoundry.kernels.late import LateGradients  # noqa: E402
from llmfoundry.kernels.low_rank import ExpertAdapters, LowRank  # noqa: E402
from llmfoundry.kernels.routing import local_routing, packed_routing, sort_by_expert  # noqa: E402
from llmfoundry.kernels.routing_triton import local_routing_triton, sort_by_expert_triton  # noqa: E402
from llmfoundry.kernels.tiles import tile_rows, tile_rows_reference, turns  # noqa: E402
from tests.kernels.devices import DEVICES  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def draw(t: int, d: int, f: int, e: int, k: int, gated: bool, routing: str, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, d, generator=g)
    w1 = torch.randn(e, f * (2 if gated else 1), d, generator=g) / d**0.5
    w2 = torch.randn(e, d, f, generator=g) / f**0.5
    scores = torch.rand(t, e, generator=g)
    if routing == "hot":
        scores[:, 0] += 1
    if routing == "empty":
        scores[:, : e // 2] = -1
    experts = scores.topk(k, dim=1).indices
    if routing == "none":
        experts[torch.rand(t, k, generator=g) < 0.3] = e
    weights = torch.rand(t, k, generator=g)
    return [x, weights, experts, w1, w2]


def run(fn, tensors, **kwargs):
    x, weights, experts, w1, w2 = tensors
    leaves = [v.detach().clone().requires_grad_() for v in (x, weights, w1, w2)]
    y = fn(leaves[0], leaves[1], experts, leaves[2], leaves[3], **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    y.backward(dy)
    return [y.detach()] + [v.grad for v in leaves]


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30))


# Few tokens: in the interpreter, the kernels that move rows take most of the time, a program for each token. The
# largest case has two tiles for an expert, and several steps over its rows.
CASES = [
    (11, 32, 16, 4, 2, True, "silu", "natural"),
    (130, 16, 40, 4, 2, True, "gelu", "hot"),  # two tiles for the first expert
    (9, 48, 24, 8, 3, False, "relu2", "empty"),
    (9, 16, 16, 4, 2, True, "gelu_tanh", "none"),
    (1, 16, 16, 4, 1, False, "relu", "natural"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_kernels_equal_reference(case, device: str) -> None:
    t, d, f, e, k, gated, activation, routing = case
    tensors = [v.to(device) for v in draw(t, d, f, e, k, gated, routing)]
    kwargs = {"activation": activation, "gated": gated}
    out = run(experts_ffn_triton, tensors, **kwargs)
    tensors64 = [v.double() if v.is_floating_point() else v for v in tensors]
    ref = run(experts_ffn, tensors64, backend="reference", **kwargs)
    for name, a, b in zip(("y", "x", "weights", "w1", "w2"), out, ref, strict=True):
        # float32 sums of a few dozen products: 1e-5 leaves a factor of ten. TF32 alone would be at 1e-3.
        assert relative(a, b) < 1e-5, name


def draw_adapters(tensors: list[torch.Tensor], rank: int, sides: str = "up down") -> ExpertAdapters:
    """Adapters that get gradients, on the device and in the dtype of the weights."""
    pairs = []
    for side, w in (("up", tensors[3]), ("down", tensors[4])):
        e, n, j = w.shape
        g = torch.Generator().manual_seed(5)
        a, b = torch.randn(e, rank, j, generator=g) / j**0.5, torch.randn(e, n, rank, generator=g) / rank**0.5
        pairs.append(LowRank(*(v.to(w).requires_grad_() for v in (a, b))) if side in sides else None)
    return ExpertAdapters(*pairs, scale=0.5)


def run_adapted(tensors, adapters: ExpertAdapters, *, late: bool = False, **kwargs) -> dict[str, torch.Tensor]:
    """The output and gradients with frozen weights: of x, of the routing weights and of the adapters."""
    x, weights, experts, w1, w2 = tensors
    x, weights = (v.detach().clone().requires_grad_() for v in (x, weights))
    owed = LateGradients() if late else None
    used = adapters if owed is None else adapters.deferred(owed)
    y = experts_ffn(x, weights, experts, w1, w2, adapters=used, late=owed, **kwargs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y))
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    for i, tensor in enumerate(tensor for pair in adapters.pairs for tensor in pair):
        found[f"adapters.{i}"], tensor.grad = tensor.grad, None
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rank", "sides"), [(3, "up down"), (16, "up"), (40, "down")])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_adapters_in_float32_equal_reference(case, rank: int, sides: str, device: str) -> None:
    t, d, f, e, k, gated, activation, routing = case
    tensors = [v.to(device) for v in draw(t, d, f, e, k, gated, routing)]
    kwargs = {"activation": activation, "gated": gated}
    found = run_adapted(tensors, draw_adapters(tensors, rank, sides), backend="triton", **kwargs)
    tensors64 = [v.double() if v.is_floating_point() else v for v in tensors]
    true = run_adapted(tensors64, draw_adapters(tensors64, rank, sides), backend="reference", **kwargs)
    assert found.keys() == true.keys() and len(found) == 3 + 2 * len(sides.split())
    for name, value in true.items():
        assert relative(found[name], value) < 1e-5, name


def test_late_gradients_of_adapters_are_the_same_and_count_the_same_flops() -> None:
    t, d, f, k = 11, 32, 16, 2
    tensors = [v.to(DEVICE) for v in draw(t, d, f, 4, k, True, "none")]
    for backend in ("triton", "grouped_mm", "reference"):
        kwargs = {"activation": "silu", "gated": True, "backend": backend}
        at_once = run_adapted(tensors, draw_adapters(tensors, 3), **kwargs)
        with FlopCounterMode(display=False) as counter:
            late = run_adapted(tensors, draw_adapters(tensors, 3), late=True, **kwargs)
        if backend == "triton":  # ranks of 16; frozen weights forward and back, adapters for their gradients too
            assert counter.get_total_flops() == 2 * t * k * (2 * 3 * d * f + 3 * 16 * (2 * d + 3 * f))
        for name, value in at_once.items():  # another backend's ranks are filled up to 16, which rounds otherwise
            assert torch.equal(value, late[name]) if backend == "triton" else relative(late[name], value) < 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("shape", [(2048, 2048, 768, 32, 8), (1000, 512, 256, 8, 2)])
def test_adapters_in_bf16_err_as_grouped_mm_does(
    shape: tuple[int, ...], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large tiles, with an adapter beside every product."""
    monkeypatch.setenv("LLMFOUNDRY_AUTOTUNE", "0")
    tensors = draw(*shape, True, "natural")
    half = [v.to("cuda", torch.bfloat16) if i in (0, 3, 4) else v.cuda() for i, v in enumerate(tensors)]
    kwargs = {"activation": "silu", "gated": True}
    found = run_adapted(half, draw_adapters(half, rank), backend="triton", **kwargs)
    peer = run_adapted(half, draw_adapters(half, rank), backend="grouped_mm", **kwargs)
    whole = [v.double() if v.is_floating_point() else v for v in half]
    adapters = draw_adapters(half, rank)
    pairs = [LowRank(*(v.detach().double().requires_grad_() for v in pair)) for pair in adapters.pairs]
    true = run_adapted(whole, ExpertAdapters(*pairs, adapters.scale), backend="reference", **kwargs)
    for name, value in true.items():
        assert relative(found[name], value) <= 1.5 * relative(peer[name], value) + 1e-6, name


@pytest.mark.parametrize("t,k,e", [(1, 1, 1), (70, 2, 5), (300, 3, 33)])
def test_order_and_tiles_equal_reference(t: int, k: int, e: int) -> None:
    experts = torch.randint(0, e + 1, (t, k), generator=torch.Generator().manual_seed(t)).to(DEVICE)
    order, expected = sort_by_expert_triton(experts, e), sort_by_expert(experts, e)
    for a, b in zip(order, expected, strict=True):
        assert torch.equal(a, b)
    tiles, reference = tile_rows(order.expert_start, t * k), tile_rows_reference(order.expert_start, t * k)
    n = int(reference.n_tiles)
    assert int(tiles.n_tiles) == n and torch.equal(tiles.by_load.cpu(), reference.by_load)
    assert torch.equal(tiles.expert[:n].cpu(), reference.expert)
    assert torch.equal(tiles.row[:n].cpu(), reference.row)


@pytest.mark.parametrize("device", DEVICES)
def test_routing_to_the_experts_held_here_equals_reference(device: str) -> None:
    for t, k, e in ((37, 3, 8), (1, 1, 4), (400, 8, 64)):
        weights, experts = torch.rand(t, k, device=device), torch.rand(t, e, device=device).topk(k).indices
        packed, found = packed_routing(weights, experts), []
        for first in (0, e // 2):
            ours = local_routing_triton(packed, first, e // 2)
            true = local_routing(packed, k, weights.dtype, first, e // 2)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, true, strict=True))
            assert torch.equal(ours.weights, weights)
            found.append(ours)
        here, there = (torch.where(part.experts < e // 2, part.experts, -e) for part in found)
        assert torch.equal(torch.maximum(here, there + e // 2), experts.int())
        assert int(found[0].n_slots + found[1].n_slots) == experts.numel()
    wide = weights.double()
    assert torch.equal(local_routing(packed_routing(wide, experts), k, wide.dtype, 0, e).weights, wide)


def test_no_tokens_give_zero_gradients() -> None:
    tensors = [v.to(DEVICE) for v in draw(0, 16, 16, 4, 2, True, "natural")]
    y, dx, dweights, dw1, dw2 = run(experts_ffn, tensors, activation="silu", gated=True, backend="triton")
    assert y.shape == (0, 16) and dx.shape == (0, 16) and dweights.shape == (0, 2)
    assert not dw1.any() and not dw2.any()


@pytest.mark.parametrize("routing", ["natural", "none"])
def test_late_gradients_are_the_same(routing: str) -> None:
    tensors = [v.to(DEVICE) for v in draw(11, 32, 16, 4, 2, True, routing)]

    def late(x, weights, experts, w1, w2, **kwargs):
        owed = LateGradients()
        w1, w2 = owed.weight("w1", w1), owed.weight("w2", w2)
        return experts_ffn_triton(x, weights, experts, w1, w2, late=owed, **kwargs)

    at_once = run(experts_ffn_triton, tensors, activation="silu", gated=True)
    for a, b in zip(at_once, run(late, tensors, activation="silu", gated=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("t", "e"), [(1, 4), (130, 2)])  # empty experts; two tiles for each
def test_tiles_handed_out_in_turns_are_the_same_tiles(t: int, e: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [v.to(DEVICE) for v in draw(t, 64, 160, e, 2, True, "natural")]
    at_once = run(experts_ffn_triton, tensors, activation="silu", gated=True)
    for module in (up, grouped, up_backward, weight_grad):
        monkeypatch.setattr(module, "turns", lambda: 5)
    for a, b in zip(at_once, run(experts_ffn_triton, tensors, activation="silu", gated=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.dist
def test_tiles_are_handed_out_in_turns_where_other_ranks_are() -> None:
    assert turns() == 1
    try:
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
        assert turns() == 5
    finally:
        dist.destroy_process_group()


BIASED = [  # T, D, F, E, K, gated, activation, routing, biases of w1 and w2, limit
    (11, 32, 16, 4, 2, True, "swiglu_oss", "natural", "b1 b2", None),
    (11, 16, 40, 4, 2, True, "swiglu_oss", "none", "b1 b2", 0.5),
    (9, 48, 24, 8, 3, False, "relu2", "empty", "b1 b2", None),
    (34, 32, 40, 4, 2, True, "silu", "hot", "b2", 0.5),  # two steps over the rows of the first expert
    (9, 16, 16, 4, 2, True, "gelu", "natural", "b1", None),
]


def run_biased(case, tensors, call=experts_ffn, late=None, rank: int = 0, **kwargs) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, those of adapters too where `rank` is not 0."""
    (d, f, e), (gated, activation, _, sides, limit) = case[1:4], case[5:]
    x, weights, experts, w1, w2 = tensors
    g = torch.Generator().manual_seed(9)
    drawn = {"b1": torch.randn(e, f * (2 if gated else 1), generator=g), "b2": torch.randn(e, d, generator=g)}
    leaves = {"x": x, "weights": weights, "w1": w1, "w2": w2} | {name: drawn[name].to(w1) for name in sides.split()}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    adapters = draw_adapters(tensors, rank) if rank else ExpertAdapters()
    used, beside = leaves, adapters
    if late is not None:
        used = leaves | {n: late.weight(n, v) for n, v in leaves.items() if n[0] in "wb" and n != "weights"}
        beside = adapters.deferred(late)
    unit = {"activation": activation, "gated": gated, "limit": limit}
    y = call(**used, experts=experts, **unit, late=late, adapters=beside, **kwargs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y))
    leaves |= {f"adapters.{i}": tensor for i, tensor in enumerate(t for pair in adapters.pairs for t in pair)}
    return {"y": y.detach()} | {name: value.grad for name, value in leaves.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "rank"), [*((case, 0) for case in BIASED), *((case, 24) for case in BIASED[1:4])],
                         ids=str)  # fmt: skip
def test_biases_and_clamps_in_float32_equal_reference(case, rank: int, device: str) -> None:
    """With adapters too. And each gradient is bitwise the same again, computed at once or late."""
    tensors = [v.to(device) for v in draw(*case[:6], case[7])]
    whole = [v.double() if v.is_floating_point() else v for v in tensors]
    found = run_biased(case, tensors, rank=rank, backend="triton")
    true = run_biased(case, whole, rank=rank, backend="reference")
    again = run_biased(case, tensors, rank=rank, backend="triton", late=LateGradients())
    assert found.keys() == true.keys()
    for name, value in true.items():
        assert relative(found[name], value) < 1e-5, name
        assert torch.equal(found[name], again[name]), name


def test_compiled_experts_have_the_gradients_of_uncompiled_ones() -> None:
    """A compiler takes the autograd that the operators register, others that of a function: the same bits."""
    case = (8, 16, 16, 2, 1, True, "swiglu_oss", "none", "b1 b2", 0.5)
    tensors = [v.to(DEVICE) for v in draw(*case[:6], case[7])]
    found = run_biased(case, tensors, rank=3, backend="triton")
    compiled = torch.compile(experts_ffn, fullgraph=True, backend="aot_eager")
    again = run_biased(case, tensors, rank=3, backend="triton", call=compiled)
    for name, value in found.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_one_expert_with_biases_is_a_dense_block(device: str) -> None:
    case = (33, 32, 24, 1, 1, True, "swiglu_oss", "natural", "b1 b2", 0.7)
    tensors = [v.to(device) for v in draw(*case[:6], case[7])]
    tensors[1] = torch.ones_like(tensors[1])
    x, _, _, w1, w2 = tensors
    g = torch.Generator().manual_seed(9)
    b1, b2 = torch.randn(1, 48, generator=g).to(x), torch.randn(1, 32, generator=g).to(x)
    gate, up = torch.nn.functional.linear(x, w1[0], b1[0]).chunk(2, -1)
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    dense = torch.nn.functional.linear(gate * torch.sigmoid(1.702 * gate) * (up + 1), w2[0], b2[0])
    assert relative(run_biased(case, tensors, backend="triton")["y"], dense) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(2048, 2880, 2880, 32, 4, True, "swiglu_oss", "natural", "b1 b2", 7.0),
                                  (1000, 512, 256, 8, 2, False, "relu2", "none", "b1 b2", None)], ids=str)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 16])
def test_biases_in_bf16_err_as_grouped_mm_does(case, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFOUNDRY_AUTOTUNE", "0")
    tensors = draw(*case[:6], case[7])
    half = [v.to("cuda", torch.bfloat16) if i in (0, 3, 4) else v.cuda() for i, v in enumerate(tensors)]
    found, peer = (run_biased(case, half, rank=rank, backend=backend) for backend in ("triton", "grouped_mm"))
    whole = [v.double() if v.is_floating_point() else v for v in half]
    true = run_biased(case, whole, rank=rank, backend="reference")
    for name, value in true.items():
        assert relative(found[name], value) <= 1.5 * relative(peer[name], value) + 1e-6, name


def random_rows(n: int) -> list[tuple]:
    """Few widths and units, for each is a compile of every kernel; many numbers of tokens and experts."""
    g = torch.Generator().manual_seed(3)
    pick = lambda *values: values[int(torch.randint(len(values), (1,), generator=g))]  # noqa: E731
    rows = []
    for i in range(n):
        e = pick(1, 3, 8, 17, 64)
        d, f = pick((64, 264), (136, 32), (520, 72), (256, 128))
        gated, activation = pick((True, "silu"), (True, "gelu"), (False, "relu2"))
        rows.append((pick(1, 5, 127, 128, 129, 500, 1300), d, f, e, min(e, pick(1, 2, 4)), gated, activation,
                     pick("natural", "hot", "empty", "none"), i))  # fmt: skip
    return rows


def draws_of(row: tuple) -> list[list[torch.Tensor]]:
    """A row's inputs, drawn until there are 100 routing weights: the error of one number alone is a matter of luck."""
    t, d, f, e, k, gated, _, routing, seed = row
    return [draw(t, d, f, e, k, gated, routing, seed + 1000 * i) for i in range(-(-100 // (t * k)))]


class Error:
    """The relative error of several tensors taken as one."""

    def __init__(self) -> None:
        self.squares = [0.0, 0.0]

    def add(self, out: torch.Tensor, ref: torch.Tensor) -> None:
        self.squares[0] += float((out.double() - ref.double()).square().sum())
        self.squares[1] += float(ref.double().square().sum())

    def relative(self) -> float:
        return (self.squares[0] / max(self.squares[1], 1e-60)) ** 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("row", random_rows(200), ids=str)
def test_error_is_that_of_grouped_mm(row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64: at most 1.5 times the error of the grouped_mm pipeline on the same bf16 inputs."""
    monkeypatch.setenv("LLMFOUNDRY_AUTOTUNE", "0")  # tuning would compile every candidate at every number of rows
    kwargs = {"activation": row[6], "gated": row[5]}
    names = ("y", "x", "weights", "w1", "w2")
    ours, theirs = ({name: Error() for name in names} for _ in range(2))
    for tensors in draws_of(row):
        half = [v.to("cuda", torch.bfloat16) if i in (0, 3, 4) else v.cuda() for i, v in enumerate(tensors)]
        out = run(experts_ffn_triton, half, **kwargs)
        peer = run(experts_ffn, half, backend="grouped_mm", **kwargs)
        whole = [v.double() if v.is_floating_point() else v for v in half]
        ref = run(experts_ffn, whole, backend="reference", **kwargs)
        for name, a, p, b in zip(names, out, peer, ref, strict=True):
            assert a.isfinite().all(), name
            ours[name].add(a, b)
            theirs[name].add(p, b)
    for name in names:
        error, peers = ours[name].relative(), theirs[name].relative()
        assert error <= 1.5 * peers + 1e-6, (name, error, peers)


@pytest.mark.gpu
def test_graph_replays_with_new_routing_and_is_bitwise_the_same_twice() -> None:
    t, d, f, e, k = 512, 256, 128, 8, 2
    x, weights, experts, w1, w2 = (v.cuda() for v in draw(t, d, f, e, k, True, "natural"))
    x, w1, w2 = (v.bfloat16().requires_grad_() for v in (x, w1, w2))
    weights.requires_grad_()
    leaves = [x, weights, w1, w2]
    dy = torch.randn_like(x)

    def step() -> list[torch.Tensor]:
        y = experts_ffn_triton(x, weights, experts, w1, w2, activation="silu", gated=True)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        experts.copy_(draw(t, d, f, e, k, True, "hot" if seed == 2 else "empty", seed)[2])
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_a_choice_is_timed_once_for_a_bucket_of_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the clock and the GPU's name are made up."""
    timed: list[tune.UpConfig] = []

    def do_bench(run, **_: object) -> float:
        timed.append(run())
        return 1.0 if timed[-1] is tune.UP.large[1] else 2.0

    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "_fixed", lambda *_: None)
    monkeypatch.setattr(tune, "_cache_file", lambda _: tmp_path / "tiles.json")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    pick = lambda rows: tune.pick(  # noqa: E731
        tune.UP, tune.Problem(torch.device("cpu"), "torch.bfloat16", 64, 64, 4, 2, rows), lambda config: config
    )
    capturing = True
    assert pick(400) is tune.UP.large[0] and not timed, "the fixed choice, and not for ever"
    capturing = False
    assert [pick(rows) for rows in (400, 500, 300)] == [tune.UP.large[1]] * 3 and timed == 2 * list(tune.UP.large)
    pick(600)
    assert len(timed) == 4 * len(tune.UP.large), "another power of two"
    monkeypatch.setattr(tune, "_chosen", {})
    assert pick(400) is tune.UP.large[1] and len(timed) == 4 * len(tune.UP.large), "read from the disk"
    (tmp_path / "tiles.json").write_text((tmp_path / "tiles.json").read_text().replace(": 1", ": 7"))
    monkeypatch.setattr(tune, "_chosen", {})
    assert pick(400) is tune.UP.large[1] and len(timed) == 6 * len(tune.UP.large), "a damaged file is timed anew"


@pytest.mark.parametrize(("capability", "kib", "large"), [
    ("8.0", 163, False), ("8.6, 8.9", 99, False), ("9.0", 227, True), ("10.0, 10.3", 227, True), ("12.0", 99, False),
])  # fmt: skip
def test_large_tiles_go_where_their_shared_memory_is(
    capability: str, kib: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes of a block's shared memory: CUDA programming guide, compute capabilities. Only the GPU is made up."""
    properties = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(tune, "holds_large", tune.holds_large.__wrapped__)  # without what it remembers
    monkeypatch.setenv("LLMFOUNDRY_AUTOTUNE", "0")
    of_adapters = (tune.NARROW, tune.NARROW_GRAD)
    for candidates in (tune.UP, tune.DOWN, tune.DX, tune.UP_BACKWARD, tune.DW1, *of_adapters):
        half, full = (
            tune.pick(
                candidates,
                tune.Problem(torch.device("cuda", 0), dtype, 2048, 768, 128, 2, 32768),
                lambda config: config,
            )
            for dtype in ("torch.bfloat16", "torch.float32")
        )
        assert half is (candidates.large[0] if large else candidates.small), capability
        assert full is candidates.small


@pytest.mark.gpu
def test_a_timed_choice_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_chosen", {})
    half = [v.to("cuda", torch.bfloat16) if i in (0, 3, 4) else v.cuda()
            for i, v in enumerate(draw(512, 256, 128, 8, 2, True, "natural"))]  # fmt: skip
    first = run(experts_ffn_triton, half, activation="silu", gated=True)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    choices = {"up", "down", "dx", "up_backward"} | ({"dw1", "dw2"} if tune.runs_gluon(half[0].device) else set())
    assert {key.split()[0] for key in kept} == choices, "the kernels with a choice"
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(triton.testing, "do_bench", None)  # nothing is timed again
    for a, b in zip(first, run(experts_ffn_triton, half, activation="silu", gated=True), strict=True):
        assert torch.equal(a, b)
