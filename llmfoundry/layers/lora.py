"""Low-rank adapters (LoRA): what is trained in place of a frozen weight W is B A, of rank r, added to it.

Shapes: D in, N out, r rank, E experts.
The adapter runs beside the weight: y = W x + s B (A x). Those of stacked experts do so inside the experts' kernels
(kernels/low_rank.py).

The adapters are parameters beside their weight (`wqkv.lora_A`, `experts.w1_lora_A`), so no name of the base model
changes, and whatever reads or writes base weights by name needs to know nothing of them. A module that can adapt
stacked parameters has empty slots of those names and `set_adapters`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from llmfoundry.config import Config

_SIDES = ("lora_A", "lora_B")


class LoRAConfig(Config):
    """`lora` in the model's block of the YAML, in peft's words.

    It stands there, not beside the optimizer, because adapters are parameters: they are built, counted, sharded, drawn
    and saved with the model, and a checkpoint's config has to say that they are there. Which weights are trained
    follows from it alone. Source: Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)  # the adapter is scaled by alpha / rank
    dropout: float = Field(default=0.0, ge=0, le=0)  # none: it cannot be had for an expert's effective weight
    # Ends of our names (wqkv, out_proj, ffn.w1, experts.w2, ...); all-linear: every linear layer of the blocks and the
    # experts, but not the router, the embedding and the head.
    target_modules: Literal["all-linear"] | list[str] = "all-linear"

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError("target_modules is empty: nothing would be trained; name some, or write all-linear")
        return targets

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class Adapter(NamedTuple):
    """The adapter of one weight."""

    name: str  # of the weight in the model, without `.weight`
    a: nn.Parameter  # (r, D), or (E, r, D)
    b: nn.Parameter  # (N, r), or (E, N, r)


class _Stacked(Protocol):
    """A module that can adapt stacked parameters."""

    def set_adapters(self, scale: float, dropout: float) -> None: ...


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. It takes over the parameters of the layer that it replaces."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate and draw a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_scale = config.scale
        self.lora_A = nn.Parameter(self.weight.new_zeros(config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, config.rank))

    def forward(self, input: Tensor) -> Tensor:
        """`W x + b + s B (A x)`."""
        return super().forward(input) + self.lora_scale * F.linear(F.linear(input, self.lora_A), self.lora_B)


def effective_weight(linear: nn.Linear) -> Tensor:
    """The weight (N, D) that a linear layer amounts to, its adapter included."""
    if not isinstance(linear, LoRALinear):
        return linear.weight
    return adapted(linear.weight, linear.lora_A, linear.lora_B, linear.lora_scale)


def adapted(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """`W + s B A` in the dtype of the weight.

    Args:
        weight: (N, D), or (E, N, D) of experts.
        a: (r, D), or (E, r, D); None where there is no adapter.
        b: (N, r), or (E, N, r).
    """
    if a is None or b is None:
        return weight
    return (torch.addmm if weight.dim() == 2 else torch.baddbmm)(weight, b, a, alpha=scale)


def add_adapters(model: nn.Module, blocks: nn.Module, config: LoRAConfig) -> None:
    """Give the targets in `blocks` their adapters, and freeze all other parameters of `model`, in place.

    B is zero, so nothing has changed yet; A is zero too until initial weights are drawn.

    Raises:
        ValueError: a target matches nothing.
    """
    targets = list(_targets(blocks))
    wanted = config.target_modules
    if wanted != "all-linear":
        missing = [target for target in wanted if not any(_matches(name, target) for name, _ in targets)]
        if missing:
            known = sorted({".".join(name.split(".")[2:]) for name, _ in targets})
            raise ValueError(f"target_modules: nothing is called {missing[0]!r}; known: {', '.join(known)}")
        targets = [found for found in targets if any(_matches(found[0], target) for target in wanted)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in targets:
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), leaf, LoRALinear(module, config))
            continue
        weight = cast(Tensor, getattr(module, leaf))  # (E, N, D)
        for side, (rows, columns) in zip(_SIDES, ((config.rank, weight.shape[2]), (weight.shape[1], config.rank)),
                                         strict=True):  # fmt: skip
            module.register_parameter(f"{leaf}_{side}", nn.Parameter(weight.new_zeros(weight.shape[0], rows, columns)))
        cast(_Stacked, module).set_adapters(config.scale, config.dropout)


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """The adapters of a model, in the order of its parameters."""
    named = dict(model.named_parameters())
    for name, a in named.items():
        if name.endswith(_SIDES[0]):
            yield Adapter(name[: -len(_SIDES[0]) - 1], a, named[name[: -len(_SIDES[0])] + _SIDES[1]])


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return name.endswith(_SIDES)


def _targets(blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name in the model, module that has it) of all that can have an adapter."""
    for path, module in blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            yield path, module
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and hasattr(module, f"{leaf}_{_SIDES[0]}"):
                yield f"{path}.{leaf}", module


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
