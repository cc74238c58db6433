"""Lets Composer be imported beside a torch that its torchvision was not built for: import this first.

Composer imports torchvision, whose package declares shapes for two operators of its own library. Where that library
does not load (a CUDA build beside a CPU build of torch), they are missing and the import fails. Neither is ever called
here, so they are declared without code.
"""

from __future__ import annotations

import torch

MISSING = ("nms", "qnms")

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass  # Composer says what it lacks
except (RuntimeError, ImportError):
    for name in MISSING:
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
