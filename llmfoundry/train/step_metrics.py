"""What a step reports: its numbers, copied to the host, and the metrics made of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llmfoundry.data.mixture import Mixture
from llmfoundry.moe.balance import Balance, named, summary
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
    routing: list[float]  # of `moe.balance.summary`; empty for a dense model


@dataclass
class Reading:
    """Copies all numbers of a step to the host at once, starting before the weights are updated.

    Args:
        balance: None for a dense model.
        tokens: tokens of the global batch.
    """

    balance: Balance | None
    tokens: int
    _numbers: Numbers = field(init=False)
    _sizes: list[int] = field(init=False)

    def begin(self, result: StepResult) -> None:
        """Start the copy, after the work launched so far."""
        parts = [torch.stack([result.updated, result.ce, result.total, result.grad_norm.to(result.ce.device)])]
        parts += [result.metrics, result.sources.flatten()]
        if result.router is not None and self.balance is not None:
            parts.append(summary(result.router, self.tokens, self.balance))
        self._sizes = [part.numel() for part in parts]
        self._numbers = Numbers(torch.cat([part.double() for part in parts]))

    def end(self) -> StepNumbers:
        """The numbers. The host waits for the device here, but not for the update."""
        read = iter(self._numbers.read())
        (updated, ce, total, grad_norm), of_loss, sources, *routing = (
            list(itertools.islice(read, size)) for size in self._sizes
        )
        return StepNumbers(bool(updated), ce, total, grad_norm, of_loss, sources, routing[0] if routing else [])


def step_metrics(run: Run, numbers: StepNumbers, of_loss: Sequence[str], rate: float) -> Metrics:
    """The metrics of the step that `run` has just counted.

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
    if numbers.routing:
        metrics |= named(numbers.routing)
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
