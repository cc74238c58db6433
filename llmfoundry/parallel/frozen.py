"""Divides frozen 4-bit weights among ranks: experts by expert parallelism, codes like FSDP shards.

FSDP shards parameters, in the dtype that they compute in. Codes are buffers, so each weight shards and gathers its own
(layers/nf4.py), at 4.5 bits per value.
"""

from __future__ import annotations

from llmfoundry.config import ConfigError
from llmfoundry.layers.nf4 import NF4Weight
from llmfoundry.model.transformer import CausalLM
from llmfoundry.parallel.expert import mixtures
from llmfoundry.parallel.mesh import EXPERT_SHARD, SHARD, Mesh


def divide_frozen(model: CausalLM, mesh: Mesh) -> bool:
    """Give each rank its part of the NF4 weights; on the meta device.

    Returns:
        Whether any weight is shared by several ranks.

    Raises:
        ConfigError: if an expert's weight is not a multiple of 64 values.
    """
    frozen = [module for module in model.modules() if isinstance(module, NF4Weight)]
    if mesh.dense is None or not frozen:
        return False
    over = dict.fromkeys(frozen, mesh.dense[SHARD].get_group())
    if mesh.sparse is not None and mesh.expert_group is not None:
        for mixture in mixtures(model):
            for weight in (each for each in mixture.experts.children() if isinstance(each, NF4Weight)):
                over[weight] = mesh.sparse[EXPERT_SHARD].get_group()
                try:
                    weight.keep_part(mesh.expert_group)
                except ValueError as error:
                    raise ConfigError(f"model.lora.quantize=nf4: experts of {error}; lower parallel.expert") from None
    shared = {weight: group for weight, group in over.items() if group.size() > 1}
    for weight, group in shared.items():
        weight.share(group)
    return bool(shared)
