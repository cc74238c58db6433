"""Sums of gradients: kernels against references, and the mean of sums rounded at random against the exact sum.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from llmfoundry.kernels import accumulate
from tests.kernels.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1,), (70, 33), (3, 4096)])
def test_the_kernel_equals_the_reference(shape: tuple[int, ...], device: str) -> None:
    pytest.importorskip("triton")
    total, x = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    total.view(-1)[0] = float("inf")
    x.view(-1)[-1] = float("nan")
    ours, theirs = total.clone(), total.clone()
    accumulate.add_triton(ours, x, 0xDEADBEEF)
    accumulate.add_reference(theirs, x, 0xDEADBEEF)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_small_terms_are_not_lost(device: str) -> None:
    """A thousandth is less than half of the last bit of 1: rounded to the nearest, a thousand of them add nothing."""
    total = torch.ones(4096, device=device, dtype=torch.bfloat16)
    nearest = total.clone()
    x = torch.full_like(total, 1e-3)
    for i in range(1000):
        accumulate.add_rounded_(total, x, accumulate.key_of(i))
        nearest += x
    expected = 1 + 1000 * x[0].item()
    # Each value is a walk of steps of 1/128 with a deviation of 0.07 in the end; the mean of 4096 is off by 0.001.
    assert total.float().mean().item() == pytest.approx(expected, rel=3e-3)
    assert (nearest == 1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_parts_are_summed_in_float32(ranks: int, device: str) -> None:
    """In the order of ranks, to the bit; this rank's own part may lie elsewhere."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    parts = torch.randn(ranks, 70 * 33, device=device).bfloat16()
    exact = parts.double().sum(0)
    for begins in (True, False):
        before = torch.randn(70, 33, device=device)
        ours, theirs, apart = before.clone(), before.clone(), before.clone()
        none = parts[:0].view(-1)
        accumulate.add_parts_triton(ours, none, parts, 0, begins)
        accumulate.add_parts_reference(theirs, none, parts, 0, begins)
        assert torch.equal(ours, theirs)
        for rank in range(ranks):
            others = torch.cat([parts[:rank], parts[rank + 1 :]])
            for add in (accumulate.add_parts_triton, accumulate.add_parts_reference):
                add(apart.copy_(before), parts[rank].clone(), others, rank, begins)
                assert torch.equal(apart, theirs), rank
        expected = exact + (0 if begins else before.double().view(-1))
        torch.testing.assert_close(ours.double().view(-1), expected, rtol=1e-6, atol=1e-6)


def test_a_sum_that_is_exact_is_not_changed() -> None:
    total, x = torch.full((64,), 1.5, dtype=torch.bfloat16), torch.full((64,), 0.25, dtype=torch.bfloat16)
    accumulate.add_rounded_(total, x, 7)
    assert (total == 1.75).all()
