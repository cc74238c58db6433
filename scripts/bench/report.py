"""What the report and its statistics add to a step: python scripts/bench/report.py.

A short run of yamls/moe.yaml with a sample of the experts every second step. Times are the process's CPU time, which
other programs on the machine change less than the clock's; on a CPU the host computes the statistics itself, so they
are an upper bound for a GPU, where they run on the device. Reads are calls that would make the host wait for a GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import llmfoundry.callbacks  # noqa: F401  registers them
from llmfoundry.callbacks.report import SAMPLES, Report
from llmfoundry.cli.command import read_run_config
from llmfoundry.train.build import build
from llmfoundry.train.callback import Callback, Metrics, Run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.reads import CountsReads  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "report.json"
STEPS, WARM_UP = 24, 4
RUN_STEPS, EVALUATIONS = 10_000, 20  # of the run for which the share is computed


class Timed(Callback):
    """The report's callback, with the CPU seconds and the reads of each call."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.steps: list[float] = []
        self.calls: dict[str, list[tuple[float, int]]] = {"none": [], "sample": [], "probe": []}
        self._end = 0.0

    def fit_start(self, trainer: Run) -> None:
        self.report.fit_start(trainer)
        self._end = time.process_time()

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        start = time.process_time()
        with CountsReads() as reads:
            self.report.step_end(trainer, metrics)
        end = time.process_time()
        if trainer.state.step > WARM_UP:
            probed = any(key.startswith("metrics/eval") for key in metrics)
            kind = "probe" if probed else "sample" if trainer.state.step % 2 == 0 else "none"
            if not probed:
                self.steps.append(start - self._end)
            self.calls[kind].append((end - start, len(reads.found)))
        self._end = end


def entropy_seconds(tokens: int, experts: int) -> float:
    """CPU seconds of a layer's entropy in one step: the only statistic that the balance loss does not need."""
    share = torch.rand(tokens, experts).softmax(1)
    times = []
    for _ in range(50):
        start = time.process_time()
        torch.special.entr(share).sum()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> int:
    """Train, and write the result."""
    with tempfile.TemporaryDirectory() as folder:
        config = read_run_config(
            str(ROOT / "yamls" / "moe.yaml"),
            [f"max_duration={STEPS}ba", f"eval_interval={STEPS // 2}ba", "eval_subset_num_batches=1",
             "callbacks.report.interval=2ba", "log_to_console=false", "callbacks.sample_text.max_new_tokens=1",
             f"save_folder={folder}/run"],
        )  # fmt: skip
        trainer = build(config)
        timed = Timed(next(callback for callback in trainer.callbacks if isinstance(callback, Report)))
        trainer.callbacks = [timed if callback is timed.report else callback for callback in trainer.callbacks]
        trainer.fit()
        router = trainer.router
        assert router is not None
        layers, experts = router.load.shape
    step = statistics.median(timed.steps)
    median = {kind: statistics.median(seconds for seconds, _ in calls) for kind, calls in timed.calls.items()}
    tokens = config.global_train_batch_size * config.max_seq_len
    entropy = entropy_seconds(tokens, experts) * layers
    each_step = median["none"] + entropy
    added = each_step + (SAMPLES * median["sample"] + EVALUATIONS * median["probe"]) / RUN_STEPS
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    processor = next(line.partition(":")[2].strip() for line in cpu.splitlines() if "model name" in line)
    result = {
        "git": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "device": f"CPU ({processor}), {torch.get_num_threads()} thread(s) of {os.cpu_count()}",
        "torch": torch.__version__,
        "config": f"yamls/moe.yaml, {STEPS} steps",
        "warm_up": WARM_UP,
        "tokens_per_step": tokens,
        "layers": layers,
        "experts": experts,
        "step_cpu_seconds": step,
        "entropy_cpu_seconds_per_step": entropy,
        "report_cpu_seconds": median,
        "calls": {kind: len(calls) for kind, calls in timed.calls.items()},
        "reads": {kind: max(reads for _, reads in calls) for kind, calls in timed.calls.items()},
        "run_steps": RUN_STEPS,
        "samples": SAMPLES,
        "evaluations": EVALUATIONS,
        "share_of_step": added / step,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
