"""Names the tensors of a run in a checkpoint: `GROUP/NAME`.

    model/blocks.0.ffn.experts.w1               parameters and persistent buffers
    optimizer/blocks.0.ffn.experts.w1/exp_avg   the optimizer's state of a parameter
    rng/cpu                                     random states, one row per rank

Names do not depend on the mesh: sharding, compilation and recomputation keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.checkpoint.index import Entry
from llmfoundry.checkpoint.manifest import CheckpointError
from llmfoundry.checkpoint.storage import RNG
from llmfoundry.dtensor import cut_like, local_part
from llmfoundry.kernels.halves import LOW_HALF, Halves, low_half_of, split_into


class EmptyState(NamedTuple):
    """An empty tensor for one entry of the optimizer's state, not yet part of it."""

    parameter: nn.Parameter
    key: str
    room: Tensor


def model_tensors(model: nn.Module, *, frozen: bool = True) -> dict[str, Tensor]:
    """Return parameters and persistent buffers; not copies.

    Args:
        model: the model, sharded or not.
        frozen: whether to include what is not trained; if False, buffers are left out too.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items() if frozen or name in trained}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return the optimizer's state of each parameter; empty before its first step."""
    if optimizer is None:
        return {}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, memory in optimizer.state.items()
        for key, value in memory.items()
        if key != LOW_HALF  # it is a part of the weight
    }


def join_halves(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer | None
) -> dict[str, Tensor | Halves]:
    """Return `model_tensors` with both halves of the weights that the optimizer keeps so; checkpoints have float32."""
    found: dict[str, Tensor | Halves] = dict(tensors)
    for name, parameter in model.named_parameters():
        low = low_half_of(parameter, optimizer)
        if low is not None and f"model/{name}" in found:
            found[f"model/{name}"] = Halves(parameter.detach(), low)
    return found


class Split(NamedTuple):
    """Memory to read a float32 weight into, which is then split into halves."""

    parameter: nn.Parameter
    room: Tensor

    def keep(self, optimizer: Optimizer) -> None:
        low = torch.zeros_like(self.parameter, dtype=torch.int16, requires_grad=False)
        split_into(Halves(local_part(self.parameter.detach()), local_part(low)), local_part(self.room))
        optimizer.state[self.parameter][LOW_HALF] = low


def rooms_to_split(entries: Mapping[str, Entry], model: nn.Module, optimizer: Optimizer | None) -> dict[str, Split]:
    """Allocate memory for weights that `optimizer` keeps in halves and the checkpoint has in float32."""
    if not getattr(optimizer, "halves", False):
        return {}
    return {
        f"model/{name}": Split(parameter, torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False))
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.bfloat16
        and parameter.requires_grad
        and entries[f"model/{name}"].dtype == torch.float32
    }


def empty_state(entries: Mapping[str, Entry], model: nn.Module, optimizer: Optimizer | None) -> dict[str, EmptyState]:
    """Allocate tensors for the optimizer state in a checkpoint, sharded like the parameters.

    Raises:
        CheckpointError: if it has state of a parameter that `optimizer` does not train.
    """
    if optimizer is None:
        return {}
    names = dict(model.named_parameters())
    steps_on_device = {
        parameter: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = {}
    for name, entry in entries.items():
        if not name.startswith("optimizer/"):
            continue
        owner, _, key = name.removeprefix("optimizer/").rpartition("/")
        parameter = names.get(owner)
        if parameter is None or parameter not in steps_on_device:
            raise CheckpointError(f"it holds optimizer state of {owner}, which this run does not train")
        if key != "step" and entry.shape == tuple(parameter.shape):
            room = torch.zeros_like(parameter, dtype=entry.dtype, requires_grad=False)
        elif key != "step" and len(entry.shape) > 1 and entry.shape[:-1] == tuple(parameter.shape[:-1]):
            local = local_part(parameter)  # one value for several in a row: the scales of 8-bit moments
            part = torch.zeros(*local.shape[:-1], entry.shape[-1], dtype=entry.dtype, device=local.device)
            room = cut_like(parameter.detach(), part)
        else:  # PyTorch keeps a step count on the CPU unless a fused or capturable kernel reads it
            device = parameter.device if steps_on_device[parameter] else torch.device("cpu")
            room = torch.zeros(entry.shape, dtype=entry.dtype, device=device)
        found[name] = EmptyState(parameter, key, room)
    return found


def rng_tensors() -> dict[str, Tensor]:
    """Return this rank's random state. llmfoundry draws from `runtime.generator` and does not need it; plug-ins may."""
    states = {f"{RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states[f"{RNG}cuda"] = torch.cuda.get_rng_state()
    return states


def rng_room(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Allocate tensors for this rank's random state; empty if the checkpoint has a different number of ranks."""
    here = rng_tensors()
    if f"{RNG}cpu" in entries:
        fits = entries[f"{RNG}cpu"].shape == (runtime.world_size(), *here[f"{RNG}cpu"].shape)
        return {name: state for name, state in here.items() if name in entries} if fits else {}
    # An earlier version named the states by rank.
    if sum(name.startswith(RNG) and name.endswith("/cpu") for name in entries) != runtime.world_size():
        return {}
    names = {f"{RNG}{runtime.rank()}/{name.removeprefix(RNG)}": state for name, state in here.items()}
    return {name: state for name, state in names.items() if name in entries}


def set_rng(states: Mapping[str, Tensor]) -> None:
    """Restore the random state that `rng_tensors` returned."""
    for name, state in states.items():
        (torch.set_rng_state if name.endswith("cpu") else torch.cuda.set_rng_state)(state)


def check_same_model(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], exact_dtype: bool) -> None:
    """Check that a checkpoint contains exactly the model's tensors.

    Args:
        entries: the checkpoint's tensors.
        tensors: `model_tensors` of the model.
        exact_dtype: whether dtypes must match too, except that weights may be float32 in one and bfloat16 in the other.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    for name, tensor in tensors.items():
        short, here = name.removeprefix("model/"), _describe(tuple(tensor.shape), tensor.dtype)
        entry = entries.get(name)
        if entry is None:
            raise CheckpointError(f"it is of another model: it has no {short}, which is {here} in this one")
        if entry.shape != tuple(tensor.shape) or (exact_dtype and not _is_kept_as(entry.dtype, tensor.dtype)):
            there = _describe(entry.shape, entry.dtype)
            raise CheckpointError(f"it is of another model: {short} is {there} there and {here} in this one")
    for name, entry in entries.items():
        if name.startswith("model/") and name not in tensors:
            there = f"{name.removeprefix('model/')}, {_describe(entry.shape, entry.dtype)}"
            raise CheckpointError(f"it is of another model: it has {there}, which this one lacks")


def _is_kept_as(there: torch.dtype, here: torch.dtype) -> bool:
    return there == here or {there, here} == {torch.float32, torch.bfloat16}


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape)) or 'scalar'} {str(dtype).removeprefix('torch.')}"
