"""Lion with decoupled weight decay, as LLM Foundry means it: one moment, and steps of one size.

Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from pydantic import Field
from torch import Tensor, nn

from llmfoundry.dtensor import local_part
from llmfoundry.train.groups import Betas
from llmfoundry.train.optim import GroupedOptimizerConfig


class DecoupledLionWConfig(GroupedOptimizerConfig, names=("decoupled_lionw",)):
    """Each step takes `(lr / initial_lr) * weight_decay` of the weight away, and `lr` times a sign."""

    lr: float = Field(1.0e-4, gt=0)  # the highest learning rate; the scheduler multiplies it
    betas: Betas = [0.9, 0.99]  # of the update's direction, and of the momentum
    weight_decay: float = Field(0.0, ge=0)  # each step takes (lr / initial lr) * weight_decay of the weight away

    @property
    def state_bytes(self) -> int:
        return 4

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return DecoupledLionW(self.settings(model), lr=self.lr, betas=(self.betas[0], self.betas[1]))


class DecoupledLionW(torch.optim.Optimizer):
    """`p *= 1 - lr / initial_lr * weight_decay; p -= lr * sign(b1 * m + (1 - b1) * g); m = b2 * m + (1 - b2) * g`.

    Every operation is element by element, so each rank updates its part of a sharded parameter and nothing is sent.
    Like `AdamW` it reads `grad_scale` and `found_inf` on the device.
    """

    _step_supports_amp_scaling = True
    reads_any_gradient = True

    def __init__(self, params: Iterable[dict[str, object]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "initial_lr": lr, "betas": betas, "weight_decay": 0.0})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        divisor, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, divisor, skip)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], divisor: Tensor | None, skip: Tensor | None) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        weight, grad, moment = map(local_part, (parameter, parameter.grad, state["exp_avg"]))
        grad = grad.to(weight.dtype)
        grad = grad if divisor is None else grad / divisor.to(grad.device, grad.dtype)
        taken: Tensor | float = 1.0  # 0 where the step is skipped: everything below is then multiplied by 1 or 0
        if skip is not None:
            taken = 1 - skip.to(grad.device, grad.dtype)
            grad = torch.where(taken == 0, 0, grad)
        beta1, beta2 = group["betas"]
        lost = group["lr"] / group["initial_lr"] * group["weight_decay"]
        weight.mul_(1 - lost * taken).sub_(torch.lerp(grad, moment, beta1).sign_().mul_(group["lr"] * taken))
        moment.lerp_(grad, (1 - beta2) * taken)
