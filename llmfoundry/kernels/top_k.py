"""The top experts of each token with deterministic ties: one pass over the scores, K maxima per row.

Shapes: T tokens, E experts, K top_k.
`torch.topk` does not specify the order of ties, so two devices, or a run and its recomputation, could route
differently. Here the lowest id wins. Scores are compared as integers in the same order, so that a chosen one can be set
below all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmfoundry.kernels.whole import cdiv, next_power_of_2

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not include it
    triton = None

# The operators that choose experts; recomputation keeps their results.
CHOICE = ("aten.topk",) if triton is None else ("aten.topk", "llmfoundry.top_k_ids")


def top_k_ids(scores: Tensor, k: int) -> Tensor:
    """Return the `k` best ids of each row, best first, ties to the lowest id: (T, E) -> (T, K) int64."""
    if triton is not None and scores.is_cuda and scores.dtype == torch.float32 and scores.numel() > 0:
        return _top_k_ids(scores.contiguous(), k)
    return top_k_ids_reference(scores, k)


def top_k_ids_reference(scores: Tensor, k: int) -> Tensor:
    """`top_k_ids` in plain PyTorch; float32 uses unique keys: the score's bits, then the id in descending order."""
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    n = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    down = torch.arange(n - 1, -1, -1, device=scores.device)
    key = ordered.long() * n + down
    return n - 1 - key.topk(k, dim=-1).values.remainder(n)


if triton is not None:
    # keys per program: 32 per thread, which stay in registers
    _KEYS = 4096

    @triton.jit
    def top_k_kernel(
        scores_ptr, ids_ptr, n_rows, E, K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr
    ):  # fmt: skip
        LOWEST: tl.constexpr = -2147483648
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        e = tl.arange(0, EXPERTS)[None, :]
        inside = (row < n_rows)[:, None] & (e < E)
        score = tl.load(scores_ptr + row[:, None] * E + e, mask=inside, other=0.0)
        bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 and 0 are equal
        key = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
        for j in tl.static_range(K):
            best = tl.argmax(key, axis=1, tie_break_left=True)
            tl.store(ids_ptr + row * K + j, best.to(tl.int64), mask=row < n_rows)
            key = tl.where(e == best[:, None], LOWEST, key)

    @torch.library.custom_op("llmfoundry::top_k_ids", mutates_args=())
    def _top_k_ids(scores: Tensor, k: int) -> Tensor:
        n_rows, n_experts = scores.shape
        ids = torch.empty(n_rows, k, dtype=torch.int64, device=scores.device)
        experts = next_power_of_2(n_experts)
        rows = max(1, min(32, _KEYS // experts))
        top_k_kernel[(cdiv(n_rows, rows),)](scores, ids, n_rows, n_experts, K=k, EXPERTS=experts, ROWS=rows)
        return ids

    @_top_k_ids.register_fake
    def _(scores: Tensor, k: int) -> Tensor:
        return scores.new_empty(scores.shape[0], k, dtype=torch.int64)
