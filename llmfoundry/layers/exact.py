"""A module base class whose buffers keep their dtype when the module is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose buffers keep their dtype: `.to(dtype)`, `.half()` and the like only cast its parameters.

    A scale that 64 values share, or a bias that accumulates small steps, would lose accuracy in bfloat16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
