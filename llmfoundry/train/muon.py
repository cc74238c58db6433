"""Muon: the update of a matrix is its orthogonalized momentum. AdamW updates the parameters that are not matrices.

A parameter may hold several matrices: one per expert, queries above keys above values, gate rows above those of the up
projection. Each is orthogonalized separately. Experts that are whole on a rank form one batch without communication. If
FSDP shards matrices by rows, each rank orthogonalizes a share of them (parallel/owners.py), with one exchange for all
matrices of one shape. Replicas repeat the same computation.

Source: Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, Muon is Scalable for LLM
Training, arXiv:2502.16982.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.dtensor import local_part
from llmfoundry.kernels.muon import apply_direction_, momentum_, orthogonalize, orthogonalize_flops
from llmfoundry.kernels.update import WHOLE, Place
from llmfoundry.layers.attention import Attention
from llmfoundry.layers.ffn import MLP
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import Experts
from llmfoundry.parallel.owners import on_owners, rows_of_ranks
from llmfoundry.parallel.single import copy_to_write, is_written
from llmfoundry.train.adamw import AdamW, beside_weight, computed_in
from llmfoundry.train.groups import Member
from llmfoundry.train.optim import AdamWConfig, decays

Item = TypeVar("Item")

MOMENTUM = "momentum_buffer"  # PyTorch's name of the moment
_AT_ONCE = 2**27  # values of a batch; its products need about three times as much memory again
# `gate` is the router's name in modules of transformers.
_HEAD_OR_ROUTER = re.compile(r"(^|\.)(lm_head|embed_out|router|(mlp|block_sparse_moe|feed_forward)\.gate)\.weight$")


class MuonConfig(AdamWConfig, names=("muon",)):
    """Muon for matrices of the blocks; AdamW for embeddings, the head, routers, norms and biases.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.
    """

    momentum: float = Field(0.95, ge=0, lt=1)  # decay of the momentum
    nesterov: bool = True  # use the momentum one step ahead as the direction
    ns_steps: int = Field(5, ge=1, le=20)  # Newton-Schulz iterations
    # Dtype of their matrix products; auto: bf16 on GPUs, fp32 on CPUs
    ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    # Factor on lr for a matrix, named as in torch.optim.Muon. match_rms_adamw: 0.2 sqrt(max(rows, columns)), so that
    # AdamW's lr and weight_decay fit. original: sqrt(max(1, rows / columns)).
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    adamw_lr: float | None = Field(None, gt=0)  # lr of the parameters that AdamW updates; None: lr
    weight_decay: float = Field(0.1, ge=0)  # each step subtracts lr * weight_decay * weight

    state_dtype: Literal["fp32", "bf16"] = "fp32"  # dtype of the momentum and of AdamW's moments

    @property
    def state_bytes(self) -> int:
        return super().state_bytes // 2  # matrices have one moment, and are nearly all there is

    def update_flops(self, model: CausalLMConfig) -> float:
        with torch.device("meta"):
            built = model.build()
        stacked, n = rows_of_stacked(built), self.ns_steps
        return sum(
            math.prod(parameter.shape[:-2]) * orthogonalize_flops(rows, parameter.shape[-1], n)
            for group in self.settings(built)
            for parameter in (group["params"] if group["muon"] else ())  # type: ignore[attr-defined]
            for rows in stacked.get(parameter, (parameter.shape[-2],))
        )

    def settings(self, model: nn.Module) -> list[dict[str, object]]:
        found = super().settings(model)
        for group in found:
            if not group["muon"] and group["number"] == 0 and self.adamw_lr is not None:
                group["lr"] = group["initial_lr"] = self.adamw_lr
        return sorted(found, key=lambda group: not group["muon"])  # a run reports the learning rate of the first group

    def marks(self, model: nn.Module) -> Callable[[Member], dict[str, object]]:
        """Return the function that marks the parameters that Muon updates."""
        embeddings = {each.weight for each in model.modules() if isinstance(each, nn.Embedding)}

        def mark(member: Member) -> dict[str, object]:
            name, parameter, asked = member.name, member.parameter, member.group.algorithm
            is_matrix = decays(name, parameter) and parameter.ndim < 4 and min(parameter.shape[-2:]) > 1
            if asked == "muon" and not is_matrix:
                raise ConfigError(
                    f"optimizer.param_groups.{member.number - 1}.algorithm: muon is for matrices, and {name} is not "
                    "one; write adamw, or a pattern that matches only matrices"
                )
            is_inside = parameter not in embeddings and not _HEAD_OR_ROUTER.search(name)
            return {"muon": is_matrix and is_inside if asked is None else asked == "muon"}

        return mark

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return Muon(self, self.settings(model), rows_of_stacked(model))


def rows_of_stacked(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Return the parameters that hold stacked matrices, with the rows of each matrix."""
    found: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention) and not module.reuses_kv:
            heads = module.n_heads, module.kv_heads, module.kv_heads
            found[module.wqkv.weight] = tuple(n * module.head_dim for n in heads)
        elif isinstance(module, MLP | Experts) and module.gated:
            weight = module.w1 if isinstance(module, Experts) else module.w1.weight
            if weight is not None:  # frozen experts are stored in 4 bits elsewhere
                found[weight] = (weight.shape[-2] // 2,) * 2
    return found


class _Kind(NamedTuple):
    """Properties that matrices share if they are orthogonalized together."""

    among: ProcessGroup | None  # the ranks that have rows of each matrix; None: matrices are whole
    shape: tuple[int, int]  # of the whole matrix
    products: tuple[torch.device, torch.dtype]  # device and dtype of matrix products
    home: tuple[torch.device, torch.dtype]  # of the weights


class _Rows(NamedTuple):
    """This rank's rows of one matrix, or of several stacked ones."""

    weight: Tensor  # (rows, C), like the next two
    grad: Tensor
    moment: Tensor
    beside: list[Tensor]  # the weights' copy in the compute dtype, or their low half, if any
    step: Tensor  # (), number of steps
    place: Place


class _Cut(NamedTuple):
    """A matrix that is sharded by rows, and this rank's rows of it."""

    rows: _Rows
    counts: list[int]  # rows on each rank; for a whole matrix, all its rows


class _Step(NamedTuple):
    """Values that are constant for one step of a group."""

    lr: float
    decay: float
    divisor: Tensor  # () float32 on the device of the weights, like the next
    skip: Tensor


class Muon(AdamW):
    """Updates groups marked `muon` by Muon, and the others by AdamW.

    Args:
        params: parameter groups.
        stacked: parameters that hold stacked matrices -> the rows of each matrix.
    """

    def __init__(
        self, config: MuonConfig, params: Iterable[dict[str, object]], stacked: Mapping[Tensor, tuple[int, ...]]
    ) -> None:
        dtype = torch.bfloat16 if config.state_dtype == "bf16" else None
        super().__init__(params, config.lr, (config.betas[0], config.betas[1]), config.eps, dtype, config.halves)
        self._config, self._stacked = config, stacked

    def _update_group(self, group: dict[str, Any], divisor: Tensor | None, skip: Tensor | None) -> None:
        if not group["muon"]:
            super()._update_group(group, divisor, skip)
            return
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        steps: dict[torch.device, _Step] = {}
        cut: dict[_Kind, list[_Cut]] = {}
        for parameter in parameters:
            kind = self._kind(parameter)
            device = kind.home[0]
            if device not in steps:
                one = torch.ones((), device=device)
                steps[device] = _Step(
                    group["lr"], group["weight_decay"], one if divisor is None else divisor.to(device),
                    torch.zeros_like(one) if skip is None else skip.to(device),
                )  # fmt: skip
            count, _ = self._state_of(parameter, (MOMENTUM,))
            count.add_(1 - steps[device].skip)
            heights = self._stacked.get(parameter, (parameter.shape[-2],))
            if parameter.ndim == 3 and kind.among is None and len(set(heights)) == 1:
                self._update_stack(parameter, kind._replace(shape=(heights[0], kind.shape[1])), steps[device])
            else:
                for each in self._matrices(parameter, heights, kind.among):
                    cut.setdefault(kind._replace(shape=(sum(each.counts), kind.shape[1])), []).append(each)
        first = 0  # batches start with different owners, so that ranks share the work if a shape has few matrices
        for kind, matrices in cut.items():
            ranks = 1 if kind.among is None else kind.among.size()
            for some in _batches(matrices, max(1, _AT_ONCE // math.prod(kind.shape)) * ranks):
                self._update_matrices(some, kind, first, steps[kind.home[0]])
                first += len(some)
        for parameter in parameters:
            if copy_to_write(parameter) is not None:
                is_written(parameter)

    def _kind(self, parameter: Tensor) -> _Kind:
        weight = local_part(parameter)
        on_mesh = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else weight.device.type
        device = runtime.device() if on_mesh == "cuda" else weight.device  # also for weights in host memory
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": computed_in(weight.dtype)}[
            self._config.ns_dtype
        ]
        if self._config.ns_dtype == "auto" and (weight.is_cuda or device.type == "cuda"):
            dtype = torch.bfloat16
        shape = parameter.shape[-2], parameter.shape[-1]
        return _Kind(_ranks_of_rows(parameter), shape, (device, dtype), (weight.device, weight.dtype))

    def _update_stack(self, parameter: Tensor, kind: _Kind, step: _Step) -> None:
        """Update a stack of matrices that are whole on this rank, in batches."""
        height, columns = kind.shape
        n = local_part(parameter).numel() // (height * columns)
        for numbers in _batches(range(n), max(1, _AT_ONCE // (height * columns))):
            part = self._rows(parameter, numbers[0] * height, len(numbers) * height)
            matrices = self._advance(part, kind, step).view(-1, height, columns)
            self._apply(part, self._orthogonalize(matrices).view(-1, columns), kind, step)

    def _update_matrices(self, matrices: Sequence[_Cut], kind: _Kind, first: int, step: _Step) -> None:
        """Update matrices of one shape whose rows are on the same ranks."""
        directions = [self._advance(each.rows, kind, step) for each in matrices]
        if kind.among is None:
            directions = list(self._orthogonalize(torch.stack(directions)))
        else:
            counts = [each.counts for each in matrices]
            directions = on_owners(directions, counts, first, kind.among, self._orthogonalize)
        for each, direction in zip(matrices, directions, strict=True):
            self._apply(each.rows, direction, kind, step)

    def _matrices(self, parameter: Tensor, heights: tuple[int, ...], among: ProcessGroup | None) -> Iterator[_Cut]:
        """Yield the matrices of a parameter, with this rank's rows of each."""
        ranks, rank = (1, 0) if among is None else (among.size(), among.rank())
        height = parameter.shape[-2]
        own = rows_of_ranks(height, ranks, 0, height)[rank]  # this rank's rows in each stack of matrices
        for at in range(local_part(parameter).shape[0] if parameter.ndim == 3 else 1):
            start, begin = 0, at * own
            for rows in heights:
                counts = rows_of_ranks(height, ranks, start, start + rows)
                yield _Cut(self._rows(parameter, begin, counts[rank]), counts)
                start, begin = start + rows, begin + counts[rank]

    def _rows(self, parameter: Tensor, begin: int, n: int) -> _Rows:
        """`n` of this rank's rows of a parameter, with all its matrices stacked."""
        columns = parameter.shape[-1]
        count, moment = self._state_of(parameter, (MOMENTUM,))
        beside = beside_weight(parameter, self.state[parameter] if self.halves else None)
        place = self._places[parameter]
        at = begin * columns
        place = place._replace(start=place.start + at // place.inner * place.step + at % place.inner)
        if at % place.inner + n * columns <= place.inner:
            place = place._replace(inner=WHOLE, step=WHOLE)
        written = [local_part(parameter).detach(), moment, *([] if beside is None else [beside])]
        weight, moment, *others = (each.view(-1, columns)[begin : begin + n] for each in written)
        assert parameter.grad is not None
        grad = local_part(parameter.grad).reshape(-1, columns)[begin : begin + n]
        return _Rows(weight, grad, moment, others, count, place)

    def _advance(self, rows: _Rows, kind: _Kind, step: _Step) -> Tensor:
        """Update the momentum and return each row's direction before orthogonalization."""
        device, dtype = kind.products
        direction = torch.empty(rows.weight.shape, dtype=dtype, device=rows.weight.device)
        if direction.numel():
            momentum_(rows.moment, direction, rows.grad, rows.step, step.divisor, step.skip, rows.place,
                      momentum=self._config.momentum, nesterov=self._config.nesterov)  # fmt: skip
        return direction.to(device)

    def _orthogonalize(self, batch: Tensor) -> Tensor:
        return orthogonalize(batch, self._config.ns_steps)

    def _apply(self, rows: _Rows, direction: Tensor, kind: _Kind, step: _Step) -> None:
        height, columns = kind.shape
        factor = 0.2 * math.sqrt(max(height, columns))
        if self._config.adjust_lr_fn == "original":
            factor = math.sqrt(max(1.0, height / columns))
        if direction.numel():
            apply_direction_(rows.weight, rows.beside, direction.to(rows.weight.device), rows.step, step.skip,
                             rows.place, lr=step.lr * factor, keep=1 - step.lr * step.decay)  # fmt: skip


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _ranks_of_rows(parameter: Tensor) -> ProcessGroup | None:
    """Return the ranks that hold rows of each of a parameter's matrices; None if matrices are whole.

    Raises:
        ValueError: if the matrices are sharded in another way.
    """
    if not isinstance(parameter, DTensor):
        return None
    mesh, placements = parameter.device_mesh, parameter.placements
    split = [i for i, place in enumerate(placements) if not place.is_replicate() and mesh.size(i) > 1]
    cut = [i for i in split if placements[i].is_shard(parameter.ndim - 2)]
    whole = [i for i in split if parameter.ndim == 3 and getattr(placements[i], "dim", None) == 0]
    if len(cut) > 1 or len(cut) + len(whole) < len(split):
        raise ValueError(f"muon: matrices that are cut as {placements} are not whole after one exchange")
    return mesh.get_group(cut[0]) if cut else None
