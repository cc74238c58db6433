"""Kernels and fused operations, each beside its plain PyTorch reference.

`experts_ffn` is the mixture's grouped feed-forward, `linear_cross_entropy` the output head with its loss, `top_k_ids`
the choice of experts. They take plain tensors and do not depend on the rest of this package.
"""

from llmfoundry.kernels.activations import ACTIVATIONS, GLU_ACTIVATIONS
from llmfoundry.kernels.cross_entropy import linear_cross_entropy
from llmfoundry.kernels.experts import Backend, ExpertKind, experts_ffn, resolve_backend
from llmfoundry.kernels.top_k import top_k_ids

__all__ = [
    "ACTIVATIONS",
    "GLU_ACTIVATIONS",
    "Backend",
    "ExpertKind",
    "experts_ffn",
    "linear_cross_entropy",
    "resolve_backend",
    "top_k_ids",
]
