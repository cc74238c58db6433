"""Where the kernels' tests run: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
