"""Loss curves of optimizers, each with a sweep of learning rates: 300 steps on the standard library's source.

    python scripts/bench/optimizer_curves.py

Each run is `yamls/moe.yaml` with the overrides of `SIZES`: toy size. It shows that an optimizer learns and which rates
suit it, and says little about large models. Writes scripts/bench/results/optimizer_curves.json. The runs are kept in
`--runs`, so that `llmfoundry report RUN RUN --out FILE.html` plots them.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
from pathlib import Path

import torch

from llmfoundry.cli.train import train_main

ROOT = Path(__file__).resolve().parents[2]
STEPS, LAST, EVERY = 300, 30, 10
SIZES = [
    "variables.max_seq_len=128", "global_train_batch_size=8", "device_train_microbatch_size=8",
    "model.d_model=64", "model.n_layers=2", "model.ffn_config.ffn_hidden_size=128", f"max_duration={STEPS}ba",
    "eval_interval=0ba", "save_interval=1000ba", "callbacks={}", "autoresume=false",
]  # fmt: skip
RATES = {
    "adamw": [1.0e-3, 2.0e-3, 4.0e-3, 8.0e-3],
    "adamw, state_dtype: bf16": [4.0e-3],
    "adamw, state_dtype: int8": [4.0e-3],
    "adamw, master_weights: bf16_sr": [4.0e-3],
    "adamw, master_weights: bf16_sr, state_dtype: bf16": [4.0e-3],
    "muon": [4.0e-3, 8.0e-3, 1.6e-2],
    "muon, master_weights: bf16_sr": [8.0e-3],
}
OTHER_SEED = ("adamw", 4.0e-3, 18)  # how far chance moves a curve


def losses(folder: Path, name: str, lr: float, seed: int) -> list[float]:
    """Nats per token of each step."""
    optimizer = f"optimizer={{name: {name}, lr: {lr}, weight_decay: 0.1}}"
    code = train_main([str(ROOT / "yamls" / "moe.yaml"), *SIZES, optimizer, f"seed={seed}", f"save_folder={folder}"])
    assert code == 0, f"{name} at {lr} ended with {code}"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss/train/ce"] for row in map(json.loads, lines) if "loss/train/ce" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "scripts/bench/results/optimizer_curves.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "optimizers", help="an empty folder")
    args = parser.parse_args()
    rows = []
    for name, lr, seed in [*((name, lr, 17) for name, rates in RATES.items() for lr in rates), OTHER_SEED]:
        words = re.findall(r"\w+", name)
        curve = losses(args.runs / "-".join([*words, str(lr), str(seed)]), name, lr, seed)
        assert len(curve) == STEPS
        row = {
            "optimizer": name,
            "lr": lr,
            "seed": seed,
            f"nats_per_token_of_last_{LAST}": statistics.mean(curve[-LAST:]),
        }
        print(json.dumps(row), flush=True)
        means = [round(statistics.mean(curve[i : i + EVERY]), 4) for i in range(0, STEPS, EVERY)]
        rows.append(row | {f"mean_of_every_{EVERY}": means})
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    facts = {"git_sha": git.stdout.strip(), "device": device, "torch": torch.__version__,
             "config": ["yamls/moe.yaml", *SIZES], "steps": STEPS}  # fmt: skip
    args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
