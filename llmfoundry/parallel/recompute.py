"""Recompute of activations: a block's forward runs again in backward, so little is kept of the first time.

What is kept is a list of operators. `full` keeps a block's input and the router's choice; `selective` also
what is dear to compute and small: attention and the dense products. The router's choice is always kept, so
that a token cannot go to other experts the second time. Statistics are returned by a block, not stored by it,
so what the second forward returns counts nowhere.
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

ATTENTION = (  # those that can drop
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
    """The operators called `namespace.name` in `torch.ops`, all overloads but those that write in place.

    Raises:
        ConfigError: there is no such operator.
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
        else:  # `out` writes into its argument: there is no result to keep
            found += [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
    return found


class _Keep(TorchDispatchMode):
    """The first forward: results of some operators are put aside."""

    def __init__(self, kept: dict[object, list[object]]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts may run below this mode; it sees nothing of them."""
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
            # Detached: autograd writes the graph into `result` itself, which would then hold itself alive.
            self.kept[func].append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Replay(_Keep):
    """The forward in backward: each of those operators returns what it did, in the same order.

    torch's own pair asks every other operator, too, to run equally often, which FSDP's inside a block do not: what is
    gathered already is not gathered again.
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
    """Make each block's forward one that is computed again in backward.

    Only `forward` is replaced: no wrapper changes the names of parameters.

    Args:
        mode: what is kept.
        save: operators kept in place of `DEAR`, for `selective`.
        in_graph: whether the blocks are compiled around this, each as one graph.
    """
    if mode == "none":
        return
    names = [*CHOICE, *((DEAR if save is None else save) if mode == "selective" else ())]
    contexts = create_selective_checkpoint_contexts if in_graph else _contexts
    for block in blocks:
        # Only dropout draws from torch's generators, whose state is kept then: the second time drops the same.
        # Attention that drops has to run again too, or what drops after it would find the generator where it began.
        # In a graph it is kept instead: to run it again, torch gives it generators that no seed reaches.
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
