"""Weight initialization that depends only on the seed, the parameter name and the block of rows.

Shapes: a parameter is (..., R, N): matrices of R rows of N values; the leading dims (experts) index the matrices.
Each matrix is split into blocks of a fixed number of whole rows, and each block is drawn with its own generator, on the
CPU in float32. So a rank draws only the blocks that overlap its shard, and all meshes, devices and wrappers give the
same values. Blocks are drawn on as many threads as PyTorch may use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmfoundry.dtensor import LocalShard, local_shard
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.lora import is_adapter
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.runtime import seed_of

_BLOCK_VALUES = 2**18  # about 2 ms each; smaller ones cost Python overhead, larger ones waste work at a shard's edges


@torch.no_grad()
def init_weights(model: CausalLM, seed: int, *, blocks: bool = True) -> None:
    """Initialize every parameter and buffer, in place.

    Weights are drawn as `init_config` says. Norms are 1; biases, sinks and buffers are 0, except that `default_` draws
    the biases of linear layers. Call this after `to_empty`. Parameters may be DTensors of any mesh.

    Args:
        model: the model, materialized.
        seed: the run's seed.
        blocks: False leaves the blocks' weights uninitialized, except adapters, for a caller that loads them next:
            drawing 30 billion numbers takes minutes.
    """
    config = model.config
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        for name, parameter in model.named_parameters():
            shard = local_shard(parameter)
            if is_adapter(name) or (not blocks and name.startswith("blocks.")):
                continue
            if parameter.dim() >= 2 and not name.endswith((".b1", ".b2")):
                fan_out = _fan_out(config, name, shapes)
                draw = config.init_config.draw(name, shard.shape[-1], fan_out, config.d_model, config.n_layers)
                draw_weight(shard, draw.std, draw.uniform, seed, name, threads, draw.mean)
            elif config.init_config.name == "default_" and _is_linear_bias(name, shapes):
                column = LocalShard(shard.local.unsqueeze(-1), torch.Size((*shard.shape, 1)), (*shard.offsets, 0))
                fan_in = shapes[name.removesuffix("bias") + "weight"][-1]
                draw_weight(column, 1 / math.sqrt(3 * fan_in), True, seed, name, threads)
            elif model.own_blocks or name.endswith(".bias"):
                shard.local.fill_(1.0 if _is_norm_weight(name) else 0.0)
    init_adapters(model, seed)
    for buffer in model.buffers() if model.own_blocks else ():  # a `transformers` module has set its own
        local_shard(buffer).local.zero_()


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Initialize every adapter, in place: B is zero, A uniform in +-1 / sqrt(fan_in), as in PEFT."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        for name, parameter in model.named_parameters():
            shard = local_shard(parameter)
            if name.endswith("lora_A"):
                draw_weight(shard, 1 / math.sqrt(3 * shard.shape[-1]), True, seed, name, threads)
            elif is_adapter(name):
                shard.local.zero_()


def _fan_out(config: CausalLMConfig, name: str, shapes: dict[str, torch.Size]) -> int:
    """Return the rows of a weight that form one layer: a head of q, k or v, or the gate or up half of a gated block."""
    if name.endswith((".wqkv.weight", ".wq.weight")) and isinstance(config.attention, GroupedQueryConfig):
        return config.attention.rotary_dim(config.d_model, config.n_heads)
    if name.endswith((".w1", ".w1.weight")):
        down = shapes.get(re.sub(r"w1((\.weight)?)$", r"w2\1", name))
        return shapes[name][-2] if down is None else down[-1]
    return shapes[name][-2]


def _is_linear_bias(name: str, shapes: dict[str, torch.Size]) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and len(shapes.get(f"{module}.weight", ())) == 2


def _is_norm_weight(name: str) -> bool:
    *_, module, leaf = ("", *name.split("."))
    return leaf == "weight" and "norm" in module


def draw_weight(
    shard: LocalShard, std: float, uniform: bool, seed: int, name: str, threads: ThreadPoolExecutor, mean: float = 0.0
) -> None:
    """Fill a shard of a parameter of two or more dims with its part of the values.

    Args:
        shard: this rank's part.
        std: standard deviation.
        uniform: uniform instead of normal.
        seed: the run's seed.
        name: the parameter's name without wrappers.
        threads: pool that draws the blocks.
        mean: of the values.
    """
    if shard.local.numel() == 0:
        return
    *lead, _, columns = shard.shape
    first_column, n_columns = shard.offsets[-1], shard.local.shape[-1]
    for at, matrix in _matrices(shard, tuple(lead)):  # one at a time, to keep the copy small
        direct = matrix.device.type == "cpu" and matrix.dtype == torch.float32 and matrix.is_contiguous()
        values = matrix if direct else torch.empty(matrix.shape, dtype=torch.float32)  # (rows, n_columns)

        def draw(block: _Block, values: Tensor = values, at: int = at) -> None:
            generator = torch.Generator().manual_seed(seed_of(seed, name, at, block.number))
            target = values[block.start : block.start + block.n]
            whole = block.skip == 0 and block.n == block.rows and n_columns == columns
            drawn = target if whole else torch.empty(block.rows, columns)
            if uniform:
                drawn.uniform_(mean - math.sqrt(3) * std, mean + math.sqrt(3) * std, generator=generator)
            else:
                drawn.normal_(mean, std, generator=generator)
            if not whole:
                rows = drawn[block.skip : block.skip + block.n]
                target.copy_(rows[:, first_column : first_column + n_columns])

        blocks = _blocks(shard.shape[-2], columns, shard.offsets[-2], shard.local.shape[-2])
        list(threads.map(draw, blocks))
        if not direct:
            matrix.copy_(values)


class _Block(NamedTuple):
    """A block of rows, and its overlap with a shard."""

    number: int  # index of the block in its matrix
    rows: int  # rows in the block
    skip: int  # rows of the block before the shard
    n: int  # rows of the block in the shard
    start: int  # the first of these rows, in the shard


def _blocks(n_rows: int, columns: int, first: int, n: int) -> Iterator[_Block]:
    """Yield the blocks of an (n_rows, columns) matrix that overlap its rows [first, first + n)."""
    size = max(1, _BLOCK_VALUES // columns)
    for number in range(first // size, -(-(first + n) // size)):
        low, high = number * size, min((number + 1) * size, n_rows)
        start, end = max(low, first), min(high, first + n)
        yield _Block(number, high - low, start - low, end - start, start - first)


def _matrices(shard: LocalShard, lead: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """Yield each matrix that overlaps a shard: its index in the full parameter, and its local part (rows, columns)."""
    if not lead:
        yield 0, shard.local
        return
    for local_index in range(shard.local.shape[0]):
        index = shard.offsets[0] + local_index
        inner = LocalShard(shard.local[local_index], shard.shape[1:], shard.offsets[1:])
        for below, matrix in _matrices(inner, lead[1:]):
            yield index * math.prod(lead[1:]) + below, matrix
