"""Low-rank adapters (LoRA): a trained product B A of rank r is added to a frozen weight W.

Shapes: D in, N out, r rank, E experts.
The adapter runs beside the weight: y = W x + s B (A x). For stacked experts, this happens inside the expert kernels
(kernels/low_rank.py).

The adapters are parameters beside their weight (`wqkv.lora_A`, `experts.w1_lora_A`), so that the names of the base
model do not change, and code that reads or writes base weights by name can ignore them. A module with adaptable stacked
parameters has empty slots of those names, and a `set_adapters` method.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from llmfoundry.config import Config
from llmfoundry.kernels.low_rank import frozen_linear_plus, rounds_once
from llmfoundry.layers.nf4 import NF4Weight, fits

_SIDES = ("lora_A", "lora_B")
# PEFT's target_modules, by llmfoundry weight. Each group of Hugging Face names forms one llmfoundry weight.
_THEIRS: dict[str, tuple[tuple[str, ...], ...]] = {
    "wqkv": (("q_proj", "k_proj", "v_proj"),),
    "out_proj": (("o_proj",),),
    "w1": (("gate_proj", "up_proj"), ("gate_up_proj",)),
    "w2": (("down_proj",),),
    "wq": (("q_proj",),),
    "wq_a": (("q_a_proj",),),
    "wq_b": (("q_b_proj",),),
    "wkv_a": (("kv_a_proj_with_mqa",),),
    "wkv_b": (("kv_b_proj",),),
}


class LoRAConfig(Config):
    """LoRA adapters: `lora` in the YAML's `model`; PEFT's names (r, lora_alpha, lora_dropout) are accepted.

    This belongs to the model, not to the optimizer, because adapters are parameters: they are built, counted, sharded,
    initialized and saved with the model, and a checkpoint's config must include them. It alone determines which weights
    are trained. Source: Hu et al. 2021, arXiv:2106.09685.
    """

    ALIASES: ClassVar[dict[str, str]] = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}

    rank: int = Field(ge=1)  # rank of A and B
    alpha: float = Field(gt=0)  # the adapter is scaled by alpha / rank
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead: Kalajdzievski 2023, arXiv:2312.03732
    # Dropout of the adapter's input in training. The Triton kernels do not support it for adapters of experts:
    # moe_impl: auto then uses grouped_mm.
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # nf4: keep the frozen weights of the blocks' linear layers and experts in 4 bits (QLoRA). They are quantized while
    # load_path is read, and dequantized in each layer's forward. Needs parallel.recompute.
    quantize: Literal["nf4"] | None = None
    # A list of name suffixes: llmfoundry's (wqkv, out_proj, ffn.w1, experts.w2, ...) or Hugging Face's (q_proj, k_proj,
    # v_proj, ...), which must include all parts of a fused weight. A string: a regular expression for whole names, such
    # as blocks\.[0-3]\.attn\..*; or all-linear: every linear layer of the blocks and the experts, except the router,
    # the embedding and the head.
    target_modules: str | list[str] = "all-linear"

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError("target_modules is empty: nothing would be trained; name some, or write all-linear")
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"target_modules: {targets!r} is not a valid pattern: {error}") from None
        return targets

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


class Adapter(NamedTuple):
    """The adapter of one weight."""

    name: str  # of the weight in the model, without `.weight`
    a: nn.Parameter  # (r, D), or (E, r, D)
    b: nn.Parameter  # (N, r), or (E, N, r)


class _Stacked(Protocol):
    """A module whose stacked parameters can have adapters."""

    def set_adapters(self, scale: float, dropout: float) -> None: ...


class _Switched(Protocol):
    """A module whose adapters can be turned off."""

    lora_off: bool


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is kept in NF4. It takes over the bias of the layer that it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate and initialize a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.frozen, self.bias = NF4Weight(linear.weight), linear.bias
        self.register_parameter("weight", None)

    def forward(self, input: Tensor) -> Tensor:
        """Compute `W x + b`."""
        return F.linear(input, self.frozen(input.dtype), self.bias)


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. It takes over the parameters of the layer that it replaces."""

    frozen: NF4Weight | None  # replaces the weight

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate and initialize a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_scale, self.lora_dropout, self.lora_off = config.scale, config.dropout, False
        self.frozen = None
        self.lora_A = nn.Parameter(self.weight.new_zeros(config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, config.rank))

    def forward(self, input: Tensor) -> Tensor:
        """Compute `W x + b + s B (A x)`."""
        weight = self.weight if self.frozen is None else self.frozen(input.dtype)
        if self.lora_off:
            return F.linear(input, weight, self.bias)
        seen = F.dropout(input, self.lora_dropout, self.training) if self.lora_dropout else input
        added = self.lora_scale * F.linear(F.linear(seen, self.lora_A), self.lora_B)
        if not rounds_once(input.dtype):
            return F.linear(input, weight, self.bias) + added
        y = frozen_linear_plus(input.flatten(0, -2), weight, added.flatten(0, -2)).view_as(added)
        # Added last: added to the bias first, the adapter's small output would be lost to rounding.
        return cast(Tensor, y if self.bias is None else y + self.bias)


def effective_weight(linear: nn.Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight (N, D) of a linear layer with its adapter merged.

    Args:
        linear: with or without an adapter.
        dtype: of the result, if the weight is kept in NF4.
    """
    frozen = linear.frozen if isinstance(linear, LoRALinear | FrozenLinear) else None
    weight = linear.weight if frozen is None else frozen(dtype)
    if not isinstance(linear, LoRALinear):
        return weight
    return adapted(weight, linear.lora_A, linear.lora_B, linear.lora_scale)


def adapted(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """Return `W + s B A` in the dtype of the weight.

    Args:
        weight: (N, D), or (E, N, D) for experts.
        a: (r, D), or (E, r, D); None if there is no adapter.
        b: (N, r), or (E, N, r).
        scale: s.
    """
    if a is None or b is None:
        return weight
    return (torch.addmm if weight.dim() == 2 else torch.baddbmm)(weight, b, a, alpha=scale)


def add_adapters(model: nn.Module, blocks: nn.Module, config: LoRAConfig) -> None:
    """Add adapters to the targets in `blocks`, and freeze all other parameters of `model`, in place.

    B is zero, so the model's output does not change; A is zero too until weights are initialized.

    Raises:
        ValueError: if a target matches nothing.
    """
    targets = list(_targets(blocks))
    chosen = _chosen([name for name, _ in targets], config.target_modules)
    targets = [found for found in targets if found[0] in chosen]
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


def quantize_frozen(blocks: nn.Module) -> None:
    """Replace the frozen weights of linear layers and stacked experts in `blocks` by empty NF4 weights, in place.

    A weight whose size is not a multiple of 64 values stays unchanged.
    """
    for path, module in list(blocks.named_modules()):
        if isinstance(module, LoRALinear):
            if fits(module.weight):
                module.frozen = NF4Weight(module.weight)
                module.register_parameter("weight", None)
        elif isinstance(module, nn.Linear) and fits(module.weight):
            parent, _, leaf = path.rpartition(".")
            setattr(blocks.get_submodule(parent), leaf, FrozenLinear(module))
        for leaf, slot in [(name[7:], name) for name in vars(module).get("_modules", {}) if name.startswith("frozen_")]:
            weight = cast(Tensor, getattr(module, leaf))
            if fits(weight):
                setattr(module, slot, NF4Weight(weight))
                module.register_parameter(leaf, None)


def frozen_weights(model: nn.Module) -> Iterator[tuple[str, NF4Weight]]:
    """Yield the NF4 weights, with their names in the base model."""
    for path, module in model.named_modules():
        if isinstance(module, NF4Weight):
            owner, _, slot = path.rpartition(".")
            yield f"{owner}.weight" if slot == "frozen" else f"{owner}.{slot.removeprefix('frozen_')}", module


def adapters(model: nn.Module) -> Iterator[Adapter]:
    """Yield the adapters of a model, in the order of its parameters."""
    named = dict(model.named_parameters())
    for name, a in named.items():
        if name.endswith(_SIDES[0]):
            yield Adapter(name[: -len(_SIDES[0]) - 1], a, named[name[: -len(_SIDES[0])] + _SIDES[1]])


def wider_than_weight(model: nn.Module) -> Adapter | None:
    """Return an adapter whose rank exceeds the smaller side of its weight, which wastes parameters; None if none."""
    return next((each for each in adapters(model) if each.a.shape[-2] > min(each.a.shape[-1], each.b.shape[-2])), None)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turn off a model's adapters inside the context, so that it computes with its frozen weights only."""
    adapting = [cast(_Switched, module) for module in model.modules() if hasattr(module, "lora_off")]
    for module in adapting:
        module.lora_off = True
    try:
        yield
    finally:
        for module in adapting:
            module.lora_off = False


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is part of an adapter."""
    return name.endswith(_SIDES)


def _targets(blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name in the model, owning module) of all weights that can have an adapter."""
    for path, module in blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            yield path, module
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and hasattr(module, f"{leaf}_{_SIDES[0]}"):
                yield f"{path}.{leaf}", module


def _chosen(names: list[str], wanted: str | list[str]) -> set[str]:
    """Return the names that `target_modules` selects."""
    if wanted == "all-linear":
        return set(names)
    known = ", ".join(sorted({".".join(name.split(".")[2:]) for name in names}))
    if isinstance(wanted, str):
        found = {name for name in names if re.fullmatch(wanted, name)}
        if not found:
            raise ValueError(f"target_modules: {wanted!r} matches no whole name, such as {names[0]}; known: {known}")
        return found
    return {name for target in _in_our_names(names, wanted, known) for name in names if _matches(name, target)}


def _in_our_names(names: list[str], wanted: list[str], known: str) -> list[str]:
    """Return the targets, with Hugging Face names replaced by the llmfoundry weights that hold them."""
    leaves = {name.rpartition(".")[2] for name in names}
    ours = [target for target in wanted if any(_matches(name, target) for name in names)]
    rest = [target for target in wanted if target not in ours]
    for leaf, groups in _THEIRS.items():
        for group in groups:
            if leaf in leaves and set(group) <= set(wanted):
                ours.append(leaf)
                rest = [target for target in rest if target not in group]
    for target in rest:
        for leaf, groups in _THEIRS.items():
            for group in groups:
                if target in group and leaf in leaves:
                    raise ValueError(
                        f"target_modules: {target!r} is a part of {leaf}; name {', '.join(group)}, or {leaf}"
                    )
        raise ValueError(f"target_modules: nothing is called {target!r}; known: {known}")
    return ours


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
