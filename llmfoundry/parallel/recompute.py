"""Activation recomputation: a block's forward runs again in backward, so that few activations are kept.

What is kept is a list of operators' results. `full` keeps a block's input and the router's choice; `selective` also
keeps results that are expensive to compute and small: attention and dense matrix products. The router's choice is
always kept, so that a token cannot go to other experts the second time. A block returns its statistics instead of
storing them, so those of the second forward are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import llmfoundry.kernels.scaled_linear  # noqa: F401  registers an operator of DEAR
from llmfoundry.config import ConfigError
from llmfoundry.kernels.top_k import CHOICE

ATTENTION = (  # these support dropout
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
)
DEAR = (
    *ATTENTION,
    "aten.addmm",
    "aten.mm",
    "higher_order.flex_attention",
    "llmfoundry.frozen_linear_plus",
    "llmfoundry.scaled_linear",
)


def operators(names: Sequence[str]) -> list[object]:
    """Return the operators called `namespace.name` in `torch.ops`, in all overloads except out variants.

    Raises:
        ConfigError: if there is no such operator.
    """
    found: list[object] = []
    for name in names:
        space, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, space), operator, None) if operator else None
        if packet is None:
            raise ConfigError(
                f"parallel.recompute_save: torch.ops has no operator {name!r}; write it as namespace.name, "
                "such as aten.mm"
            )
        if isinstance(packet, torch._ops.HigherOrderOperator):
            found.append(packet)
        else:  # out variants have no result to keep
            found += [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
    return found


class _Keep(TorchDispatchMode):
    """Dispatch mode of the first forward: stores the results of some operators."""

    def __init__(self, kept: dict[object, list[object]]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Allow compiled code under this mode, which does not intercept its operators."""
        return True

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func in self.kept:
            # Detached: autograd sets the grad_fn of `result` itself, which would then keep itself alive.
            self.kept[func].append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Replay(_Keep):
    """Dispatch mode of the second forward: those operators return their stored results, in the same order.

    PyTorch's own pair also requires all other operators to run equally often. FSDP's operators inside a block do not:
    what is already gathered is not gathered again.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        return self.kept[func].pop(0) if func in self.kept else func(*args, **(kwargs or {}))


def _contexts(kept: list[object]) -> tuple[_Keep, _Replay]:
    store: dict[object, list[object]] = {operator: [] for operator in kept}
    return _Keep(store), _Replay(store)


def recompute_blocks(
    blocks: nn.ModuleList,
    mode: Literal["none", "full", "selective"],
    save: list[str] | None,
    *,
    in_graph: bool,
) -> None:
    """Make the forward of each block recompute its activations in backward.

    Only `forward` is replaced, so there is no wrapper that changes parameter names.

    Args:
        blocks: the model's blocks.
        mode: what is kept.
        save: operators to keep instead of `DEAR`, for `selective`.
        in_graph: whether each block is compiled around this, as one graph.
    """
    if mode == "none":
        return
    names = [*CHOICE, *((DEAR if save is None else save) if mode == "selective" else ())]
    contexts = create_selective_checkpoint_contexts if in_graph else _contexts
    for block in blocks:
        # Only dropout uses PyTorch's generators, whose state is then saved, so that the second forward drops the same.
        # Attention with dropout must run again too; otherwise later dropout would see another generator state. In a
        # graph, attention is kept instead: on recomputation, PyTorch gives it generators that ignore the seed.
        drops = bool(getattr(getattr(block, "attn", None), "dropout", 0))
        if drops and in_graph:
            kept = operators(list(dict.fromkeys([*names, *ATTENTION])))
        else:
            kept = operators([name for name in names if not drops or name not in ATTENTION])
        draws = any(getattr(module, name, 0) for module in block.modules() for name in ("dropout", "lora_dropout"))
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=draws,
            context_fn=functools.partial(contexts, kept),
        )
