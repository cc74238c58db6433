"""Handle values that are not finite: name the weight or the rows, skip the step, and end a run that is hopeless.

A gradient that is not finite changes nothing (step.py): every rank skips the step. Then all ranks look for the cause. A
weight that is not finite ends the run at once, because no later step can repair it. Otherwise the rows of the batch are
written to `skipped.jsonl`, with those whose own loss is not finite.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.checkpoint.tensors import model_tensors, optimizer_tensors
from llmfoundry.config import RunError
from llmfoundry.data.loader import Batch
from llmfoundry.dtensor import local_part
from llmfoundry.train.loss import Loss
from llmfoundry.train.outputs import SKIPPED
from llmfoundry.train.run import Run

log = logging.getLogger(__name__)

NAMED = 16  # maximum number of rows of a rank in a record
DAMAGED = "the weights are damaged, and only an older checkpoint helps"


class BadRow(NamedTuple):
    """A row whose own loss is not finite."""

    row: int  # its number in the run
    rank: int


def note_update(run: Run, batch: Batch, objective: Loss, updated: bool, finite: bool) -> dict[str, object] | None:
    """Count whether the last step of `run` changed the weights; if not, look for the cause.

    Args:
        batch: this rank's rows of the step.
        finite: whether the gradient was finite; if so, the loss was too high.

    Returns:
        A line for skipped.jsonl if the update was skipped.

    Raises:
        RunError: if a weight is not finite.
    """
    state = run.state
    state.skipped_steps += not updated
    state.skipped_in_a_row = 0 if updated else state.skipped_in_a_row + 1
    if updated:
        return None
    why, bad = "the loss is too high", []
    if not finite:
        _check_weights(run)
        why, bad = "the gradient is not finite", _bad_rows(run, batch, objective)
    log.warning("step %d: %s; the update was skipped; its rows are in %s", state.step, why, SKIPPED)
    return record(state.step, why, state.rows - run.config.global_train_batch_size, state.rows, bad)


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a value that is not finite. All ranks call this, each for its shards.

    Nothing is copied. The host waits once, and once more if a sum is not finite: sums are fast, but may overflow.
    """
    own = {name: local_part(tensor).detach() for name, tensor in tensors.items()}
    own = {name: part for name, part in own.items() if part.is_floating_point() and part.numel()}
    sums = {name: part.sum(dtype=torch.float32).isfinite() for name, part in own.items()}
    by_device: dict[torch.device, list[Tensor]] = {}
    for each in sums.values():
        by_device.setdefault(each.device, []).append(each)
    finite = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}
    suspects = [name for name, each in sums.items() if not next(finite[each.device])]
    names = list(tensors)
    bad = [names.index(name) for name in suspects if not own[name].isfinite().all()]
    least = -runtime.most_of_ranks([-min(bad, default=len(names))])[0]
    return names[int(least)] if least < len(names) else None


def _check_weights(run: Run) -> None:
    """Check every weight and optimizer state; all ranks together. (Saves check by themselves.)

    Raises:
        RunError: names the first one that is not finite.
    """
    name = first_not_finite(model_tensors(run.model) | optimizer_tensors(run.model, run.optimizer))
    if name is not None:
        raise RunError(
            f"step {run.state.step}: {name.removeprefix('model/')} has values that are not finite; {DAMAGED}"
        )


@torch.no_grad()
def _bad_rows(run: Run, batch: Batch, objective: Loss) -> list[BadRow]:
    """Return the rows of a batch whose own loss is not finite, found by another forward of all ranks together."""
    own: list[int] = []
    for micro in objective.microbatches(batch, run.microbatches.rows):
        nats = objective.forward(run.model, micro).nats
        if nats is not None:
            rows = micro.rows.repeat_interleave(nats.shape[0] // micro.rows.shape[0])
            own += rows[~nats.isfinite().all(1)].tolist()
    named = [BadRow(row, runtime.rank()) for row in sorted(set(own))[:NAMED]]
    return [each for of_rank in runtime.of_each_rank(named) for each in of_rank]


def record(step: int, why: str, first: int, end: int, bad: list[BadRow]) -> dict[str, object]:
    """Return a line of skipped.jsonl: which rows of the run were skipped, and why.

    Args:
        step: the step after which the run continues behind them.
        first: the first row.
        end: the row after the last.
    """
    return {"step": step, "why": why, "rows": [first, end - 1], "not_finite": [each._asdict() for each in bad]}


class Hopeless(NamedTuple):
    """Why a run with this many skipped steps must stop."""

    why: str  # the reason, and what to do
    save: bool  # whether to save, so that a restart continues past the rows


def hopeless(run: Run) -> Hopeless | None:
    """Check whether too many steps were skipped, in a row or in total."""
    state, allowed, share = run.state, run.config.max_skipped_steps, run.config.max_skipped_share
    total = min(run.timeline.total_steps, run.timeline.expected_steps(state.step) or state.step)
    if state.skipped_steps > max(allowed, share * total):
        why = (
            f"{state.skipped_steps} of {state.step} steps were skipped, more than max_skipped_share={share:.12g} of all"
        )
        return Hopeless(f"{why}: {_HELP}, or raise max_skipped_share", save=True)
    if state.skipped_in_a_row <= allowed or state.skipped_in_a_row % (allowed + 1):
        return None
    why = f"{state.skipped_in_a_row} steps in a row were skipped (max_skipped_steps={allowed})"
    if state.skipped_in_a_row == allowed + 1:
        return Hopeless(
            f"{why}; the same command continues after their rows ({SKIPPED}); if it stops again, {_HELP}", save=True
        )
    # The checkpoint of the first time stays the newest: restarts end here, with this line, after as many steps.
    return Hopeless(f"{why}, in two starts; other rows do not help: {_HELP}, or raise max_skipped_steps", save=False)


_HELP = "lower optimizer.lr, clip gradients, or start from an older checkpoint (load_path) in another save_folder"
