"""Lion in one pass: the kernel against its reference, parts against the whole, a step that is skipped.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmfoundry.kernels import lion
from llmfoundry.kernels.update import Place
from tests.kernels.devices import DEVICES

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "keep": 0.999}
WHOLE = torch.Size((4, 6, 1000))
CUT = slice(2, 4), slice(3, 6)


def drawn(device: str, weight: torch.dtype, grad: torch.dtype, moment: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    w, m, g = (torch.randn(WHOLE, generator=random).to(device) for _ in range(3))
    return [w.to(weight), m.to(moment), g.to(grad)]


def advance(run: str, tensors: list[Tensor], copies: list[Tensor], place: Place, skip: float = 0.0) -> None:
    step, divisor, flag = (torch.tensor(value, device=tensors[0].device) for value in (3.0, 2.0, skip))
    getattr(lion, run)(*tensors, copies, step, divisor, flag, place, **SETTINGS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("weight", "moment"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
def test_the_kernel_equals_the_reference(
    weight: torch.dtype, moment: torch.dtype, grad: torch.dtype, device: str
) -> None:
    pytest.importorskip("triton")
    ours = drawn(device, weight, grad, moment)
    theirs, copies = [each.clone() for each in ours], [torch.zeros(WHOLE, dtype=torch.bfloat16, device=device)]
    advance("lion_triton", ours, copies, Place(7, 11))
    advance("lion_reference", theirs, [], Place(7, 11))
    if moment == torch.float32:
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)
    else:  # the same random bits: another neighbour only where the last bit of float32 decides
        torch.testing.assert_close(ours[1], theirs[1], rtol=2**-7, atol=1e-6)
        assert (ours[1] != theirs[1]).float().mean() < 1e-3
    # Triton's interpreter cuts bits off where a GPU rounds to the nearest.
    torch.testing.assert_close(copies[0].float(), theirs[0].float(), rtol=2**-6, atol=1e-6)
    if weight == torch.float32:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=1e-6)
        assert (ours[0] != theirs[0]).float().mean() < 1e-3


def test_small_changes_of_a_momentum_in_bf16_add_up() -> None:
    """With beta2 = 0.999 a step changes it by a thousandth: rounded to the nearest, by nothing."""
    n, steps = 4000, 300
    tensors = [torch.zeros(n), torch.ones(n, dtype=torch.bfloat16), torch.full((n,), 2.0)]
    for step in range(1, steps + 1):
        lion.lion_reference(*tensors, [], torch.tensor(float(step)), torch.ones(()), torch.zeros(()), Place(),
                            lr=1e-3, beta1=0.9, beta2=0.999, keep=1.0)  # fmt: skip
    assert tensors[1].float().mean().item() == pytest.approx(2 - 0.999**steps, rel=2e-3)


def test_parts_get_the_bits_of_the_whole() -> None:
    whole = drawn("cpu", torch.bfloat16, torch.float32, torch.bfloat16)
    part = [each[CUT].clone() for each in whole]
    advance("lion_reference", whole, [], Place.of(7, WHOLE, WHOLE, (0, 0, 0)))
    advance("lion_reference", part, [], Place.of(7, part[0].shape, WHOLE, (2, 3, 0)))
    assert all(torch.equal(a[CUT], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", ["lion_triton", "lion_reference"])
def test_a_step_that_is_skipped_changes_no_bit(run: str, device: str) -> None:
    pytest.importorskip("triton")
    tensors = drawn(device, torch.bfloat16, torch.float32, torch.bfloat16)
    tensors[2][1, 2, 3] = float("nan")
    before = [each.clone() for each in tensors[:2]]
    advance(run, tensors, [], Place(), skip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors[:2], strict=True))
