"""One optimizer step. Everything that changes the weights happens in `train_step`, in this order.

What a step reports is known before the weights are updated, so the host can read it and launch the next step while a
GPU still updates them.

Shapes: B rows, S sequence, T tokens of the global batch, L MoE layers, E experts, K top_k.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
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
from llmfoundry.parallel.single import begin_step
from llmfoundry.train.loss import Loss
from llmfoundry.train.optim import clipping_of, norm_dtype, square_share, update
from llmfoundry.train.out_of_memory import held

CROSS_ENTROPY = Loss()


class StepResult(NamedTuple):
    """The results of a step, the same on every rank, on the device."""

    ce: Tensor  # () nats per label, mean over the global batch; of DPO: of the chosen answers
    total: Tensor  # () with the auxiliary losses: what was differentiated
    grad_norm: Tensor  # () before clipping
    router: RouterStats | None  # (L, E), (L, E), (L,), (L,) sums over the global batch
    updated: Tensor  # () bool; False: some gradient was not finite or the loss too high, and nothing was changed
    sources: Tensor  # (2, n_sources) nats and labels of each source of a mixture
    metrics: Tensor  # of the loss, in the order of its `metrics`


def train_step(
    model: CausalLM,
    optimizer: Optimizer,
    batch: Batch,
    *,
    microbatch_rows: int,
    max_grad_norm: float | None,
    balance: Balance | None,
    noise_seed: int = 0,
    step: int = 0,
    n_sources: int = 0,
    objective: Loss = CROSS_ENTROPY,
    together: bool = False,
    max_loss: float = math.inf,
    before_update: Callable[[StepResult], object] = lambda result: None,
) -> StepResult:
    """Run forward and backward over microbatches, then clip and update.

    The loss is a sum over units (labels) divided by the units of the whole global batch, and gradients are summed over
    ranks. So the gradient is the same for every microbatch size, packing and number of ranks.

    Args:
        model: sharded or not.
        batch: this rank's rows, on its device.
        microbatch_rows: rows per forward; the last microbatch may be smaller.
        max_grad_norm: None: no clipping.
        balance: how the experts' load is balanced; None for a dense model.
        noise_seed: seed of router jitter, which also depends on each row's number, and of dropout.
        step: number of earlier steps, for dropout.
        n_sources: number of a mixture's sources; 0 for a single dataset.
        objective: the loss.
        max_loss: nats per label, including auxiliary losses; a step with a higher loss is skipped, as one that is not
            finite.
        together: if some rank runs out of memory before the update, all of them drop the step.
        before_update: called with the result before the update is launched, so that reading it can start.

    Raises:
        runtime.OutOfMemory: with `together`, some rank ran out of memory; nothing has changed.
    """
    batch = batch._replace(rows=batch.rows + runtime.seed_of("noise", noise_seed) // 2)  # // 2: far from overflow
    own = torch.stack([*objective.units(batch), torch.full_like(batch.n_labels, batch.tokens.numel())])
    counts = _Counts(*runtime.all_reduce_sum(own).unbind())
    microbatches = objective.microbatches(batch, microbatch_rows)
    seeding = _seeding(model, noise_seed, step)
    begin_step(model, optimizer, len(microbatches), step)

    def accumulate() -> _Sums:
        return _accumulate(model, microbatches, balance, objective, counts, n_sources, seeding)

    if together:
        try:
            sums = runtime.together(accumulate)
        except runtime.OutOfMemory as error:
            error.held = held(model, optimizer, batch.tokens.device)  # gradients of earlier microbatches go next
            for each in filter(None, (model, objective.other)):
                forget_step(each)
            raise
    else:
        sums = accumulate()

    parameters = list(model.parameters())
    square = square_share(parameters)
    (ce, total, sources, metrics, router), square = _sum_over_ranks(sums, square)
    clip = clipping_of(square, max_grad_norm, norm_dtype(parameters))
    if max_loss < math.inf:
        clip = clip._replace(skip=torch.maximum(clip.skip, (total > max_loss).to(clip.skip)))
    updated = clip.skip == 0  # the same on every rank, because the norm is global
    result = StepResult(ce, total, clip.norm, router, updated, sources, metrics)
    before_update(result)
    update(optimizer, clip)
    if balance is not None and router is not None:
        update_expert_bias(model, router.load, balance, updated)
    optimizer.zero_grad(set_to_none=True)
    return result


class _Counts(NamedTuple):
    """Counts of the global batch."""

    units: Tensor  # () what the loss is a sum over
    labels: Tensor  # ()
    tokens: Tensor  # ()


def _accumulate(
    model: CausalLM,
    microbatches: list[Batch],
    balance: Balance | None,
    objective: Loss,
    counts: _Counts,
    n_sources: int,
    seeding: Callable[[int], object],
) -> _Sums:
    """Run forward and backward of every microbatch; returns this rank's sums."""
    references = [objective.reference(model, micro) for micro in microbatches]
    ce = torch.zeros((), dtype=torch.float32, device=counts.labels.device)
    total = torch.zeros_like(ce)
    sources, metrics = ce.new_zeros(2, n_sources), ce.new_zeros(len(objective.metrics))
    router: RouterStats | None = None
    for i, (out, load) in enumerate(_forwards(model, microbatches, balance, objective, seeding)):
        parts = objective.parts(out, microbatches[i], references[i])
        loss = parts.loss / counts.units
        ce += parts.nats / counts.labels
        metrics += parts.metrics / counts.units
        _add_sources(sources, out, microbatches[i])
        if balance is not None and out.router is not None:
            loss = loss + _auxiliary(out.router, load, balance) / counts.tokens
            stats = RouterStats(*(part.detach() for part in out.router))
            router = stats if router is None else RouterStats(*(a + b for a, b in zip(router, stats, strict=True)))
        with accumulating(model, last=i == len(microbatches) - 1):
            loss.backward()
        total += loss.detach()
    return _Sums(ce, total, sources, metrics, router)


def _seeding(model: CausalLM, seed: int, step: int) -> Callable[[int], object]:
    """Call the result with each microbatch's number before its forward: dropout then depends on nothing earlier."""
    if not model.config.has_dropout:
        return lambda number: None
    return lambda number: torch.manual_seed(runtime.seed_of("dropout", seed, step, runtime.rank(), number))


def _forwards(
    model: CausalLM,
    microbatches: list[Batch],
    balance: Balance | None,
    objective: Loss = CROSS_ENTROPY,
    seeding: Callable[[int], object] = lambda number: None,
) -> Iterator[tuple[Output, Tensor | None]]:
    """Yield each microbatch's output, and the (L, E) loads for its balance loss (None: there is no such loss).

    The caller runs the backward of one before it asks for the next. `Balance` explains the modes.
    """

    def run(number: int) -> Output:
        seeding(number)
        return objective.forward(model, microbatches[number])

    numbers = range(len(microbatches))
    if balance is None or balance.loss_weight == 0:
        yield from ((run(i), None) for i in numbers)
    elif balance.scope == "microbatch":
        for i in numbers:
            out = run(i)
            yield out, _load(out)
    elif balance.accumulation == "running":
        load: Tensor | None = None
        for i in numbers:
            out = run(i)
            seen = runtime.all_reduce_sum(_load(out).clone())
            load = seen if load is None else load + seen
            yield out, load
    else:
        # The loads of the whole batch have to be known before the first backward.
        kept = len(microbatches) if balance.accumulation == "keep" else 1
        counts = []
        for i in numbers[kept:]:
            seeding(i)
            counts.append(_count(model, microbatches[i]))
        outputs = deque(run(i) for i in numbers[:kept])
        load = runtime.all_reduce_sum(torch.stack([*counts, *map(_load, outputs)]).sum(0))
        while outputs:
            yield outputs.popleft(), load
        for i in numbers[kept:]:
            yield run(i), load


@torch.no_grad()
def _count(model: CausalLM, batch: Batch) -> Tensor:
    """The (L, E) loads of a microbatch; counting needs no logits but those of the last token."""
    out: Output = model(
        batch.tokens, sequence_ids=batch.sequence_ids, positions=batch.positions, keys=batch.rows, last_only=True
    )
    return _load(out)


def _load(out: Output) -> Tensor:
    assert out.router is not None
    return out.router.load


def _auxiliary(stats: RouterStats, load: Tensor | None, balance: Balance) -> Tensor:
    """The auxiliary losses of one microbatch, summed over its tokens; they add up over microbatches and ranks."""
    loss = balance.z_loss_weight * z_loss(stats.z_sum)
    if load is None:
        return loss
    return loss + balance.loss_weight * load_balance_loss(stats.score_sum, load, balance.together)


def _add_sources(sources: Tensor, out: Output, batch: Batch) -> None:
    """Add a microbatch's nats and labels to the sums of its rows' sources."""
    if batch.sources is not None:
        assert out.nats is not None
        sources[0].index_add_(0, batch.sources, out.nats.sum(1, dtype=sources.dtype))
        sources[1].index_add_(0, batch.sources, (batch.labels != IGNORE).sum(1, dtype=sources.dtype))


class _Sums(NamedTuple):
    """Values that are summed over ranks."""

    ce: Tensor
    total: Tensor
    sources: Tensor
    metrics: Tensor
    router: RouterStats | None


def _sum_over_ranks(own: _Sums, square: Tensor) -> tuple[_Sums, Tensor]:
    """Sum all of a step's values, and the squared gradients, in one all-reduce."""
    parts = [*own[:4], *(own.router or ()), square]
    flat = runtime.all_reduce_sum(torch.cat([part.reshape(-1).to(own.ce.device, torch.float64) for part in parts]))
    pieces = zip(flat.split([part.numel() for part in parts]), parts, strict=True)
    summed = [piece.view_as(part).to(part.dtype) for piece, part in pieces]
    ce, total, sources, metrics = summed[:4]
    router = RouterStats(*summed[4:-1]) if own.router is not None else None
    return _Sums(ce, total, sources, metrics, router), summed[-1]
