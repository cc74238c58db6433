"""MegaBlocks' layers on our kernels: its `Arguments`, `MoE`, `dMoE` and loss functions, with its call signatures.

    from llmfoundry.standalone.megablocks import install
    install()                                        # before the first `import megablocks`
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE          # is the class below

Shapes: S sequence, B batch, D hidden_size, F ffn_hidden_size, E experts, K top_k, T = S*B tokens. As in MegaBlocks, a
layer takes (S, B, D), and by default returns its output and its one bias (D) separately. State dicts have MegaBlocks'
names and layouts, in and out. Some differences are intended: the losses of a recomputed forward count once; experts'
gradients are not divided by the size of the expert-parallel group; `MoE` computes dropped tokens with weight 0, and
under expert parallelism its capacity is for the tokens of one rank. Modules inside a layer are ours: read and write
weights by `state_dict`, not as `layer.experts.mlp.w1`.

Source: Gale et al. 2022, MegaBlocks, arXiv:2211.15841; names and defaults as of its version 0.10.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from types import ModuleType
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmfoundry.config import ConfigError
from llmfoundry.moe.balance import load_balance_loss, z_loss
from llmfoundry.standalone.moe import MoE as OurMoE
from llmfoundry.standalone.moe import autocast_call, check_input

_gelu = partial(F.gelu, approximate="tanh")
Init = Callable[[Tensor], object]  # fills a tensor in place


@dataclass
class Arguments:
    """MegaBlocks' settings of a layer, with its names and defaults."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 1
    bias: bool = True  # one per layer, (D,), added to the sum of the experts' outputs
    return_bias: bool = True
    activation_fn: Callable[[Tensor], Tensor] = _gelu

    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_capacity_factor: int | float = 1  # of `MoE`; 0: drops nothing
    moe_normalize_expert_weights: int | float | None = None
    moe_loss_weight: float = 0.1
    moe_jitter_eps: float | None = None
    moe_lbl_in_fp32: bool = False  # it always is

    moe_expert_model_parallelism: bool = False
    expert_parallel_group: dist.ProcessGroup | None = None  # None: all ranks
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None

    memory_optimized_mlp: bool = False  # it always is
    mlp_type: str = "mlp"  # or glu
    mlp_impl: str = "grouped"  # or sparse; ours is neither of them
    fp16: bool = True
    bf16: bool = False
    device: int | str | torch.device | None = None  # None: the current GPU, or the CPU where there is none
    init_method: Init = partial(torch.nn.init.normal_, mean=0.0, std=0.02)
    output_layer_init_method: Init = partial(torch.nn.init.normal_, mean=0.0, std=0.02)

    uniform_expert_assignment: bool = False

    shared_expert: bool = False
    fc_cls: type[nn.Module] = nn.Linear
    fc_kwargs: dict[str, object] = field(default_factory=dict)
    remat_act_fn: bool = True  # it always is
    shared_expert_hidden_size: int | None = None  # None: ffn_hidden_size
    shared_expert_weighted_sum: bool = False

    moe_zloss_weight: float = 0.0
    moe_zloss_in_fp32: bool = False  # it always is

    def __post_init__(self) -> None:
        if self.device is None:
            self.device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        if self.shared_expert_hidden_size is None:
            self.shared_expert_hidden_size = self.ffn_hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32


def from_megatron(megatron_args: object) -> Arguments:
    """Convert Megatron's arguments: settings with the same names are taken, the rest have their defaults."""
    args = Arguments()
    for setting in fields(args):
        if hasattr(megatron_args, setting.name):
            setattr(args, setting.name, getattr(megatron_args, setting.name))
    return args


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square()
}  # fmt: skip


def _activation_name(function: Callable[[Tensor], Tensor]) -> str:
    """Find the known activation that a function equals, by its values."""
    probe = torch.linspace(-6, 6, 49, dtype=torch.float64)
    found = function(probe) if callable(function) else torch.full_like(probe, torch.nan)
    for name, known in _ACTIVATIONS.items():
        if torch.allclose(found, known(probe), rtol=1e-6, atol=1e-9):
            return name
    raise ConfigError(f"activation_fn={function!r} is not one of {', '.join(_ACTIVATIONS)}")


def _refuse(args: Arguments, drops: bool) -> None:
    refused = {
        "shared_expert_weighted_sum": args.shared_expert_weighted_sum,
        "num_layers_per_virtual_pipeline_stage": args.num_layers_per_virtual_pipeline_stage is not None,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size != 1,
        "fc_cls": args.fc_cls is not nn.Linear,
        "fc_kwargs": bool(args.fc_kwargs),
    }
    for name, given in refused.items():
        if given:
            raise ConfigError(f"{name}={getattr(args, name)!r} is not supported here; leave it out")
    for name, known in {"mlp_type": ("mlp", "glu"), "mlp_impl": ("grouped", "sparse")}.items():
        if getattr(args, name) not in known:
            raise ConfigError(f"{name}={getattr(args, name)!r} is neither {known[0]} nor {known[1]}")
    if args.shared_expert and args.bias:
        raise ConfigError("shared_expert=True has biases of its own with bias=True, which is not supported; bias=False")
    if args.shared_expert and drops and args.mlp_type == "glu":
        raise ConfigError("shared_expert=True of MoE has no gate here, and mlp_type='glu' asks for one; take dMoE")
    if args.moe_expert_model_parallelism and not dist.is_initialized():
        raise ConfigError("moe_expert_model_parallelism=True needs a process group; call init_process_group first")


def _expert_group(args: Arguments) -> dist.ProcessGroup | None:
    """The process group whose ranks divide the experts."""
    if not args.moe_expert_model_parallelism:
        return None
    return args.expert_parallel_group if args.expert_parallel_group is not None else dist.group.WORLD


class _Balance(NamedTuple):
    """What the balance loss needs of one layer's last training forward."""

    score_sum: Tensor  # (E,) with gradient
    load: Tensor  # (E,)
    tokens: int


# By layer, so that a forward that is computed again replaces what it left before.
_balance: weakref.WeakKeyDictionary[nn.Module, _Balance] = weakref.WeakKeyDictionary()
_zloss: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()  # () mean over tokens


class dMoE(OurMoE):  # noqa: N801  MegaBlocks' name
    """MegaBlocks' dropless mixture: `dMoE(args)(x)` is `(y, bias)`, or with `return_bias=False` `y + bias`.

    Raises:
        ConfigError: an argument asks for what is not supported here.
    """

    drops = False

    def __init__(self, args: Arguments) -> None:
        _refuse(args, self.drops)
        norm = args.moe_normalize_expert_weights
        super().__init__(
            args.hidden_size,
            expert_group=_expert_group(args),
            device=None if args.device is None else torch.device(args.device),
            dtype=args.dtype,
            ffn_hidden_size=args.ffn_hidden_size,
            moe_num_experts=args.moe_num_experts,
            moe_top_k=args.moe_top_k,
            mlp_type="mlp" if self.drops else args.mlp_type,  # its MoE knows no gate
            ffn_act_fn={"name": _activation_name(args.activation_fn)},
            moe_loss_weight=args.moe_loss_weight,
            moe_zloss_weight=args.moe_zloss_weight,
            moe_jitter_eps=args.moe_jitter_eps or None,
            moe_normalize_expert_weights=None if not norm else float(norm),
            uniform_expert_assignment=args.uniform_expert_assignment,
            moe_capacity_factor=args.moe_capacity_factor if self.drops and args.moe_capacity_factor else None,
            shared_expert=args.shared_expert,
            shared_expert_hidden_size=args.shared_expert_hidden_size if args.shared_expert else None,
        )
        self.args = args
        self.bias = nn.Parameter(self.router.weight.new_zeros(args.hidden_size)) if args.bias else None
        self._draw()
        self.register_state_dict_post_hook(_to_theirs)
        self.register_load_state_dict_pre_hook(_to_ours)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """(S, B, D) -> (S, B, D), with the bias separate if `return_bias` and there is one.

        Raises:
            ValueError: x has another width or, without autocast, another dtype than the weights.
        """
        if torch.is_autocast_enabled(x.device.type):
            return cast(Tensor | tuple[Tensor, Tensor], autocast_call(self, x))
        check_input(self, x)
        keys = None
        if self.training and self.config.moe_jitter_eps is not None:
            keys = torch.randint(2**62, x.shape[:1], device=x.device)
        y, stats = super(OurMoE, self).forward(x, keys)
        if self.training and stats is not None:
            tokens = x.shape[0] * x.shape[1]
            if self.args.moe_loss_weight:
                _balance[self] = _Balance(stats.score_sum, stats.load, tokens)
            if self.args.moe_zloss_weight:
                _zloss[self] = z_loss(stats.z_sum.unsqueeze(0)) / max(1, tokens)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw initial weights by the arguments' methods, for all experts on every rank, as MegaBlocks does."""
        args, own = self.args, self.experts.w1.shape[0]
        first = 0 if self.expert_group is None else dist.get_rank(self.expert_group) * own
        rows = self.experts.w1.shape[1] // args.ffn_hidden_size  # 2 with a gate
        size = (args.moe_num_experts, args.ffn_hidden_size, args.hidden_size)
        for target, method in [(self.experts.w1, args.init_method), (self.experts.w2, args.output_layer_init_method)]:
            for part in range(rows if target is self.experts.w1 else 1):
                drawn = torch.empty(size, device=target.device)
                method(drawn)
                drawn = drawn[first : first + own]  # (own, F, D)
                if target is self.experts.w1:
                    target[:, part * args.ffn_hidden_size : (part + 1) * args.ffn_hidden_size].copy_(drawn)
                else:
                    target.copy_(drawn.transpose(1, 2))
        args.init_method(self.router.weight)


class MoE(dMoE):
    """MegaBlocks' mixture with a capacity: each expert drops tokens beyond `moe_capacity_factor * T * K / E` slots.

    With a capacity factor of 0 none are dropped. Under expert parallelism the capacity is for the tokens of one rank.
    """

    drops = True


# MegaBlocks stacks the experts' weights as (E*F, D) in `dMoE`; its `MoE` has w1 (E, D, F) and w2 (E, F, D).
def _stacked(module: dMoE, weight: Tensor, name: str) -> Tensor:
    """(E, F, D) -> MegaBlocks' layout."""
    if not module.drops:
        return weight.flatten(0, 1)
    return weight.transpose(1, 2).contiguous() if name == "w1" else weight


def _by_expert(module: dMoE, weight: Tensor, name: str) -> Tensor:
    """The inverse of `_stacked`."""
    if not module.drops:
        return weight.view(module.experts.w1.shape[0], -1, module.args.hidden_size)
    return weight.transpose(1, 2) if name == "w1" else weight


def _to_theirs(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    assert isinstance(module, dMoE)
    ups = ("w1", "v1") if module.config.gated else ("w1",)
    state[f"{prefix}router.layer.weight"] = state.pop(f"{prefix}router.weight")
    for name, part in zip(ups, state.pop(f"{prefix}experts.w1").chunk(len(ups), dim=1), strict=True):
        state[f"{prefix}experts.mlp.{name}"] = _stacked(module, part, name)
    state[f"{prefix}experts.mlp.w2"] = _stacked(module, state.pop(f"{prefix}experts.w2").transpose(1, 2), "w2")
    if module.bias is not None:
        state[f"{prefix}experts.bias"] = state.pop(f"{prefix}bias")
    if module.shared_expert is not None:
        shared = ("gate_proj", "up_proj") if module.config.gated else ("up_proj",)
        for name, part in zip(shared, state.pop(f"{prefix}shared_expert.w1.weight").chunk(len(shared)), strict=True):
            state[f"{prefix}shared_expert.{name}.weight"] = part
        state[f"{prefix}shared_expert.down_proj.weight"] = state.pop(f"{prefix}shared_expert.w2.weight")


def _to_ours(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """The inverse of `_to_theirs`; a state dict that has our names already is returned unchanged."""
    assert isinstance(module, dMoE)
    if f"{prefix}router.layer.weight" not in state:
        return
    ups = ("w1", "v1") if module.config.gated else ("w1",)
    state[f"{prefix}router.weight"] = state.pop(f"{prefix}router.layer.weight")
    parts = [_by_expert(module, state.pop(f"{prefix}experts.mlp.{name}"), name) for name in ups]
    state[f"{prefix}experts.w1"] = torch.cat(parts, dim=1)
    state[f"{prefix}experts.w2"] = _by_expert(module, state.pop(f"{prefix}experts.mlp.w2"), "w2").transpose(1, 2)
    if f"{prefix}experts.bias" in state:
        state[f"{prefix}bias"] = state.pop(f"{prefix}experts.bias")
    if module.shared_expert is not None:
        shared = ("gate_proj", "up_proj") if module.config.gated else ("up_proj",)
        joined = [state.pop(f"{prefix}shared_expert.{name}.weight") for name in shared]
        state[f"{prefix}shared_expert.w1.weight"] = torch.cat(joined)
        state[f"{prefix}shared_expert.w2.weight"] = state.pop(f"{prefix}shared_expert.down_proj.weight")


def get_load_balancing_loss() -> list[tuple[Tensor, Tensor]]:
    """(slots per expert (E,), scores (T, E)) of each layer's last training forward.

    Each row of the scores is their mean over the tokens, which is all that a balance loss uses.
    """
    return [(one.load, (one.score_sum / max(1, one.tokens)).expand(one.tokens, -1)) for one in _balance.values()]


def clear_load_balancing_loss() -> None:
    """Clear the recorded losses; call it after each step, as with MegaBlocks."""
    _balance.clear()


def batched_load_balancing_loss(args: Arguments) -> Tensor | float:
    """The weighted balance loss, mean over `args.num_layers` layers: () float32, or 0.0 if its weight is 0.

    Raises:
        ValueError: not every layer has run in training since the last `clear_load_balancing_loss`.
    """
    if args.moe_loss_weight == 0:
        return 0.0
    found = list(_balance.values())
    if len(found) != args.num_layers:
        raise ValueError(
            f"{len(found)} layers have run in training, and num_layers={args.num_layers}; run the forward first, in "
            "training mode, and clear_load_balancing_loss() after each step"
        )
    each = [load_balance_loss(r.score_sum.unsqueeze(0), r.load.unsqueeze(0)) / max(1, r.tokens) for r in found]
    return args.moe_loss_weight * torch.stack(each).mean()


def clear_router_zloss() -> None:
    """Clear the routers' losses; call it after each step, as with MegaBlocks."""
    _zloss.clear()


def batched_router_zloss(args: Arguments) -> Tensor | float:
    """The weighted z-loss of each layer's router: (layers,) float32, or 0.0 if its weight is 0.

    Raises:
        ValueError: no layer has run in training since the last `clear_router_zloss`.
    """
    if args.moe_zloss_weight == 0:
        return 0.0
    if not _zloss:
        raise ValueError("no layer has run in training since the last clear_router_zloss(); run the forward first")
    return args.moe_zloss_weight * torch.stack(list(_zloss.values()))


def install() -> None:
    """Make `import megablocks.layers.dmoe` and its siblings find this module, in this process.

    Raises:
        RuntimeError: the real megablocks has been imported already.
    """
    loaded = sys.modules.get("megablocks")
    if loaded is not None and getattr(loaded, "__file__", None) is not None:
        raise RuntimeError("megablocks is imported already; call install() before the first import of it")
    here = sys.modules[__name__]
    names = ("megablocks", "megablocks.layers", "megablocks.layers.arguments", "megablocks.layers.moe",
             "megablocks.layers.dmoe", "megablocks.layers.router")  # fmt: skip
    for name in names:
        module = ModuleType(name, __doc__)
        module.__dict__.update({key: value for key, value in vars(here).items() if not key.startswith("_")})
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
