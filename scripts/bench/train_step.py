"""The whole training step of a YAML: tokens/s, MFU and peak memory, beside the plan.

    python scripts/bench/train_step.py yamls/olmoe-1b-7b.yaml --name "OLMoE, 8 layers" model.n_layers=8 \
        variables.data=FOLDER_OF_TEXT variables.tokenizer=bpe tokenizer.vocab_size=8192
    torchrun --nproc-per-node 2 scripts/bench/train_step.py yamls/olmoe-1b-7b.yaml --name "OLMoE, shard 2" ...

Builds the run as training does and takes its steps, without evaluation, checkpoints or loggers. A step ends when its
numbers are on the host, so each is timed whole. With --profile it also says how long each GPU was in communication
while nothing else ran on it, and how long it was idle; rank 0 prints the milliseconds of each kernel in one step, and
the longest gaps of two. Rank 0 puts a row under its name into scripts/bench/results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from llmfoundry import runtime
from llmfoundry.callbacks import console  # noqa: F401  registers the callbacks that the YAMLs name
from llmfoundry.cli.command import read_run_config
from llmfoundry.planning import hardware
from llmfoundry.planning.hardware import GIB
from llmfoundry.planning.job import Job
from llmfoundry.planning.plan import plan
from llmfoundry.planning.settle import settled
from llmfoundry.train.build import build
from llmfoundry.train.config import RunConfig
from llmfoundry.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, object]


def timed_steps(trainer: Trainer, warmup: int, steps: int) -> list[float]:
    """Seconds of each step after the warm-up; the peak of memory counts from there."""
    for _ in range(warmup):
        trainer.take_step()
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return [float(str(trainer.take_step()["time/step_seconds"])) for _ in range(steps)]


def measured(trainer: Trainer, seconds: list[float]) -> Row:
    config = trainer.config
    tokens = config.global_train_batch_size * config.max_seq_len / runtime.world_size()
    low, median, high = statistics.quantiles(seconds, n=4)
    flops = tokens / median * config.model.flops_per_token(config.max_seq_len)
    peak = runtime.peak_flops(trainer.device)
    return {
        "seconds": {"median": median, "quartile_1": low, "quartile_3": high},
        "tokens_per_second_per_device": tokens / median,
        "model_tflops_per_device": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "peak_gib": runtime.peak_memory_bytes(trainer.device) / GIB,
    }


def planned(config: RunConfig, gpus: int) -> Row:
    """The plan of what `measured` finds, in a process of its own, for it is simulated."""
    job = Job.of(config)
    degrees = job.degrees(gpus)
    job, held = settled(job, degrees, hardware.GPU_MEMORY - hardware.RESERVE)
    sizes = {f"{name}_gib": size / GIB for name, size in held._asdict().items()}
    return {"in_all_gib": held.total / GIB, "seconds": plan(job, degrees).time.total} | sizes


def exposed_communication(trainer: Trainer) -> Row:
    """Seconds of one step in which communication kernels ran on this GPU and no other kernel did."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.take_step()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            is_communication = re.search("nccl|PtoP|symmetric_memory::barrier", event.name) is not None
            spans[is_communication].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    if runtime.is_rank0():
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110))
    busy, communicating = _union(spans[False]), _union(spans[True])
    together = _union([*spans[True], *spans[False]])
    return {"communication_seconds": communicating, "exposed_seconds": together - busy}


def idle(trainer: Trainer, longest: int = 30) -> Row:
    """Seconds per step in which nothing ran on this GPU, of two steps and what is between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(2):
            trainer.take_step()
    ran = [each for each in profiler.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    ran.sort(key=lambda each: each.time_range.start)
    gaps: list[tuple[float, float, str, str]] = []  # microseconds, since when, and what ran before and after
    last = ran[0]
    for each in ran[1:]:
        gap = each.time_range.start - last.time_range.end
        if gap > 0:
            gaps.append((gap, last.time_range.end - ran[0].time_range.start, last.name, each.name))
        if each.time_range.end > last.time_range.end:
            last = each
    if runtime.is_rank0():
        print(f"{len(ran)} kernels, {len(gaps)} gaps; longest first, in us")
        for gap, at, before, after in sorted(gaps, reverse=True)[:longest]:
            print(f"{gap:9.1f} at {at:10.1f} between {before[:60]} and {after[:60]}")
    return {"idle_seconds": sum(gap for gap, *_ in gaps) / 1e6 / 2}


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def machine(device: torch.device) -> Row:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "git_sha": git.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "devices": runtime.world_size(),
        "torch": torch.__version__,
    }


def described(config: RunConfig) -> Row:
    return {
        "parameters": config.model.n_params(),
        "active_parameters": config.model.n_active_params(),
        "sequence": config.max_seq_len,
        "global_rows": config.global_train_batch_size,
        "microbatch_rows": config.device_train_microbatch_size,
        "parallel": config.parallel.model_dump(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--name", required=True, help="of the row")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench" / "results" / "train_step.json")
    args = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = read_run_config(args.yaml, [*args.overrides, f"save_folder={folder}", "autoresume=false"])
        # Before CUDA is initialised, a fork is safe. The plan takes as long as the first steps.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as beside:
            gpus, first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
            plan_of_run = beside.submit(planned, config, gpus) if first else None
            trainer = build(config)
            seconds = timed_steps(trainer, args.warmup, args.steps)
            row = machine(trainer.device) | described(config) | measured(trainer, seconds)
            row |= {"plan": plan_of_run.result()} if plan_of_run is not None else {}
        row |= {"warmup": args.warmup, "steps": args.steps, "yaml": args.yaml}
        row["overrides"] = [re.sub("^(variables.data=).*", r"\1FOLDER_OF_TEXT", each) for each in args.overrides]
        if args.profile and trainer.device.type == "cuda":
            row |= exposed_communication(trainer) | idle(trainer)
    if runtime.is_rank0():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
        args.out.write_text(json.dumps({"rows": rows | {args.name: row}}, indent=1) + "\n")
        print(json.dumps({args.name: row}, indent=1))
    runtime.stop()


if __name__ == "__main__":
    main()
    runtime.leave(0)
