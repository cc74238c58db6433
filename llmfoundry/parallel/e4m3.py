"""`precision: amp_fp8`: which layers compute in e4m3. They are changed in place, so names and checkpoints stay."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from llmfoundry.layers.scaled import ScaledLinear, scaled_refusal
from llmfoundry.moe.layer import Experts

log = logging.getLogger(__name__)


def use_e4m3(blocks: Iterable[nn.Module]) -> None:
    """Let the linear layers and experts of these blocks compute in e4m3, where they can; say once which cannot."""
    left: dict[str, str] = {}
    for block in blocks:
        for name, module in block.named_modules():
            refusal = _change(module)
            if refusal is not None:
                left.setdefault(name, refusal)
    for name, refusal in left.items():
        log.warning("precision: amp_fp8 leaves %s in bfloat16: %s", name, refusal)


def _change(module: nn.Module) -> str | None:
    if isinstance(module, Experts):
        return module.use_e4m3()
    if type(module) is not nn.Linear or module.out_features == 1:  # the gate of a shared expert
        return None
    refusal = scaled_refusal(module)
    if refusal is None:
        module.__class__ = ScaledLinear
    return refusal
