"""`mbmoe_tok_per_expert`: how tokens are distributed over the experts, under LLM Foundry's names.

Loads are those of the global batch, which every step counts anyway; LLM Foundry's are one GPU's unless it reduces them
(`all_reduce_stats`).

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from llmfoundry.config import ConfigError
from llmfoundry.moe.balance import Balance
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run
from llmfoundry.train.config import RunConfig

NAMES = ("min", "max", "median", "std")


class TokPerExpertConfig(CallbackConfig, names=("mbmoe_tok_per_expert",)):
    """What is logged, and how often."""

    log_interval: int = Field(10, ge=1)  # steps between logs
    log_every_layer: bool = False  # log mb_moe/layer0_max_tpe, ... in addition to mb_moe/all_layers_max_tpe, ...
    all_reduce_stats: bool = False  # accepted, without effect: loads are always those of the global batch
    normalize: bool = True  # log the share of tokens per expert; false: the number of tokens

    def build(self) -> TokPerExpert:
        return TokPerExpert(self)

    def check_run(self, run: RunConfig) -> None:
        if Balance.of(run.model) is None:  # type: ignore[arg-type]
            raise ConfigError("callbacks.mbmoe_tok_per_expert: the model has no experts; leave it out")


class TokPerExpert(Callback):
    """Reads the loads of a step, which are copied to the host with its metrics."""

    def __init__(self, config: TokPerExpertConfig) -> None:
        self.config = config

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        due = trainer.state.step % self.config.log_interval == 0
        if trainer.router is None or trainer.balance is None or not metrics["step"] or not due:
            return
        load = trainer.router.load.detach().float()  # (L, E) slots per expert
        if self.config.normalize:
            load = load * trainer.balance.top_k / load.sum(1, keepdim=True)
        rows = [_statistics(load.flatten())]
        if self.config.log_every_layer:
            rows += [_statistics(of_layer) for of_layer in load]
        places = ["all_layers", *(f"layer{layer}" for layer in range(len(rows) - 1))]
        for place, values in zip(places, torch.stack(rows).tolist(), strict=True):
            metrics |= {f"mb_moe/{place}_{name}_tpe": value for name, value in zip(NAMES, values, strict=True)}


def _statistics(tokens: Tensor) -> Tensor:
    """Return minimum, maximum, median (the lower of two) and sample standard deviation: (n,) -> (4,)."""
    return torch.stack([tokens.min(), tokens.max(), tokens.median(), tokens.std()])
