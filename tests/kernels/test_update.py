"""AdamW in one pass: the kernel against the plain reference, the reference against torch, and rounding at random.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmfoundry.kernels import update
from llmfoundry.kernels.update import Place, Rule, adamw_, adamw_reference
from tests.kernels.devices import DEVICES

RULE = Rule(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
SHAPES = [(3,), (70, 33), (4, 5, 9), (20_001,)]
WHOLE = [(3,), (70, 33), (8, 10, 9), (20_001,)]
OFFSETS = [(0,), (0, 0), (4, 5, 0), (0,)]


def drawn(
    device: str, grad: torch.dtype, moment: torch.dtype, weight: torch.dtype = torch.float32
) -> tuple[list[Tensor], ...]:
    """Weights, gradients, moments, and copies that nobody has written: none of weights in bfloat16."""
    weights, grads, means = ([torch.randn(shape, device=device) for shape in SHAPES] for _ in range(3))
    squares = [torch.rand(shape, device=device).to(moment) for shape in SHAPES]
    copies = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in SHAPES]
    if weight == torch.bfloat16:
        weights, copies = [each.bfloat16() for each in weights], []
    return weights, [each.to(grad) for each in grads], [each.to(moment) for each in means], squares, copies


def places() -> list[Place]:
    cuts = zip(SHAPES, WHOLE, OFFSETS, strict=True)
    return [Place.of(i, torch.Size(part), torch.Size(whole), at) for i, (part, whole, at) in enumerate(cuts)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_reference(
    weight: torch.dtype, grad: torch.dtype, moment: torch.dtype, device: str
) -> None:
    pytest.importorskip("triton")
    ours = drawn(device, grad, moment, weight)
    theirs = tuple([each.clone() for each in tensors] for tensors in ours)
    steps, divisor, skip = torch.arange(1.0, 5.0, device=device), torch.tensor(2.0, device=device), torch.zeros(())
    for run, tensors in ((update.adamw_triton, ours), (adamw_reference, theirs)):
        run(*tensors, steps, divisor, skip.to(device), places(), RULE)
    for a, b in zip(ours[0], theirs[0], strict=True):
        if weight == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)
            assert (a != b).float().mean() < 1e-3
    for w, copy in zip(ours[0] + theirs[0], ours[4] + theirs[4], strict=weight == torch.float32):
        # Triton's interpreter cuts bits off where a GPU rounds to the nearest.
        torch.testing.assert_close(copy, w.bfloat16(), rtol=0 if device == "cuda" else 2**-7, atol=0)
    for a, b in zip(ours[2] + ours[3], theirs[2] + theirs[3], strict=True):
        if moment == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        else:  # the same random bits: another one of the two neighbours only where the last bit of float32 decides
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)
            assert (a != b).float().mean() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_is_that_of_torch(device: str) -> None:
    weights, *_ = drawn(device, torch.float32, torch.float32)
    theirs = [torch.nn.Parameter(each.clone()) for each in weights]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    means, squares = ([torch.zeros_like(each) for each in weights] for _ in range(2))
    one = torch.ones((), device=device)
    for step in range(1, 5):
        grads = [torch.randn(each.shape, device=device) for each in weights]
        adamw_(weights, grads, means, squares, [], [one * step] * len(weights), one * 4, one * 0, places(), RULE)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad / 4
        optimizer.step()
    for a, b in zip(weights, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", ["adamw_triton", "adamw_reference"])
def test_a_step_that_is_skipped_changes_no_bit(run: str, device: str) -> None:
    pytest.importorskip("triton")
    tensors = drawn(device, torch.float32, torch.bfloat16)
    tensors[1][1][3, 4] = float("nan")
    before = [each.clone() for part in (0, 2, 3, 4) for each in tensors[part]]
    nan, one = torch.tensor(float("nan"), device=device), torch.ones((), device=device)
    getattr(update, run)(*tensors, one.expand(4).contiguous(), nan, one, places(), RULE)
    assert all(
        torch.equal(a, b) for a, b in zip(before, [w for part in (0, 2, 3, 4) for w in tensors[part]], strict=True)
    )


def test_parts_get_the_bits_of_the_whole() -> None:
    whole = torch.Size((4, 6, 5))
    tensors = [torch.randn(whole).bfloat16(), torch.randn(whole), torch.zeros(whole, dtype=torch.bfloat16)]
    tensors.append(torch.zeros(whole, dtype=torch.bfloat16))
    ranks = [(slice(2 * e, 2 * e + 2), slice(3 * f, 3 * f + 3)) for e in range(2) for f in range(2)]
    parts = [[each[cut].clone() for each in tensors] for cut in ranks]
    arguments = torch.ones(1), torch.ones(()), torch.zeros(())
    adamw_reference(*([each] for each in tensors), [], *arguments, [Place.of(7, whole, whole, (0, 0, 0))], RULE)
    for cut, part in zip(ranks, parts, strict=True):
        place = Place.of(7, part[0].shape, whole, (cut[0].start, cut[1].start, 0))
        adamw_reference(*([each] for each in part), [], *arguments, [place], RULE)
        assert all(torch.equal(a[cut], b) for a, b in zip(tensors, part, strict=True))


def test_small_changes_of_a_moment_in_bf16_add_up() -> None:
    """With beta2 = 0.999 a step changes the second moment by a thousandth: rounded to the nearest, by nothing."""
    n, steps = 2000, 700
    weight, mean = torch.zeros(n), torch.zeros(n, dtype=torch.bfloat16)
    square = torch.ones(n, dtype=torch.bfloat16)
    grad = torch.full((n,), 2**0.5)
    for step in range(1, steps + 1):
        at = torch.tensor([float(step)])
        adamw_reference([weight], [grad], [mean], [square], [], at, torch.ones(()), torch.zeros(()), [Place()],
                        RULE._replace(beta2=0.999))  # fmt: skip
    expected = 2 - 0.999**steps
    assert square.float().mean().item() == pytest.approx(expected, rel=2e-3)
    nearest = torch.tensor(1.0, dtype=torch.bfloat16)
    assert (nearest.float() * 0.999 + 2 * 0.001).bfloat16() == nearest


def test_small_updates_of_weights_in_bf16_add_up() -> None:
    """A step of 1/1000 of a weight is 1/4 of its last bit; and what is rounded is right on average, at every size."""
    n, steps, lr = 4096, 40, 1e-3
    weight, mean, square = torch.ones(n, dtype=torch.bfloat16), torch.zeros(n), torch.zeros(n)
    for step in range(1, steps + 1):
        adamw_reference([weight], [torch.ones(n)], [mean], [square], [], torch.tensor([float(step)]), torch.ones(()),
                        torch.zeros(()), [Place()], RULE._replace(lr=lr, decay=0.0))  # fmt: skip
    # A step rounds each value with a standard deviation of at most 1/512; of the mean, 40^0.5 / 512 / 4096^0.5 = 2e-4.
    assert weight.float().mean().item() == pytest.approx(1 - steps * lr, abs=4e-4)
    assert weight.unique().numel() > 2
    noise = update.noise_of_weight(update.noise_of(torch.zeros(2**20), torch.ones(()), Place(5)))
    for x in (1.0000305, -3.3333333, 1e-20, 65504.123):
        exact = torch.full((2**20,), x)
        rounded = update.rounded(exact, noise).double()
        last = rounded.max() - rounded.min()  # 2^20 values with a spread of at most half a bit: 5 / 2000
        assert rounded.unique().numel() == 2 and abs(rounded.mean() - exact[0].double()) < last * 2.5e-3


def test_bits_of_a_weight_are_not_those_of_its_moments() -> None:
    noise = update.noise_of(torch.zeros(2**16), torch.ones(()), Place(5))
    bits = torch.stack([update.noise_of_weight(noise), noise & 0xFFFF, noise >> 16]).double()
    assert torch.corrcoef(bits).fill_diagonal_(0).abs().max() < 0.02  # chance: 1/256


def test_another_step_or_parameter_rounds_otherwise() -> None:
    def mean(number: int, step: float) -> Tensor:
        tensors = [torch.zeros(512), torch.full((512,), 1.2345)]
        tensors += [torch.zeros(512, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)]
        adamw_reference(*([each] for each in tensors), [], torch.tensor([step]), torch.ones(()), torch.zeros(()),
                        [Place(number)], RULE)  # fmt: skip
        return tensors[2]

    first = mean(0, 1.0)
    assert torch.equal(first, mean(0, 1.0)) and first.unique().numel() == 2
    assert not torch.equal(first, mean(0, 2.0)) and not torch.equal(first, mean(1, 1.0))


def test_a_part_that_is_cut_twice_behind_the_first_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="cut in more than one dim"):
        Place.of(0, torch.Size((2, 3, 4)), torch.Size((2, 6, 8)), (0, 0, 0))
