"""One optimizer step. Everything that changes the weights happens in `train_step`, in this order.

Shapes: B rows, S sequence, T tokens of the global batch, L MoE layers, E experts, K top_k.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.data.loader import Batch
from llmfoundry.data.rows import IGNORE
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.model.transformer import CausalLM, Output
from llmfoundry.moe.balance import Balance, load_balance_loss, update_expert_bias, z_loss
from llmfoundry.parallel.fsdp import accumulating, forget_step
from llmfoundry.train.optim import clip_by_global_norm


class StepResult(NamedTuple):
    """What a step did, the same on every rank. Only `updated` was read from the device."""

    ce: Tensor  # () nats per label, mean over the global batch
    total: Tensor  # () with the auxiliary losses: what was differentiated
    grad_norm: Tensor  # () before clipping
    router: RouterStats | None  # (L, E), (L, E), (L,), (L,) sums over the global batch
    updated: bool  # False: some gradient was not finite, and nothing was changed
    sources: Tensor  # (2, n_sources) nats and labels of each source of a mixture


def train_step(
    model: CausalLM,
    optimizer: Optimizer,
    batch: Batch,
    *,
    microbatch_rows: int,
    max_grad_norm: float | None,
    balance: Balance | None,
    noise_seed: int = 0,
    n_sources: int = 0,
    together: bool = False,
) -> StepResult:
    """Run forward and backward over microbatches, then clip and update.

    The loss is a sum over labels divided by the labels of the whole global batch, and gradients are summed over
    ranks. So the gradient is the same for every microbatch size, packing and number of ranks.

    Args:
        model: sharded or not.
        batch: this rank's rows, on its device.
        microbatch_rows: rows of one forward; the last microbatch may be smaller.
        max_grad_norm: None does not clip.
        balance: how the experts' load is balanced; None for a dense model.
        noise_seed: for routers with jitter, whose noise depends only on it and on each row's number.
        n_sources: how many a mixture has; 0 for rows of a single one.
        together: when some rank runs out of memory before the update, all of them drop the step.

    Raises:
        runtime.OutOfMemory: `together`, and some rank ran out of memory; nothing has changed.
    """
    batch = batch._replace(rows=batch.rows + runtime.seed_of("noise", noise_seed) // 2)  # // 2: far from overflow
    own = torch.stack([batch.n_labels, torch.full_like(batch.n_labels, batch.tokens.numel())])
    n_labels, n_tokens = runtime.all_reduce_sum(own).unbind()
    microbatches = batch.split(microbatch_rows)
    accumulate = partial(_accumulate, model, microbatches, balance, n_labels, n_tokens, n_sources)
    if together:
        try:
            ce, total, sources, router = runtime.together(accumulate)
        except runtime.OutOfMemory:
            forget_step(model)
            raise
    else:
        ce, total, sources, router = accumulate()

    grad_norm = clip_by_global_norm(model.parameters(), max_grad_norm)
    updated = bool(torch.isfinite(grad_norm))  # the same on every rank, because the norm is global
    ce, total, sources, router = _sum_over_ranks(ce, total, sources, router)
    if updated:
        optimizer.step()
        if balance is not None and router is not None:
            update_expert_bias(model, router.load, balance)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(ce, total, grad_norm, router, updated, sources)


def _accumulate(
    model: CausalLM,
    microbatches: list[Batch],
    balance: Balance | None,
    n_labels: Tensor,
    n_tokens: Tensor,
    n_sources: int,
) -> _Sums:
    """Forward and backward of every microbatch: gradients, and this rank's sums."""
    ce = torch.zeros((), dtype=torch.float32, device=n_labels.device)
    total = torch.zeros_like(ce)
    sources = ce.new_zeros(2, n_sources)
    router: RouterStats | None = None
    for i, (out, load) in enumerate(_forwards(model, microbatches, balance)):
        assert out.loss_sum is not None
        loss = out.loss_sum / n_labels
        ce += loss.detach()
        _add_sources(sources, out, microbatches[i])
        if balance is not None and out.router is not None:
            loss = loss + _auxiliary(out.router, load, balance) / n_tokens
            stats = RouterStats(*(part.detach() for part in out.router))
            router = stats if router is None else RouterStats(*(a + b for a, b in zip(router, stats, strict=True)))
        with accumulating(model, last=i == len(microbatches) - 1):
            loss.backward()
        total += loss.detach()
    return _Sums(ce, total, sources, router)


def forward(model: CausalLM, batch: Batch) -> Output:
    """The model on a batch's rows, with its loss."""
    return model(
        batch.tokens, batch.labels, sequence_ids=batch.sequence_ids, positions=batch.positions, keys=batch.rows
    )


def _forwards(
    model: CausalLM, microbatches: list[Batch], balance: Balance | None
) -> Iterator[tuple[Output, Tensor | None]]:
    """Each microbatch's output, and the (L, E) loads for its balance loss (None: there is no such loss).

    The caller runs the backward of one before it asks for the next. `Balance` says what the modes mean.
    """
    if balance is None or balance.loss_weight == 0:
        yield from ((forward(model, micro), None) for micro in microbatches)
    elif balance.scope == "microbatch":
        for micro in microbatches:
            out = forward(model, micro)
            yield out, _load(out)
    elif balance.accumulation == "running":
        load: Tensor | None = None
        for micro in microbatches:
            out = forward(model, micro)
            seen = runtime.all_reduce_sum(_load(out).clone())
            load = seen if load is None else load + seen
            yield out, load
    else:
        # The loads of the whole batch have to be known before the first backward.
        kept = len(microbatches) if balance.accumulation == "keep" else 1
        with torch.no_grad():  # last_only: a count needs no logits
            counts = [
                _load(
                    model(
                        micro.tokens,
                        sequence_ids=micro.sequence_ids,
                        positions=micro.positions,
                        keys=micro.rows,
                        last_only=True,
                    )
                )
                for micro in microbatches[kept:]
            ]
        outputs = deque(forward(model, micro) for micro in microbatches[:kept])
        load = runtime.all_reduce_sum(torch.stack([*counts, *map(_load, outputs)]).sum(0))
        while outputs:
            yield outputs.popleft(), load
        for micro in microbatches[kept:]:
            yield forward(model, micro), load


def _load(out: Output) -> Tensor:
    assert out.router is not None
    return out.router.load


def _auxiliary(stats: RouterStats, load: Tensor | None, balance: Balance) -> Tensor:
    """The auxiliary losses of one microbatch, summed over its tokens; those of microbatches and ranks add up."""
    loss = balance.z_loss_weight * z_loss(stats.z_sum)
    if load is None:
        return loss
    return loss + balance.loss_weight * load_balance_loss(stats.score_sum, load, balance.together)


def _add_sources(sources: Tensor, out: Output, batch: Batch) -> None:
    """Add the nats and labels of a microbatch to those of the sources of its rows."""
    if batch.sources is not None:
        assert out.nats is not None
        sources[0].index_add_(0, batch.sources, out.nats.sum(1, dtype=sources.dtype))
        sources[1].index_add_(0, batch.sources, (batch.labels != IGNORE).sum(1, dtype=sources.dtype))


class _Sums(NamedTuple):
    """What is summed over ranks."""

    ce: Tensor
    total: Tensor
    sources: Tensor
    router: RouterStats | None


def _sum_over_ranks(ce: Tensor, total: Tensor, sources: Tensor, router: RouterStats | None) -> _Sums:
    """All of a step's sums in one all-reduce."""
    parts = [ce, total, sources, *(router or ())]
    flat = runtime.all_reduce_sum(torch.cat([part.reshape(-1) for part in parts]))
    summed = [piece.view_as(part) for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    ce, total, sources, *rest = summed
    return _Sums(ce, total, sources, RouterStats(*rest) if router is not None else None)
