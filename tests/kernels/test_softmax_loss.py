"""The kernel of the loss against the plain operation in float64, and itself. Without a GPU it is interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmfoundry.kernels import softmax_loss as module
from llmfoundry.kernels.softmax_loss import softmax_loss_reference
from tests.kernels.devices import DEVICES

pytest.importorskip("triton")
N = 5


def _run(logits: Tensor, labels: Tensor, softcap: float | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    loss, gradient = torch.empty_like(logits[:, 0]), torch.full_like(logits, torch.nan)
    run = module.softmax_loss_triton if logits.dtype == torch.float32 else softmax_loss_reference
    run(logits, labels, loss, gradient, softcap, weights)
    return loss, gradient


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocab", "softcap", "weighted"), [(1, None, False), (60, 3.0, True), (150, None, True)])
def test_slices_of_rows_give_the_whole_loss_and_gradient(
    vocab: int, softcap: float | None, weighted: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)  # 1 and 3 slices
    logits, labels = torch.randn(N, vocab, device=device) * 2, torch.randint(vocab, (N,), device=device)
    labels[2] = module.IGNORE
    labels[3] = vocab - 1
    if softcap is None:
        logits[3, :-1] = -torch.inf  # slices of nothing else
    weights = torch.rand(N, device=device) if weighted else None
    ours = _run(logits, labels, softcap, weights)
    theirs = _run(logits.double(), labels, softcap, None if weights is None else weights.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, _run(logits, labels, softcap, weights), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_and_labels_that_do_not_lie_side_by_side(device: str) -> None:
    logits, labels = torch.randn(N, 7, device=device), torch.randint(7, (N, 2), device=device)[:, 0]
    weights = torch.full((), 0.5, device=device).expand(N)  # as autograd gives a sum's gradient
    ours = _run(logits, labels, None, weights)
    for a, b in zip(ours, _run(logits.double(), labels, None, weights.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_label_outside_the_vocabulary_is_seen_in_the_loss_and_in_the_gradient(device: str) -> None:
    loss, gradient = _run(
        torch.randn(N, 7, device=device), torch.tensor([4, 7, -1, -100, 1], device=device), None, None
    )
    assert loss.isnan().tolist() == gradient.isnan().all(1).tolist() == [False, True, True, False, False]
    assert gradient.isnan().any(1).tolist() == loss.isnan().tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_beside_nothing_but_minus_infinity_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)
    logits = torch.randn(N, 66, device=device)
    logits[1, 64:] = torch.nan  # with the rest of the block, which is -inf
    logits[2, 64], logits[2, 65] = -torch.inf, torch.nan
    loss, gradient = _run(logits, torch.full((N,), 3, device=device), None, None)
    assert loss.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, True, False, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy, which sees NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the kernel, and in plain PyTorch
def test_logits_of_tokens_that_do_not_count_are_not_seen(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, weights = torch.randn(N, 7, dtype=dtype, device=device), torch.ones(N, dtype=dtype, device=device)
    logits[1], logits[2, 0], weights[3] = torch.nan, -torch.inf, torch.nan
    loss, gradient = _run(logits, torch.tensor([4, -100, -100, -100, 1], device=device), 3.0, weights)
    assert loss[1:4].eq(0).all() and gradient[1:4].eq(0).all()
    assert loss[[0, 4]].gt(0).all() and gradient[[0, 4]].ne(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50_304, 151_936, 700_000])
def test_programs_that_share_a_row_give_what_two_launches_give(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(600, vocab, device="cuda") * 4, torch.randint(vocab, (600,), device="cuda")
    together = _run(logits, labels, None, None)
    assert module._fit_at_once(-(-vocab // module._BLOCK), logits.device) == (vocab < 500_000)
    monkeypatch.setattr(module, "_fit_at_once", lambda *_: False)
    for a, b in zip(together, _run(logits, labels, None, None), strict=True):
        assert torch.equal(a, b)
