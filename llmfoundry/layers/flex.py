"""FlexAttention: its mask of blocks, and one compiled function for each kind of attention.

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

BLOCK = 128  # queries and keys of a block, FlexAttention's own default
NO_WINDOW = 2**31 - 1  # the same for every length, since the compiled code holds it as a constant
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class FlexOutput(NamedTuple):
    """What attention gives, and what a sink needs to join the softmax later."""

    y: Tensor  # (B, H, S, V)
    lse: Tensor | None  # (B, H, S) float32, log-sum-exp of the scores, if asked for


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, score: Score | None = None, lse: bool = False
) -> FlexOutput:
    """Attention in one fused kernel, which is compiled at the first call of a kind unless a graph holds this call.

    Args:
        q: (B, H, S, C).
        k: (B, G, S, C).
        v: (B, G, S, V).
        score: changes the scores; None: they stay.
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
    """Without `fullgraph`, torch would run it eagerly past the recompile limit, holding (B, H, S, S) scores."""
    return torch.compile(with_own_code(_attend, "flex_attention_of_a_kind"), fullgraph=True)


def _constants(function: Callable[..., Tensor] | None) -> tuple[object, ...]:
    """What a graph holds as constants of a function: its code, and what it encloses except tensors' values."""
    if function is None:
        return ()
    enclosed = (cell.cell_contents for cell in function.__closure__ or ())
    return function.__code__, *(Tensor if isinstance(value, Tensor) else value for value in enclosed)


def _layout(x: Tensor) -> tuple[object, ...]:
    """What a graph depends on, except sizes that it can leave open: rows, unless one, and the length."""
    return x.dtype, x.device, x.requires_grad, x.shape[0] == 1, x.shape[1], x.shape[3]


def block_mask(window: int, length: int, sequence_ids: Tensor | None, device: torch.device) -> BlockMask:
    """The mask of causal attention, by blocks: those seen in whole, and those that have to look at each pair.

    It is computed from the first and last position and the least and greatest document of each block, (B, N, N) at
    most. FlexAttention's own `create_block_mask` looks at (B, S, S) pairs, and has to be compiled.

    Args:
        window: earlier tokens seen besides the token itself; NO_WINDOW: all.
        length: S.
        sequence_ids: (B, S) document numbers in any order, or None.
    """
    n = -(-length // BLOCK)
    first = torch.arange(0, n * BLOCK, BLOCK, device=device)  # (N,)
    last = first + BLOCK - 1
    end = last.clamp(max=length - 1)
    some = (first <= end[:, None]) & (first[:, None] - end <= window)  # (N, N), queries by keys
    # The last block is never whole if it is short.
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
    """(..., N, N) -> how many blocks each row has, (..., N), and which, (..., N, N): those come first, in order."""
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
