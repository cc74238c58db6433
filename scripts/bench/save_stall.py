"""How long an asynchronous save keeps a run from its next step, beside the time of the whole save. One process, CPU.

50 million parameters (200 MB) with AdamW's moments: checkpoints of 600 MB. A step follows each save. The stall is
the time of `Checkpointer.save`, and what the step's update waits until all is copied, to memory that was made before;
the save ends when the checkpoint is on disk and has its name. The save shares cores and memory with the step beside it:
its seconds are recorded beside those of a step without a save.
Writes scripts/bench/results/save_stall.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState
from llmfoundry.train.optim import AdamWConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--rows", type=int, default=128, help="of a step: the more, the longer it takes")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/save_stall.json"))
    args = parser.parse_args()
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))
    optimizer = AdamWConfig(lr=1e-3).build(model)
    torch.set_flush_denormal(True)  # so deep a model of noise has tiny values, which take a CPU many times as long
    tokens = torch.randn(args.rows, 1024)

    def step_seconds() -> float:
        start = time.perf_counter()
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    rows, alone = [], [step_seconds() for _ in range(4)][1:]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpointer = Checkpointer(folder, keep=1, asynchronous=True)
        checkpointer.prepare(CheckpointState(step=0, model=model, optimizer=optimizer))
        checkpointer.wait()
        for step in range(1, args.saves + 1):
            start = time.perf_counter()
            checkpointer.save(CheckpointState(step=step, model=model, optimizer=optimizer))
            stall = time.perf_counter() - start
            checkpointer.stage.waited, ended = 0.0, []
            assert checkpointer._pending is not None
            checkpointer._pending.add_done_callback(lambda _, ended=ended: ended.append(time.perf_counter()))
            seconds = step_seconds()
            stall += checkpointer.stage.waited
            path = checkpointer.wait()
            rows.append({"stall_seconds": stall, "save_seconds": ended[0] - start, "step_seconds": seconds})
            alone.append(step_seconds())
            print(json.dumps(rows[-1]), flush=True)
        n_bytes = sum(file.stat().st_size for file in Path(str(path)).iterdir())
    sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    facts = {
        "git_sha": sha, "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0], "torch": torch.__version__, "threads": torch.get_num_threads(),
        "checkpoint_bytes": n_bytes, "step_seconds_alone": statistics.median(alone),
        "warmup": "room for the copies is made before", "saves": rows,
        "stall_share_median": statistics.median(row["stall_seconds"] / row["save_seconds"] for row in rows),
    }  # fmt: skip
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"median share {facts['stall_share_median']:.1%} at a load of {facts['load_average']:.1f}")


if __name__ == "__main__":
    main()
