"""Optimizers, their learning rate, and gradient clipping by the true global norm.

Weight decay applies to matrices, not to parameters of one dimension (norms, biases) or the stacked biases of experts.
Parameters may be plain tensors or DTensors, also on different meshes in one optimizer.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmfoundry import runtime
from llmfoundry.config import Choice, ConfigError
from llmfoundry.dtensor import local_part
from llmfoundry.kernels.square_sum import square_sum
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.train.adamw import AdamW, DecoupledAdamW
from llmfoundry.train.groups import Betas, Member, ParamGroup, Pattern, members

_BIAS_OR_NORM = re.compile(r"(^|\.)(b1|b2|[^.]*bias|[^.]*norm[^.]*\.[^.]*)$")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe)\.weight$")


class OptimizerConfig(Choice, tag="name"):
    """Base of the optimizers: `optimizer: {name: decoupled_adamw, lr: 3.0e-4, weight_decay: 1.0e-5}`."""

    name: str  # the optimizer
    lr: float = Field(gt=0)  # highest learning rate; the scheduler multiplies it

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state per parameter, for the plan's time of an update."""
        return 8

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of trained weights."""
        return torch.float32

    @property
    def halves(self) -> bool:
        """Whether bfloat16 weights are the high halves of float32 weights."""
        return False

    def decided(self, may_split: bool) -> OptimizerConfig:
        """The same config with `auto` resolved; the run says whether float32 weights may be split."""
        return self

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of `model`'s trainable parameters; each group has its `initial_lr`."""
        raise NotImplementedError

    def update_flops(self, model: CausalLMConfig) -> float:
        """FLOPs of an update's matrix products, over all parameters."""
        return 0.0


class GroupedOptimizerConfig(OptimizerConfig):
    """Settings of every optimizer: decay for matrices, and LLM Foundry's groups (groups.py)."""

    betas: Betas
    weight_decay: float = Field(ge=0)
    # How weights are stored. fp32: 4 bytes per parameter, cast or copied for computing. fp32_split: the same values as
    # a bf16 for computing and the other 16 bits, 4 bytes in total. bf16_sr: 2 bytes with stochastic rounding, so that
    # small changes add up. auto: fp32_split if weights are computed with in bf16, without cpu_offload and adapters;
    # otherwise fp32.
    master_weights: Literal["auto", "fp32", "fp32_split", "bf16_sr"] = "auto"
    decay_embeddings: bool = True  # apply weight decay to embeddings too
    # Settings for some parameters: [{param_str_match: REGEX, lr: ..., weight_decay: ...}]
    param_groups: list[ParamGroup] = []
    # Parameters that are not trained: a regular expression on their names, or a list
    disable_grad: Pattern | list[Pattern] = []

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.master_weights in ("auto", "fp32") else torch.bfloat16

    @property
    def halves(self) -> bool:
        return self.master_weights == "fp32_split"

    def decided(self, may_split: bool) -> OptimizerConfig:
        if self.master_weights != "auto":
            return self
        return self.model_copy(update={"master_weights": "fp32_split" if may_split else "fp32"})

    def settings(self, model: nn.Module) -> list[dict[str, object]]:
        """The optimizer's groups. A group of the YAML may become two: with and without decay.

        Raises:
            ConfigError: a group's pattern matches nothing.
        """
        found: dict[tuple[object, ...], dict[str, object]] = {}
        parts: dict[tuple[object, ...], list[nn.Parameter]] = {}
        marks = self.marks(model)
        frozen = [self.disable_grad] if isinstance(self.disable_grad, str) else self.disable_grad
        for member in members(model, self.param_groups, frozen):
            number, group, name, parameter = member
            own = group.weight_decay is not None
            decayed = own or decays(name, parameter, embeddings=self.decay_embeddings)
            marked = marks(member)
            key = (number, decayed, *marked.items())
            if key not in found:
                lr = group.lr or self.lr
                decay = group.weight_decay if group.weight_decay is not None else self.weight_decay
                found[key] = {"lr": lr, "initial_lr": lr, "weight_decay": decay if decayed else 0.0, "number": number}
                found[key] |= marked
                if group.betas is not None:
                    found[key]["betas"] = tuple(group.betas)
                if group.eps is not None:
                    if "eps" not in type(self).model_fields:
                        raise ConfigError(f"optimizer.param_groups.{number - 1}.eps: {self.name} has none; remove it")
                    found[key]["eps"] = group.eps
                parts[key] = []
                found[key]["params"] = parts[key]
            parts[key].append(parameter)
        return list(found.values())

    def marks(self, model: nn.Module) -> Callable[[Member], dict[str, object]]:
        """Further properties of a parameter; parameters that differ in them are in different groups."""

        def nothing(member: Member) -> dict[str, object]:
            if member.group.algorithm is not None:
                key = f"optimizer.param_groups.{member.number - 1}.algorithm"
                raise ConfigError(f"{key}: is for name: muon, and not {self.name}; remove it")
            return {}

        return nothing


class AdamWConfig(GroupedOptimizerConfig, names=("adamw",)):
    """AdamW as in torch: each step first subtracts `lr * weight_decay` times the weight.

    Source: Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """

    betas: Betas = [0.9, 0.95]  # decay rates of the two moments
    eps: float = Field(1.0e-8, gt=0)  # added to the square root of the second moment
    weight_decay: float = Field(0.01, ge=0)  # each step subtracts lr * weight_decay * weight
    # Storage of the moments. fp32: 8 bytes per parameter; bf16: 4; int8: 2 for matrices. bf16 and int8 use stochastic
    # rounding, so that small changes add up.
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32"

    @property
    def state_bytes(self) -> int:
        return {"fp32": 8, "bf16": 4, "int8": 2}[self.state_dtype]

    def marks(self, model: nn.Module) -> Callable[[Member], dict[str, object]]:
        """Whether moments are stored in 8 bits: those of matrices whose rows are whole on every rank."""
        plain = super().marks(model)
        if self.state_dtype != "int8":
            return plain
        return lambda member: {**plain(member), "eight_bit": decays(member.name, member.parameter)}

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        beta1, beta2 = self.betas
        dtype = torch.bfloat16 if self.state_dtype == "bf16" else None  # groups say which have 8 bits
        return self._class()(
            self.settings(model), lr=self.lr, betas=(beta1, beta2), eps=self.eps, state_dtype=dtype, halves=self.halves
        )

    def _class(self) -> type[AdamW]:
        return AdamW


class DecoupledAdamWConfig(AdamWConfig, names=("decoupled_adamw",)):
    """AdamW as in Composer: each step subtracts `(lr / initial_lr) * weight_decay` times the weight.

    The decay follows the schedule but not the size of the learning rate, so values are small: 1e-5 is usual.
    """

    weight_decay: float = Field(1.0e-5, ge=0)  # each step subtracts (lr / initial lr) * weight_decay * weight

    def settings(self, model: nn.Module) -> list[dict[str, object]]:
        found = super().settings(model)
        for group in found:
            decay, lr = group["weight_decay"], group["initial_lr"]
            assert isinstance(decay, float) and isinstance(lr, float)
            group["weight_decay"] = decay / lr  # torch multiplies by lr
        return found

    def _class(self) -> type[AdamW]:
        return DecoupledAdamW


def decays(name: str, parameter: Tensor, *, embeddings: bool = True) -> bool:
    """Whether weight decay applies to a parameter: a matrix that is neither a norm's weight nor a (stacked) bias."""
    if parameter.ndim < 2 or _BIAS_OR_NORM.search(name):
        return False
    return embeddings or not _EMBEDDING.search(name)


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Set every group's learning rate to `multiplier` times its initial one; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    return optimizer.param_groups[0]["lr"]


class _GradientGroup(NamedTuple):
    """Gradients whose parts are replicated on the same number of ranks."""

    copies: int  # ranks that hold the same part
    device_type: str  # where ranks reduce
    grads: list[Tensor]  # this rank's part of each


class Clipping(NamedTuple):
    """How a step's gradients are scaled, on the device and the same on every rank."""

    norm: Tensor  # () of the full gradients before clipping, float32 (float64 for float64 gradients)
    divisor: Tensor  # () float32, what gradients are divided by: 1 unless the norm is above the limit
    skip: Tensor  # () float32: 1 if any gradient is not finite, and nothing may be updated


@torch.no_grad()
def square_share(parameters: Iterable[Tensor]) -> Tensor:
    """() float64: this rank's share of the squared L2 norm of all gradients; the shares of all ranks add up to it.

    Gradients may be sharded in any way, each differently. The host does not wait.

    Args:
        parameters: those without a gradient are ignored.
    """
    groups: dict[tuple[object, ...], _GradientGroup] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            part = _part(parameter.grad)
            key = (parameter.grad.dtype, parameter.grad.device, part.copies)
            groups.setdefault(key, part._replace(grads=[])).grads.extend(part.grads)
    shares = [square_sum(group.grads).to(group.device_type) / group.copies for group in groups.values()]
    return torch.stack([share.to(shares[0].device) for share in shares]).sum() if shares else torch.zeros(()).double()


def clipping_of(square: Tensor, max_norm: float | None, dtype: torch.dtype = torch.float32) -> Clipping:
    """The clipping that reduces the norm of gradients to `max_norm`.

    Args:
        square: () squared norm of all gradients: the sum of all ranks' `square_share`.
        max_norm: None: no clipping.
        dtype: dtype of the norm.
    """
    norm = square.sqrt().to(dtype)
    divisor = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1.0)
    return Clipping(norm, divisor.float(), (~norm.isfinite()).float())


def norm_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the norm of these parameters' gradients: float32, or float64 if a gradient is."""
    dtypes = (parameter.grad.dtype for parameter in parameters if parameter.grad is not None)
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


@torch.no_grad()
def clipping(parameters: Iterable[Tensor], max_norm: float | None) -> Clipping:
    """Measure the global L2 norm of the gradients, and compute the clipping to `max_norm`. Changes nothing.

    The norm is that of the full gradients over all ranks, and the same on each of them. It costs one all-reduce of one
    number. The host does not wait.

    Args:
        parameters: those without a gradient are ignored.
        max_norm: None: no clipping.
    """
    parameters = list(parameters)
    return clipping_of(runtime.all_reduce_sum(square_share(parameters)), max_norm, norm_dtype(parameters))


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, clip: Clipping) -> None:
    """Take one step of `optimizer` with clipped gradients, or none if `clip` says to skip it.

    Optimizers that read scale and flag on the device (ours, and torch's fused ones) get them as `grad_scale` and
    `found_inf`. For others, the host waits for the flag, and scaling is a pass over the gradients.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = clip.divisor, clip.skip  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not clip.skip:
        _divide([each.grad for group in optimizer.param_groups for each in group["params"]], clip.divisor)
        optimizer.step()


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients down to a global L2 norm of at most `max_norm`, for optimizers stepped elsewhere.

    The host waits for the norm: most steps of a healthy run need no scaling, which is a pass over all gradients.

    Args:
        parameters: those without a gradient are ignored.
        max_norm: None: measure the norm and change nothing.

    Returns:
        () norm before clipping, float32 (float64 for float64 gradients); not finite if any gradient is not.
    """
    parameters = list(parameters)
    clip = clipping(parameters, max_norm)
    _divide([parameter.grad for parameter in parameters], clip.divisor)
    return clip.norm


def _divide(grads: Sequence[Tensor | None], divisor: Tensor) -> None:
    """Divide gradients by a number that is usually 1. The host waits for it."""
    factor = 1 / float(divisor)
    for grad in grads if factor != 1 else ():
        if grad is not None:
            local_part(grad).mul_(factor)


def _part(grad: Tensor) -> _GradientGroup:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(grad, DTensor):
        return _GradientGroup(ranks, grad.device.type, [grad])
    assert not any(place.is_partial() for place in grad.placements), "a gradient not reduced yet has no norm"
    mesh = grad.device_mesh
    parts = math.prod(mesh.size(i) for i, place in enumerate(grad.placements) if not place.is_replicate())
    return _GradientGroup(ranks // parts, mesh.device_type, [grad.to_local()])


def l2_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor over all ranks: (n,) on the CPU, the same on every rank; all ranks call this.

    It takes one all-reduce, whatever the number of tensors; the host waits for it.
    """
    shares = torch.zeros(len(tensors), dtype=torch.float64)
    groups: dict[tuple[object, ...], tuple[_GradientGroup, list[int]]] = {}
    for number, tensor in enumerate(tensors):
        part = _part(tensor)
        group, numbers = groups.setdefault((tensor.device, tensor.dtype, part.copies), (part._replace(grads=[]), []))
        group.grads.extend(part.grads)
        numbers.append(number)
    for group, numbers in groups.values():
        norms = torch._foreach_norm(group.grads, 2.0, dtype=torch.promote_types(group.grads[0].dtype, torch.float32))
        shares[numbers] = torch.stack([norm.double() for norm in norms]).square().cpu() / group.copies
    return runtime.all_reduce_sum(shares.to(runtime.device())).sqrt().cpu()
