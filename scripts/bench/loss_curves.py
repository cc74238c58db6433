"""Train the same steps with each backend of the experts, precision or optimizer state, and compare their loss curves.

    python scripts/bench/loss_curves.py yamls/olmoe-1b-7b.yaml model.n_layers=2 variables.data=FOLDER_OF_TEXT ...

All runs start from the same weights and read the same batches, in one process. Two correct backends differ by the
rounding of their dtype, and training amplifies the difference. So `triton` is compared with `reference` beside
`grouped_mm` with `reference`. Precisions and optimizer states are compared with the default beside a run of the default
from another seed: other initial weights and another order of the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from train_step import described, machine

from llmfoundry import runtime
from llmfoundry.cli.command import read_run_config
from llmfoundry.train.build import build

ROOT = Path(__file__).resolve().parents[2]
ANOTHER_SEED = ["seed=18", "train_loader.dataset.shuffle_seed=17"]
RUNS = {  # the others are compared with the first of each
    "backends": {name: [f"model.ffn_config.moe_impl={name}"] for name in ("reference", "grouped_mm", "triton")},
    "precisions": {
        "amp_bf16": ["precision=amp_bf16"],
        "amp_bf16, another seed": ["precision=amp_bf16", *ANOTHER_SEED],
        "amp_fp8": ["precision=amp_fp8"],
    },
    "states": {
        "fp32": [],
        "fp32, another seed": ANOTHER_SEED,
        "bf16 moments": ["optimizer.state_dtype=bf16"],
        "int8 moments": ["optimizer.state_dtype=int8"],
        "bf16_sr weights": ["optimizer.master_weights=bf16_sr"],
        "bf16_sr weights, bf16 moments": ["optimizer.master_weights=bf16_sr", "optimizer.state_dtype=bf16"],
    },
}


def curve(yaml: str, overrides: list[str], steps: int) -> tuple[list[float], dict[str, object]]:
    """The cross-entropy of each step, nats per token, and what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(read_run_config(yaml, [*overrides, f"save_folder={folder}", "autoresume=false"]))
        losses = [float(str(trainer.take_step()["loss/train/ce"])) for _ in range(steps)]
        return losses, machine(trainer.device) | described(trainer.config)


def gap(ours: list[float], true: list[float]) -> dict[str, float]:
    """How far two curves are apart, nats per token."""
    apart = [abs(a - b) for a, b in zip(ours, true, strict=True)]
    last = len(apart) // 10
    return {
        "mean": statistics.fmean(apart),
        "largest": max(apart),
        "of_the_last_tenths_means": abs(statistics.fmean(ours[-last:]) - statistics.fmean(true[-last:])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--of", choices=list(RUNS), default="backends")
    parser.add_argument(
        "--out", type=Path, help="default: scripts/bench/results/loss_curves.json, or loss_curves_of_*.json"
    )
    args = parser.parse_intermixed_args()
    name = "loss_curves.json" if args.of == "backends" else f"loss_curves_of_{args.of}.json"
    out = args.out or ROOT / "scripts" / "bench" / "results" / name
    first = next(iter(RUNS[args.of]))
    curves: dict[str, list[float]] = {}
    facts: dict[str, object] = {}
    for run, own in RUNS[args.of].items():
        curves[run], facts = curve(args.yaml, [*args.overrides, *own], args.steps)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        gaps = {name: gap(losses, curves[first]) for name, losses in curves.items()}
        result = facts | {"overrides": args.overrides, "from_reference": gaps, "curves": curves}
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({"run": run, "last": curves[run][-1], **gaps[run]}), flush=True)
    runtime.stop()


if __name__ == "__main__":
    main()
    runtime.leave(0)
