"""Time Newton-Schulz with whole and with symmetric products, for the experts of some models on one GPU.

    python scripts/bench/newton_schulz.py --out scripts/bench/results/newton_schulz.json

Shapes: a batch of the matrices that one layer's experts have, each R x C, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import triton
from moe_layer import machine

from llmfoundry.kernels.muon import orthogonalize, orthogonalize_flops

STEPS = 5
SHAPES = {  # matrices, rows, columns: of gate and up together, and of down
    "olmoe, up": (128, 1024, 2048),
    "olmoe, down": (64, 2048, 1024),
    "qwen30b, up": (256, 768, 2048),
    "qwen30b, down": (128, 2048, 768),
    "mixtral, up": (4, 14336, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/newton_schulz.json"))
    args = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        whole, half = (orthogonalize(x.clone(), STEPS, symmetric=each).float() for each in (False, True))
        difference = float((whole - half).norm() / whole.norm())
        for symmetric in (False, True):
            call = partial(orthogonalize, x, STEPS, symmetric=symmetric)
            low, ms, high = triton.testing.do_bench(call, warmup=100, rep=600, quantiles=[0.25, 0.5, 0.75])
            flops = shape[0] * orthogonalize_flops(shape[1], shape[2], STEPS)  # of whole products, for both
            rows.append({"shape": name, "symmetric": symmetric, "ms": ms, "ms_quartiles": [low, high],
                         "tflops": flops / ms / 1e9, "relative_difference": difference})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    args.out.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
