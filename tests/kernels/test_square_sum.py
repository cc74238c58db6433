"""The sum of squares of a list of tensors, by the kernel and in plain PyTorch. Without a GPU it is interpreted."""

from __future__ import annotations

import pytest
import torch

from llmfoundry.kernels import square_sum as module
from llmfoundry.kernels.square_sum import square_sum, square_sum_reference
from tests.kernels.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_reference(dtype: torch.dtype, device: str) -> None:
    pytest.importorskip("triton")
    # Of several programs; of a size and an address that no 16 bytes fit into; of nothing; not contiguous.
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in [(130, 520), (3,), (0, 4), (70, 9)]]
    tensors += [tensors[0].view(-1)[1:9], tensors[0].T]
    ours = module.square_sum_triton(tensors)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, square_sum_reference([each.double() for each in tensors]), rtol=1e-6, atol=0)
    assert torch.equal(ours, module.square_sum_triton(tensors))


def test_it_counts_every_value_and_keeps_what_is_not_finite() -> None:
    tensors = [torch.full((256,), 2.0), torch.ones(4)]
    assert square_sum(tensors) == 1028
    tensors[1][3] = torch.inf
    assert square_sum(tensors).isinf()
    assert square_sum([torch.zeros(0)]) == 0
