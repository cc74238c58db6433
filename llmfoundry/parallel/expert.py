"""Divides experts among ranks.

Each rank of the `ep` axis keeps E / ep whole experts: their stacked weights become DTensors sharded in dim 0, and the
mixture is told which ranks to exchange tokens with, and how. The exchange itself is in moe/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from llmfoundry import runtime
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.all_gather import gathers
from llmfoundry.moe.layer import MoE, MoEConfig
from llmfoundry.parallel.mesh import Mesh, ParallelConfig


def mixtures(model: nn.Module) -> Iterator[MoE]:
    """Return the mixture layers of a model, in order."""
    return (module for module in model.modules() if isinstance(module, MoE))


def n_experts(model: CausalLMConfig) -> int:
    """Return the number of experts per mixture layer; 0 for a dense model."""
    blocks = (model.ffn(layer) for layer in range(model.n_layers))
    return next((block.moe_num_experts for block in blocks if isinstance(block, MoEConfig)), 0)


def divide_experts(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> None:
    """Give each rank of the `ep` axis its experts; a no-op without that axis.

    Args:
        model: on the meta device, so that each rank keeps the shape of its own part, and no weights are sent.
        mesh: with the `ep` axis, if there is one.
        config: how tokens are exchanged.
    """
    if mesh.experts is None:
        return
    ranks = mesh.degrees.expert
    # Adjacent ranks are on one node if the node's size is a multiple of `ranks`; check the smallest node.
    within_node = -runtime.most_of_ranks([-runtime.local_world_size()])[0] % ranks == 0
    for mixture in mixtures(model):
        mixture.gathers = gathers(config.exchange_tokens, ranks, mixture.router.config.moe_top_k, within_node)
        experts = mixture.experts
        for name, whole in list(experts.named_parameters(recurse=False)):
            part = distribute_tensor(whole.detach(), mesh.experts, [Shard(0)])
            experts.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))
        mixture.expert_group = mesh.expert_group
