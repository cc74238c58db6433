"""Time the update of a step: norm, clip and AdamW, for the parameters of an OLMoE of some layers on one GPU.

Providers: torch's fused AdamW after a clip that waits for the norm and scales the gradients in a pass, which is what
clipping usually costs; ours, with the norm left on the device, by the dtypes of gradients and moments. The norm is far
above the limit, so every provider has to scale.

    python scripts/bench/update.py --out scripts/bench/results/update.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from moe_layer import machine
from torch import nn

from llmfoundry.train.adamw import AdamW
from llmfoundry.train.optim import clip_by_global_norm, clipping, update

D, F, E, V = 2048, 1024, 64, 50304
LAYER = [(E, 2 * F, D), (E, D, F), (D, D), (D, D), (D, D), (D, D), (E, D), (D,), (D,), (D,), (D,)]
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
BF16 = torch.bfloat16
HALVES = "weights in halves"  # the end of a provider's name; its weights are the high ones
PROVIDERS = {  # dtypes of gradients, of moments and of weights
    "torch fused, clip by a pass": (torch.float32, None, torch.float32),
    "ours": (torch.float32, None, torch.float32),
    "ours, bf16 moments": (torch.float32, BF16, torch.float32),
    "ours, bf16 gradients": (BF16, None, torch.float32),
    "ours, bf16 gradients and moments": (BF16, BF16, torch.float32),
    f"ours, bf16 gradients, {HALVES}": (BF16, None, BF16),
    f"ours, bf16 gradients and moments, {HALVES}": (BF16, BF16, BF16),
    "ours, bf16 gradients and weights": (BF16, None, BF16),
    "ours, bf16 gradients, moments and weights": (BF16, BF16, BF16),
}


def parameters(layers: int, dtype: torch.dtype, weight: torch.dtype) -> list[nn.Parameter]:
    """With gradients of `dtype`."""
    made = []
    for shape in [(V, D), (V, D), (D,), *LAYER * layers]:
        parameter = nn.Parameter(torch.empty(shape, device="cuda", dtype=weight).normal_(std=0.02))
        if dtype != weight:
            parameter.grad_dtype = dtype
        parameter.grad = torch.empty(shape, device="cuda", dtype=dtype).normal_()
        made.append(parameter)
    return made


def step_of(provider: str, weights: list[nn.Parameter], moment: torch.dtype | None) -> Callable[[], None]:
    if provider.startswith("torch"):
        theirs = torch.optim.AdamW(weights, fused=True, **SETTINGS)
        kept = [each.grad.clone() for each in weights]

        def fused() -> None:
            clip_by_global_norm(weights, 1.0)
            theirs.step()

        def again() -> None:  # scaled once, they need no scaling the next time
            torch._foreach_copy_([each.grad for each in weights], kept)

        return lambda: (again(), fused())[1]
    ours = AdamW([{"params": weights}], state_dtype=moment, halves=provider.endswith(HALVES), **SETTINGS)
    return lambda: update(ours, clipping(weights, 1.0))


def milliseconds(call: Callable[[], object]) -> list[float]:
    return triton.testing.do_bench(call, warmup=100, rep=600, quantiles=[0.25, 0.5, 0.75])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/update.json"))
    args = parser.parse_args()
    rows = []
    for provider, (grad, moment, weight) in PROVIDERS.items():
        weights = parameters(args.layers, grad, weight)
        n = sum(each.numel() for each in weights)
        call = step_of(provider, weights, moment)
        low, ms, high = milliseconds(call)
        if provider.startswith("torch"):  # without the copies that bring the gradients back
            kept = [each.grad.clone() for each in weights]
            copies = milliseconds(lambda w=weights, k=kept: torch._foreach_copy_([each.grad for each in w], k))[1]
            low, ms, high = low - copies, ms - copies, high - copies
            del kept
        norm = milliseconds(lambda w=weights: clipping(w, 1.0))[1]
        row = {"provider": provider, "parameters": n, "ms": ms, "ms_quartiles": [low, high], "norm_ms": norm}
        row["ms_per_1e9_parameters"] = ms / n * 1e9
        moved = (
            2 * (4 if provider.endswith(HALVES) else weight.itemsize)
            + grad.itemsize
            + 4 * (moment or torch.float32).itemsize
        )
        row["update_gb_per_second"] = moved * n / (ms - norm) / 1e6
        rows.append(row)
        print(json.dumps(row), flush=True)
        del weights, call
        torch.cuda.empty_cache()
    facts = machine() | {"config": f"OLMoE-1B-7B, {args.layers} layers", "warmup_ms": 100, "timed_ms": 600}
    args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
