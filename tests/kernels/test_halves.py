"""Float32 weights in two halves: exact, the same step as of whole weights, by kernels and references.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmfoundry.kernels import eight_bit, halves, lion, muon, update
from llmfoundry.kernels.eight_bit import encode
from llmfoundry.kernels.halves import join_into, joined, split
from llmfoundry.kernels.update import Place, Rule, corrections
from tests.kernels.devices import DEVICES

RULE = Rule(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
SHAPE = (3, 300)


def test_halves_are_the_weight_exactly() -> None:
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=random).int()
    bits[:6] = torch.tensor([0, 0x3F808000, 0x3F818000, -0x80000000, 0x7F7FFFFF, 0x3F807FFF]).int()  # ties, -0, largest
    x = bits.view(torch.float32)
    high, low = split(x)
    assert torch.equal(joined(high, low).view(torch.int32)[~x.isnan()], bits[~x.isnan()])
    assert high[x.isnan()].isnan().all() and joined(high, low)[x.isnan()].isnan().all()
    near = x.isfinite() & (bits & 0xFFFF != 0x8000)
    assert torch.equal(high[near], x[near].bfloat16()), "rounded to the nearest"


def test_halves_are_joined_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_AT_ONCE", 1000)
    x = torch.randn(7, 300)
    out = torch.empty_like(x)
    join_into(out, split(x))
    assert torch.equal(out, x)


def steps(device: str) -> dict[str, Callable[[str, Tensor, list[Tensor]], object]]:
    """One step of each optimizer: of a weight, with what is beside it, by the kernel or the reference."""
    random = torch.Generator().manual_seed(1)
    g, m, v = (torch.randn(SHAPE, generator=random).to(device) for _ in range(3))
    step, divisor, skip = (torch.tensor(value, device=device) for value in (3.0, 2.0, 0.0))

    def adamw(run: str, w: Tensor, beside: list[Tensor]) -> None:
        getattr(update, f"adamw_{run}")(
            [w], [g], [m.clone()], [v.abs()], beside, step[None], divisor, skip, [Place()], RULE
        )

    def adamw_of_8_bits(run: str, w: Tensor, beside: list[Tensor]) -> None:
        bits = torch.full(SHAPE, 1 << 15, device=device)
        (mean, mean_scale), (square, square_scale) = encode(m, bits, torch.int8), encode(v.abs(), bits, torch.uint8)
        factors, other = corrections(step[None], 0.9, 0.95)[0], beside[0] if beside else None
        getattr(eight_bit, f"adamw_{run}")(
            w, g, mean, square, mean_scale, square_scale, other, step, factors, divisor, skip, Place(), RULE
        )

    def by_lion(run: str, w: Tensor, beside: list[Tensor]) -> None:
        settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "keep": 0.999}
        getattr(lion, f"lion_{run}")(w, m.clone(), g, beside, step, divisor, skip, Place(), **settings)

    def by_muon(run: str, w: Tensor, beside: list[Tensor]) -> None:
        getattr(muon, f"apply_{run}")(w, beside, g, step, skip, Place(), lr=0.25, keep=0.9)

    return {"adamw": adamw, "adamw of 8 bits": adamw_of_8_bits, "lion": by_lion, "muon": by_muon}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", ["triton", "reference"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw of 8 bits", "lion", "muon"])
def test_a_step_of_halves_is_that_of_the_weight_to_the_bit(optimizer: str, run: str, device: str) -> None:
    if run == "triton":
        pytest.importorskip("triton")
    take = functools.partial(steps(device)[optimizer], run)
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(device)
    high, low = split(whole)
    before = whole.clone()
    for _ in range(3):
        take(whole, [])
        take(high, [low])
    assert not torch.equal(whole, before)
    assert torch.equal(joined(high, low), whole)
    assert torch.equal(high, split(whole).high)
