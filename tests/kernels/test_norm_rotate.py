import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from llmfoundry.kernels.norm_rotate import norm_rotate, norm_rotate_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _inputs(heads: int, groups: int, dim: int, each: bool, rows_apart: bool) -> tuple[Tensor, ...]:
    rows, length = 2, 5
    qkv = torch.randn(rows, length, (heads + 2 * groups) * dim)
    weights = [torch.randn(dim if each else n * dim) for n in (heads, groups)]
    angles = torch.randn(*((rows,) if rows_apart else ()), length, 1, dim // 2)
    leaves = [each.to(DEVICE).requires_grad_() for each in (qkv, *weights)]
    return *leaves, angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "rows_apart"), [(4, 2, 16, False), (3, 1, 12, True), (2, 2, 8, True)]
)
def test_equals_the_plain_norm_and_rotation(heads: int, groups: int, dim: int, rows_apart: bool, each: bool) -> None:
    inputs = _inputs(heads, groups, dim, each, rows_apart)
    ours, theirs = (
        call(*inputs, heads, groups, 1e-5) for call in (norm_rotate, norm_rotate_reference)
    )  # fmt: skip
    # Attention returns gradients of queries and keys in (B, H, S, C), and of values in a layout of its own.
    dy = [torch.randn(y.transpose(1, 2).shape, device=DEVICE).transpose(1, 2) for y in ours]
    found, true = (torch.autograd.grad(ys, inputs[:3], dy) for ys in (ours, theirs))
    for mine, other in zip((*ours, *found), (*theirs, *true), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
