"""Assigns roles to ranks. The only file that names mesh axes.

world = replicate x shard. A dense parameter is sharded over `fsdp` (shard ranks) and replicated `dp_replicate` times.
Experts use the same ranks in another arrangement: `expert` divides `shard`; each expert belongs to one of `ep` adjacent
ranks (adjacent, so that tokens travel over NVLink), and its weights are sharded over the `efsdp` = shard / expert ranks
that hold the same experts. Every rank has its own rows, whatever the degrees.

    dense   (dp_replicate, fsdp)          8 ranks, replicate 1, shard 8, expert 2:   0 1 2 3 4 5 6 7
    sparse  (dp_replicate, efsdp, ep)     ep groups 01 23 45 67, efsdp groups 0246 1357
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from pydantic import Field, field_validator, model_validator
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmfoundry import runtime
from llmfoundry.config import Config, ConfigError

REPLICATE, SHARD, EXPERT_SHARD, EXPERT = "dp_replicate", "fsdp", "efsdp", "ep"


class ParallelConfig(Config):
    """Parallelism: `parallel` in the YAML. By default, everything is sharded over all processes."""

    replicate: int = Field(1, ge=1)  # number of model replicas (HSDP), usually one per node or a few
    shard: int = -1  # ranks that each replica is sharded over; -1: processes / replicate
    expert: int = Field(1, ge=1)  # ranks that share the experts; must divide shard and the number of experts
    # How tokens reach experts on other ranks in training. all_to_all: each token is sent to the ranks that hold any of
    # its experts. gather: all tokens are gathered; the host waits for no counts, but every rank needs the same number
    # of rows. auto: gather, within a node, if that receives at most 1.5 times as many tokens. Evaluation and generation
    # always use all_to_all.
    exchange_tokens: Literal["auto", "gather", "all_to_all"] = "auto"
    recompute: Literal["none", "full", "selective"] = "none"  # activations to recompute in backward
    recompute_save: list[str] | None = None  # selective: operators whose results are kept; None: attention, matmuls
    compile: bool | Literal["auto"] = "auto"  # torch.compile each block; auto: on GPUs
    reshard_after_forward: bool = True  # free a block's weights after forward, and gather them again in backward
    # Reduce gradients over ranks once per step. False: after each microbatch, with more traffic but less memory. auto:
    # once, if unsharded gradients fit and the plan of --dry-run expects a shorter step.
    reduce_once_a_step: bool | Literal["auto"] = "auto"
    # In a single process, and for experts that are whole on a rank: accumulate gradients over microbatches in fp32 (4
    # bytes per parameter), or in bf16 with stochastic rounding (2 bytes).
    sum_gradients_in: Literal["fp32", "bf16"] = "fp32"
    # How stacked experts are gathered and their gradients reduced. packed: in FSDP's buffers, with the block's other
    # weights. direct: without them, in fewer copies, by NCCL. auto: as direct, but by the GPUs' copy engines, which
    # leave the SMs to matrix products, if the GPUs of a node can access each other's memory and weights are kept in
    # bfloat16; with cpu_offload, packed.
    gather_experts: Literal["auto", "packed", "direct"] = "auto"
    prefetch: int = Field(1, ge=0)  # number of blocks whose weights are gathered in advance
    cpu_offload: bool = False  # keep weights, gradients and optimizer state in host memory

    @field_validator("shard")
    @classmethod
    def _shard_is_a_degree(cls, shard: int) -> int:
        if shard != -1 and shard < 1:
            raise ValueError(f"shard={shard} is not a number of ranks; write 1 or more, or -1 (processes / replicate)")
        return shard

    @model_validator(mode="after")
    def _saves_what_is_recomputed(self) -> Self:
        if self.recompute_save is not None and self.recompute != "selective":
            raise ValueError(f"recompute_save is for recompute: selective, not {self.recompute}; leave one out")
        return self


class Degrees(NamedTuple):
    """The number of ranks on each axis."""

    replicate: int
    shard: int
    expert: int

    @property
    def expert_shard(self) -> int:
        """The number of ranks that one expert's weights are sharded over."""
        return self.shard // self.expert


def single_process(config: ParallelConfig, degrees: Degrees) -> bool:
    """Return whether training needs no FSDP: there is one process, and nothing is offloaded."""
    return degrees == (1, 1, 1) and not config.cpu_offload


def plan_mesh(config: ParallelConfig, world: int, n_experts: int) -> Degrees:
    """Compute the degrees of a run.

    Args:
        config: `parallel` in the YAML.
        world: number of processes.
        n_experts: per mixture layer; 0 for a dense model.

    Raises:
        ConfigError: if the degrees do not fit the processes or the experts.
    """
    replicate, expert = config.replicate, config.expert
    shard = config.shard
    if shard == -1:
        if world % replicate:
            raise ConfigError(f"parallel.replicate={replicate} does not divide the {world} processes; change one")
        shard = world // replicate
    if replicate * shard != world:
        raise ConfigError(
            f"parallel.replicate={replicate} x parallel.shard={shard} is {replicate * shard}, but there are "
            f"{world} processes; set shard: -1, or start {replicate * shard} processes"
        )
    if shard < expert:
        raise ConfigError(
            f"parallel.expert={expert} needs at least {expert * replicate} processes, this run has {world}; start them "
            f"by torchrun --nproc-per-node {expert * replicate}, or set parallel.expert={shard}"
        )
    if shard % expert:
        raise ConfigError(f"parallel.expert={expert} does not divide parallel.shard={shard}; lower it to a divisor")
    if expert > 1 and n_experts == 0:
        raise ConfigError(
            f"parallel.expert={expert} needs a mixture of experts, and the model is dense or a module of transformers; "
            "set expert: 1"
        )
    if expert > 1 and n_experts % expert:
        raise ConfigError(
            f"parallel.expert={expert} does not divide model.ffn_config.moe_num_experts={n_experts}; "
            "lower it to a divisor"
        )
    return Degrees(replicate, shard, expert)


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, as FSDP and the experts use them. Without a process group there are no axes.

    Attributes:
        degrees: number of ranks on each axis.
        dense: (fsdp,) or (dp_replicate, fsdp), for everything but experts; None in one process without a group.
        sparse: (efsdp, ep) or (dp_replicate, efsdp, ep), for experts; None with `expert: 1`, which shards them like
            other parameters.
        data_rank: index of this rank's slice of the global batch.
        data_ranks: number of slices of the global batch.
    """

    degrees: Degrees
    dense: DeviceMesh | None
    sparse: DeviceMesh | None
    data_rank: int
    data_ranks: int

    @property
    def experts(self) -> DeviceMesh | None:
        """The axis that experts are divided over, (ep,)."""
        return None if self.sparse is None else self.sparse[EXPERT]

    @property
    def expert_shards(self) -> DeviceMesh | None:
        """The mesh that FSDP shards expert weights over: (efsdp,) or (dp_replicate, efsdp)."""
        if self.sparse is None:
            return None
        if self.degrees.replicate > 1:
            return self.sparse[REPLICATE, EXPERT_SHARD]
        return self.sparse[EXPERT_SHARD]

    @property
    def expert_group(self) -> ProcessGroup | None:
        """The ranks that exchange tokens."""
        return None if self.experts is None else self.experts.get_group()


def settled_exchange(config: ParallelConfig, rows: int, ranks: int) -> ParallelConfig:
    """Return the config, with all_to_all instead of gather if ranks have different numbers of rows.

    Args:
        config: `parallel` in the YAML.
        rows: number of rows in the global batch.
        ranks: number of ranks that share it.

    Raises:
        ConfigError: if a gather is requested explicitly in that case.
    """
    if config.expert == 1 or rows % ranks == 0:
        return config
    if config.exchange_tokens == "gather":
        raise ConfigError(
            f"parallel.exchange_tokens=gather needs as many rows on every rank, and global_train_batch_size={rows} is "
            f"not a multiple of the {ranks} ranks; change it, or write parallel.exchange_tokens=auto"
        )
    return config.model_copy(update={"exchange_tokens": "all_to_all"})


def build_mesh(config: ParallelConfig, device_type: str, n_experts: int) -> Mesh:
    """Arrange the running processes in a mesh; call this after `runtime.start`, before the model is built.

    Args:
        config: `parallel` in the YAML.
        device_type: "cuda" or "cpu".
        n_experts: per mixture layer; 0 for a dense model.

    Raises:
        ConfigError: if the degrees do not fit the processes or the model.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    degrees = plan_mesh(config, world, n_experts)
    if not dist.is_initialized():
        return Mesh(degrees, None, None, 0, 1)
    replicate, shard, expert = degrees
    replicas, axis = ((replicate,), (REPLICATE,)) if replicate > 1 else ((), ())
    # An axis of one rank stays in the mesh: with replicas, FSDP over it provides the mixed precision.
    dense = init_device_mesh(device_type, (*replicas, shard), mesh_dim_names=(*axis, SHARD))
    sparse = None
    if expert > 1:
        sizes = (*replicas, degrees.expert_shard, expert)
        sparse = init_device_mesh(device_type, sizes, mesh_dim_names=(*axis, EXPERT_SHARD, EXPERT))
    for mesh in (dense, sparse):
        if mesh is not None and dist.get_backend() != "fake":
            _warm_up(mesh)
    return Mesh(degrees, dense, sparse, dist.get_rank(), world)


def _warm_up(mesh: DeviceMesh) -> None:
    """Run one small all-reduce on every axis, in the same order on all ranks.

    NCCL connects a group at its first use. In the middle of a step, where ranks reach groups in different orders, a bad
    link would look like a hang; here it is an error that names the axis.
    """
    for axis in mesh.mesh_dim_names or ():
        group = mesh.get_group(axis)
        total = torch.ones((), device=runtime.device() if mesh.device_type == "cuda" else "cpu")
        runtime.all_reduce_sum(total, group)
        if int(total) != group.size():
            raise RuntimeError(f"mesh axis {axis}: {group.size()} ranks summed to {int(total)}")
