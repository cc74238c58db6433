"""AdamW with moments of 8 bits: the kernel against its reference, what codes keep, parts against the whole.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmfoundry.kernels import eight_bit
from llmfoundry.kernels.eight_bit import adamw_reference, decode, encode
from llmfoundry.kernels.update import Place, Rule, corrections
from tests.kernels.devices import DEVICES

RULE = Rule(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
WHOLE = torch.Size((4, 6, 300))
CUT = Place.of(7, torch.Size((2, 3, 300)), WHOLE, (2, 3, 0))


def drawn(
    shape: tuple[int, ...], device: str, grad: torch.dtype = torch.float32, weight: torch.dtype = torch.float32
) -> list[Tensor]:
    """Weight, gradient, codes and scales of both moments, and a copy."""
    random = torch.Generator().manual_seed(0)
    w, g, m = (torch.randn(shape, generator=random) for _ in range(3))
    noise = torch.randint(0, 2**16, shape, generator=random)
    mean, square = encode(m, noise, torch.int8), encode(m * m, noise, torch.uint8)
    tensors = [
        w.to(weight),
        g.to(grad),
        mean[0],
        square[0],
        mean[1],
        square[1],
        torch.zeros(shape, dtype=torch.bfloat16),
    ]
    return [each.to(device) for each in tensors]


def advance(run: str, tensors: list[Tensor], place: Place, skip: float = 0.0, step: float = 3.0) -> None:
    device = tensors[0].device
    count, divisor, flag = (torch.tensor(value, device=device) for value in (step, 2.0, skip))
    getattr(eight_bit, run)(*tensors, count, corrections(count[None], 0.9, 0.95)[0], divisor, flag, place, RULE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "place"), [((2, 3, 300), CUT), ((5, 256), Place(1, 77)), ((3, 7), Place())])
def test_the_kernel_equals_the_reference(
    shape: tuple[int, ...], place: Place, weight: torch.dtype, grad: torch.dtype, device: str
) -> None:
    pytest.importorskip("triton")
    ours = drawn(shape, device, grad, weight)
    theirs = [each.clone() for each in ours]
    advance("adamw_triton", ours, place)
    advance("adamw_reference", theirs, place)
    if weight == torch.float32:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=1e-6)
        assert (ours[0] != theirs[0]).float().mean() < 2e-3
    for i in (2, 3):  # another one of two neighbours only where the last bit of float32 decides
        difference = (ours[i].int() - theirs[i].int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 2e-3
        torch.testing.assert_close(ours[i + 2], theirs[i + 2], rtol=1e-6, atol=0)
    # Triton's interpreter cuts bits off where a GPU rounds to the nearest.
    torch.testing.assert_close(ours[6].float(), theirs[6].float(), rtol=2**-7, atol=0)
    torch.testing.assert_close(ours[6].float(), ours[0].float(), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", ["adamw_triton", "adamw_reference"])
def test_a_step_that_is_skipped_changes_no_bit(run: str, device: str) -> None:
    pytest.importorskip("triton")
    tensors = drawn((3, 300), device)
    tensors[1][1, 2] = float("nan")
    before = [each.clone() for i, each in enumerate(tensors) if i != 1]
    advance(run, tensors, Place(), skip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, [t for i, t in enumerate(tensors) if i != 1], strict=True))


def test_parts_get_the_codes_of_the_whole() -> None:
    whole = drawn(tuple(WHOLE), "cpu")
    cut = slice(2, 4), slice(3, 6)
    part = [each[cut].clone() for each in whole]
    advance("adamw_reference", whole, Place.of(7, WHOLE, WHOLE, (0, 0, 0)))
    advance("adamw_reference", part, CUT)
    assert all(torch.equal(a[cut], b) for i, (a, b) in enumerate(zip(whole, part, strict=True)) if i != 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_right_on_average_and_keep_small_values(dtype: torch.dtype) -> None:
    sizes = torch.logspace(0, -4 if dtype == torch.int8 else -9, 200)[None]
    x = sizes if dtype == torch.uint8 else sizes * torch.tensor([1.0, -1.0]).repeat(100)
    noise = torch.arange(0, 2**16, 16)[:, None].expand(-1, 200)
    codes, scales = encode(x.expand(len(noise), -1), noise, dtype)
    found = decode(codes, scales)
    torch.testing.assert_close(found.mean(0), x[0], rtol=5e-3, atol=1e-9)
    large = sizes[0] > 0.1
    assert ((found - x).abs()[:, large] / sizes[:, large]).max() < 0.06
    assert dtype == torch.int8 or (codes > 0).all(), "a second moment of zero would divide by eps"


def test_a_block_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 300)
    for dtype in (torch.int8, torch.uint8):
        codes, scales = encode(x, torch.full(x.shape, 0xFFFF), dtype)
        assert not codes.any() and not scales.any() and torch.equal(decode(codes, scales), x)


def test_small_changes_of_a_second_moment_add_up() -> None:
    """With beta2 = 0.999 a step changes it by a thousandth, and codes are 1.6 % apart."""
    n, steps = 4096, 400
    w, g = torch.zeros(16, n // 16), torch.full((16, n // 16), 2**0.5)
    noise = torch.zeros(w.shape, dtype=torch.int64)
    (m, ms), (v, vs) = encode(w, noise, torch.int8), encode(w + 1, noise, torch.uint8)
    v[:, 1:] = 200  # smaller than the block's largest
    before = decode(v, vs)[:, 1:].mean()
    one = torch.ones(())
    for step in range(1, steps + 1):
        adamw_reference(w, g, m, v, ms, vs, None, one * step, torch.ones(2), one, one * 0, Place(),
                        RULE._replace(beta2=0.999))  # fmt: skip
    expected = before * 0.999**steps + 2 * (1 - 0.999**steps)
    assert decode(v, vs)[:, 1:].mean().item() == pytest.approx(expected.item(), rel=5e-3)
