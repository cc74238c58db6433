from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmfoundry.kernels import cross_entropy
from llmfoundry.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def _inputs(tokens: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, 24, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(vocab, 24, dtype=dtype, device=device, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), device=device)
    labels[::3] = -100
    return x, weight, labels


def _value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
) -> tuple[Tensor, ...]:
    loss = function(x, weight, labels, softcap)
    return loss, *torch.autograd.grad(loss / 7, (x, weight))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tokens", [0, 1, 2, 37])
@pytest.mark.parametrize("sizes", [(1, 1), (11 * 4, 11 * 8), (11 * 2, 10**9), (10**9, 10**9)])
def test_equals_the_plain_loss_in_float64(
    monkeypatch: pytest.MonkeyPatch, tokens: int, sizes: tuple[int, int], softcap: float | None
) -> None:
    monkeypatch.setitem(cross_entropy.SIZES, "cpu", cross_entropy.Sizes(*sizes))
    inputs = _inputs(tokens, 11, torch.float64)
    ours = _value_and_gradients(linear_cross_entropy, *inputs, softcap)
    theirs = _value_and_gradients(cross_entropy_reference, *inputs, softcap)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [11, 1000, 20011])
def test_lower_precisions_are_near_float64(device: str, dtype: torch.dtype, vocab: int) -> None:
    x, weight, labels = _inputs(130, vocab, dtype, device)
    ours = _value_and_gradients(linear_cross_entropy, x, weight, labels, None)
    exact = _value_and_gradients(cross_entropy_reference, x.double(), weight.double(), labels, None)
    # Float32 logits of up to 25 are right to 2^-19, and so is each probability by its own size. In bf16 the
    # logits are as exact (float32 products of bf16 numbers), but their gradient and the result are rounded to
    # 8 bits.
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)
    step = 2**-18 if dtype == torch.float32 else 2**-7
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=step, atol=2 * step * float(b.abs().max()))


def test_ignored_tokens_alone_give_zero_and_no_gradient() -> None:
    x, weight, labels = _inputs(9, 11, torch.float32)
    loss, dx, dw = _value_and_gradients(linear_cross_entropy, x, weight, torch.full_like(labels, -100), None)
    assert loss == 0 and not dx.any() and not dw.any()


def test_logits_beyond_exp_range_stay_finite() -> None:
    x, weight, labels = _inputs(9, 11, torch.float32)
    x, weight = (x * 100).detach().requires_grad_(), weight.detach().requires_grad_()
    assert all(value.isfinite().all() for value in _value_and_gradients(linear_cross_entropy, x, weight, labels, None))


class _Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_all_logits_are_never_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.SIZES, "cpu", cross_entropy.Sizes(1000, 2000))
    x, weight, labels = _inputs(400, 50, torch.float32)
    with _Largest() as largest:
        linear_cross_entropy(x, weight, labels).backward()
    assert largest.elements == x.numel() < 400 * 50


def test_without_gradients_none_are_made() -> None:
    x, weight, labels = _inputs(40, 11, torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy_reference(x, weight, labels).detach())


def test_label_outside_the_vocabulary_is_refused_on_cpu() -> None:
    x, weight, labels = _inputs(4, 11, torch.float32)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, labels.fill_(11))


@pytest.mark.gpu
def test_label_outside_the_vocabulary_shows_as_nan_on_cuda() -> None:
    x, weight, labels = _inputs(4, 11, torch.float32, "cuda")
    assert linear_cross_entropy(x, weight, labels.fill_(11)).isnan()


@pytest.mark.parametrize(("frozen", "given"), [("weight", "x"), ("x", "weight")])
def test_no_gradient_is_computed_for_what_is_frozen(frozen: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"x": torch.randn(6, 8), "weight": torch.randn(11, 8)}
    leaves = {name: tensor.clone().requires_grad_(name != frozen) for name, tensor in tensors.items()}
    labels = torch.arange(6)
    products: list[str] = []
    for name in ("_product", "_add_product"):
        real = getattr(cross_entropy, name)
        monkeypatch.setattr(
            cross_entropy, name, lambda *a, real=real, name=name, **k: (products.append(name), real(*a, **k))[1]
        )
    linear_cross_entropy(leaves["x"], leaves["weight"], labels).backward()
    # The first sum is a product alone.
    assert products == ["_product", *(["_product"] if frozen == "weight" else ["_add_product", "_product"])]
    whole = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    cross_entropy_reference(whole["x"], whole["weight"], labels).backward()
    torch.testing.assert_close(leaves[given].grad, whole[given].grad)
    assert leaves[frozen].grad is None
