"""Shards weights, gradients and optimizer state over ranks with FSDP2.

A unit is what is gathered together: each block; its experts, if they have their own mesh axis (but not if a rank keeps
whole experts in bfloat16, because then there is nothing to gather or reduce); the embedding and the head, if they are
not tied; and the rest with the root. A unit's weights are gathered just before it runs, in the compute dtype, and freed
afterwards. Its gradients are reduced over ranks in float32 as soon as they are complete. Experts, which are most of the
bytes, may bypass FSDP's buffers (direct.py).

One rule for scaling: gradients are SUMMED, never averaged. The loss is already divided by the number of labels in the
global batch. By default FSDP2 divides by the size of its own mesh, which for experts is ep times too small. Their
gradients would be ep times too large, which no loss curve would show, because Adam ignores a constant factor.
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
_SUMS = "sums_gradients_in"  # attribute of a model with bfloat16 weights: the dtype of gradient sums


def has_half_weights(model: nn.Module) -> bool:
    """Return whether trainable weights are kept in bfloat16."""
    return any(parameter.dtype == torch.bfloat16 for parameter in model.parameters() if parameter.requires_grad)


def keeps_experts_whole(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> bool:
    """Return whether experts are outside of all units: each rank has its own whole experts, in bfloat16.

    FSDP over a single rank would copy every weight and gradient. With float32 weights, it saves memory nonetheless,
    because it casts one block at a time.
    """
    alone = mesh.expert_shards is not None and mesh.expert_shards.size() == 1
    return alone and has_half_weights(model) and not config.cpu_offload


def shard(model: CausalLM, mesh: Mesh, config: ParallelConfig, compute: torch.dtype) -> None:
    """Shard the model's parameters over ranks, in place.

    Args:
        model: on the meta device, with its experts already divided.
        mesh: from `build_mesh`.
        config: `parallel` in the YAML.
        compute: if bfloat16, weights are gathered and used in it, and gradients are reduced in float32. Any other dtype
            only determines how bfloat16 weights are computed with.
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
        if over.size() > 1:  # a divide factor of 1 would still be a pass over all gradients
            sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo does not support scaled sums
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
    if model.lm_head is not None:  # untied; the root keeps a tied embedding, which is needed first and last
        # The gradient of a lookup does not need the weight.
        unit(model.wte, mesh.dense, SHARD, again).set_unshard_in_backward(False)
        unit(model.lm_head, mesh.dense, SHARD, False)  # its backward follows immediately
    unit(model, mesh.dense, SHARD, False)
    _set_prefetch(model, config.prefetch)
    setattr(model, _DIRECT, direct)
    model.register_forward_pre_hook(direct.before_forward, prepend=True)
    setattr(model, _EVERY_MICROBATCH, config.reduce_once_a_step is False)


def _stacked_parameters(model: CausalLM) -> dict[int, int]:
    """Map the id of each parameter that is stacked by expert to the number of experts on this rank."""
    found: dict[int, int] = {}
    for mixture in mixtures(model):
        ranks = 1 if mixture.expert_group is None else mixture.expert_group.size()
        for parameter in mixture.experts.parameters():
            found[id(parameter)] = parameter.shape[0] // ranks
    return found


def _placement(stacked: dict[int, int], ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Choose the dim to shard: dim 0, or dim 1 (through each expert) if the experts do not divide evenly among ranks.

    In dim 0, 8 experts on 64 ranks would leave 56 ranks with nothing to hold and update.
    """

    def place(parameter: nn.Parameter) -> Shard | None:
        n_experts = stacked.get(id(parameter))
        if n_experts is None or n_experts % ranks == 0 or parameter.shape[1] % ranks:
            return None
        return Shard(1)

    return place


def _set_prefetch(model: CausalLM, ahead: int) -> None:
    """Gather the weights of `ahead` blocks in advance, in both directions.

    Without this, FSDP relies on the host running ahead of the device, but the expert exchange makes it wait in every
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
    """Wrap the forward and backward of one microbatch; gradients are reduced over ranks after the last one.

    Without `parallel.reduce_once_a_step`, each microbatch's gradients are reduced over `fsdp` at once, so that no rank
    keeps unsharded gradients; over `dp_replicate` they are always reduced after the last one. A no-op for a model
    without FSDP.
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
    """Keep the sums of gradients in float32 if weights are kept in bfloat16; call this after the first forward.

    PyTorch would round a reduced gradient to the weight's dtype, and accumulate microbatches in it. It has no public
    way to keep the sum in float32.
    """
    dtype: torch.dtype | None = getattr(model, _SUMS, None)
    for group in _groups(model) if dtype is not None else ():
        if group._orig_dtype == torch.bfloat16:
            group._orig_dtype = dtype
            for parameter in group.fsdp_params:
                parameter.sharded_param.grad_dtype = dtype


def can_leave(model: nn.Module) -> bool:
    """Return whether a step can be interrupted and another one started; FSDP2 supports this from torch 2.13."""
    return not isinstance(model, FSDPModule) or hasattr(model, "reset_iter_state")


def gradients_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield all gradients on this rank, even during a step: reduced ones, and unsharded ones not reduced yet."""
    yield from (each.grad for each in model.parameters() if each.grad is not None)
    for group in _groups(model):
        for parameter in group.fsdp_params:
            if parameter.unsharded_accumulated_grad is not None:
                yield parameter.unsharded_accumulated_grad
            if hasattr(parameter, "_unsharded_param") and parameter._unsharded_param.grad is not None:
                yield parameter._unsharded_param.grad


def reduces_once(model: nn.Module) -> bool:
    """Return whether the gradients of a step's microbatches are reduced over ranks only once."""
    return not getattr(model, _EVERY_MICROBATCH, False)


def _groups(model: nn.Module) -> Iterator[FSDPParamGroup]:
    """Yield FSDP's internal parameter groups, for which there is no public API."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from _groups_of(module)


def _groups_of(module: FSDPModule) -> list[FSDPParamGroup]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.11: one group per module


def forget_step(model: nn.Module) -> None:
    """Make a model ready for another forward after a forward or backward was interrupted."""
    model.zero_grad(set_to_none=True)
    if not isinstance(model, FSDPModule) or model._get_fsdp_state()._is_root is None:  # None: before the first forward
        return
    model.reset_iter_state()
    getattr(model, _DIRECT).forget()
    for group in _groups(model):
        for parameter in group.fsdp_params:  # gradients of earlier microbatches that have not been reduced yet
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # missing before the first forward
                parameter._unsharded_param.grad = None
    model.zero_grad(set_to_none=True)
