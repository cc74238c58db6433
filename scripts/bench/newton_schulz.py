"""Time Muon's iteration on Gram matrices beside the plain one, for the matrices of some models on one GPU.

    python scripts/bench/newton_schulz.py --out scripts/bench/results/newton_schulz.json

Shapes: a batch of the matrices that one layer has, at most 64 as in a step, each R x C, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import triton
from moe_layer import machine
from torch import Tensor

from llmfoundry.kernels.muon import COEFFICIENTS, orthogonalize, orthogonalize_flops

STEPS = 5
SHAPES = {  # matrices, rows, columns
    "olmoe, gate and up": (64, 1024, 2048),
    "olmoe, down": (64, 2048, 1024),
    "olmoe, attention": (32, 2048, 2048),
    "qwen30b, gate and up": (64, 768, 2048),
    "mixtral, gate and up": (2, 14336, 4096),
}


def plain_iteration(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz as `torch.optim.Muon` has it, by cuBLAS, for a batch."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).to(x.dtype)
    wide = x.shape[1] <= x.shape[2]
    for _ in range(steps):
        gram = x @ x.mT if wide else x.mT @ x
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a) if wide else torch.baddbmm(x, x, factor, beta=a)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/newton_schulz.json"))
    args = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        exact = plain_iteration(x[:2].float(), STEPS)
        for run in (plain_iteration, orthogonalize):
            error = float((run(x[:2], STEPS).float() - exact).norm() / exact.norm())
            low, ms, high = triton.testing.do_bench(partial(run, x, STEPS), warmup=100, rep=600,
                                                    quantiles=[0.25, 0.5, 0.75])  # fmt: skip
            short, long = min(shape[1:]), max(shape[1:])
            plain = STEPS * (4 * short * short * long + 2 * short**3)  # FLOPs
            flops = shape[0] * (plain if run is plain_iteration else orthogonalize_flops(*shape[1:], STEPS))
            rows.append({"shape": name, "matrices": shape[0], "iteration": run.__name__, "ms": ms,
                         "ms_quartiles": [low, high], "tflops": flops / ms / 1e9, "relative_error": error})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    args.out.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
