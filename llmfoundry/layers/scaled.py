"""Linear layers whose matrix products are in e4m3, for `precision: amp_fp8`.

Shapes: J inputs, N outputs of a linear layer.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from llmfoundry.kernels.scaled_linear import scaled_linear

STEP = 16  # J and N must be multiples of this: 16 bytes


class ScaledLinear(nn.Linear):
    """A linear layer in e4m3, with the parameters of an nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute `W x + b`."""
        y = cast(Tensor, scaled_linear(input.flatten(0, -2), self.weight)[0]).view(*input.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def scaled_refusal(linear: nn.Linear) -> str | None:
    """Return why a layer cannot be a `ScaledLinear`, or None if it can."""
    if linear.in_features % STEP or linear.out_features % STEP:
        return f"{linear.in_features} and {linear.out_features} are not multiples of {STEP}"
    return None
