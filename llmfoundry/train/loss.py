"""Training losses: the cross-entropy of the next token, or preferences (DPO).

Shapes: B rows of a microbatch, P pairs of it (2 B sequences of S tokens).
A loss is a sum over units (labels, pairs), divided by their number in the global batch. It and its gradient are
therefore the same for every microbatch size and number of ranks.
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
    """The numbers by which a batch's sums are divided. () int64 each."""

    units: Tensor
    labels: Tensor


class Loss:
    """Cross-entropy: the mean over the labels of the global batch, in nats."""

    metrics: tuple[str, ...] = ()  # means over units, by name
    sequences = 1  # of a row
    other: CausalLM | None = None  # a model beside the one that is trained

    def microbatches(self, batch: Batch, rows: int) -> list[Batch]:
        """Split a batch into parts of at most `rows` rows, in the form that the model takes."""
        return batch.split(rows)

    def units(self, batch: Batch) -> Units:
        """The units in one rank's rows."""
        return Units(batch.n_labels, batch.n_labels)

    def reference(self, model: CausalLM, batch: Batch) -> Tensor | None:
        """What must be computed of a microbatch before the model's forward, without gradients."""
        return None

    def forward(self, model: CausalLM, batch: Batch) -> Output:
        """Run the model on a microbatch."""
        return forward(model, batch)

    def parts(self, out: Output, batch: Batch, reference: Tensor | None) -> Parts:
        """Compute the sums of a microbatch."""
        assert out.loss_sum is not None
        return Parts(out.loss_sum, out.loss_sum.detach(), out.loss_sum.new_zeros(0))


class DPO(Loss):
    """Direct preference optimization: the mean over the pairs of the global batch of -log sigmoid(margin).

    The margin is beta times the model's preference for the chosen answer, relative to that of the reference. The
    reference is the model without its adapters, or another model. Metrics have TRL's names.
    Source: Rafailov et al. 2023, arXiv:2305.18290.
    """

    metrics = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    sequences = 2

    def __init__(self, beta: float, other: CausalLM | None = None) -> None:
        """Make the loss.

        Args:
            beta: the higher, the closer the model stays to the reference.
            other: the reference; None: the model without its adapters.
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
    """Run the model on a batch's rows and compute its loss."""
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
    """(2 P,) log-likelihood of each sequence's labels, in nats."""
    assert out.nats is not None
    return -out.nats.sum(1)


def _of_chosen(sequences: Batch) -> Batch:
    return sequences._replace(labels=sequences.labels[::2])


class LossConfig(Choice, tag="name"):
    """Base of the losses: the YAML's `loss`."""

    name: str = "cross_entropy"  # the loss

    @property
    def pairs(self) -> bool:
        """Whether the rows are preferences."""
        return False

    def build(self, other: CausalLM | None = None) -> Loss:
        """Build the loss.

        Args:
            other: a frozen model, if the loss needs a reference model.
        """
        raise NotImplementedError


class CrossEntropyConfig(LossConfig, names=("cross_entropy",)):
    """Cross-entropy of the next token; the default."""

    def build(self, other: CausalLM | None = None) -> Loss:
        return Loss()


class DPOConfig(LossConfig, names=("dpo",)):
    """Preferences. With `model.lora` the reference is the model without adapters, else a frozen copy of load_path."""

    beta: float = Field(0.1, gt=0)  # strength of the pull towards the reference model

    @property
    def pairs(self) -> bool:
        return True

    def build(self, other: CausalLM | None = None) -> Loss:
        return DPO(self.beta, other)
