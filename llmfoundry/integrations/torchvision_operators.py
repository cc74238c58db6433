"""Lets Composer be imported with a PyTorch that its torchvision was not built for; import this module first.

Composer imports torchvision, which declares shapes for two operators of its own library. If that library does not load
(a CUDA build with a CPU build of PyTorch), they are missing and the import fails. Neither is ever called here, so they
are declared without an implementation.
"""

from __future__ import annotations

import torch

MISSING = ("nms", "qnms")

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass  # Composer reports what is missing
except (RuntimeError, ImportError):
    for name in MISSING:
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
