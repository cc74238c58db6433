"""The experts' products on Hopper, with the loads, products and stores of different tiles overlapped.

Shapes: M rows in expert order, N output width, J inner width, P x N the gradient of a matrix, D d_model, F ffn hidden
size, E experts.
These are the plain products of `grouped.py`, `up.py` and `weight_grad.py`, bitwise equal: bf16, gated units, no
adapters, no biases. They are written in Gluon, Triton's lower-level language. A program consists of one warp that loads
and two warp groups that multiply, each for 64 of a tile's 128 rows. They synchronize only by barriers: loads run up to
STAGES steps ahead, across tiles, and while one group stores its rows, the other uses the tensor cores.
`tune.runs_gluon` says where these kernels run. The interpreter does not support them; the references are those of the
other files.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor as TritonDescriptor

from llmfoundry.kernels.tiles import (
    TILE_ROWS,
    HopperConfig,
    Tiles,
    my_tiles,
    n_programs,
    place,
    plain,
    ragged,
    turns,
    unit_factors,
)

HEIGHT = gl.constexpr(TILE_ROWS // 2)  # rows per warp group, the height of one instruction
WIDTH = gl.constexpr(256)  # columns of a tile, the width of one instruction
DEPTH = gl.constexpr(64)  # of the inner dim per step
STAGES = gl.constexpr(4)  # steps in shared memory, 48 KiB each
BLOCK = gl.constexpr(64)  # columns stored at once: 128 bytes, the widest swizzle
PLACES = gl.constexpr(2)  # blocks that each warp group stores concurrently, 8 KiB each
FAR = gl.constexpr(1073741824)  # offset of ragged descriptors, see `tiles.read_ragged`
WARPS = gl.constexpr([4, 1])  # of the second group and of the loads; the first group is the program's own four
REGISTERS = gl.constexpr([240, 24])  # per thread; the first group has as many as the second


# The parts that all kernels share.


@gluon.jit
def _memory(left_desc, right_desc, out_desc):
    """Allocate ring buffers of operands, staging buffers of results, and barriers: slot is full, slot is empty."""
    left = gl.allocate_shared_memory(left_desc.dtype, [STAGES] + left_desc.block_shape, left_desc.layout)
    right = gl.allocate_shared_memory(right_desc.dtype, [STAGES] + right_desc.block_shape, right_desc.layout)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEIGHT, BLOCK], out_desc.dtype)
    places = gl.allocate_shared_memory(out_desc.dtype, [2 * PLACES, HEIGHT, BLOCK], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    hopper.fence_async_shared()
    gl.thread_barrier()
    return left, right, places, full, empty


@gluon.jit
def _fill(left_desc, left_at, right_desc, right_at, left, right, full, empty, step):
    """Load a step's blocks once its slot in the ring buffers is empty."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
    bar = full.index(slot)
    mbarrier.expect(bar, left_desc.block_type.nbytes + right_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(left_desc, left_at, bar, left.index(slot))
    tma.async_copy_global_to_shared(right_desc, right_at, bar, right.index(slot))


@gluon.jit
def _matrix(ring, slot, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return a slot of a ring buffer without leading dims."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], ring.dtype)
    return ring.index(slot)._reinterpret(ring.dtype, [ROWS, COLUMNS], layout)


@gluon.jit
def _multiply(
    left, right, full, empty, step, n_steps,
    SECOND: gl.constexpr, LEFT_TURNED: gl.constexpr, RIGHT_TURNED: gl.constexpr,
):  # fmt: skip
    """Compute a group's half of a tile, (64, WIDTH) float32; `TURNED` operands lie as (DEPTH, ...) in the rings."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    acc = gl.zeros([HEIGHT, WIDTH], gl.float32, layout)
    for k in range(n_steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        if LEFT_TURNED:
            a = _matrix(left, slot, DEPTH, 2 * HEIGHT).slice(SECOND * HEIGHT, HEIGHT, dim=1).permute((1, 0))
        else:
            a = _matrix(left, slot, 2 * HEIGHT, DEPTH).slice(SECOND * HEIGHT, HEIGHT)
        if RIGHT_TURNED:
            b = _matrix(right, slot, DEPTH, WIDTH)
        else:
            b = _matrix(right, slot, WIDTH, DEPTH).permute((1, 0))
        acc = hopper.warpgroup_mma(a, b, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, [acc])
        if k > 0:  # the previous step is done
            mbarrier.arrive(empty.index((step - 1) % STAGES))
        step += 1
    acc = hopper.warpgroup_mma_wait(0, [acc])
    if n_steps > 0:
        mbarrier.arrive(empty.index((step - 1) % STAGES))
    return acc, step


@gluon.jit
def _skip(full, empty, step, n_steps):
    """Handle the barriers like `_multiply`, for the second group if its half of a tile has no rows."""
    for _ in range(n_steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        mbarrier.arrive(empty.index(slot))
        step += 1
    return step


@gluon.jit
def _store(desc, at, places, SECOND: gl.constexpr, NUMBER: gl.constexpr, value):
    """Store the NUMBERth (64, 64) block of a group's half of a tile."""
    block = places.index(PLACES * SECOND + NUMBER % PLACES)
    tma.store_wait(PLACES - 1)
    block.store(value.to(desc.dtype))
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(desc, at, block._reinterpret(desc.dtype, desc.block_shape, desc.layout))


@gluon.jit
def _blocks(acc):
    """Split into two or four (64, 64) blocks, from left to right."""
    left, right = _halves(acc)
    if acc.shape[1] == 2 * BLOCK:
        return (left, right)
    else:
        a, b = _halves(left)
        c, d = _halves(right)
        return (a, b, c, d)


@gluon.jit
def _halves(acc):
    return acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()


def _described(desc: TritonDescriptor) -> TensorDescriptor:
    """Return a descriptor with the layout of its blocks in shared memory, which Triton infers but Gluon does not."""
    layout = gl.NVMMASharedLayout.get_default_for(desc.block_shape, gl.bfloat16)
    return TensorDescriptor(desc.base, desc.shape, desc.strides, desc.block_shape, layout)


# Rows times their expert's matrix.


@gluon.jit
def _grouped_load(
    rows_desc, w_desc, left, right, full, empty, expert_ptr, row_ptr, count_ptr,
    J, N: gl.constexpr, BN: gl.constexpr, HALVES: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    COLUMN_TILES: gl.constexpr = (N + BN - 1) // BN
    n_row_tiles = gl.load(count_ptr)
    first, end_tile = my_tiles(n_row_tiles * COLUMN_TILES, PROGRAMS, TURNS)
    step = 0
    for tile in range(first, end_tile, PROGRAMS):
        i, j = place(tile, n_row_tiles, COLUMN_TILES, GROUP)
        e = gl.load(expert_ptr + i)
        row = gl.load(row_ptr + i)
        for k in range(0, J, DEPTH):
            if TRANSPOSED:
                _fill(rows_desc, [row, k], w_desc, [e, k, j * BN], left, right, full, empty, step)
            else:
                _fill(rows_desc, [row, k], w_desc, [e * HALVES, j * BN, k], left, right, full, empty, step)
            step += 1


@gluon.jit
def _grouped_group(
    left, right, places, full, empty, out_desc, start_ptr, expert_ptr, row_ptr, count_ptr,
    J, SECOND: gl.constexpr, N: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    COLUMN_TILES: gl.constexpr = (N + WIDTH - 1) // WIDTH
    n_row_tiles = gl.load(count_ptr)
    n_steps = (J + DEPTH - 1) // DEPTH
    first, end_tile = my_tiles(n_row_tiles * COLUMN_TILES, PROGRAMS, TURNS)
    step = 0
    for tile in range(first, end_tile, PROGRAMS):
        i, j = place(tile, n_row_tiles, COLUMN_TILES, GROUP)
        e = gl.load(expert_ptr + i)
        row = gl.load(row_ptr + i) + SECOND * HEIGHT
        end = gl.load(start_ptr + e + 1)
        if row < end:
            acc, step = _multiply(left, right, full, empty, step, n_steps, SECOND, False, TRANSPOSED)
            blocks = _blocks(acc)
            for b in gl.static_range(WIDTH // BLOCK):
                _store(out_desc, [FAR, end, FAR - end + row, j * WIDTH + b * BLOCK], places, SECOND, b, blocks[b])
        else:
            step = _skip(full, empty, step, n_steps)
    tma.store_wait(0)


@gluon.jit
def grouped_hopper_kernel(
    rows_desc, w_desc, out_desc, start_ptr, expert_ptr, row_ptr, count_ptr,
    J, N: gl.constexpr, TRANSPOSED: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    left, right, places, full, empty = _memory(rows_desc, w_desc, out_desc)
    gl.warp_specialize(
        [
            (_grouped_group, (left, right, places, full, empty, out_desc, start_ptr, expert_ptr, row_ptr, count_ptr,
                              J, 0, N, TRANSPOSED, GROUP, PROGRAMS, TURNS)),
            (_grouped_group, (left, right, places, full, empty, out_desc, start_ptr, expert_ptr, row_ptr, count_ptr,
                              J, 1, N, TRANSPOSED, GROUP, PROGRAMS, TURNS)),
            (_grouped_load, (rows_desc, w_desc, left, right, full, empty, expert_ptr, row_ptr, count_ptr,
                             J, N, WIDTH, 1, TRANSPOSED, GROUP, PROGRAMS, TURNS)),
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def grouped_hopper(rows: Tensor, w: Tensor, tiles: Tiles, *, transposed: bool, config: HopperConfig) -> Tensor:
    """`grouped.grouped` without an adapter."""
    n_rows, inner = rows.shape
    width = w.shape[2] if transposed else w.shape[1]
    out = rows.new_empty(n_rows, width)
    programs = n_programs(rows.device)
    grouped_hopper_kernel[(programs * turns(),)](
        _described(plain(rows, [TILE_ROWS, DEPTH.value])),
        _described(plain(w, [1, DEPTH.value, WIDTH.value] if transposed else [1, WIDTH.value, DEPTH.value])),
        _described(ragged(out, [HEIGHT.value, BLOCK.value])),
        tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles,
        inner, N=width, TRANSPOSED=transposed, GROUP=config.group, PROGRAMS=programs, TURNS=turns(), num_warps=4,
    )  # fmt: skip
    return out


# The up projection of gated units, with the activation. A tile has as many gate columns as up columns.


@gluon.jit
def _up_group(
    left, right, places, full, empty, h_desc, a_desc, weights_ptr, row_slot_ptr, start_ptr, expert_ptr, row_ptr,
    count_ptr, D, SECOND: gl.constexpr, F: gl.constexpr, ACTIVATION: gl.constexpr, LIMIT: gl.constexpr,
    GROUP: gl.constexpr, PROGRAMS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = WIDTH // 2
    COLUMN_TILES: gl.constexpr = (F + BN - 1) // BN
    BLOCKS: gl.constexpr = BN // BLOCK
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    n_row_tiles = gl.load(count_ptr)
    n_steps = (D + DEPTH - 1) // DEPTH
    first, end_tile = my_tiles(n_row_tiles * COLUMN_TILES, PROGRAMS, TURNS)
    step = 0
    for tile in range(first, end_tile, PROGRAMS):
        i, j = place(tile, n_row_tiles, COLUMN_TILES, GROUP)
        e = gl.load(expert_ptr + i)
        row = gl.load(row_ptr + i) + SECOND * HEIGHT
        end = gl.load(start_ptr + e + 1)
        if row < end:
            rows = row + gl.arange(0, HEIGHT, gl.SliceLayout(1, layout))
            slot = gl.load(row_slot_ptr + rows, mask=rows < end, other=0)
            s = gl.load(weights_ptr + slot)
            acc, step = _multiply(left, right, full, empty, step, n_steps, SECOND, False, False)
            at = FAR - end + row
            gate, up = _halves(acc)
            gates, ups = _blocks(gate), _blocks(up)
            for b in gl.static_range(BLOCKS):
                _store(h_desc, [FAR, end, at, 0, j * BN + b * BLOCK], places, SECOND, b, gates[b])
            for b in gl.static_range(BLOCKS):
                _store(h_desc, [FAR, end, at, 1, j * BN + b * BLOCK], places, SECOND, BLOCKS + b, ups[b])
            for b in gl.static_range(BLOCKS):
                value, _, factor = unit_factors(gates[b], ups[b], ACTIVATION, LIMIT)
                scale = gl.convert_layout(s, gl.SliceLayout(1, value.type.layout))
                a = value * factor * scale.expand_dims(1)
                _store(a_desc, [FAR, end, at, j * BN + b * BLOCK], places, SECOND, 2 * BLOCKS + b, a)
        else:
            step = _skip(full, empty, step, n_steps)
    tma.store_wait(0)


@gluon.jit
def up_hopper_kernel(
    x_desc, w1_desc, h_desc, a_desc, weights_ptr, row_slot_ptr, start_ptr, expert_ptr, row_ptr, count_ptr,
    D, F: gl.constexpr, ACTIVATION: gl.constexpr, LIMIT: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    left, right, places, full, empty = _memory(x_desc, w1_desc, a_desc)
    gl.warp_specialize(
        [
            (_up_group, (left, right, places, full, empty, h_desc, a_desc, weights_ptr, row_slot_ptr, start_ptr,
                         expert_ptr, row_ptr, count_ptr, D, 0, F, ACTIVATION, LIMIT, GROUP, PROGRAMS, TURNS)),
            (_up_group, (left, right, places, full, empty, h_desc, a_desc, weights_ptr, row_slot_ptr, start_ptr,
                         expert_ptr, row_ptr, count_ptr, D, 1, F, ACTIVATION, LIMIT, GROUP, PROGRAMS, TURNS)),
            (_grouped_load, (x_desc, w1_desc, left, right, full, empty, expert_ptr, row_ptr, count_ptr,
                             D, F, WIDTH // 2, 2, False, GROUP, PROGRAMS, TURNS)),
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def up_hopper(
    x_rows: Tensor, weights: Tensor, row_slot: Tensor, tiles: Tiles, w1: Tensor, *,
    activation: str, limit: float | None, config: HopperConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`up.up` for gated units, without biases or an adapter."""
    n_rows, d_model = x_rows.shape
    n_experts, hidden = w1.shape[0], w1.shape[1] // 2
    h, a = x_rows.new_empty(n_rows, 2 * hidden), x_rows.new_empty(n_rows, hidden)
    programs = n_programs(x_rows.device)
    up_hopper_kernel[(programs * turns(),)](
        _described(plain(x_rows, [TILE_ROWS, DEPTH.value])),
        _described(plain(w1.view(n_experts * 2, hidden, d_model), [2, WIDTH.value // 2, DEPTH.value])),
        _described(ragged(h.view(-1, 2, hidden), [HEIGHT.value, 1, BLOCK.value])),
        _described(ragged(a, [HEIGHT.value, BLOCK.value])),
        weights, row_slot, tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles,
        d_model, F=hidden, ACTIVATION=activation, LIMIT=limit, GROUP=config.group, PROGRAMS=programs, TURNS=turns(),
        num_warps=4,
    )  # fmt: skip
    return h, a


# The gradients of the matrices.


@gluon.jit
def _grad_load(
    left_desc, right_desc, left, right, full, empty, start_ptr, by_load_ptr, E,
    P: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    ROW_TILES: gl.constexpr = (P + 2 * HEIGHT - 1) // (2 * HEIGHT)
    COLUMN_TILES: gl.constexpr = (N + WIDTH - 1) // WIDTH
    TILES: gl.constexpr = ROW_TILES * COLUMN_TILES
    first, end_tile = my_tiles(E * TILES, PROGRAMS, TURNS)
    step = 0
    for tile in range(first, end_tile, PROGRAMS):
        e = gl.load(by_load_ptr + tile // TILES)
        i, j = place(tile % TILES, ROW_TILES, COLUMN_TILES, GROUP)
        start = gl.load(start_ptr + e)
        end = gl.load(start_ptr + e + 1)
        for row in range(start, end, DEPTH):
            left_at, right_at = [FAR, end, FAR - end + row, i * 2 * HEIGHT], [FAR, end, FAR - end + row, j * WIDTH]
            _fill(left_desc, left_at, right_desc, right_at, left, right, full, empty, step)
            step += 1


@gluon.jit
def _grad_group(
    left, right, places, full, empty, out_desc, start_ptr, by_load_ptr, E,
    SECOND: gl.constexpr, P: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    ROW_TILES: gl.constexpr = (P + 2 * HEIGHT - 1) // (2 * HEIGHT)
    COLUMN_TILES: gl.constexpr = (N + WIDTH - 1) // WIDTH
    TILES: gl.constexpr = ROW_TILES * COLUMN_TILES
    first, end_tile = my_tiles(E * TILES, PROGRAMS, TURNS)
    step = 0
    for tile in range(first, end_tile, PROGRAMS):
        e = gl.load(by_load_ptr + tile // TILES)
        i, j = place(tile % TILES, ROW_TILES, COLUMN_TILES, GROUP)
        n_steps = (gl.load(start_ptr + e + 1) - gl.load(start_ptr + e) + DEPTH - 1) // DEPTH
        acc, step = _multiply(left, right, full, empty, step, n_steps, SECOND, True, True)
        blocks = _blocks(acc)
        for b in gl.static_range(WIDTH // BLOCK):
            _store(out_desc, [e, (2 * i + SECOND) * HEIGHT, j * WIDTH + b * BLOCK], places, SECOND, b, blocks[b])
    tma.store_wait(0)


@gluon.jit
def weight_grad_hopper_kernel(
    left_desc, right_desc, out_desc, start_ptr, by_load_ptr, E,
    P: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    left, right, places, full, empty = _memory(left_desc, right_desc, out_desc)
    gl.warp_specialize(
        [
            (_grad_group, (left, right, places, full, empty, out_desc, start_ptr, by_load_ptr, E,
                           0, P, N, GROUP, PROGRAMS, TURNS)),
            (_grad_group, (left, right, places, full, empty, out_desc, start_ptr, by_load_ptr, E,
                           1, P, N, GROUP, PROGRAMS, TURNS)),
            (_grad_load, (left_desc, right_desc, left, right, full, empty, start_ptr, by_load_ptr, E,
                          P, N, GROUP, PROGRAMS, TURNS)),
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def weight_grad_hopper(left: Tensor, right: Tensor, tiles: Tiles, *, config: HopperConfig) -> Tensor:
    """`weight_grad.weight_grad` for bf16."""
    n_experts = tiles.expert_start.numel() - 1
    out = left.new_empty(n_experts, left.shape[1], right.shape[1])
    programs = n_programs(left.device)
    weight_grad_hopper_kernel[(programs * turns(),)](
        _described(ragged(left, [DEPTH.value, TILE_ROWS])),
        _described(ragged(right, [DEPTH.value, WIDTH.value])),
        _described(plain(out, [1, HEIGHT.value, BLOCK.value])),
        tiles.expert_start, tiles.by_load, n_experts, P=left.shape[1], N=right.shape[1],
        GROUP=config.group, PROGRAMS=programs, TURNS=turns(), num_warps=4,
    )  # fmt: skip
    return out
