"""What all grouped kernels share: the tiles that cover the experts' rows, and descriptors of ragged rows.

Shapes: M rows in expert order, E experts, N_TILES bound on row tiles = ceil(M / 128) + E.
A row tile never spans two experts. The number of tiles depends on the routing and stays on the device: kernels are
persistent, their grid is the number of SMs, and they read `Tiles.n_tiles`. The busiest experts come first, so that the
last wave consists of short tiles. While a collective occupies some SMs, the others take over their tiles (`turns`).
`tf32x3` only affects float32 products: each operand is split into two TF32 numbers, for nearly float32 precision on
tensor cores. Triton's default would use one.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmfoundry.kernels.whole import cdiv, next_power_of_2

TILE_ROWS = 128  # height of a row tile: two warp groups of 64, the most that Hopper's registers hold


class Tiles(NamedTuple):
    """The rows of each row tile. All int32, on the device."""

    expert_start: Tensor  # (E+1,) first row of each expert
    by_load: Tensor  # (E,) experts, the busiest first
    expert: Tensor  # (N_TILES,) expert of each row tile
    row: Tensor  # (N_TILES,) its first row
    n_tiles: Tensor  # (1,) number of tiles used, at most N_TILES
    first: Tensor  # (E,) the first row tile of each expert


class HopperConfig(NamedTuple):
    """Config of a kernel in `hopper.py`: the order of tiles. Their sizes are fixed by the hardware.

    That file is only imported where such a kernel is launched, because Gluon is experimental.
    """

    group: int = 8


@cache
def n_programs(device: torch.device) -> int:
    """Return the number of programs of a persistent kernel: one per SM (a few in Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def turns() -> int:
    """Return how many times a persistent kernel hands out its remaining tiles: once, if no collective takes SMs.

    A program takes its tiles when it starts, which may be late: a collective that runs beside the kernel occupies some
    SMs for a millisecond, and their tiles would finish after all others. So the programs of the first turn take half of
    the tiles, those of the next turn half of the rest, and so on. A program starts wherever one has ended, so an SM
    that was occupied takes fewer turns. With one GPU there is a single turn, because each turn refills the pipeline.
    """
    return 5 if dist.is_initialized() and dist.get_world_size() > 1 else 1


@triton.jit
def my_tiles(n_tiles, PROGRAMS: tl.constexpr, TURNS: tl.constexpr):
    """Return a program's first tile, and the end of its turn; its tiles are PROGRAMS apart."""
    first = tl.program_id(0)
    end = n_tiles
    if TURNS > 1:
        turn = first // PROGRAMS
        rounds = (n_tiles + PROGRAMS - 1) // PROGRAMS
        first = first - turn * PROGRAMS + (rounds - (rounds >> turn)) * PROGRAMS
        if turn < TURNS - 1:
            end = min(n_tiles, (rounds - (rounds >> (turn + 1))) * PROGRAMS)
    return first, end


def ragged(rows: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a TMA descriptor of (M, N) or (M, P, N) rows that clips reads and writes at an expert's last row."""
    return create_ragged_descriptor(rows, block)


def plain(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a TMA descriptor of a contiguous tensor; out-of-bounds reads give zero."""
    return TensorDescriptor.from_tensor(tensor, block)


@triton.jit
def _tiles_kernel(
    start_ptr, by_load_ptr, expert_ptr, row_ptr, count_ptr, first_ptr, n_experts,
    TILE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per expert: computes its rank in the order of load, and its row tiles."""
    e = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    start = tl.load(start_ptr + ids, mask=ids < n_experts, other=0)
    load = tl.load(start_ptr + ids + 1, mask=ids < n_experts, other=0) - start
    own_start = tl.load(start_ptr + e)
    own_load = tl.load(start_ptr + e + 1) - own_start
    ahead = (ids < n_experts) & ((load > own_load) | ((load == own_load) & (ids < e)))
    tl.store(by_load_ptr + tl.sum(ahead.to(tl.int32)), e)
    tiles = (load + TILE - 1) // TILE
    first = tl.sum(tl.where(ahead, tiles, 0))
    tl.store(first_ptr + e, first)
    own_tiles = (own_load + TILE - 1) // TILE
    for begin in tl.range(0, own_tiles, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        tl.store(expert_ptr + first + i, e + i * 0, mask=i < own_tiles)
        tl.store(row_ptr + first + i, own_start + i * TILE, mask=i < own_tiles)
    if e == 0:
        tl.store(count_ptr, tl.sum(tiles))


def tile_rows(expert_start: Tensor, n_rows: int, store: Tensor | None = None) -> Tiles:
    """Compute the row tiles of an order.

    Args:
        expert_start: (E+1,) int32.
        n_rows: M, a bound on expert_start[E].
        store: memory to write to, (tiles_length(E, M),) int32; allocated by default.
    """
    n_experts = expert_start.numel() - 1
    if store is None:
        store = expert_start.new_empty(tiles_length(n_experts, n_rows))
    tiles = tiles_in(store, expert_start, n_rows)
    _tiles_kernel[(n_experts,)](*tiles, n_experts, TILE=TILE_ROWS, EXPERTS=next_power_of_2(n_experts), CHUNK=64)
    return tiles


def tiles_in(store: Tensor, expert_start: Tensor, n_rows: int) -> Tiles:
    """Return the row tiles that `tile_rows` wrote to `store` for the same arguments."""
    n_experts = expert_start.numel() - 1
    by_load, _, expert, row, n_tiles, _, first = store.split_with_sizes(_lengths(n_experts, n_rows))
    return Tiles(expert_start, by_load, expert, row, n_tiles, first)


def tiles_length(n_experts: int, n_rows: int) -> int:
    """Return the number of int32 values that `tile_rows` writes."""
    return sum(_lengths(n_experts, n_rows))


def _lengths(n_experts: int, n_rows: int) -> list[int]:
    """Return the lengths of what `Tiles` holds beside `expert_start`, at multiples of 16 bytes for aligned pointers.

    It is not cached, because in a compiled graph for any number of rows `n_rows` is a symbol, which has no hash.
    """
    bound = 4 * cdiv(cdiv(n_rows, TILE_ROWS) + n_experts, 4)
    return [n_experts, -n_experts % 4, bound, bound, 1, 3, n_experts]


def tile_rows_reference(expert_start: Tensor, n_rows: int) -> Tiles:
    """`tile_rows` in plain PyTorch, on the host."""
    start = expert_start.tolist()
    load = [b - a for a, b in zip(start[:-1], start[1:], strict=True)]
    by_load = sorted(range(len(load)), key=lambda e: (-load[e], e))
    tiles = [(e, start[e] + i) for e in by_load for i in range(0, load[e], TILE_ROWS)]
    expert, row = ([t[i] for t in tiles] for i in (0, 1))
    first = [sum(-(-load[f] // TILE_ROWS) for f in by_load[: by_load.index(e)]) for e in range(len(load))]
    as_int = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    return Tiles(expert_start, as_int(by_load), as_int(expert), as_int(row), as_int([len(tiles)]), as_int(first))


class Beside(NamedTuple):
    """A low-rank product that is added to a grouped one: `u @ v[e].T`, or `u @ v[e]` if the grouped one is transposed.

    It works as if u were more columns of the rows and v of the matrices: a kernel's loop continues over their
    descriptors, whose blocks are zero after the last of r columns. So an adapter costs one step of the loop and no
    shared memory.
    """

    u: Tensor  # (M, r) in expert order, r a multiple of 16
    v: Tensor  # (E, N, r), or (E, r, N)


@triton.jit
def place(tile, n_row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Map a tile number to (row tile, column tile): GROUP row tiles go through all columns together, for L2 reuse."""
    group = tile // (GROUP * COLUMN_TILES)
    first = group * GROUP
    height = min(n_row_tiles - first, GROUP)
    inside = tile - group * (GROUP * COLUMN_TILES)
    return first + inside % height, inside // height


@triton.jit
def write_rows(desc, start, size, row, column, acc, PIECES: tl.constexpr):
    """Store an accumulator as a block of (M, N) rows, in one piece or in two halves of the columns."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    dtype: tl.constexpr = desc.dtype
    if PIECES == 2:
        left, right = acc.reshape([BM, 2, BN // 2]).permute(0, 2, 1).split()
        write_ragged(desc, start, size, row, column, left.to(dtype))
        write_ragged(desc, start, size, row, column + BN // 2, right.to(dtype))
    else:
        write_ragged(desc, start, size, row, column, acc.to(dtype))


@triton.jit
def write_matrix(desc, e, row, column, acc, PIECES: tl.constexpr):
    """Store an accumulator as a block of an expert's matrix, (E, P, N), in pieces as `write_rows`."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    dtype: tl.constexpr = desc.dtype
    if PIECES == 2:
        left, right = acc.reshape([BM, 2, BN // 2]).permute(0, 2, 1).split()
        desc.store([e, row, column], left.to(dtype).reshape([1, BM, BN // 2]))
        desc.store([e, row, column + BN // 2], right.to(dtype).reshape([1, BM, BN // 2]))
    else:
        desc.store([e, row, column], acc.to(dtype).reshape([1, BM, BN]))


@triton.jit
def read_ragged(desc, start, size, row, column):
    """Load a block of (M, N) rows from a ragged descriptor; rows past `start + size` are zero."""
    block: tl.constexpr = desc.block_shape[2:]
    return desc.load([1073741824, start + size, 1073741824 - size + row, column]).reshape(block)


@triton.jit
def write_ragged(desc, start, size, row, column, value):
    """Store a block of (M, N) rows; rows past `start + size` are not written."""
    shape: tl.constexpr = desc.block_shape
    desc.store([1073741824, start + size, 1073741824 - size + row, column], value.reshape(shape))


@triton.jit
def write_ragged_half(desc, start, size, row, half, column, value):
    """`write_ragged` to one half of (M, 2, N) rows."""
    shape: tl.constexpr = desc.block_shape
    desc.store([1073741824, start + size, 1073741824 - size + row, half, column], value.reshape(shape))


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """Return an activation of float32 `x` and its derivative."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        value = x * s
        slope = s + value * (1 - s)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * s
        slope = s + value * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "swiglu_oss":
        s = sigmoid(1.702 * x)
        value = x * s
        slope = s + 1.702 * value * (1 - s)
    elif ACTIVATION == "relu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        positive = tl.maximum(x, 0.0)
        value = positive * positive
        slope = 2 * positive
    return value, slope


@triton.jit
def unit_factors(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """Return act(gate), its slope, and up of `act(gate) * up` in float32, clamped and shifted as in activations.py."""
    if LIMIT is not None:
        beyond = gate > LIMIT
        value, slope = value_and_slope(tl.where(beyond, LIMIT, gate), ACTIVATION)  # NaN stays NaN
        slope = tl.where(beyond, 0.0, slope)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    else:
        value, slope = value_and_slope(gate, ACTIVATION)
    if ACTIVATION == "swiglu_oss":
        up += 1
    return value, slope, up
