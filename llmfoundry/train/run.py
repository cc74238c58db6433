"""What a run is while it runs, for those who watch it: the part of the trainer that callbacks may read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from llmfoundry.data.loader import Loader
from llmfoundry.data.tokenizer import SpecialTokens
from llmfoundry.eval.icl import PREFIX, Task
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel.mesh import Mesh
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.schedule import Schedule

Metrics = dict[str, float | int | list[float]]
EVALUATED = "metrics/eval/"


def is_evaluated(metrics: Metrics) -> bool:
    """Whether an evaluation is among the metrics of a step."""
    return any(key.startswith(PREFIX) for key in metrics)


@dataclass
class TrainState:
    """How far a run is: all that resuming needs beside tensors. `rows` is the whole state of the loader."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    skipped_steps: int = 0  # updates left out for a gradient that was not finite
    skipped_in_a_row: int = 0


@dataclass(kw_only=True)
class Run:
    """A run, built. Nothing but the trainer changes it."""

    config: RunConfig
    mesh: Mesh
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    loader: Loader
    eval_loader: Loader | None
    eval_loaders: list[Loader]  # the others, which have labels
    tasks: list[Task]  # of icl_tasks
    model: CausalLM
    optimizer: Optimizer
    schedule: Schedule
    timeline: Timeline
    balance: Balance | None
    state: TrainState = field(default_factory=TrainState)
    router: RouterStats | None = None  # of the last step, (L, E) and (L,) sums over the global batch, on the device
    evaluation: Metrics = field(default_factory=dict)  # of the last evaluation
    train_seconds: float = 0.0  # in steps alone, over all processes that the run has had
