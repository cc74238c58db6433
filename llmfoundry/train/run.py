"""What a run is while it runs, for those who watch it: the part of the trainer that callbacks may read."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from llmfoundry import runtime
from llmfoundry.config import PLACEHOLDERS
from llmfoundry.data.loader import Loader
from llmfoundry.data.tokenizer import SpecialTokens
from llmfoundry.eval.icl import PREFIX, Task
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel.mesh import Mesh
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.microbatch import Microbatches
from llmfoundry.train.schedule import Schedule

log = logging.getLogger(__name__)

Metrics = dict[str, float | int | list[float]]
EVALUATED = "metrics/eval/"
STEP = "training step"  # its name in a profile
ASKED, TIME_LIMIT = 256, 257  # codes beside signal numbers: stopped by a callback, by the time limit


class Table(NamedTuple):
    """Text that a callback shows beside the metrics of a step."""

    name: str
    columns: list[str]
    rows: list[list[str]]


def is_evaluated(metrics: Metrics) -> bool:
    """Whether an evaluation is among the metrics of a step."""
    return any(key.startswith(PREFIX) for key in metrics)


@dataclass
class TrainState:
    """How far a run is: all that resuming needs beside tensors. `rows` is the whole state of the loader."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    skipped_steps: int = 0  # updates skipped because a gradient was not finite
    skipped_in_a_row: int = 0


@dataclass(kw_only=True)
class Run:
    """A run, built. Nothing but the trainer changes it; callbacks may ask it to end."""

    config: RunConfig
    mesh: Mesh
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    loader: Loader
    eval_loader: Loader | None
    eval_loaders: list[Loader]  # the eval loaders with labels
    tasks: list[Task]  # the tasks of icl_tasks
    model: CausalLM
    optimizer: Optimizer
    schedule: Schedule
    timeline: Timeline
    balance: Balance | None
    microbatches: Microbatches
    state: TrainState = field(default_factory=TrainState)
    router: RouterStats | None = None  # of the last step, (L, E) and (L,) sums over the global batch, on the host
    evaluation: Metrics = field(default_factory=dict)  # of the last evaluation
    generation: str | None = None  # generation_config.json of what the run started from
    begin_seconds: float = 0.0  # of this rank alone: from the end of the last step until its rows are on the device
    train_seconds: float = 0.0  # in steps alone, over all processes that the run has had
    asked: int = 0  # why this rank was asked to stop: the number of a signal, or ASKED; 0: it was not
    loss_limit: float = math.inf  # set by a callback: a step with a higher loss is skipped; the same on every rank
    doubtful: bool = False  # set by a callback: save no checkpoint until this is reset; the same on every rank
    way_back: str = ""  # why to return to the last checkpoint and skip the rows read since
    why: str = ""  # why the run ended or stopped, for its summary; set on rank 0

    def stop(self, why: str) -> None:
        """Save and stop after this step, as for a signal: the same command continues. One rank may ask for all."""
        log.info("step %d: %s", self.state.step, why)
        self.asked, self.why = self.asked or ASKED, why

    def roll_back(self, why: str) -> None:
        """Go back to the last checkpoint after this step, and step past the data. Every rank asks at the same step."""
        self.way_back = why

    def finish(self, why: str) -> None:
        """End the run with this step, as if `max_duration` ended here. Every rank has to ask at the same step."""
        log.info("step %d: %s; the run ends here", self.state.step, why)
        self.why = why
        self.timeline = replace(self.timeline, total_steps=self.state.step)

    def filled(self, pattern: str) -> str:
        """A name with its placeholders (`config.PLACEHOLDERS`) filled in, as of this step."""
        values: dict[str, str | int | None] = {
            "run_name": self.config.run_name,
            "rank": runtime.rank(),
            "local_rank": runtime.local_rank(),
            "world_size": runtime.world_size(),
            "epoch": self.state.rows // self.loader.rows_per_epoch,
            "batch": self.state.step,
            "token": self.state.tokens,
            "sample": self.state.rows,
        }
        for name in PLACEHOLDERS:
            pattern = pattern.replace(f"{{{name}}}", str(values[name]))
        return pattern

    def log_table(self, table: Table) -> None:
        """Hand a table to every logger; all ranks call it."""
        raise NotImplementedError
