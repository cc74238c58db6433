"""Time MoE layers side by side in one process: ours, `auto`, the grouped_mm pipeline, and others' where installed.

Others: `transformers`' experts (grouped_mm), liger-kernel's fused MoE, ScatterMoE, SonicMoE. MegaBlocks 0.10 does not
build on CUDA 13. A provider that cannot run has a `failed` row; `auto` has the figures of the backend that it picks.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k. The router (product, softmax, top-k) is timed
with every provider. TFLOP/s count the experts' arithmetic alone: 6*T*K*D*F forward, 18*T*K*D*F with backward.

    python scripts/bench/moe_layer.py --tokens 16384 --out scripts/bench/results/moe_layer.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from math import prod
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

from llmfoundry.kernels.experts import ExpertKind, experts_ffn, resolve_backend
from llmfoundry.kernels.top_k import top_k_ids
from llmfoundry.moe.router import router_logits

CASE = ("provider", "shape", "T", "routing")  # what tells rows apart
SHAPES = {  # D, F, E, K
    "mixtral": (4096, 14336, 8, 2),
    "dbrx": (6144, 10752, 16, 4),
    "olmoe": (2048, 1024, 64, 8),
    "qwen30b": (2048, 768, 128, 8),
}
PROVIDERS = ("triton", "auto", "grouped_mm", "transformers", "liger", "scattermoe", "sonicmoe")
SECONDS = 0.4  # enough calls for a median whose spread is recorded beside it
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def route(x: Tensor, router: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax top-k in float32: weights (T, K), experts (T, K). `bias` (E,) shapes the load of a routing."""
    logits = router_logits(x, router, None)
    experts = top_k_ids(logits.detach() + bias, top_k)
    return logits.softmax(-1).gather(-1, experts), experts


def load_bias(routing: str, n_experts: int, x: Tensor) -> Tensor:
    """What is added to the log-scores: nothing, or a Zipf law over experts, or (later) a balancing bias."""
    if routing == "zipf":
        return -torch.log1p(torch.arange(n_experts, device=x.device, dtype=torch.float32))
    return torch.zeros(n_experts, device=x.device)


def balance(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    """A bias that evens the load out, found by 100 steps of the loss-free rule."""
    bias = torch.zeros(router.shape[0], device=x.device)
    for step in range(100):
        _, experts = route(x, router, bias, top_k)
        load = torch.bincount(experts.reshape(-1), minlength=bias.numel()).float()
        bias += (load.mean() - load).sign() * 0.3 * 0.95**step
    return bias


def build(provider: str, w1: Tensor, w2: Tensor) -> Layer:
    """A function of (x, weights, experts) and nothing else that differs between providers."""
    if provider == "transformers":
        return transformers_experts(w1, w2)
    if provider == "liger":
        return liger(w1, w2)
    if provider == "scattermoe":
        return scattermoe(w1, w2)
    if provider == "sonicmoe":
        return sonicmoe(w1, w2)
    backend = resolve_backend(provider, ExpertKind(*w2.shape[1:]), w2.device, w2.dtype)
    return lambda x, weights, experts: experts_ffn(
        x, weights, experts, w1, w2, activation="silu", gated=True, backend=backend
    )


def transformers_experts(w1: Tensor, w2: Tensor) -> Layer:
    """The experts of its OLMoE by grouped_mm, on these weights."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    n_experts, d_model, hidden = w2.shape
    config = OlmoeConfig(hidden_size=d_model, intermediate_size=hidden, num_experts=n_experts)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = OlmoeExperts(config)
    for name, weight in (("gate_up_proj", w1), ("down_proj", w2)):
        delattr(module, name)
        setattr(module, name, weight)
    return lambda x, weights, experts: module(x, experts, weights.to(x.dtype))


@cache
def _liger_function() -> type[torch.autograd.Function]:
    """Its fused MoE with a smaller list for its tuner, which tries 32 tile sizes a kernel, for minutes a shape.

    Of the list, those stay whose tiles are the largest, with at most four stages.
    """
    from liger_kernel.ops import fused_moe_kernels
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    for tuner in vars(fused_moe_kernels).values():
        if isinstance(tuner, triton.runtime.Autotuner):
            size = lambda config: prod(config.kwargs.values())  # noqa: E731
            largest = max(map(size, tuner.configs))
            tuner.configs = [c for c in tuner.configs if size(c) == largest and c.num_stages <= 4]
    return LigerFusedMoEFunction


def liger(w1: Tensor, w2: Tensor) -> Layer:
    function = _liger_function()
    return lambda x, weights, experts: function.apply(x, w1, w2, experts.int(), weights)


def scattermoe(w1: Tensor, w2: Tensor) -> Layer:
    """Its GLU layer, on these weights: gate rows first, no copy of them."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def layer(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        order = flatten_sort_count(experts, num_experts=w1.shape[0])
        h = parallel_linear(x, w1.transpose(1, 2), experts.shape[1], *order, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        a = nn.functional.silu(gate) * up
        return parallel_linear(a, w2.transpose(1, 2), 1, *order, grouped_in=True, gates=weights.to(x.dtype))

    return layer


# What SonicMoE's tuners choose from. Of products: rows and columns of a tile, and whether two consumers store in turn.
SONIC_TILES = [(256, 128, False), (256, 160, False), (256, 192, False), (128, 256, False),
               (128, 128, True), (128, 160, True), (128, 192, True), (192, 128, True)]  # fmt: skip
# Of sums: columns, rows, warps.
SONIC_SUMS = [(1024, 2, 4), (2048, 1, 4), (1024, 4, 4), (2048, 2, 8), (1024, 8, 8), (2048, 4, 8)]


@cache
def _sonicmoe_functions() -> tuple[type[torch.autograd.Function], type[torch.autograd.Function], Callable[..., None]]:
    """Its up and down projection and its sort, with smaller lists for its tuners, which take many minutes a shape."""
    from quack import gemm_interface
    from quack.autotuner import AutotuneConfig
    from quack.gemm_config import GemmConfig
    from sonicmoe.functional import _DownProjection, _UpProjection, reduction_over_k_gather
    from sonicmoe.functional.triton_kernels import TC_topk_router_metadata_triton

    tiles = [
        AutotuneConfig(config=GemmConfig(tile_m=m, tile_n=n, pingpong=pingpong, is_dynamic_persistent=False))
        for m, n, pingpong in SONIC_TILES
    ]
    for tuner in (gemm_interface.gemm_tuned, gemm_interface.gemm_gated_tuned, gemm_interface.gemm_dgated_tuned):
        tuner.configs = list(tiles)
    reduction_over_k_gather.token_gather_sum_kernel.configs = [
        triton.Config({"BLOCK_H": columns, "BLOCK_K": rows}, num_warps=warps, num_stages=4)
        for columns, rows, warps in SONIC_SUMS
    ]
    return _UpProjection, _DownProjection, TC_topk_router_metadata_triton


def sonicmoe(w1: Tensor, w2: Tensor) -> Layer:
    """Its layer behind the router of all providers. It takes w1's rows as gate and up rows in turn."""
    from sonicmoe.enums import ActivationType

    up, down, sort = _sonicmoe_functions()
    n_experts = w1.shape[0]

    def layer(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        n_tokens, top_k = experts.shape
        empty = partial(torch.empty, dtype=torch.int32, device=x.device)
        start, order = empty(n_experts + 1), [empty(experts.numel()) for _ in range(3)]
        sort(experts.int(), n_experts, empty(n_experts), start, *order)
        unit, inference = ActivationType.SWIGLU, not torch.is_grad_enabled()
        a, h = up.apply(
            x, w1.permute(1, 2, 0), None, start, experts.numel(), top_k, *order, None, False, unit, inference, False
        )
        return down.apply(a, h, w2.permute(1, 2, 0), None, weights, start, n_tokens, top_k, *order, None, False, unit)

    return layer


def milliseconds(call: Callable[[], object], warmup: int, iterations: int) -> list[float]:
    """CUDA-event times of calls that follow each other: as many as SECONDS hold, 3 at least, `iterations` at most."""
    for _ in range(warmup):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
    torch.cuda.synchronize()
    n = min(iterations, max(3, int(SECONDS / (time.perf_counter() - begin))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for begin_event, end_event in events:
        begin_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return [begin_event.elapsed_time(end_event) for begin_event, end_event in events]


def measure(
    provider: str, leaves: list[Tensor], bias: Tensor, top_k: int, warmup: int, iterations: int
) -> dict[str, float]:
    x, router, w1, w2 = leaves
    layer = build(provider, w1, w2)
    flops = 6 * x.shape[0] * top_k * w2.shape[1] * w2.shape[2]
    dy = torch.randn_like(x)

    def forward() -> Tensor:
        return layer(x, *route(x, router, bias, top_k))

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, dy)

    both()  # compiles, and lets tuners tune
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    # What the layer keeps; y itself is the next layer's input.
    activation = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    del y
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated()
    with torch.no_grad():
        forward_ms = milliseconds(forward, warmup, iterations)
    both_ms = milliseconds(both, warmup, iterations)
    fwd, fb = statistics.median(forward_ms), statistics.median(both_ms)
    spread = statistics.quantiles(both_ms, n=10)
    return {
        "fwd_ms": fwd, "fwdbwd_ms": fb, "fwdbwd_p10_ms": spread[0], "fwdbwd_p90_ms": spread[-1],
        "fwd_tflops": flops / fwd / 1e9, "fwdbwd_tflops": 3 * flops / fb / 1e9,
        "activation_mib": activation / 2**20, "peak_mib": peak / 2**20,
    }  # fmt: skip


def dense_ceiling(d_model: int, hidden: int, rows: int, warmup: int, iterations: int) -> float:
    """TFLOP/s of two cuBLAS products of the layer's own sizes, as if all rows had one expert."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, w1, w2 = make(rows, d_model), make(d_model, 2 * hidden), make(hidden, d_model)
    a = make(rows, hidden)
    ms = statistics.median(milliseconds(lambda: (x @ w1, a @ w2), warmup, iterations))
    return 6 * rows * d_model * hidden / ms / 1e9


def machine() -> dict[str, str]:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "git_sha": git.stdout.strip(),
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(ask, capture_output=True, text=True).stdout.strip().split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def rows_of(path: Path, facts: dict[str, object], case: tuple[str, ...]) -> dict[tuple[object, ...], dict[str, object]]:
    """The rows that a file has, by case: a run replaces its own and keeps the others.

    Args:
        facts: what all rows of one file share.
        case: the columns that tell rows apart.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    rows = found.pop("rows")
    if found != facts:
        raise SystemExit(f"{path} is of another machine ({found}, not {facts}); choose another --out")
    return {tuple(row[column] for column in case): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384, 32768])
    parser.add_argument("--routing", nargs="+", default=["natural", "balanced", "zipf"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/moe_layer.json"))
    args = parser.parse_args()
    result: dict[str, object] = {**machine(), "dtype": "bfloat16"}
    run = {"git_sha": result.pop("git_sha"), "warmup": args.warmup, "iterations": args.iterations}
    rows = rows_of(args.out, result, CASE)
    for name in args.shapes:
        d_model, hidden, n_experts, top_k = SHAPES[name]
        torch.manual_seed(0)
        options = {"device": "cuda", "dtype": torch.bfloat16}
        router = torch.randn(n_experts, d_model, **options) * d_model**-0.5
        w1 = torch.randn(n_experts, 2 * hidden, d_model, **options) * d_model**-0.5
        w2 = torch.randn(n_experts, d_model, hidden, **options) * hidden**-0.5
        for tokens in args.tokens:
            x, kind = torch.randn(tokens, d_model, **options), ExpertKind(d_model, hidden)
            ceiling = dense_ceiling(d_model, hidden, tokens, args.warmup, args.iterations)
            for routing in args.routing:
                bias = balance(x, router, top_k) if routing == "balanced" else load_bias(routing, n_experts, x)
                done: dict[str, dict[str, float]] = {}
                for provider in args.providers:
                    leaves = [t.detach().requires_grad_() for t in (x, router, w1, w2)]
                    row: dict[str, object] = {"provider": provider, "shape": name, "T": tokens, "routing": routing}
                    picked = resolve_backend("auto", kind, x.device, x.dtype) if provider == "auto" else ""
                    try:
                        done[provider] = done.get(picked) or measure(
                            provider, leaves, bias, top_k, args.warmup, args.iterations
                        )
                        row |= done[provider] | {"dense_tflops": ceiling} | ({"picked": picked} if picked else {})
                        row["fraction_of_dense"] = float(str(row["fwdbwd_tflops"])) / ceiling
                    except (RuntimeError, ImportError, AttributeError, TypeError) as error:
                        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                    rows[tuple(row[column] for column in CASE)] = row | run
                    shown = {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}
                    print(json.dumps(shown), flush=True)
                    args.out.write_text(json.dumps(result | {"rows": list(rows.values())}, indent=1) + "\n")
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
