"""The order in which parallelism is applied, stated once: experts > recompute > compile > shards or casts > weights.

Experts come first, because FSDP shards each rank's part of them. Recomputation goes inside compile, which can then
choose what to keep within one graph. Sharding comes last, around everything. A block is not a single graph if the host
reads token counts (when experts are divided among ranks, or when the expert backend does so), or if 4-bit codes are
gathered from ranks. Then its parts are compiled instead, inside recomputation.
"""

from __future__ import annotations

import torch
from torch import nn

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.kernels.experts import reads_on_host
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM
from llmfoundry.parallel.compile import compile_blocks, compile_parts
from llmfoundry.parallel.e4m3 import use_e4m3
from llmfoundry.parallel.expert import divide_experts, mixtures
from llmfoundry.parallel.frozen import divide_frozen
from llmfoundry.parallel.fsdp import has_half_weights, keeps_experts_whole, shard
from llmfoundry.parallel.mesh import Mesh, ParallelConfig, single_process
from llmfoundry.parallel.recompute import recompute_blocks
from llmfoundry.parallel.single import compute_in, sum_gradients_in

_COMPUTE = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp8": torch.bfloat16}


def parallelize(model: CausalLM, mesh: Mesh, config: ParallelConfig, precision: str) -> CausalLM:
    """Distribute a model over the ranks of `mesh`; in a single process, only recompute, compile and cast.

    Args:
        model: built on the meta device.
        mesh: from `build_mesh`.
        config: `parallel` in the YAML.
        precision: the compute precision, see `RunConfig.precision`; weights keep their dtype.

    Returns:
        The same model, still on the meta device; `materialize` allocates its storage.
    """
    _check_quantized(model, config)
    compute = _COMPUTE[precision]
    if compute == torch.bfloat16 and model.config.lora is not None:
        _keep_frozen_in(torch.bfloat16, model)
    if precision == "amp_fp8":
        use_e4m3(model.blocks)
    divide_experts(model, mesh, config)
    shared = divide_frozen(model, mesh)
    compiled = config.compile is True or (config.compile == "auto" and runtime.device().type == "cuda")
    if config.compile is True and not model.own_blocks:
        raise ConfigError("parallel.compile: modules of transformers are not compiled; leave it out")
    compiled = compiled and model.own_blocks
    one_graph = compiled and mesh.experts is None and not shared and not _reads_on_host(model, precision)
    by_itself = single_process(config, mesh.degrees)
    casts = by_itself and (compute == torch.bfloat16 or has_half_weights(model))
    whole = keeps_experts_whole(model, mesh, config)
    if whole:
        experts = [mixture.experts for mixture in mixtures(model)]
        for each in experts:
            compute_in(each, compute)
        sum_gradients_in(model, compute, config.sum_gradients_in, experts)
    if compiled and not one_graph:
        compile_parts(model)
    if casts and not one_graph:  # inside of recomputation
        for block in model.blocks:
            compute_in(block, compute)
    recompute_blocks(model.blocks, config.recompute, config.recompute_save, in_graph=one_graph)
    if one_graph:
        compile_blocks(model)
    if casts and one_graph:  # around the graph, whose inputs the weights are
        for block in model.blocks:
            compute_in(block, compute)
    if casts:
        compute_in(model, compute, without=list(model.blocks))
        sum_gradients_in(model, compute, config.sum_gradients_in, [model])
    if config.sum_gradients_in == "bf16" and not ((by_itself or whole) and compute == torch.bfloat16):
        raise ConfigError(
            "parallel.sum_gradients_in=bf16 is for precision: amp_bf16 or amp_fp8 in a single process, or with experts "
            "that are whole on their rank (parallel.expert = shard); leave it out otherwise"
        )
    if not by_itself:
        shard(model, mesh, config, compute)
    return model


def keep_weights_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Convert all trainable weights to a dtype; buffers and frozen weights keep theirs."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _keep_frozen_in(dtype: torch.dtype, model: CausalLM) -> None:
    """Convert frozen weights to the compute dtype, to which every use would cast them anyway."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _check_quantized(model: CausalLM, config: ParallelConfig) -> None:
    lora = model.config.lora
    if lora is not None and lora.quantize is not None and config.recompute == "none":
        raise ConfigError(
            f"model.lora.quantize={lora.quantize} needs parallel.recompute: full, or backward would find every weight "
            "unpacked"
        )


def _reads_on_host(model: CausalLM, precision: str) -> bool:
    plain = precision == "fp32" and not has_half_weights(model)
    dtype = next(model.parameters()).dtype if plain else _COMPUTE[precision]
    device = runtime.device()
    return any(reads_on_host(mixture.experts.backend(device, dtype), device) for mixture in mixtures(model))


def materialize(model: CausalLM, config: ParallelConfig, seed: int, *, loaded: bool = False) -> CausalLM:
    """Allocate the storage of a model on the meta device, and initialize it.

    With `cpu_offload`, parameters are in host memory; buffers always go to the device.

    Args:
        model: from `parallelize`.
        config: `parallel` in the YAML.
        seed: the run's seed.
        loaded: skip the initialization of the blocks' weights, because all of them are loaded next.
    """
    place = runtime.device()
    model.to_empty(device="cpu" if config.cpu_offload else place)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(place))
    model.init_buffers()
    init_weights(model, seed, blocks=not loaded)
    return model
