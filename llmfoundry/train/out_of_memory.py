"""The message of a run that is out of memory: what held it, what was planned, and the keys that would help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.dtensor import local_part
from llmfoundry.model.transformer import CausalLM
from llmfoundry.parallel.fsdp import gradients_of
from llmfoundry.parallel.mesh import Mesh, single_process
from llmfoundry.train.config import RunConfig
from llmfoundry.train.optim import GroupedOptimizerConfig
from llmfoundry.train.planned import Planned, planned


class Allocator(NamedTuple):
    """A GPU's memory, in bytes."""

    card: int
    allocated: int  # at the highest moment so far, which is the one that did not fit
    reserved: int  # by this process now, in use or not


class Held(NamedTuple):
    """What this rank holds on its device, in bytes."""

    weights: int
    optimizer: int
    gradients: int


def allocator(device: torch.device) -> Allocator | None:
    """The allocator's figures; None on a CPU."""
    if device.type != "cuda":
        return None
    stats = runtime.memory_stats(device)
    card = torch.cuda.get_device_properties(device).total_memory
    return Allocator(card, stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.current"])


def held(model: CausalLM, optimizer: Optimizer, device: torch.device) -> Held:
    """Measure what a rank holds, also in the middle of a step."""

    def size(tensors: Iterator[Tensor]) -> int:
        parts = (local_part(each) for each in tensors)
        return sum(part.nbytes for part in parts if part.device.type == device.type)

    state = (each for memory in optimizer.state.values() for each in memory.values() if isinstance(each, Tensor))
    return Held(size(model.parameters()) + size(model.buffers()), size(state), size(gradients_of(model)))


def message(
    config: RunConfig, mesh: Mesh, device: torch.device, rows: int, *, once: bool, there: Held, why: str
) -> str:
    """One line.

    Args:
        rows: rows of the microbatch that did not fit.
        once: whether gradients are reduced over ranks once per step.
        there: what this rank held.
        why: the text of torch's error, or runtime.ELSEWHERE.
    """
    figures = allocator(device) if why != runtime.ELSEWHERE else None
    parts, rest = there._asdict(), 0
    if figures is not None:
        rest = max(0, figures.allocated - sum(there))
        parts["activations and other"] = rest
    plan = planned(_as_run(config, rows, once), mesh.data_ranks, figures.card) if figures is not None else None
    expected = _by_kind(plan) if isinstance(plan, Planned) else {}
    table = ", ".join(
        f"{name} {_size(size)}" + (f" (planned {_size(expected[name])})" if name in expected else "")
        for name, size in parts.items()
    )
    if figures is not None:
        unused = max(0, figures.reserved - figures.allocated)
        table += f", reserved without use {_size(unused)}, of {_size(figures.card)}"
    keys = ", ".join(_remedies(config, mesh, device, rows, once, there, rest))
    what = f"{rows} row{'s' * (rows > 1)} at once"
    return f"out of memory with {what}; held: {table}; less is needed with {keys} ({first_of(why)})"


def first_of(why: str) -> str:
    """The first part of torch's message: that memory ran out, and how much was requested."""
    return ". ".join(" ".join(why.split()).split(". ")[:2])


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"


def _as_run(config: RunConfig, rows: int, once: bool) -> RunConfig:
    """The run with `auto` resolved."""
    parallel = config.parallel.model_copy(update={"reduce_once_a_step": once})
    return config.model_copy(update={"device_train_microbatch_size": rows, "parallel": parallel})


def _by_kind(plan: Planned) -> dict[str, float]:
    kinds = {name: plan.held[name] for name in Held._fields}
    return kinds | {"activations and other": sum(plan.held.values()) - sum(kinds.values())}


def _remedies(
    config: RunConfig, mesh: Mesh, device: torch.device, rows: int, once: bool, there: Held, rest: int
) -> Iterator[str]:
    """Keys that need less memory, starting with those that reduce the largest share."""
    parallel, optimizer = config.parallel, config.optimizer_on(device.type)
    several = -(-config.global_train_batch_size // mesh.data_ranks) > rows
    of_state: list[str] = []
    if getattr(optimizer, "state_dtype", "bf16") == "fp32":
        of_state.append("optimizer.state_dtype=bf16")
    if isinstance(optimizer, GroupedOptimizerConfig) and optimizer.master_weights != "bf16_sr":
        of_state.append("optimizer.master_weights=bf16_sr")
    of_gradients: list[str] = []
    if several and once and mesh.degrees.shard > 1:
        of_gradients.append("parallel.reduce_once_a_step=false")
    casts = single_process(parallel, mesh.degrees) and config.precision_on(device.type) != "fp32"
    if several and casts and parallel.sum_gradients_in == "fp32":
        of_gradients.append("parallel.sum_gradients_in=bf16")
    of_rest = [f"device_train_microbatch_size={rows // 2}"] * (rows > 1)
    if parallel.recompute != "full":
        of_rest.append("parallel.recompute=full")
    of_rest.append("a shorter max_seq_len")
    by_size = [(there.weights + there.optimizer, of_state), (there.gradients, of_gradients), (rest, of_rest)]
    for _, keys in sorted(by_size, key=lambda each: -each[0]):
        yield from keys
    yield "more GPUs"
