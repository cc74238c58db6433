"""FlexAttention: builds block masks, and compiles one function per kind of attention.

Shapes: B rows, S queries and keys, H query heads, G kv heads, C head_dim, V head_dim of values, N blocks of S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from llmfoundry.layers.graphs import with_own_code

BLOCK = 128  # queries and keys per block; FlexAttention's default
NO_WINDOW = 2**31 - 1  # independent of the length, because the compiled code holds it as a constant
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class FlexOutput(NamedTuple):
    """The output of attention, and the log-sum-exp needed to add a sink to the softmax afterwards."""

    y: Tensor  # (B, H, S, V)
    lse: Tensor | None  # (B, H, S) float32, log-sum-exp of the scores, if requested


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, score: Score | None = None, lse: bool = False
) -> FlexOutput:
    """Attend with one fused kernel. It is compiled at the first call of each kind, unless a graph is being compiled.

    Args:
        q: (B, H, S, C).
        k: (B, G, S, C).
        v: (B, G, S, V).
        mask: from `block_mask`.
        scale: factor on the scores.
        score: modifies the scores; None: unmodified.
        lse: whether to return the log-sum-exp.
    """
    if torch.compiler.is_compiling():
        return _attend(q, k, v, mask, scale, score, lse)
    kind = (_constants(mask.mask_mod), _constants(score), scale, lse, torch.is_grad_enabled(), *map(_layout, (q, k, v)))
    if kind not in _compiled:
        _compiled[kind] = _compile()
    try:
        return _compiled[kind](q, k, v, mask, scale, score, lse)
    except FailOnRecompileLimitHit:  # more sizes than torch keeps graphs for
        _compiled[kind] = _compile()
        return _compiled[kind](q, k, v, mask, scale, score, lse)


_compiled: dict[object, Callable[..., FlexOutput]] = {}


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, score: Score | None, lse: bool
) -> FlexOutput:
    y, aux = flex_attention(
        q, k, v,
        score_mod=score,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=lse),
    )  # fmt: skip
    return FlexOutput(y, aux.lse)


def _compile() -> Callable[..., FlexOutput]:
    """Compile `_attend`. Past the recompile limit, only `fullgraph` prevents eager runs with (B, H, S, S) scores."""
    return torch.compile(with_own_code(_attend, "flex_attention_of_a_kind"), fullgraph=True)


def _constants(function: Callable[..., Tensor] | None) -> tuple[object, ...]:
    """Return what a graph treats as constant in a function: its code, and its closure except tensor values."""
    if function is None:
        return ()
    enclosed = (cell.cell_contents for cell in function.__closure__ or ())
    return function.__code__, *(Tensor if isinstance(value, Tensor) else value for value in enclosed)


def _layout(x: Tensor) -> tuple[object, ...]:
    """Return what a graph depends on, except dynamic sizes: the number of rows, unless it is one, and the length."""
    return x.dtype, x.device, x.requires_grad, x.shape[0] == 1, x.shape[1], x.shape[3]


def block_mask(window: int, length: int, sequence_ids: Tensor | None, device: torch.device) -> BlockMask:
    """Build a causal block mask, which separates fully visible blocks from blocks that are masked per pair.

    It is computed from the first and last position and the smallest and largest document number of each block, in (B,
    N, N) at most. FlexAttention's own `create_block_mask` evaluates (B, S, S) pairs and must be compiled.

    Args:
        window: number of earlier tokens to attend to besides the token itself; NO_WINDOW: all.
        length: S.
        sequence_ids: (B, S) document numbers in any order, or None.
        device: of the mask.
    """
    n = -(-length // BLOCK)
    first = torch.arange(0, n * BLOCK, BLOCK, device=device)  # (N,)
    last = first + BLOCK - 1
    end = last.clamp(max=length - 1)
    some = (first <= end[:, None]) & (first[:, None] - end <= window)  # (N, N), queries by keys
    # A short last block is never fully visible.
    every = (last <= first[:, None]) & (last[:, None] - first <= window) & (last[:, None] < length)
    some, every = some[None], every[None]  # (1, N, N)
    mask_mod = _near(window)
    if sequence_ids is not None:
        mask_mod = _near_in_document(window, sequence_ids)
        at = torch.arange(n * BLOCK, device=device).clamp(max=length - 1)
        least, greatest = sequence_ids[:, at].unflatten(1, (n, BLOCK)).aminmax(dim=2)  # (B, N) each
        some = some & (least[:, :, None] <= greatest[:, None]) & (least[:, None] <= greatest[:, :, None])
        every = every & (least[:, :, None] == greatest[:, None]) & (least[:, None] == greatest[:, :, None])
    both = torch.stack((some & ~every, every))[:, :, None]  # (2, B, 1, N, N)
    (n_keys, n_whole_keys), (keys, whole_keys) = _listed(both)
    (n_queries, n_whole_queries), (queries, whole_queries) = _listed(both.mT)
    return BlockMask(
        (length, length),
        n_keys, keys, n_whole_keys, whole_keys, n_queries, queries, n_whole_queries, whole_queries,
        (BLOCK, BLOCK), mask_mod,
    )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Map (..., N, N) to the number of blocks per row, (..., N), and their indices first, in order, (..., N, N)."""
    order = blocks.byte().contiguous().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _near(window: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j <= window)

    return near


def _near_in_document(window: int, sequence_ids: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def near_in_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j <= window) & (sequence_ids[b, i] == sequence_ids[b, j])

    return near_in_document
