"""Lion with decoupled weight decay, as in LLM Foundry: one moment, and updates of equal size.

Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from pydantic import Field
from torch import Tensor, nn

from llmfoundry.dtensor import local_part
from llmfoundry.kernels.lion import lion_
from llmfoundry.kernels.update import Place
from llmfoundry.parallel.single import copy_to_write, is_written
from llmfoundry.train.adamw import beside_weight, computed_in, place_of
from llmfoundry.train.groups import Betas
from llmfoundry.train.optim import GroupedOptimizerConfig


class DecoupledLionWConfig(GroupedOptimizerConfig, names=("decoupled_lionw",)):
    """Lion: each step subtracts `(lr / initial_lr) * weight_decay` times the weight, and `lr` times a sign."""

    lr: float = Field(1.0e-4, gt=0)  # highest learning rate; the scheduler multiplies it
    betas: Betas = [0.9, 0.99]  # interpolation of the update's direction, and decay of the momentum
    weight_decay: float = Field(0.0, ge=0)  # each step subtracts (lr / initial lr) * weight_decay * weight

    @property
    def state_bytes(self) -> int:
        return 4

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        betas = self.betas[0], self.betas[1]
        return DecoupledLionW(self.settings(model), lr=self.lr, betas=betas, halves=self.halves)


class DecoupledLionW(torch.optim.Optimizer):
    """`p *= 1 - lr / initial_lr * weight_decay; p -= lr * sign(b1 * m + (1 - b1) * g); m = b2 * m + (1 - b2) * g`.

    Every operation is element by element, so each rank updates its part of a sharded parameter and nothing is sent.
    Like `AdamW` it reads `grad_scale` and `found_inf` on the device. Steps are counted for weights in bfloat16 alone,
    whose random bits depend on it.
    """

    _step_supports_amp_scaling = True
    reads_any_gradient = True
    noise_seed = 0

    def __init__(
        self, params: Iterable[dict[str, object]], lr: float, betas: tuple[float, float], halves: bool = False
    ) -> None:
        self.halves = halves
        super().__init__(params, {"lr": lr, "initial_lr": lr, "betas": betas, "weight_decay": 0.0})
        self._places: dict[Tensor, Place] = {}

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
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self._places:
                    self._places[parameter] = place_of(parameter, number, self.noise_seed)
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, divisor, skip)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], divisor: Tensor | None, skip: Tensor | None) -> None:
        state, weight = self.state[parameter], local_part(parameter).detach()
        one = torch.ones((), device=weight.device)
        divisor = one if divisor is None else divisor.to(weight.device)
        skip = torch.zeros_like(one) if skip is None else skip.to(weight.device)
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=computed_in(parameter.dtype))
        if weight.dtype == torch.bfloat16:
            state.setdefault("step", torch.zeros_like(one)).add_(1 - skip)
        beside, (beta1, beta2) = beside_weight(parameter, state if self.halves else None), group["betas"]
        if not weight.numel():  # a small parameter may leave a rank with nothing
            return
        assert parameter.grad is not None
        lion_(
            weight, local_part(state["exp_avg"]), local_part(parameter.grad), [] if beside is None else [beside],
            state.get("step", one), divisor, skip, self._places[parameter], lr=group["lr"], beta1=beta1, beta2=beta2,
            keep=1 - group["lr"] / group["initial_lr"] * group["weight_decay"],
        )  # fmt: skip
        if copy_to_write(parameter) is not None:
            is_written(parameter)
