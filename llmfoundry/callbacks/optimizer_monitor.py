"""`optimizer_monitor`: L2 norms of gradients, weights, moments and updates, under Composer's names.

It logs `l2_norm/grad/global` and, for each parameter, `l2_norm/grad/NAME`, `l2_norm/param/NAME`, `l2_norm/moment/NAME`
(the optimizer's mean of gradients) and `l2_norm/update/NAME` (the change of the weights in the step). Gradients are
clipped, as the optimizer sees them. Norms are of whole tensors over all ranks. On a logged step, weights are held
twice.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry.kernels.halves import weight_of
from llmfoundry.train.adamw import moment
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run
from llmfoundry.train.optim import l2_norms

MOMENTS = {"exp_avg", "momentum_buffer"}  # names in AdamW and Lion, and in Muon


class OptimizerMonitorConfig(CallbackConfig, names=("optimizer_monitor",)):
    """What is logged, and how often."""

    log_optimizer_metrics: bool = True  # also log norms of weights, moments and updates; false: only gradients
    batch_log_interval: int = Field(10, ge=1)  # steps between logs
    only_global: bool = False  # log only l2_norm/grad/global

    def build(self) -> OptimizerMonitor:
        return OptimizerMonitor(self)


class OptimizerMonitor(Callback):
    """Reads tensors just before and after the optimizer's step, because gradients are freed in the trainer's step."""

    def __init__(self, config: OptimizerMonitorConfig) -> None:
        self.config = config
        self._found: Metrics = {}
        self._before: dict[str, Tensor] = {}  # weights before the update
        self._grads: Tensor | None = None  # (n,) gradient norms

    def fit_start(self, trainer: Run) -> None:
        # The trainer only counts a step once it is complete.
        def is_due() -> bool:
            return (trainer.state.step + 1) % self.config.batch_log_interval == 0

        def before(optimizer: Optimizer, *_: object) -> None:
            if is_due():
                parameters = _with_gradient(trainer)
                # Measured before the step, because only some optimizers scale gradients in place.
                divisor = getattr(optimizer, "grad_scale", torch.ones(())).cpu()
                self._grads = l2_norms([_grad(each) for each in parameters.values()]) / divisor
                if self.config.log_optimizer_metrics and not self.config.only_global:
                    self._before = {name: weight_of(each, optimizer).clone() for name, each in parameters.items()}

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
        assert self._grads is not None
        norms, before, self._grads, self._before = self._grads, self._before, None, {}
        if not norms.isfinite().all():  # the step was skipped
            return
        parameters = _with_gradient(trainer)
        self._found = {"l2_norm/grad/global": float(norms.square().sum().sqrt())}
        if not self.config.only_global:
            self._found |= {f"l2_norm/grad/{name}": norm for name, norm in zip(parameters, norms.tolist(), strict=True)}
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items() if before else ():
            tensors[f"l2_norm/param/{name}"] = weight = weight_of(parameter, optimizer)
            tensors[f"l2_norm/update/{name}"] = before.pop(name).sub_(weight)
            state = optimizer.state[parameter]
            for key in state.keys() & MOMENTS:
                tensors[f"l2_norm/moment/{name}"] = moment(state, key).to(weight.dtype)
        self._found |= dict(zip(tensors, l2_norms(list(tensors.values())).tolist(), strict=True))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _with_gradient(trainer: Run) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that this step changes, by name; the same on every rank."""
    return {name: each for name, each in trainer.model.named_parameters() if each.grad is not None}
