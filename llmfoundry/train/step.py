"""One optimizer step. Everything that changes the weights happens in `train_step`, in this order.

Shapes: B rows, S sequence, T tokens of the global batch, L MoE layers, E experts, K top_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.data.loader import Batch
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.model.transformer import CausalLM, Output
from llmfoundry.moe.balance import Balance, load_balance_loss, update_expert_bias, z_loss
from llmfoundry.parallel.fsdp import accumulating
from llmfoundry.train.optim import clip_by_global_norm


class StepResult(NamedTuple):
    """What a step did, the same on every rank; nothing has waited for the device except `updated`."""

    ce: Tensor  # () nats a label, mean over the global batch
    total: Tensor  # () with the auxiliary losses, as differentiated
    grad_norm: Tensor  # () before clipping
    router: RouterStats | None  # (L, E), (L, E), (L,), (L,) sums over the global batch
    updated: bool  # False: some gradient was not finite, and nothing was changed


def train_step(
    model: CausalLM,
    optimizer: Optimizer,
    batch: Batch,
    *,
    microbatch_rows: int,
    max_grad_norm: float | None,
    balance: Balance | None,
    noise_seed: int = 0,
) -> StepResult:
    """Forward and backward over microbatches, then clip and update.

    The loss is a sum over labels divided by the labels of the whole global batch, and gradients are summed over
    ranks. So the gradient is the same for every microbatch size, packing and number of ranks.

    Args:
        model: sharded or not.
        batch: this rank's rows, on its device.
        microbatch_rows: rows of one forward; the last microbatch may be smaller.
        max_grad_norm: None does not clip.
        balance: how experts are kept busy; None for a model without a mixture.
        noise_seed: of routers with jitter; the noise depends on it and on each row's number alone.
    """
    batch = batch._replace(rows=batch.rows + runtime.seed_of("noise", noise_seed) // 2)  # // 2: far from overflow
    own = torch.stack([batch.n_labels, torch.full_like(batch.n_labels, batch.tokens.numel())])
    counts = runtime.all_reduce_sum(own)
    n_labels, n_tokens = counts.unbind()
    microbatches = batch.split(microbatch_rows)
    loads = _loads_of_global_batch(model, microbatches, balance)

    ce = torch.zeros((), dtype=torch.float32, device=batch.labels.device)
    total = torch.zeros_like(ce)
    router: RouterStats | None = None
    for i, micro in enumerate(microbatches):
        with accumulating(model, last=i == len(microbatches) - 1):
            out = forward(model, micro)
            assert out.loss_sum is not None
            loss = out.loss_sum / n_labels
            ce += loss.detach()
            if balance is not None and out.router is not None:
                loss = loss + _auxiliary(out.router, balance, micro.tokens.numel(), n_tokens, loads)
                stats = RouterStats(*(part.detach() for part in out.router))
                router = stats if router is None else RouterStats(*(a + b for a, b in zip(router, stats, strict=True)))
            loss.backward()
            total += loss.detach()

    grad_norm = clip_by_global_norm(model.parameters(), max_grad_norm)
    updated = bool(torch.isfinite(grad_norm))  # the same on every rank, for the norm is global
    ce, total, router = _sum_over_ranks(ce, total, router)
    if updated:
        optimizer.step()
        if balance is not None and router is not None:
            update_expert_bias(model, router.load, balance)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(ce, total, grad_norm, router, updated)


def forward(model: CausalLM, batch: Batch) -> Output:
    """The model on a batch's rows, with its loss."""
    return model(batch.tokens, batch.labels, sequence_ids=batch.sequence_ids, keys=batch.rows)


def _loads_of_global_batch(model: CausalLM, microbatches: list[Batch], balance: Balance | None) -> Tensor | None:
    """(L, E) loads of the whole global batch before any backward, where the balance loss asks for them.

    With one microbatch they are known after its forward (`_auxiliary` reduces them there). With several, an extra
    forward without gradient counts them first: a third more compute, and the only exact way.
    """
    if balance is None or balance.scope != "global_batch" or balance.loss_weight == 0 or len(microbatches) == 1:
        return None
    with torch.no_grad():
        routers = [forward(model, micro).router for micro in microbatches]
    return runtime.all_reduce_sum(torch.stack([router.load for router in routers if router is not None]).sum(0))


def _auxiliary(stats: RouterStats, balance: Balance, tokens: int, n_tokens: Tensor, loads: Tensor | None) -> Tensor:
    """This microbatch's share of the auxiliary losses of the global batch; shares add up."""
    if balance.scope == "global_batch":
        load = runtime.all_reduce_sum(stats.load.clone()) if loads is None else loads
        share = load_balance_loss(stats.score_sum, load, n_tokens, balance.top_k, balance.together)
    else:
        share = load_balance_loss(stats.score_sum, stats.load, tokens, balance.top_k, balance.together)
    return balance.loss_weight * share / n_tokens + balance.z_loss_weight * z_loss(stats.z_sum) / n_tokens


def _sum_over_ranks(ce: Tensor, total: Tensor, router: RouterStats | None) -> tuple[Tensor, Tensor, RouterStats | None]:
    """All of a step's sums in one all-reduce."""
    parts = [ce, total, *(router or ())]
    flat = runtime.all_reduce_sum(torch.cat([part.reshape(-1) for part in parts]))
    summed = [piece.view_as(part) for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    return summed[0], summed[1], RouterStats(*summed[2:]) if router is not None else None
