"""What a step reports: its numbers, copied to the host, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmfoundry.data.mixture import Mixture
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.moe.balance import named, summary
from llmfoundry.numbers import Numbers
from llmfoundry.train.run import Metrics, Run
from llmfoundry.train.step import StepResult


class StepNumbers(NamedTuple):
    """A `StepResult` on the host."""

    updated: bool
    ce: float
    total: float
    grad_norm: float
    of_loss: list[float]  # in the order of the loss's `metrics`
    sources: list[float]  # nats of each source of a mixture, then labels of each
    router: RouterStats | None  # None for a dense model


class Reading:
    """Copies all numbers of a step to the host at once, starting before the weights are updated."""

    _numbers: Numbers
    _router: RouterStats | None

    def begin(self, result: StepResult) -> None:
        """Start the copy, after the work launched so far."""
        scalars = torch.stack([result.updated, result.ce, result.total, result.grad_norm.to(result.ce.device)])
        parts = [scalars, result.metrics, result.sources.flatten(), *(part.flatten() for part in result.router or ())]
        self._sizes = [part.numel() for part in parts]
        self._router = result.router
        self._numbers = Numbers(torch.cat([part.double() for part in parts]))

    def end(self) -> StepNumbers:
        """Return the numbers. The host waits for the device here, but not for the update."""
        scalars, of_loss, sources, *router = self._numbers.read().split(self._sizes)
        updated, ce, total, grad_norm = scalars.tolist()
        stats = None
        if self._router is not None:
            pairs = zip(router, self._router, strict=True)
            stats = RouterStats(*(read.view(part.shape).to(part.dtype) for read, part in pairs))
        return StepNumbers(bool(updated), ce, total, grad_norm, of_loss.tolist(), sources.tolist(), stats)


def step_metrics(run: Run, numbers: StepNumbers, of_loss: Sequence[str], rate: float) -> Metrics:
    """Return the metrics of the step that `run` has just counted.

    Args:
        of_loss: names of `numbers.of_loss`.
        rate: the learning rate.
    """
    state = run.state
    metrics: Metrics = {"step": state.step, "tokens": state.tokens, "epoch": state.rows // run.loader.rows_per_epoch}
    metrics |= {"loss/train/ce": numbers.ce, "loss/train/total": numbers.total}
    metrics |= dict(zip(of_loss, numbers.of_loss, strict=True))
    metrics |= _by_source(run, numbers.sources)
    metrics |= {"lr": rate, "grad_norm": numbers.grad_norm, "skipped_steps": state.skipped_steps}
    if numbers.router is not None and run.balance is not None:
        tokens = run.config.global_train_batch_size * run.loader.max_seq_len
        metrics |= named(summary(numbers.router, tokens, run.balance).tolist())
    return metrics


def _by_source(run: Run, sums: list[float]) -> Metrics:
    """For a mixture: the loss of each source in the batch, and its tokens so far."""
    found: Metrics = {}
    if isinstance(run.loader.order, Mixture):
        labels = run.loader.labels
        for label, nats, n in zip(labels, sums[: len(labels)], sums[len(labels) :], strict=True):
            if n:
                found[f"loss/train/{label}"] = nats / n
        for label, rows in run.loader.order.taken(run.state.rows).items():
            found[f"tokens/{label}"] = rows * run.loader.max_seq_len
    return found
