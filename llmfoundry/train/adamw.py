"""AdamW on this rank's shards of the parameters, on any mesh, without communication and without making the host wait.

While the optimizer steps, it has the attributes `grad_scale` (gradients are divided by it) and `found_inf` (1: weights,
moments and step counts do not change), as torch's fused optimizers and its GradScaler expect. Both are read on the
device.

On GPUs our kernel updates the weights (kernels/update.py); on CPUs torch's fused optimizer does. Weights in bfloat16 or
in two halves (kernels/halves.py), and moments in bfloat16 or 8 bits (kernels/eight_bit.py), use our code on both. State
has torch's names, so each can load the other's checkpoints. 8-bit moments have `exp_avg_scale` and `exp_avg_sq_scale`
beside their codes; weights in halves have a `low_half`, which checkpoints join with the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from llmfoundry.dtensor import cut_like, local_part, local_shard
from llmfoundry.kernels.eight_bit import adamw_eight_bit_, decode, encode, n_blocks
from llmfoundry.kernels.halves import LOW_HALF
from llmfoundry.kernels.update import Place, Rule, adamw_
from llmfoundry.parallel.single import copy_to_write, is_written
from llmfoundry.runtime import seed_of

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
_CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
_SCALE = "_scale"  # after a moment's name


class _Part(NamedTuple):
    """This rank's shard of one parameter."""

    parameter: Tensor
    weight: Tensor  # the rank's part
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: list[Tensor]  # of both, where they have 8 bits
    beside: Tensor | None  # its copy in the compute dtype, or its low half, where there is one
    step: Tensor  # ()
    place: Place


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with weights, moments and gradients in float32 or bfloat16.

    Args:
        params: parameter groups; parameters may be plain tensors or DTensors on any meshes.
        state_dtype: dtype of the moments; None: the dtype in which each parameter's step is computed.
        halves: whether bfloat16 parameters are the high halves of float32 weights, whose low halves are in the state.

    Attributes:
        noise_seed: seed of stochastic rounding, which also depends on the step and a value's position.
    """

    reads_any_gradient = True
    noise_seed = 0

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype | None = None,
        halves: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.halves = halves
        self._state_dtype = state_dtype
        self._cast = False  # whether a checkpoint's moments were
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
        self._number_parameters()
        divisor, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            self._update_group(group, divisor, skip)
        return loss

    def _update_group(self, group: dict[str, Any], divisor: Tensor | None, skip: Tensor | None) -> None:
        for parts in self._parts(group["params"], bool(group.get("eight_bit"))):
            place = parts[0].weight.device
            _update(parts, group, None if divisor is None else divisor.to(place),
                    None if skip is None else skip.to(place))  # fmt: skip

    def _number_parameters(self) -> None:
        """Compute once where the shards are in their full tensors, because that is slow."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(self._places) != len(parameters):
            for number, parameter in enumerate(parameters):
                self._places[parameter] = place_of(parameter, number, self.noise_seed)

    def _parts(self, parameters: list[Tensor], eight_bit: bool) -> Iterable[list[_Part]]:
        """This rank's shards, grouped by what one kernel launch can handle together."""
        found: dict[tuple[object, ...], list[_Part]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            step, mean, square = self._state_of(parameter, MOMENTS, eight_bit)
            state = self.state[parameter]
            scales = [local_part(state[key + _SCALE]) for key in MOMENTS] if eight_bit else []
            weight, grad = local_part(parameter).detach(), local_part(parameter.grad)
            beside, place = beside_weight(parameter, state if self.halves else None), self._places[parameter]
            key = (weight.device, weight.dtype, grad.dtype, mean.dtype, None if beside is None else beside.dtype)
            found.setdefault(key, []).append(_Part(parameter, weight, grad, mean, square, scales, beside, step, place))
        return found.values()

    def _state_of(self, parameter: Tensor, names: tuple[str, ...], eight_bit: bool = False) -> list[Tensor]:
        """The step count and this rank's shard of the moments; created, or cast to the requested dtype, if needed."""
        state = self.state[parameter]
        kept = [name + end for name in names for end in ("", _SCALE)] + [LOW_HALF] * self.halves
        for key in state.keys() - {"step", *kept}:  # of another optimizer
            del state[key]
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
        if self.halves:  # made also where this rank has none of its values: a checkpoint is of all ranks alike
            beside_weight(parameter, state)
        for key in names:
            dtype = _CODES[key] if eight_bit else self._state_dtype or computed_in(parameter.dtype)
            if key not in state:
                state[key] = torch.zeros_like(parameter, dtype=dtype)
                if eight_bit:
                    part = local_part(parameter)
                    scales = part.new_zeros(*part.shape[:-1], n_blocks(part.shape[-1]), dtype=torch.float32)
                    state[key + _SCALE] = cut_like(parameter.detach(), scales)
            elif state[key].dtype != dtype:  # of a checkpoint
                self._say_that_it_casts(state[key].dtype, dtype)
                exact = moment(state, key)
                state.pop(key + _SCALE, None)
                if eight_bit:
                    part = local_part(exact).float()
                    codes, scales = encode(part, torch.full(part.shape, 1 << 15, device=part.device), dtype)
                    state[key + _SCALE], state[key] = cut_like(exact, scales), cut_like(exact, codes)
                else:
                    state[key] = exact.to(dtype)
        return [state["step"], *(local_part(state[key]) for key in names)]

    def _say_that_it_casts(self, before: torch.dtype, now: torch.dtype) -> None:
        if not self._cast:
            log.info("moments were %s in the checkpoint and are kept in %s (optimizer.state_dtype)", before, now)
        self._cast = True


def beside_weight(parameter: Tensor, state: dict[str, Tensor] | None) -> Tensor | None:
    """The tensor that an update reads or writes beside a weight: its copy, its low half, or None; this rank's shard.

    Args:
        state: the parameter's state, which holds its low half; None: it has no low half.
    """
    if state is None or parameter.dtype != torch.bfloat16:
        return copy_to_write(parameter)
    if LOW_HALF not in state:
        state[LOW_HALF] = torch.zeros_like(parameter, dtype=torch.int16)
    return local_part(state[LOW_HALF])


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the step of a weight is computed."""
    return torch.promote_types(dtype, torch.float32)


def place_of(parameter: Tensor, number: int, seed: int) -> Place:
    """The position of this rank's shard in its full tensor, and the parameter's number for stochastic rounding."""
    shard = local_shard(parameter)
    return Place.of(seed_of("rounding", seed, number) % 2**31, shard.local.shape, shard.shape, shard.offsets)


def moment(state: Mapping[str, Tensor], key: str) -> Tensor:
    """One moment of a parameter's state, decoded if it is stored in 8 bits."""
    kept = state[key]
    if key + _SCALE not in state:
        return kept
    return cut_like(kept, decode(local_part(kept), local_part(state[key + _SCALE])))


class DecoupledAdamW(AdamW):
    """AdamW under the name that Composer's metrics use."""


def _update(parts: list[_Part], group: dict[str, Any], divisor: Tensor | None, skip: Tensor | None) -> None:
    """One step of shards that share a kernel launch."""
    beta1, beta2 = group["betas"]
    rule = Rule(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    taken = torch.ones_like(parts[0].step) if skip is None else 1 - skip.to(parts[0].step.device)
    torch._foreach_add_([part.step for part in parts], [taken] * len(parts))  # of one tensor, the host reads the value
    parts = [part for part in parts if part.weight.numel()]  # a small parameter may leave a rank with nothing
    if not parts:
        return
    weights, grads = [part.weight for part in parts], [part.grad for part in parts]
    means, squares = [part.exp_avg for part in parts], [part.exp_avg_sq for part in parts]
    steps, beside = [part.step for part in parts], [part.beside for part in parts if part.beside is not None]
    one, places = torch.ones((), device=weights[0].device), [part.place for part in parts]
    scale, flag = one if divisor is None else divisor, torch.zeros_like(one) if skip is None else skip
    if parts[0].scales:
        mean_scales, square_scales = ([part.scales[i] for part in parts] for i in (0, 1))
        adamw_eight_bit_(weights, grads, means, squares, mean_scales, square_scales, beside, steps, scale, flag, places,
                         rule)  # fmt: skip
        _note(parts)
        return
    dtype = weights[0].dtype
    if dtype == torch.bfloat16 or (dtype == torch.float32 and (weights[0].is_cuda or means[0].dtype == torch.bfloat16)):
        adamw_(weights, grads, means, squares, beside, steps, scale, flag, places, rule)
        _note(parts)
        return
    grads = [grad.to(weights[0].dtype) for grad in grads]
    torch._fused_adamw_(
        weights, grads, means, squares, [], steps, amsgrad=False, maximize=False, grad_scale=divisor, found_inf=skip,
        lr=rule.lr, beta1=beta1, beta2=beta2, weight_decay=rule.decay, eps=rule.eps,
    )  # fmt: skip
    if beside:
        torch._foreach_copy_(beside, weights)
    _note(parts)


def _note(parts: list[_Part]) -> None:
    """Record that the copies equal the weights."""
    for part in parts:
        if copy_to_write(part.parameter) is not None:
            is_written(part.parameter)
