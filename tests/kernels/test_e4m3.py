"""What quantises to e4m3 and what multiplies it, against plain references: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmfoundry.kernels import e4m3, scaled  # noqa: E402
from llmfoundry.kernels.e4m3 import Scaled  # noqa: E402
from llmfoundry.kernels.grouped import GroupedConfig  # noqa: E402
from llmfoundry.kernels.routing import Order, sort_by_expert  # noqa: E402
from llmfoundry.kernels.tiles import Tiles, tile_rows, tile_rows_reference  # noqa: E402
from llmfoundry.kernels.weight_grad import WeightGradConfig  # noqa: E402

PLACES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
TOKENS, D, EXPERTS, TOP_K = 24, 48, 5, 2
LARGE = 150  # tokens of which one expert has two row tiles


def routed(device: str, tokens: int = TOKENS) -> tuple[Order, Tiles, int]:
    """An order in which some slots have no expert, one expert has most of them, and one has none."""
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, EXPERTS, generator=g)
    scores[:, 3] += 1
    experts = scores.topk(TOP_K, 1).indices
    experts[torch.rand(tokens, TOP_K, generator=g) < 0.1] = EXPERTS
    experts[experts == 2] = EXPERTS
    order = sort_by_expert(experts.to(device), EXPERTS)
    return order, tile_rows(order.expert_start, tokens * TOP_K), int(order.expert_start[-1])


def values(scaled: Scaled) -> Tensor:
    scale = scaled.scale
    return scaled.values.float() * scale.reshape(*scale.shape, *[1] * (scaled.values.ndim - scale.ndim))


def drawn(*shape: int, device: str) -> Tensor:
    """Values of e4m3. Triton's interpreter converts others wrongly where rounding carries into the exponent."""
    return torch.randn(*shape, device=device).to(e4m3.E4M3).float()


def same(found: Scaled, expected: Scaled, n: int | None = None, equal: float = 1.0) -> None:
    """Bitwise, for this share of the values."""
    torch.testing.assert_close(found.scale[:n], expected.scale[:n], rtol=0, atol=0)
    a, b = values(found)[:n], values(expected)[:n]
    assert a.isfinite().all()
    assert (a == b).float().mean() >= equal


@pytest.mark.parametrize("device", PLACES)
def test_a_scale_is_the_least_power_of_two_that_holds_the_row(device: str) -> None:
    rows = torch.tensor([[448.0, 1], [449, 1], [0, 0], [1e-20, 0], [torch.inf, 1], [torch.nan, 1], [3e38, 1]])
    rows = torch.nn.functional.pad(rows, (0, 14)).to(device)
    found, expected = e4m3.scale_rows(rows), e4m3.scale_rows_reference(rows)
    torch.testing.assert_close(found.scale[[0, 1]], torch.tensor([1.0, 2.0], device=device))
    assert found.scale[2] > 0
    assert values(found)[2].eq(0).all()
    finite = torch.tensor([0, 1, 2, 3, 6])
    for each in (found, expected):
        assert values(each)[[4, 5]].isnan().all()
    torch.testing.assert_close(values(found)[finite], values(expected)[finite], rtol=0, atol=0)
    torch.testing.assert_close(found.scale[finite], expected.scale[finite], rtol=0, atol=0)


@pytest.mark.parametrize("device", PLACES)
def test_gathered_rows_are_the_tokens_rows_quantised(device: str) -> None:
    order, _, n = routed(device)
    x = drawn(TOKENS, D, device=device)
    found = e4m3.gather_scaled(x, order, TOKENS * TOP_K)
    same(found, e4m3.gather_scaled_reference(x, order, TOKENS * TOP_K), n)


@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (False, "relu2")])
@pytest.mark.parametrize("device", PLACES)
def test_activations_forward_and_backward(device: str, gated: bool, activation: str) -> None:
    order, tiles, n = routed(device)
    hidden, n_rows = 40, TOKENS * TOP_K
    h = torch.randn(n_rows, hidden * (2 if gated else 1), device=device)
    da, weights = torch.randn(n_rows, hidden, device=device), torch.rand(TOKENS, TOP_K, device=device)
    unit = {"activation": activation, "gated": gated}
    of_rows = (weights, order.row_slot, tiles)
    # Activations differ in their last bits, which then round to another side; the interpreter: see `drawn`.
    equal = 0.99 if device == "cuda" else 0.94
    same(
        e4m3.activate_scaled(h, *of_rows, **unit), e4m3.activate_scaled_reference(h, *of_rows, **unit), n, equal
    )  # fmt: skip
    expected = e4m3.activate_backward_scaled_reference(da, h, *of_rows, **unit)
    found = e4m3.activate_backward_scaled(da, h, *of_rows, **unit)
    same(found.dh, expected.dh, n, equal)
    same(found.a, expected.a, n, equal)
    torch.testing.assert_close(found.ds[:, :n], expected.ds[:, :n])


@pytest.mark.parametrize("device", PLACES)
def test_what_is_transposed_keeps_its_values(device: str) -> None:
    """Another power of two rounds nothing that does not underflow."""
    w = drawn(EXPERTS, 80, D, device=device)
    rows = e4m3.scale_rows_reference(w)
    largest = rows.scale.amax(1)
    found = e4m3.transpose_weight(w, largest)
    same(found, e4m3.transpose_weight_reference(w, largest))
    torch.testing.assert_close(values(found).transpose(1, 2), values(rows), rtol=0, atol=2**-9 * largest.max().item())

    order, tiles, n = routed(device)
    x = drawn(TOKENS * TOP_K, D, device=device)
    x[n:] = torch.nan  # of rows without an expert
    rows = e4m3.scale_rows_reference(x)
    turned = e4m3.transpose_rows(rows, tiles)
    assert turned.values.shape == (tiles.expert.numel(), D, 128)
    start = order.expert_start.tolist()
    for e in range(EXPERTS):
        span = slice(start[e], start[e + 1])
        size = start[e + 1] - start[e]
        tile = turned.values[tiles.first[e]].float().T * turned.scale[e]  # fewer than 128 rows
        torch.testing.assert_close(tile[:size], values(rows)[span], rtol=0, atol=2**-9 * turned.scale[e].item())
        assert size == 0 or tile[size:].eq(0).all()
    tokens = e4m3.scale_rows_reference(drawn(TOKENS, D, device=device))
    token = order.row_slot.long() // TOP_K
    rows = Scaled(tokens.values[token], tokens.scale[token])
    found, expected = e4m3.transpose_rows(tokens, tiles, order.row_slot, TOP_K), e4m3.transpose_rows(rows, tiles)
    exist = int(tiles.n_tiles)
    assert torch.equal(found.values[:exist].float(), expected.values[:exist].float())
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("device", PLACES)
def test_products_of_scaled_rows(device: str, per_channel: bool) -> None:
    _, tiles, n = routed(device, LARGE)
    rows = e4m3.scale_rows_reference(torch.randn(LARGE * TOP_K, D, device=device))
    matrices = torch.randn(EXPERTS, 80, D, device=device)
    w = e4m3.scale_rows_reference(matrices)
    if not per_channel:
        w = e4m3.transpose_weight_reference(matrices.transpose(1, 2).contiguous(), w.scale.amax(1))
    config = GroupedConfig(columns=64, depth=32, num_warps=4, num_stages=2)
    expected = scaled.scaled_grouped_reference(rows, w, tiles, torch.float32)
    sizes = (each._replace(values=each.values.float().abs().to(each.values.dtype)) for each in (rows, w))
    # Hopper's tensor cores add products of 8 bits in 14 bits of the largest (docs/experiments.md).
    bound = scaled.scaled_grouped_reference(*sizes, tiles, torch.float32) * (2**-13 if device == "cuda" else 2**-18)
    for pieces in (1, 2):
        found = scaled.scaled_grouped(rows, w, tiles, torch.float32, config=config._replace(pieces=pieces))
        assert ((found - expected)[:n].abs() <= bound[:n]).all()


@pytest.mark.parametrize("device", PLACES)
def test_weight_gradients_of_scaled_rows(device: str) -> None:
    order, tiles, n = routed(device, LARGE)
    left, right = (e4m3.scale_rows_reference(drawn(LARGE * TOP_K, width, device=device)) for width in (80, D))
    config = WeightGradConfig(height=64, width=64, num_warps=4, num_stages=2)
    turned = [e4m3.transpose_rows(each, tiles) for each in (left, right)]
    start = order.expert_start.tolist()
    a, b = values(left)[:n], values(right)[:n]
    expected = torch.stack([a[i:j].T @ b[i:j] for i, j in zip(start[:-1], start[1:], strict=True)])
    for pieces in (1, 2):
        found = scaled.scaled_weight_grad(*turned, tiles, torch.float32, config=config._replace(pieces=pieces))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-2)


def test_the_tiles_of_an_expert_begin_where_they_say() -> None:
    order, tiles, _ = routed("cuda" if torch.cuda.is_available() else "cpu", LARGE)
    expected = tile_rows_reference(order.expert_start.cpu(), LARGE * TOP_K)
    assert torch.equal(tiles.first.cpu(), expected.first)
    with_rows = [0, 1, 3, 4]
    assert tiles.expert.cpu()[expected.first[with_rows]].tolist() == with_rows
    assert expected.n_tiles > len(with_rows), "no expert has two tiles"
