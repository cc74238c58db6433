"""The console: log lines and, on a terminal, a live view below them (`progress_bar: false` shows lines only).

`log_to_console: false` turns both off.
"""

from __future__ import annotations

import datetime
import sys
import time

import torch
from rich.console import Console as RichConsole

from llmfoundry import runtime
from llmfoundry.callbacks.live import LiveView, Now
from llmfoundry.eval.gauntlet import COMPOSITE
from llmfoundry.eval.icl import PREFIX
from llmfoundry.train.callback import Callback, Metrics, Run
from llmfoundry.train.run import EVALUATED, is_evaluated

MUCH_EVALUATION = 0.25  # fraction of the run time


class Console(Callback):
    """Prints one line every `console_log_interval` on rank 0 and, on a terminal, a view below the lines."""

    def __init__(self) -> None:
        self.out = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.view: LiveView | None = None
        self.gpu_memory: float | None = None  # bytes
        self.validation: float | None = None  # at the last evaluation
        self.begun: tuple[float, int] | None = None  # when the first step of this process ended, and its number

    def fit_start(self, trainer: Run) -> None:
        if not runtime.is_rank0():
            return
        model, total = trainer.config.model, trainer.timeline.expected_steps(trainer.state.step)
        length = str(trainer.config.max_duration) if total is None else f"{total:,} steps"
        self.out.print(
            f"{model.n_params():,} parameters, {model.n_active_params():,} active; "
            f"{trainer.loader.rows_per_epoch:,} rows of {trainer.loader.max_seq_len} tokens per epoch; {length}; "
            f"{runtime.world_size()} x {trainer.device.type}; saving to {trainer.config.save_folder}"
        )
        if trainer.eval_loader is not None:
            self._warn_of_evaluation(trainer, trainer.eval_loader.n_rows)
        if trainer.device.type == "cuda":
            self.out.print("the first step also compiles the model and times the kernels' tile sizes: about a minute")
            self.gpu_memory = torch.cuda.get_device_properties(trainer.device).total_memory
        # `is_terminal` alone is not enough: FORCE_COLOR sets it for pipes too.
        if trainer.config.progress_bar and sys.stdout.isatty() and not self.out.is_dumb_terminal:
            self.view = LiveView(self.out, trainer.config.run_name or "")
            self.view.start()
            self.view.draw(Now(trainer.state.step, total, None))

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if not runtime.is_rank0():
            return
        step, now = trainer.state.step, time.monotonic()
        self.begun = self.begun or (now, step)  # the first step compiles, so its time is not representative
        seconds, steps = now - self.begun[0], step - self.begun[1]
        total = trainer.timeline.expected_steps(step)
        left = seconds / steps * (total - step) if steps and total is not None else None
        due = trainer.timeline.due(trainer.config.console_log_interval, step)
        if due or step == trainer.timeline.total_steps or is_evaluated(metrics):
            clock = "" if self.out.is_terminal else f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  "
            text = clock + line(metrics, total, left)
            if self.view is not None:
                self.view.print(text)
            else:
                self.out.print(text)
        if self.view is not None:
            loss = metrics.get("loss/train/ce")
            if isinstance(loss, float):
                self.view.losses.add(loss)
            validation = metrics.get(f"{EVALUATED}LanguageCrossEntropy")
            if isinstance(validation, float):
                self.validation = validation
            if self.view.is_due() or step == trainer.timeline.total_steps:
                self.view.draw(self._now(trainer, metrics, total, left))

    def _now(self, trainer: Run, metrics: Metrics, total: int | None, left: float | None) -> Now:
        found = {key: value for key, value in metrics.items() if not isinstance(value, list)}
        load = metrics.get("moe/load", [])
        return Now(
            trainer.state.step, total, left, found.get("loss/train/ce"), self.validation,
            found.get("throughput/tokens_per_sec"), found.get("throughput/device/mfu"),
            runtime.peak_memory_bytes(trainer.device), self.gpu_memory,
            load if isinstance(load, list) else [], found.get("moe/min_load"), found.get("moe/max_load"),
        )  # fmt: skip

    def _warn_of_evaluation(self, trainer: Run, rows: int) -> None:
        config = trainer.config
        if config.eval_subset_num_batches != -1:
            rows = min(rows, config.eval_subset_num_batches * config.device_eval_batch_size)
        share = trainer.timeline.share_of_evaluation(rows, config.eval_interval)
        if share is not None and share > MUCH_EVALUATION:
            self.out.print(
                f"evaluation: {rows:,} rows every {config.eval_interval} take about {share:.0%} of the time; "
                "eval_interval and eval_subset_num_batches set it"
            )

    def close(self) -> None:
        if self.view is not None:
            self.view.stop()


def tasks_line(metrics: Metrics) -> list[str]:
    """Return a line on tasks: the gauntlet's scores, or without a gauntlet each task's accuracy, without categories."""
    found = {key.removeprefix(COMPOSITE): value for key, value in metrics.items() if key.startswith(COMPOSITE)}
    for key, value in metrics.items() if not found else ():
        task, _, metric = key.removeprefix(PREFIX).rpartition("/")
        if key.startswith(PREFIX) and metric.endswith("Accuracy") and task.count("/") == 1:
            found[task] = value
    return [f"{name} {value:.4f}" for name, value in found.items()]


def line(metrics: Metrics, total_steps: int | None, seconds_left: float | None = None) -> str:
    """Return a step's main numbers for the console. A run limited by time does not know its total at the start."""
    of = "" if total_steps is None else f"/{total_steps}"
    parts = [f"step {metrics['step']:>{len(of) - 1 if of else 0}}{of}"]
    shown = {
        "tokens": "{:,} tokens",
        "loss/train/ce": "loss {:.4f}",
        "moe/max_load": "max load {:.2f}",
        "grad_norm": "grad norm {:.3f}",
        "lr": "lr {:.2e}",
        "throughput/tokens_per_sec": "{:,.0f} tok/s",
        "throughput/device/mfu": "MFU {:.1%}",
        "memory/peak_allocated_mem": "{:.1f} GB",
        "metrics/eval/LanguageCrossEntropy": "validation {:.4f}",
        "metrics/eval/bits_per_byte": "{:.4f} bits/byte",
    }
    parts += [form.format(metrics[key]) for key, form in shown.items() if key in metrics]
    for key, value in metrics.items():  # for eval_loaders: metrics/eval/LABEL/LanguageCrossEntropy
        label, _, name = key.removeprefix(EVALUATED).partition("/")
        if key.startswith(EVALUATED) and name == "LanguageCrossEntropy":
            parts.append(f"{label} {value:.4f}")
    parts += tasks_line(metrics)
    if seconds_left:
        parts.append(f"{datetime.timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)
