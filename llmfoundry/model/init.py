"""Initial weights, as a function of (seed, parameter name, block of rows) alone.

Shapes: a parameter is (..., R, N): R rows of N values, the leading dims (experts) counting matrices.
Each matrix is cut into blocks of a fixed number of whole rows, and each block is drawn from a generator of
its own, on the CPU in float32. So any rank makes just the blocks that its shard meets, and every mesh, device
and wrapper gives the same values. Blocks are drawn on as many threads as torch may use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmfoundry.config import Config
from llmfoundry.layers.lora import is_adapter
from llmfoundry.runtime import seed_of

if TYPE_CHECKING:
    from llmfoundry.model.transformer import CausalLM

_BLOCK_VALUES = 2**18  # about 2 ms of drawing; less is Python's overhead, more wastes work at a shard's edges
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
_RESIDUAL = (".out_proj.weight", ".w2.weight", ".w2")  # what is added to the residual stream
_EMBEDDING = ("wte.weight", "wpe.weight")


class InitConfig(Config):
    """`init_config`, in LLM Foundry's words.

    kaiming_*: std sqrt(2 / fan_in) (`fan_mode: fan_out` takes the other side). baseline_ (also normal_): std
    `init_std`. small_init_: sqrt(2 / 5D). neox_init_: that, and 2 / (L sqrt(D)) for residual outputs.
    """

    name: Literal[
        "kaiming_normal_", "kaiming_uniform_", "baseline_", "normal_", "small_init_", "neox_init_"
    ] = "kaiming_normal_"  # fmt: skip
    init_std: float | None = Field(default=None, gt=0)
    fan_mode: Literal["fan_in", "fan_out"] = "fan_in"
    init_gain: float = 0.0  # of kaiming_*: the slope of the leaky ReLU that its gain is for
    init_div_is_residual: bool | float = True  # residual outputs divided by sqrt(2 L), or by this number
    emb_init_std: float | None = Field(default=None, ge=0)  # embeddings; None: as all other weights

    @model_validator(mode="after")
    def _check_std(self) -> InitConfig:
        needs_std = self.name in ("baseline_", "normal_")
        if needs_std != (self.init_std is not None):
            raise ValueError(f"name={self.name} {'needs' if needs_std else 'does not use'} init_std")
        return self

    @field_validator("init_div_is_residual")
    @classmethod
    def _check_divisor(cls, divide: bool | float) -> bool | float:
        if not isinstance(divide, bool) and divide <= 0:
            raise ValueError(f"residual outputs cannot be divided by {divide}; write false for no division")
        return divide

    @property
    def uniform(self) -> bool:
        """Whether values are uniform, else normal."""
        return self.name == "kaiming_uniform_"

    def std(self, name: str, shape: torch.Size, d_model: int, n_layers: int) -> float:
        """Standard deviation of a weight of two or more dims, by its name in the model."""
        is_residual = name.endswith(_RESIDUAL)
        if name in _EMBEDDING and self.emb_init_std is not None:
            return self.emb_init_std
        if self.name in ("small_init_", "neox_init_"):
            std = math.sqrt(2 / (5 * d_model))
        elif self.init_std is not None:
            std = self.init_std
        else:
            fan = shape[-1] if self.fan_mode == "fan_in" else shape[-2]
            std = math.sqrt(2 / (1 + self.init_gain**2) / fan)
        if self.name == "neox_init_":
            return 2 / n_layers / math.sqrt(d_model) if is_residual else std
        divide = self.init_div_is_residual
        if is_residual and divide is not False:
            std /= math.sqrt(2 * n_layers) if divide is True else divide
        return std


class Shard(NamedTuple):
    """The part of a parameter that this process holds."""

    local: Tensor  # its storage
    shape: torch.Size  # of the whole parameter
    offsets: tuple[int, ...]  # of `local` in it, a dim each


@torch.no_grad()
def init_weights(model: CausalLM, seed: int) -> None:
    """Give every parameter and buffer its initial value, in place.

    Weights as `init_config` says, norms 1, biases and sinks 0, buffers 0. Call it after `to_empty`;
    parameters may be DTensors of any mesh, and the model's blocks may be wrapped for recompute or compile.
    """
    config = model.config
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        for name, parameter in model.named_parameters():
            name = plain_name(name)
            shard = shard_of(parameter)
            if is_adapter(name):
                continue
            if parameter.dim() >= 2 and not name.endswith((".b1", ".b2")):
                std = config.init_config.std(name, shard.shape, config.d_model, config.n_layers)
                draw_weight(shard, std, config.init_config.uniform, seed, name, threads)
            else:
                shard.local.fill_(1.0 if _is_norm_weight(name) else 0.0)
    init_adapters(model, seed)
    for buffer in model.buffers():
        shard_of(buffer).local.zero_()


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Give every adapter its initial value, in place: B zero, A uniform in +-1 / sqrt(fan_in), as peft draws it."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            if name.endswith("lora_A"):
                draw_weight(shard, 1 / math.sqrt(3 * shard.shape[-1]), True, seed, plain_name(name), threads)
            elif is_adapter(name):
                shard.local.zero_()


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of recompute, compile and FSDP."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_norm_weight(name: str) -> bool:
    *_, module, leaf = ("", *name.split("."))
    return leaf == "weight" and "norm" in module


def shard_of(tensor: Tensor) -> Shard:
    """Where a plain tensor (all of itself) or a DTensor's local part stands in the whole."""
    if not isinstance(tensor, DTensor):
        return Shard(tensor.detach(), tensor.shape, (0,) * tensor.dim())
    # The one place that knows how FSDP over expert parallelism strides its shards. It is private in torch,
    # proved by the parity tests.
    from torch.distributed.checkpoint.planner_helpers import _create_chunk_from_dtensor

    return Shard(tensor.to_local().detach(), tensor.shape, tuple(_create_chunk_from_dtensor(tensor).offsets))


def draw_weight(shard: Shard, std: float, uniform: bool, seed: int, name: str, threads: ThreadPoolExecutor) -> None:
    """Fill a shard of two or more dims with its part of the parameter's values.

    Args:
        std: standard deviation; the mean is 0.
        uniform: uniform instead of normal.
        name: the parameter's name without wrappers.
    """
    if shard.local.numel() == 0:
        return
    *lead, _, columns = shard.shape
    first_column, n_columns = shard.offsets[-1], shard.local.shape[-1]
    for at, matrix in _matrices(shard, tuple(lead)):  # one at a time: a copy is small beside the model
        direct = matrix.device.type == "cpu" and matrix.dtype == torch.float32 and matrix.is_contiguous()
        values = matrix if direct else torch.empty(matrix.shape, dtype=torch.float32)  # (rows, n_columns)

        def draw(block: _Block, values: Tensor = values, at: int = at) -> None:
            generator = torch.Generator().manual_seed(seed_of(seed, name, at, block.number))
            target = values[block.start : block.start + block.n]
            whole = block.skip == 0 and block.n == block.rows and n_columns == columns
            drawn = target if whole else torch.empty(block.rows, columns)
            if uniform:
                drawn.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
            else:
                drawn.normal_(0.0, std, generator=generator)
            if not whole:
                rows = drawn[block.skip : block.skip + block.n]
                target.copy_(rows[:, first_column : first_column + n_columns])

        blocks = _blocks(shard.shape[-2], columns, shard.offsets[-2], shard.local.shape[-2])
        list(threads.map(draw, blocks))
        if not direct:
            matrix.copy_(values)


class _Block(NamedTuple):
    """A block of rows, and the part of it that a shard holds."""

    number: int  # of the block in its matrix
    rows: int  # of the block
    skip: int  # rows of the block before the shard
    n: int  # rows of the block in the shard
    start: int  # where they stand in the shard


def _blocks(n_rows: int, columns: int, first: int, n: int) -> Iterator[_Block]:
    """The blocks of an (n_rows, columns) matrix that meet its rows [first, first + n)."""
    size = max(1, _BLOCK_VALUES // columns)
    for number in range(first // size, -(-(first + n) // size)):
        low, high = number * size, min((number + 1) * size, n_rows)
        start, end = max(low, first), min(high, first + n)
        yield _Block(number, high - low, start - low, end - start, start - first)


def _matrices(shard: Shard, lead: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """(number in the whole parameter, local part) of each matrix that a shard meets."""
    if not lead:
        yield 0, shard.local
        return
    for local_index in range(shard.local.shape[0]):
        index = shard.offsets[0] + local_index
        inner = Shard(shard.local[local_index], shard.shape[1:], shard.offsets[1:])
        for below, matrix in _matrices(inner, lead[1:]):
            yield index * math.prod(lead[1:]) + below, matrix
