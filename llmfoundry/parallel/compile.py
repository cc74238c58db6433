"""Compiled blocks: one function for each kind of block, so that every kind has its own recompile limit.

torch.compile stores graphs by code object and runs a function eagerly after eight of them. All blocks share the code
of `Block.forward`, and each kind of block needs several graphs: with and without gradient, in training and evaluation,
for batches of a fixed and of any size, of one row or token, with and without a mask. So each kind gets a copy of the
code and a limit that no combination of these reaches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from llmfoundry.layers.graphs import with_own_code
from llmfoundry.model.transformer import Block, BlockOutput, CausalLM
from llmfoundry.moe.layer import MoE

LIMIT = 32  # maximum number of graphs of one kind of block
P = ParamSpec("P")
R = TypeVar("R")


def compile_blocks(model: CausalLM) -> None:
    """Compile each block as one graph, including recomputation; blocks of the same kind share their graphs."""
    runs: dict[object, Callable[..., BlockOutput]] = {}
    for kind, block in _kinds(model):
        if kind not in runs:
            runs[kind] = torch.compile(with_own_code(_run, f"block_kind_{len(runs)}"))
        block.forward = _dispatch(block.forward, functools.partial(runs[kind], block.forward))  # type: ignore[method-assign]


def compile_parts(model: CausalLM) -> None:
    """Compile what surrounds the mixtures: attention, norms, shared experts, dense blocks.

    A mixture and everything that it calls stay eager. If traced, its autograd nodes would be merged into one, which
    would lose the order of the exchange, the weight gradients and FSDP's hooks. The router stays eager too, because
    recomputation must intercept its choice.
    """
    copies: dict[object, Callable[..., BlockOutput]] = {}
    for kind, block in _kinds(model):
        mixture = block.ffn
        if isinstance(mixture, MoE):
            if mixture.shared_expert is not None:
                shared = mixture.shared_expert
                shared.forward = torch.compile(shared.forward)  # type: ignore[method-assign]
            mixture.forward = torch.compiler.disable(mixture.forward)  # type: ignore[method-assign]
        # A graph break at the mixture makes the code of `Block.forward` count towards the limit, not that of a caller.
        copy = copies.setdefault(kind, with_own_code(Block.forward, f"block_kind_{len(copies)}"))
        block.forward = _dispatch(block.forward, torch.compile(MethodType(copy, block)))  # type: ignore[method-assign]


def _kinds(model: CausalLM) -> list[tuple[object, Block]]:
    """Return each block with its kind: all that a graph may depend on, except tensor values and input sizes."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # `_dispatch` reports the error
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    found: list[tuple[object, Block]] = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        modules = tuple((name, type(module), _constants(module)) for name, module in block.named_modules())
        tensors = tuple((name, value.shape, value.requires_grad) for name, value in block.named_parameters())
        found.append(((model.config.window(layer), modules, tensors), block))
    return found


def _constants(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """Return the plain attributes of a module, which a graph treats as constants."""
    plain = (bool, int, float, str)
    return tuple((name, value) for name, value in sorted(vars(module).items()) if isinstance(value, plain))


def _run(forward: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    return forward(*args, **kwargs)


def _dispatch(eager: Callable[..., BlockOutput], compiled: Callable[..., BlockOutput]) -> Callable[..., BlockOutput]:
    """Return a block's forward that is compiled except in generation, where the cache length changes every token."""

    def forward(*args: object) -> BlockOutput:
        if args[-1] is not None:  # the cache
            return eager(*args)
        try:
            return compiled(*args)
        except FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "parallel.compile: torch needs more graphs for one kind of block than its limit of "
                f"{torch._dynamo.config.recompile_limit}; TORCH_LOGS=recompiles says why; set parallel.compile: false"
            ) from error

    return forward
