"""The order in which a model is spread, stated once: experts > recompute > compile > shards or casts > weights.

Experts first, because FSDP splits what is left of them; recompute inside compile, which then plans what to keep
in one graph; shards last, around all of it. A block is no one graph where the host reads how many tokens go where: with
experts divided among ranks, or where the backend of the experts does. Then its parts are compiled, inside recompute.
"""

from __future__ import annotations

from json import dumps

import torch
import torch._dynamo

from llmfoundry import runtime
from llmfoundry.config import dump
from llmfoundry.kernels.experts import reads_on_host
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import Block, CausalLM, CausalLMConfig
from llmfoundry.moe.layer import MoE
from llmfoundry.parallel.expert import divide_experts, mixtures
from llmfoundry.parallel.fsdp import shard
from llmfoundry.parallel.mesh import Mesh, ParallelConfig, single_process
from llmfoundry.parallel.recompute import recompute_blocks
from llmfoundry.parallel.single import compute_in

GRAPHS_PER_KIND = 8  # torch's limit for one kind: training and evaluation, each with and without dynamic sizes


def parallelize(model: CausalLM, mesh: Mesh, config: ParallelConfig, precision: str) -> CausalLM:
    """Spread a model over the ranks of `mesh`; in one process, only recompute, compile and cast.

    Args:
        model: built on the meta device.
        precision: "fp32" or "amp_bf16".

    Returns:
        The same model, still on the meta device; `materialize` gives it storage.
    """
    divide_experts(model, mesh)
    compiled = config.compile is True or (config.compile == "auto" and runtime.device().type == "cuda")
    one_graph = compiled and mesh.experts is None and not _reads_on_host(model, precision)
    by_itself = single_process(config, mesh.degrees)
    casts = precision == "amp_bf16" and by_itself
    if compiled:
        _allow_graphs(model.config)
    if compiled and not one_graph:
        compile_parts(model)
    if casts and not one_graph:  # inside of what is computed again
        for block in model.blocks:
            compute_in(block, torch.bfloat16)
    recompute_blocks(model.blocks, config.recompute, config.recompute_save, in_graph=one_graph)
    if one_graph:
        for block in model.blocks:  # blocks of one kind share the code
            block.forward = torch.compile(block.forward)
            if casts:  # around the graph, whose inputs the weights are
                compute_in(block, torch.bfloat16)
    if casts:
        compute_in(model, torch.bfloat16, without=list(model.blocks))
    if not by_itself:
        shard(model, mesh, config, precision)
    return model


def _allow_graphs(config: CausalLMConfig) -> None:
    """Let torch compile a graph for each kind of block, and several for its modes and shapes.

    All blocks share one code object, which torch compiles 8 times and then runs uncompiled. A pattern of windows, dense
    first layers or a mixture in every n-th layer make more kinds than that.
    """
    kinds = {(config.window(layer), dumps(dump(config.ffn(layer)))) for layer in range(config.n_layers)}
    limit = GRAPHS_PER_KIND * len(kinds)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, GRAPHS_PER_KIND * limit
    )


def _reads_on_host(model: CausalLM, precision: str) -> bool:
    dtype = torch.bfloat16 if precision == "amp_bf16" else next(model.parameters()).dtype
    device = runtime.device()
    return any(reads_on_host(mixture.experts.backend(device, dtype), device) for mixture in mixtures(model))


def compile_parts(model: CausalLM) -> None:
    """Compile what stands around mixtures: attention, norms, shared experts, dense blocks.

    A mixture itself stays eager, all that it calls included: traced, its autograd nodes would become one, and the order
    in which the exchange, the weights' gradients and FSDP's hooks follow each other would be lost. So does its router,
    whose choice recompute has to see.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        mixture = block.ffn
        if isinstance(mixture, MoE):
            if mixture.shared_expert is not None:
                shared = mixture.shared_expert
                shared.forward = torch.compile(shared.forward)  # type: ignore[method-assign]
            mixture.forward = torch.compiler.disable(mixture.forward)  # type: ignore[method-assign]
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def materialize(model: CausalLM, config: ParallelConfig, seed: int) -> CausalLM:
    """Give a model on the meta device its storage, and its initial weights.

    With `cpu_offload` parameters live in host memory; buffers go to the device in any case.
    """
    place = runtime.device()
    model.to_empty(device="cpu" if config.cpu_offload else place)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(place))
    init_weights(model, seed)
    return model
