"""Time the experts of a MoE layer with adapters beside their weights, in one process with the frozen layer.

Providers: `frozen` (no adapter: gradients of x and of the routing weights alone), `beside` (ours), `merged` (adapters
added to a copy of the weights, whose gradient is computed whole: what peft does for stacked parameters), each by the
Triton kernels; `beside_grouped_mm`, the same adapters in the other backend.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, r rank. Routing is uniform and drawn once.

    python scripts/bench/lora_layer.py --out scripts/bench/results/lora_layer.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from moe_layer import SHAPES, machine, milliseconds, rows_of
from torch import Tensor

from llmfoundry.kernels.experts import experts_ffn
from llmfoundry.kernels.low_rank import ExpertAdapters, LowRank
from llmfoundry.layers.lora import adapted

CASE = ("provider", "shape", "T", "rank")  # what tells rows apart
PROVIDERS = ("frozen", "beside", "merged", "beside_grouped_mm")
SCALE = 2.0


class Layer:
    """Frozen experts, their adapters and one batch."""

    def __init__(self, shape: str, tokens: int, rank: int) -> None:
        d_model, hidden, n_experts, top_k = SHAPES[shape]
        torch.manual_seed(0)
        make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.w1 = make(n_experts, 2 * hidden, d_model).mul_(d_model**-0.5)
        self.w2 = make(n_experts, d_model, hidden).mul_(hidden**-0.5)
        self.x, self.dy = make(tokens, d_model).requires_grad_(), make(tokens, d_model)
        scores = torch.rand(tokens, n_experts, device="cuda")
        chosen = scores.topk(top_k)
        self.experts, self.weights = chosen.indices, chosen.values.softmax(-1).requires_grad_()
        pairs = [(make(n_experts, rank, w.shape[2]), make(n_experts, w.shape[1], rank)) for w in (self.w1, self.w2)]
        self.up, self.down = (LowRank(*(t.mul_(0.02).requires_grad_() for t in pair)) for pair in pairs)

    def output(self, provider: str) -> Tensor:
        """What the layer computes."""
        w1, w2, adapters = self.w1, self.w2, None
        if provider == "merged":
            w1, w2 = adapted(w1, *self.up, SCALE), adapted(w2, *self.down, SCALE)
        elif provider.startswith("beside"):
            adapters = ExpertAdapters(self.up, self.down, SCALE)
        backend = "grouped_mm" if provider == "beside_grouped_mm" else "triton"
        return experts_ffn(
            self.x, self.weights, self.experts, w1, w2, activation="silu", gated=True, backend=backend,
            adapters=adapters,
        )  # fmt: skip

    def leaves(self, provider: str) -> list[Tensor]:
        """What gets gradients."""
        return [self.x, self.weights, *([] if provider == "frozen" else [*self.up, *self.down])]


def measure(layer: Layer, provider: str, warmup: int, iterations: int) -> dict[str, float]:
    """Milliseconds and peak memory of forward, and of forward and backward."""
    leaves = layer.leaves(provider)

    def both() -> object:
        return torch.autograd.grad(layer.output(provider), leaves, layer.dy)

    both()  # compiles, and lets tuners tune
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before

    def forward() -> Tensor:
        with torch.no_grad():
            return layer.output(provider)

    times: dict[str, Callable[[], object]] = {"fwd": forward, "fwdbwd": both}
    row = {"peak_mib": peak / 2**20}
    for name, call in times.items():
        found = milliseconds(call, warmup, iterations)
        spread = statistics.quantiles(found, n=10)
        row |= {f"{name}_ms": statistics.median(found), f"{name}_p10_ms": spread[0], f"{name}_p90_ms": spread[-1]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen30b"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/lora_layer.json"))
    args = parser.parse_args()
    facts: dict[str, object] = {**machine(), "dtype": "bfloat16"}
    run = {"git_sha": facts.pop("git_sha"), "warmup": args.warmup, "iterations": args.iterations}
    rows = rows_of(args.out, facts, CASE)
    for shape in args.shapes:
        for tokens in args.tokens:
            for rank in args.ranks:
                layer, frozen = Layer(shape, tokens, rank), None
                for provider in args.providers:
                    row: dict[str, object] = {"provider": provider, "shape": shape, "T": tokens, "rank": rank}
                    measured = measure(layer, provider, args.warmup, args.iterations)
                    frozen = measured["fwdbwd_ms"] if provider == "frozen" else frozen
                    row |= measured
                    if frozen is not None:
                        row["of_frozen"] = measured["fwdbwd_ms"] / frozen
                    rows[tuple(row[column] for column in CASE)] = row | run
                    print(
                        json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True
                    )
                    args.out.write_text(json.dumps(facts | {"rows": list(rows.values())}, indent=1) + "\n")
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
