"""Muon's kernels: the passes over memory against their references, and what Newton-Schulz makes of matrices.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmfoundry.kernels import muon, symmetric
from llmfoundry.kernels.muon import apply_reference, momentum_reference, orthogonalize, orthogonalize_flops
from llmfoundry.kernels.update import Place
from tests.kernels.devices import DEVICES

CUT_TWICE = Place.of(1, torch.Size((2, 3, 1000)), torch.Size((4, 6, 1000)), (2, 3, 0))
PLACES = [(torch.Size((70, 99)), Place(3, 17)), (torch.Size((1,)), Place()), (torch.Size((6, 1000)), CUT_TWICE)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_the_momentum_equals_its_reference(grad: torch.dtype, moment: torch.dtype, nesterov: bool, device: str) -> None:
    pytest.importorskip("triton")
    for shape, place in PLACES:
        g = torch.randn(shape, device=device).to(grad)
        ours = [torch.randn(shape, device=device).to(moment), torch.zeros(shape, device=device)]
        theirs = [each.clone() for each in ours]
        step, divisor, skip = (torch.tensor(value, device=device) for value in (7.0, 2.0, 0.0))
        for run, (m, direction) in ((muon.momentum_triton, ours), (momentum_reference, theirs)):
            run(m, direction, g, step, divisor, skip, place, momentum=0.95, nesterov=nesterov)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)
        if moment == torch.float32:
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
        else:  # the same random bits: another neighbour only where the last bit of float32 decides
            torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=1e-6)
            assert (ours[0] != theirs[0]).float().mean() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applying_a_direction_equals_its_reference(dtype: torch.dtype, weight: torch.dtype, device: str) -> None:
    pytest.importorskip("triton")
    first, direction = torch.randn(70, 99, device=device), torch.randn(70, 99, device=device).to(dtype)
    exact = 0.9 * first.to(weight).float() - 0.25 * direction.float()
    step, skip = (torch.tensor(value, device=device) for value in (7.0, 0.0))
    for has_copy in (False, True)[: 1 if weight == torch.bfloat16 else 2]:
        pairs = [(first.to(weight, copy=True), [torch.zeros_like(first).bfloat16()] * has_copy) for _ in range(2)]
        for run, (w, copies) in zip((muon.apply_triton, apply_reference), pairs, strict=True):
            run(w, copies, direction, step, skip, Place(3, 17), lr=0.25, keep=0.9)
        (a, copied), (b, _) = pairs
        if weight == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(b, exact, rtol=1e-6, atol=1e-6)
        else:  # one of the two neighbours, and another one only where the last bit of float32 decides
            torch.testing.assert_close(b.float(), exact, rtol=2**-7, atol=1e-6)
            assert (a != b).float().mean() < 1e-3
        for copy in copied:  # Triton's interpreter cuts bits off where a GPU rounds to the nearest
            torch.testing.assert_close(copy.float(), exact, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["triton", "reference"])
def test_a_step_that_is_skipped_changes_no_bit(kind: str, device: str) -> None:
    pytest.importorskip("triton")
    tensors = [torch.randn(5, 9, device=device) for _ in range(3)]
    before = [each.clone() for each in tensors]
    nan, one = torch.full((5, 9), float("nan"), device=device), torch.ones((), device=device)
    getattr(muon, f"momentum_{kind}")(tensors[0], tensors[1], nan, one, nan[0, 0], one, Place(), momentum=0.9,
                                      nesterov=True)  # fmt: skip
    getattr(muon, f"apply_{kind}")(tensors[2], [], nan, one, one, Place(), lr=1.0, keep=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    """And singular vectors stay, with those of each matrix of a batch by themselves."""
    u, _, v = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -1.5, min(shape), dtype=torch.float64) * torch.tensor([1.0, 1e-6, 1e6])[:, None]
    result = orthogonalize(u @ torch.diag_embed(values) @ v, steps=5)
    found = u.mT @ result @ v.mT
    assert 0.65 < torch.linalg.svdvals(result).min() and torch.linalg.svdvals(result).max() < 1.25
    torch.testing.assert_close(found, torch.diag_embed(found.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)


def test_a_matrix_without_gradient_stays_zero() -> None:
    x = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)])
    result = orthogonalize(x, steps=5)
    assert result.isfinite().all() and not result[0].any() and result[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(2, 40, 72), (1, 304, 88), (2, 128, 128)])
def test_symmetric_products_equal_the_whole_ones(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Also of columns, of sides that no tile divides, of several tiles, and of two matrices that commute."""
    pytest.importorskip("triton")
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    each = torch.tensor([0.25, 3.0][: shape[0]], device=device)
    for x in (torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype).mT):
        square = symmetric.symmetric_triton(x, x, None, alpha=1.0, beta=0.0, diagonal=0.0)
        scales = {"alpha": 0.25 * each, "beta": -each, "diagonal": 1.5}
        factor = symmetric.symmetric_triton(square, square, square, **scales)
        both = symmetric.symmetric_triton(square, factor, None, alpha=each, beta=0.0, diagonal=0.0)
        exact = x.double() @ x.double().mT
        for found, want in (
            (square, exact),
            (factor, symmetric.symmetric_reference(square.double(), square.double(), square.double(), **scales)),
            (both, each[:, None, None] * (square.double() @ factor.double())),
        ):
            assert torch.equal(found, found.mT)
            torch.testing.assert_close(found.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_orthogonal_matrices_by_the_kernel_are_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for shape in ((2, 24, 40), (2, 40, 24)):
        x = torch.randn(shape, device=device)
        want = orthogonalize(x.double(), steps=5)
        with monkeypatch.context() as patch:
            patch.setattr(symmetric, "symmetric_reference", symmetric.symmetric_triton)
            torch.testing.assert_close(orthogonalize(x, steps=5).double(), want, rtol=1e-4, atol=1e-5)


def plain_iteration(x: Tensor, steps: int) -> Tensor:
    a, b, c = muon.COEFFICIENTS
    x = x / x.double().norm(dim=(1, 2), keepdim=True).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7])
def test_the_iteration_on_gram_matrices_is_the_plain_one(steps: int) -> None:
    for shape in ((2, 12, 20), (2, 20, 12), (2, 12, 12)):
        x = torch.randn(shape, dtype=torch.float64)
        want = plain_iteration(x, steps) if shape[1] <= shape[2] else plain_iteration(x.mT, steps).mT
        torch.testing.assert_close(orthogonalize(x, steps), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_matrix_changes_nothing_up_to_1e9(dtype: torch.dtype) -> None:
    """Of rank one too, whose Gram matrix has the largest products."""
    x = torch.stack([torch.randn(12, 20), torch.outer(torch.randn(12), torch.randn(20))])
    x = (x / torch.linalg.matrix_norm(x, keepdim=True)).to(dtype)
    want = orthogonalize(x, steps=5)
    for exponent in (-23, 20, 30):  # powers of two round nothing
        assert torch.equal(orthogonalize(x * 2.0**exponent, steps=5), want)


def test_singular_values_in_bf16_end_where_those_of_the_plain_iteration_do() -> None:
    """Also of matrices whose Gram matrix has eigenvalues below the rounding of its entries, maybe negative."""
    s, long = 128, 256
    u, v = (torch.linalg.qr(torch.randn(n, s))[0] for n in (s, long))
    few = torch.cat([torch.ones(4), 1e-2 * torch.rand(s - 4)])
    spectra = [1 / torch.arange(1, s + 1), few, torch.logspace(0, -5, s), (few == 1).float()]
    x = torch.stack([u * each @ v.mT for each in spectra] + [torch.ones(s, 1) @ torch.randn(1, long)]).bfloat16()
    large = torch.linalg.svdvals(x.float()) > 3e-3 * x.float().norm(dim=(1, 2))[:, None]
    for run in (orthogonalize, plain_iteration):
        found = torch.linalg.svdvals(run(x, 5).float())
        assert found.max() < 1.25 and found[large].min() > 0.6


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((3, 16, 40), (3, 40, 16)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(shape), steps=5)
        assert counter.get_total_flops() == 3 * orthogonalize_flops(*shape[1:], steps=5, halves=False)


def test_each_part_of_a_momentum_gets_the_random_bits_of_the_whole() -> None:
    whole = torch.Size((4, 6, 5))
    g = torch.randn(whole)

    def advanced(part: Tensor, place: Place) -> Tensor:
        m, one = torch.zeros_like(part, dtype=torch.bfloat16), torch.ones(())
        momentum_reference(m, torch.zeros_like(part), part, one, one, one * 0, place, momentum=0.9, nesterov=False)
        return m

    want = advanced(g, Place.of(7, whole, whole, (0, 0, 0)))
    cut = slice(2, 4), slice(3, 6)
    place = Place.of(7, torch.Size((2, 3, 5)), whole, (2, 3, 0))
    assert torch.equal(advanced(g[cut].clone(), place), want[cut])
