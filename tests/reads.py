"""Counts the calls that would make the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "is_nonzero"}


class CountsReads(TorchFunctionMode):
    """Counts what would make the host wait if tensors were on a GPU; not what happens inside of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))  # type: ignore[arg-type]
