"""`precision: amp_fp8`: converts layers to e4m3 in place, so that names and checkpoints do not change."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from llmfoundry.layers.scaled import ScaledLinear, scaled_refusal
from llmfoundry.moe.layer import Experts

log = logging.getLogger(__name__)


def use_e4m3(blocks: Iterable[nn.Module]) -> None:
    """Convert the linear layers and experts of these blocks to e4m3 if supported; log once which are not."""
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
    if type(module) is not nn.Linear or module.out_features == 1:  # a shared expert's gate
        return None
    refusal = scaled_refusal(module)
    if refusal is None:
        module.__class__ = ScaledLinear
    return refusal
