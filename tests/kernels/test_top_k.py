"""The choice of experts: that of a stable sort, in PyTorch, in Triton's interpreter and on the GPU.

Shapes: T tokens, E experts, K top_k.
"""

from __future__ import annotations

import pytest
import torch

from llmfoundry.kernels.top_k import top_k_ids

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_sort(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def drawn(e: int, device: str) -> torch.Tensor:
    """Floats of both signs, then rows full of ties, then rows with experts that are left out."""
    masked = torch.randn(200, e).masked_fill(torch.rand(200, e) < 0.3, float("-inf"))
    masked[:, -1] = 0
    return torch.cat([torch.randn(500, e), torch.randint(-2, 3, (500, e)).float(), masked]).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_id(device: str) -> None:
    scores = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.0, -0.0, 0.0, -1.0]], device=device)
    for dtype in (torch.float32, torch.float64):
        assert top_k_ids(scores.to(dtype), 2).tolist() == [[0, 2], [0, 1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("e,k", [(7, 4), (64, 8), (128, 8), (1, 1)])
def test_top_k_is_that_of_a_sort_for_any_floats(e: int, k: int, device: str) -> None:
    scores = drawn(e, device)
    assert torch.equal(top_k_ids(scores, k), by_sort(scores, k))


def test_no_tokens() -> None:
    assert top_k_ids(torch.empty(0, 4), 2).shape == (0, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's own test")
@pytest.mark.parametrize("e,k", [(7, 4), (64, 8), (1, 1)])
def test_interpreted_kernel_is_that_of_a_sort(e: int, k: int) -> None:
    pytest.importorskip("triton")
    scores = drawn(e, "cpu")
    assert torch.equal(torch.ops.llmfoundry.top_k_ids(scores, k), by_sort(scores, k))
