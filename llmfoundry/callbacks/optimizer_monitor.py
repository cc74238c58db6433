"""`optimizer_monitor`: L2 norms of gradients, weights, moments and updates, under Composer's names.

`l2_norm/grad/global`, and for each parameter `l2_norm/grad/NAME`, `l2_norm/param/NAME`, `l2_norm/moment/NAME` (of the
optimizer's mean of gradients) and `l2_norm/update/NAME` (of what the step changed). Gradients are those that the
optimizer saw: clipped. Norms are of whole tensors over all ranks. A logged step holds its weights twice.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run
from llmfoundry.train.optim import l2_norms

MOMENT = "exp_avg"


class OptimizerMonitorConfig(CallbackConfig, names=("optimizer_monitor",)):
    """What is logged, and how often."""

    log_optimizer_metrics: bool = True  # weights, moments and updates too; false: gradients alone
    batch_log_interval: int = Field(10, ge=1)  # steps
    only_global: bool = False  # l2_norm/grad/global alone

    def build(self) -> OptimizerMonitor:
        return OptimizerMonitor(self)


class OptimizerMonitor(Callback):
    """Looks just before and after the optimizer's step, for gradients are gone when the trainer's step ends."""

    def __init__(self, config: OptimizerMonitorConfig) -> None:
        self.config = config
        self._found: Metrics = {}
        self._before: dict[str, Tensor] = {}  # weights

    def fit_start(self, trainer: Run) -> None:
        # The trainer counts a step when it is complete.
        def is_due() -> bool:
            return (trainer.state.step + 1) % self.config.batch_log_interval == 0

        def before(optimizer: Optimizer, *_: object) -> None:
            if is_due() and self.config.log_optimizer_metrics and not self.config.only_global:
                self._before = {name: each.detach().clone() for name, each in _with_gradient(trainer).items()}

        def after(optimizer: Optimizer, *_: object) -> None:
            if is_due():
                self._measure(trainer, optimizer)

        trainer.optimizer.register_step_pre_hook(before)
        trainer.optimizer.register_step_post_hook(after)

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        metrics |= self._found
        self._found = {}

    @torch.no_grad()
    def _measure(self, trainer: Run, optimizer: Optimizer) -> None:
        parameters = _with_gradient(trainer)
        grads: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            grads[name] = parameter.grad
        tensors = {f"l2_norm/grad/{name}": grad for name, grad in grads.items()}
        if self._before:
            for name, parameter in parameters.items():
                tensors[f"l2_norm/param/{name}"] = parameter.detach()
                tensors[f"l2_norm/update/{name}"] = self._before.pop(name).sub_(parameter.detach())
                moment = optimizer.state[parameter].get(MOMENT)
                if isinstance(moment, Tensor):
                    tensors[f"l2_norm/moment/{name}"] = moment
        norms = l2_norms(list(tensors.values()))
        self._found = {"l2_norm/grad/global": float(norms[: len(grads)].square().sum().sqrt())}
        if not self.config.only_global:
            self._found |= dict(zip(tensors, norms.tolist(), strict=True))


def _with_gradient(trainer: Run) -> dict[str, torch.nn.Parameter]:
    """The parameters that this step changes, by name; the same on every rank."""
    return {name: each for name, each in trainer.model.named_parameters() if each.grad is not None}
