"""Weights, gradients and optimizer state split over ranks, by torch's FSDP2.

A unit is what is gathered together: each block; its experts, where they have an axis of their own (none of them,
where a rank's experts are whole and it has them in bfloat16: there is nothing to gather or to sum); the embedding
and the head, where they are not tied; and the rest with the root. A unit's weights are gathered just before it
runs, in the compute dtype, and freed after; its gradients are summed over ranks in float32 as soon as they are
whole. Experts, which are most of the bytes, may go around FSDP's buffers (direct.py).

One rule for scale: gradients are SUMMED, never averaged. The loss is already divided by the labels of the
global batch. FSDP2 by default divides by its own mesh's size, which for experts is ep times too small, so that
their gradients come out ep times too big, and no loss curve shows it (Adam does not see a constant factor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import Shard

from llmfoundry.model.transformer import Block, CausalLM
from llmfoundry.moe.layer import MoE
from llmfoundry.parallel.direct import Direct, Gather, Reduce
from llmfoundry.parallel.expert import mixtures
from llmfoundry.parallel.mesh import EXPERT_SHARD, SHARD, Mesh, ParallelConfig

_EVERY_MICROBATCH = "reduces_every_microbatch"
_DIRECT = "gathers_directly"
_SUMS = "sums_gradients_in"  # attribute of a model whose weights have fewer bits than sums of gradients: their dtype


def has_half_weights(model: nn.Module) -> bool:
    """Whether weights that are trained are kept in bfloat16."""
    return any(parameter.dtype == torch.bfloat16 for parameter in model.parameters() if parameter.requires_grad)


def keeps_experts_whole(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> bool:
    """Whether experts are in no unit: each rank alone has its own, in the bfloat16 that is computed with.

    FSDP over one rank would copy every weight and gradient. With float32 weights it also keeps memory low, for it casts
    one block at a time.
    """
    alone = mesh.expert_shards is not None and mesh.expert_shards.size() == 1
    return alone and has_half_weights(model) and not config.cpu_offload


def shard(model: CausalLM, mesh: Mesh, config: ParallelConfig, compute: torch.dtype) -> None:
    """Split the model's parameters over ranks, in place.

    Args:
        model: on the meta device, its experts already divided.
        compute: bfloat16, in which weights are gathered and computed with, and gradients are summed in float32; any
            other only says how weights that are kept in bfloat16 are computed with.
    """
    assert mesh.dense is not None
    half = has_half_weights(model)
    if compute == torch.bfloat16:
        policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    else:
        policy = MixedPrecisionPolicy(compute if half else None, cast_forward_inputs=False)
    if half:
        setattr(model, _SUMS, torch.promote_types(compute, torch.float32))
    on_gpu = mesh.dense.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if config.cpu_offload else OffloadPolicy()
    stacked = _stacked_parameters(model)
    apart = keeps_experts_whole(model, mesh, config)
    whole = {each for mixture in mixtures(model) for each in mixture.experts.parameters()} if apart else set()

    direct, experts = (
        Direct(by_copies=config.gather_experts == "auto"),
        {mixture.experts for mixture in mixtures(model)},
    )

    def unit(module: nn.Module, over: DeviceMesh, axis: str, reshard: bool) -> FSDPModule:
        ranks = over[axis].size()
        sharded = fully_shard(
            module,
            mesh=over,
            reshard_after_forward=reshard,
            shard_placement_fn=_placement(stacked, ranks),
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=whole,
        )
        if over.size() > 1:  # alone there is nothing to divide by, and a factor of 1 would be a pass over all gradients
            sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        gather = Gather()
        sharded.set_custom_all_gather(gather)
        sharded.set_custom_reduce_scatter(Reduce())
        if config.gather_experts != "packed" and not config.cpu_offload:
            for group in _groups_of(sharded):
                direct.add(group, gather, experts)
        return sharded

    again = config.reshard_after_forward
    for block in model.blocks:
        if mesh.expert_shards is not None and not apart and isinstance(block, Block) and isinstance(block.ffn, MoE):
            unit(block.ffn.experts, mesh.expert_shards, EXPERT_SHARD, again)
        unit(block, mesh.dense, SHARD, again)
    if model.lm_head is not None:  # untied; a tied embedding is needed first and last, so the root keeps it
        # The gradient of a look-up needs no weight.
        unit(model.wte, mesh.dense, SHARD, again).set_unshard_in_backward(False)
        unit(model.lm_head, mesh.dense, SHARD, False)  # its backward follows at once
    unit(model, mesh.dense, SHARD, False)
    _set_prefetch(model, config.prefetch)
    setattr(model, _DIRECT, direct)
    model.register_forward_pre_hook(direct.before_forward, prepend=True)
    setattr(model, _EVERY_MICROBATCH, config.reduce_once_a_step is False)


def _stacked_parameters(model: CausalLM) -> dict[int, int]:
    """id of each parameter that is stacked by expert -> how many experts of it this rank has."""
    found: dict[int, int] = {}
    for mixture in mixtures(model):
        ranks = 1 if mixture.expert_group is None else mixture.expert_group.size()
        for parameter in mixture.experts.parameters():
            found[id(parameter)] = parameter.shape[0] // ranks
    return found


def _placement(stacked: dict[int, int], ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Where to cut a parameter: dim 0, but through each expert where whole ones do not divide among ranks.

    Cut in dim 0, 8 experts on 64 ranks would leave 56 of them with nothing to hold and to update.
    """

    def place(parameter: nn.Parameter) -> Shard | None:
        n_experts = stacked.get(id(parameter))
        if n_experts is None or n_experts % ranks == 0 or parameter.shape[1] % ranks:
            return None
        return Shard(1)

    return place


def _set_prefetch(model: CausalLM, ahead: int) -> None:
    """Gather the weights of `ahead` blocks before their turn, in both directions.

    Without this, FSDP counts on the host being ahead of the device; the expert exchange makes it wait every
    layer.
    """
    if ahead == 0:
        return
    units = []
    for block in model.blocks:
        mixture = isinstance(block, Block) and isinstance(block.ffn, MoE)
        units.append(_sharded(block, cast(MoE, block.ffn).experts if mixture else None))
    head, root = _sharded(model.lm_head), _sharded(model)
    first, last = (_sharded(model.wte) or root)[0], (head or root)[0]

    first.set_modules_to_forward_prefetch(_flat(units[:ahead]))
    for i, unit in enumerate(units):
        after, before = units[i + 1 : i + 1 + ahead], units[max(0, i - ahead) : i]
        unit[0].set_modules_to_forward_prefetch(_flat(after) + (head if i + ahead >= len(units) else []))
        unit[0].set_modules_to_backward_prefetch(_flat(before[::-1]))
    last.set_modules_to_backward_prefetch(_flat(units[: -ahead - 1 : -1]))


def _sharded(*modules: nn.Module | None) -> list[FSDPModule]:
    return [cast(FSDPModule, unit) for unit in modules if isinstance(unit, FSDPModule)]


def _flat(units: list[list[FSDPModule]]) -> list[FSDPModule]:
    return [module for unit in units for module in unit]


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and backward of one microbatch: gradients are summed over ranks after the last.

    Without `parallel.reduce_once_a_step` each microbatch's are summed over `fsdp` at once, so that no rank
    keeps whole gradients; over `dp_replicate` they are summed after the last one in any case. Nothing to do
    for a model that is not split.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_is_last_backward(last)
    model.set_requires_gradient_sync(last or getattr(model, _EVERY_MICROBATCH))
    model.set_requires_all_reduce(last)
    _sum_gradients_of_half_weights(model)
    direct: Direct = getattr(model, _DIRECT)
    direct.before_backward()
    yield
    direct.after_backward()


def _sum_gradients_of_half_weights(model: nn.Module) -> None:
    """Keep the sums of gradients in float32 where weights are kept in bfloat16; call it after the first forward.

    torch would round a sum over ranks to the dtype of the weight, and add those of microbatches in it. It has no public
    way to keep the sum as it is.
    """
    dtype: torch.dtype | None = getattr(model, _SUMS, None)
    for group in _groups(model) if dtype is not None else ():
        if group._orig_dtype == torch.bfloat16:
            group._orig_dtype = dtype
            for parameter in group.fsdp_params:
                parameter.sharded_param.grad_dtype = dtype


def can_leave(model: nn.Module) -> bool:
    """Whether a step can be left in the middle and another one taken; before torch 2.13, FSDP2 could not."""
    return not isinstance(model, FSDPModule) or hasattr(model, "reset_iter_state")


def gradients_of(model: nn.Module) -> Iterator[Tensor]:
    """All gradients that a rank holds, also in the middle of a step: finished ones, and whole ones not summed yet."""
    yield from (each.grad for each in model.parameters() if each.grad is not None)
    for group in _groups(model):
        for parameter in group.fsdp_params:
            if parameter.unsharded_accumulated_grad is not None:
                yield parameter.unsharded_accumulated_grad
            if hasattr(parameter, "_unsharded_param") and parameter._unsharded_param.grad is not None:
                yield parameter._unsharded_param.grad


def reduces_once(model: nn.Module) -> bool:
    """Whether the gradients of a step's microbatches are summed over ranks once."""
    return not getattr(model, _EVERY_MICROBATCH, False)


def _groups(model: nn.Module) -> Iterator[FSDPParamGroup]:
    """What torch keeps of the parameters of each unit; it has no public way to it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from _groups_of(module)


def _groups_of(module: FSDPModule) -> list[FSDPParamGroup]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.11: one group per module


def forget_step(model: nn.Module) -> None:
    """Make a model ready for another forward after one that was left, or its backward."""
    model.zero_grad(set_to_none=True)
    if not isinstance(model, FSDPModule) or model._get_fsdp_state()._is_root is None:  # None: before the first forward
        return
    model.reset_iter_state()
    getattr(model, _DIRECT).forget()
    for group in _groups(model):
        for parameter in group.fsdp_params:  # gradients of earlier microbatches, not summed over ranks yet
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # not before the first forward
                parameter._unsharded_param.grad = None
    model.zero_grad(set_to_none=True)
