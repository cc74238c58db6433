"""What is minimised: the cross-entropy of the next token, or a preference among answers (DPO).

Shapes: B rows of a microbatch, P pairs of it (2 B sequences of S tokens).
A loss is a sum over units (labels, pairs) that is divided by their number in the global batch. So it and its gradient
are the same for every microbatch size and number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from llmfoundry.config import Choice
from llmfoundry.data.loader import Batch
from llmfoundry.data.preferences import apart
from llmfoundry.layers.lora import adapters_off
from llmfoundry.model.transformer import CausalLM, Output


class Parts(NamedTuple):
    """The sums of one microbatch."""

    loss: Tensor  # () over units; what is differentiated
    nats: Tensor  # () of the labels that `Units.labels` counts
    metrics: Tensor  # (len(Loss.metrics),) over units


class Units(NamedTuple):
    """What the sums of a batch are divided by. () int64 each."""

    units: Tensor
    labels: Tensor


class Loss:
    """Cross-entropy: the mean over the labels of the global batch, in nats."""

    metrics: tuple[str, ...] = ()  # means over units, by name
    sequences = 1  # of a row
    other: CausalLM | None = None  # a model beside the one that is trained

    def microbatches(self, batch: Batch, rows: int) -> list[Batch]:
        """A batch in parts of at most `rows` rows, as the model sees them."""
        return batch.split(rows)

    def units(self, batch: Batch) -> Units:
        """Those of the rows of one rank."""
        return Units(batch.n_labels, batch.n_labels)

    def reference(self, model: CausalLM, batch: Batch) -> Tensor | None:
        """What is computed of a microbatch before the model's forward, without a gradient."""
        return None

    def forward(self, model: CausalLM, batch: Batch) -> Output:
        """The model on a microbatch."""
        return forward(model, batch)

    def parts(self, out: Output, batch: Batch, reference: Tensor | None) -> Parts:
        """The sums of a microbatch."""
        assert out.loss_sum is not None
        return Parts(out.loss_sum, out.loss_sum.detach(), out.loss_sum.new_zeros(0))


class DPO(Loss):
    """Direct preference optimisation: the mean over the pairs of the global batch of -log sigmoid(margin).

    The margin is beta times how much more than its reference the model prefers the chosen answer.

    The reference is the model without its adapters, or another one. The names of the metrics are TRL's.
    Source: Rafailov et al. 2023, arXiv:2305.18290.
    """

    metrics = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    sequences = 2

    def __init__(self, beta: float, other: CausalLM | None = None) -> None:
        """Make the loss.

        Args:
            beta: how close the model stays to the reference: the higher, the closer.
            other: the reference; None: the model with its adapters off.
        """
        self.beta, self.other = beta, other

    def microbatches(self, batch: Batch, rows: int) -> list[Batch]:
        return [apart(part) for part in batch.split(rows)]

    def units(self, batch: Batch) -> Units:
        chosen = apart(batch)
        return Units(torch.tensor(len(batch.rows), device=batch.rows.device), _of_chosen(chosen).n_labels)

    @torch.no_grad()
    def reference(self, model: CausalLM, batch: Batch) -> Tensor:
        if self.other is not None:
            return _log_likelihoods(forward(self.other, batch))
        with adapters_off(model), _without_dropout(model):
            return _log_likelihoods(forward(model, batch))

    def forward(self, model: CausalLM, batch: Batch) -> Output:
        return forward(model, batch, by_token=True)

    def parts(self, out: Output, batch: Batch, reference: Tensor | None) -> Parts:
        assert out.nats is not None and reference is not None
        rewards = self.beta * (_log_likelihoods(out) - reference)  # (2 P,)
        chosen, rejected = rewards.view(-1, 2).unbind(1)  # (P,)
        margins = chosen - rejected
        found = torch.stack([chosen, rejected, margins, (margins > 0).to(margins.dtype)])
        return Parts(-F.logsigmoid(margins).sum(), out.nats[::2].detach().sum(), found.detach().sum(1))


def forward(model: CausalLM, batch: Batch, by_token: bool = False) -> Output:
    """The model on a batch's rows, with its loss."""
    out: Output = model(
        batch.tokens, batch.labels, sequence_ids=batch.sequence_ids, positions=batch.positions, keys=batch.rows,
        by_token=by_token,
    )  # fmt: skip
    return out


@contextmanager
def _without_dropout(model: CausalLM) -> Iterator[None]:
    drops = model.training and model.config.has_dropout
    if drops:
        model.eval()
    try:
        yield
    finally:
        if drops:
            model.train()


def _log_likelihoods(out: Output) -> Tensor:
    """(2 P,) of each sequence's labels together, in nats."""
    assert out.nats is not None
    return -out.nats.sum(1)


def _of_chosen(sequences: Batch) -> Batch:
    return sequences._replace(labels=sequences.labels[::2])


class LossConfig(Choice, tag="name"):
    """Root of the losses: the YAML's `loss`."""

    name: str = "cross_entropy"  # the loss

    @property
    def pairs(self) -> bool:
        """Whether the rows are preferences."""
        return False

    def build(self, other: CausalLM | None = None) -> Loss:
        """The loss.

        Args:
            other: a frozen model, where one is needed beside that which is trained.
        """
        raise NotImplementedError


class CrossEntropyConfig(LossConfig, names=("cross_entropy",)):
    """The next token; the default."""

    def build(self, other: CausalLM | None = None) -> Loss:
        return Loss()


class DPOConfig(LossConfig, names=("dpo",)):
    """Preferences. With `model.lora` the reference is the model without adapters; else a frozen copy of load_path."""

    beta: float = Field(0.1, gt=0)  # strength of the pull towards the reference model

    @property
    def pairs(self) -> bool:
        return True

    def build(self, other: CausalLM | None = None) -> Loss:
        return DPO(self.beta, other)
