"""Time each kernel of our MoE layer alone, in the tile sizes that the tuner picks.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, M = T*K rows. Natural routing of random inputs.
TFLOP/s count a product's arithmetic, GB/s the bytes that a kernel has to read and write once.

    python scripts/bench/moe_kernels.py --shapes qwen30b --out scripts/bench/results/moe_kernels.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from moe_layer import SHAPES, machine, route, rows_of

from llmfoundry.kernels.gather import gather, slot_sums, sum_rows
from llmfoundry.kernels.grouped import grouped
from llmfoundry.kernels.routing_triton import sort_by_expert_triton
from llmfoundry.kernels.tiles import tile_rows
from llmfoundry.kernels.tune import DOWN, DW1, DW2, DX, UP, UP_BACKWARD, Problem, pick
from llmfoundry.kernels.up import up
from llmfoundry.kernels.up_backward import up_backward
from llmfoundry.kernels.weight_grad import weight_grad

# SonicMoE's own tuner on an H100 of this kind, ms: what the three products with an epilogue are held against.
SONIC_MOE = {("qwen30b", 16384): {"up": 1.468, "down": 0.623, "up_backward": 1.017}}
CASE = ("kernel", "shape", "T")
Row = dict[str, object]


def kernels(shape: str, n_tokens: int) -> list[Row]:
    d_model, hidden, n_experts, top_k = SHAPES[shape]
    torch.manual_seed(0)
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    router = make(n_experts, d_model) * d_model**-0.5
    w1, w2 = make(n_experts, 2 * hidden, d_model) * d_model**-0.5, make(n_experts, d_model, hidden) * hidden**-0.5
    x, dy = make(n_tokens, d_model), make(n_tokens, d_model)
    n_rows = n_tokens * top_k
    problem = Problem(w1.device, str(w1.dtype), d_model, hidden, n_experts, 2, n_rows)
    unit = {"activation": "silu", "gated": True}

    weights, experts = route(x, router, torch.zeros(n_experts, device="cuda"), top_k)
    order = sort_by_expert_triton(experts, n_experts)
    tiles = tile_rows(order.expert_start, n_rows)
    slot = order.row_slot
    x_rows, dy_rows = gather(x, order, n_rows), gather(dy, order, n_rows)
    run_up = partial(up, x_rows, weights, slot, tiles, w1, **unit)
    h, a = pick(UP, problem, run_up, plain=True)
    run_back = partial(up_backward, dy_rows, h, weights, slot, tiles, w2, **unit)
    dh, scaled, ds = pick(UP_BACKWARD, problem, run_back)
    run_down = partial(grouped, a, w2, tiles)
    y_rows = pick(DOWN, problem, run_down, plain=True)

    product = 2 * n_rows * d_model * hidden  # FLOPs of one of the three matrices
    rows, wide = 2 * n_rows * d_model, 2 * n_rows * hidden  # bytes
    w1_bytes, w2_bytes, tokens = 2 * w1.numel(), 2 * w2.numel(), 2 * x.numel()
    table: list[tuple[str, Callable[[], object], int, int]] = [
        ("route", lambda: route(x, router, torch.zeros(n_experts, device="cuda"), top_k), 0, tokens),
        ("sort", lambda: sort_by_expert_triton(experts, n_experts), 0, 8 * n_rows),
        ("tiles", lambda: tile_rows(order.expert_start, n_rows), 0, 0),
        ("gather", lambda: gather(x, order, n_rows), 0, tokens + rows),
        ("up", lambda: pick(UP, problem, run_up, plain=True), 2 * product, rows + w1_bytes + 3 * wide),
        ("down", lambda: pick(DOWN, problem, run_down, plain=True), product, wide + w2_bytes + rows),
        ("sum_rows", lambda: sum_rows(y_rows, order, top_k), 0, rows + tokens),
        ("up_backward", lambda: pick(UP_BACKWARD, problem, run_back), product, rows + w2_bytes + 5 * wide),
        ("slot_sums", lambda: slot_sums(ds, order), 0, 4 * ds.numel()),
        (
            "dx",
            lambda: pick(DX, problem, partial(grouped, dh, w1, tiles, transposed=True), plain=True),
            2 * product,
            2 * wide + w1_bytes + rows,
        ),
        ("dw2", lambda: pick(DW2, problem, partial(weight_grad, dy_rows, scaled, tiles), plain=True), product,
         rows + wide + w2_bytes),
        ("dw1", lambda: pick(DW1, problem, partial(weight_grad, dh, x_rows, tiles), plain=True), 2 * product,
         2 * wide + rows + w1_bytes),
    ]  # fmt: skip
    found: list[Row] = []
    for name, call, flops, size in table:
        low, ms, high = triton.testing.do_bench(call, warmup=20, rep=60, quantiles=[0.25, 0.5, 0.75])
        row: Row = {"kernel": name, "shape": shape, "T": n_tokens, "ms": ms, "ms_quartiles": [low, high]}
        row |= {"tflops": flops / ms / 1e9 if flops else None, "gb_per_second": size / ms / 1e6 if size else None}
        row["sonic_moe_ms"] = SONIC_MOE.get((shape, n_tokens), {}).get(name)
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/moe_kernels.json"))
    args = parser.parse_args()
    facts: Row = {**machine(), "dtype": "bfloat16"}
    run = {"git_sha": facts.pop("git_sha")}
    rows = rows_of(args.out, facts, CASE)
    for shape in args.shapes:
        rows |= {tuple(row[column] for column in CASE): row | run for row in kernels(shape, args.tokens)}
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(facts | {"rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
