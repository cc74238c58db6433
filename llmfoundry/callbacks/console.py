"""The console: a progress bar on a terminal, plain lines elsewhere. `log_to_console: false` turns it off."""

from __future__ import annotations

import datetime
import sys
import time

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llmfoundry import runtime
from llmfoundry.eval.gauntlet import COMPOSITE
from llmfoundry.eval.icl import PREFIX
from llmfoundry.train.callback import Callback, Metrics, Run
from llmfoundry.train.run import EVALUATED, is_evaluated

MUCH_EVALUATION = 0.25  # of the time of the run


class Console(Callback):
    """One line every `console_log_interval`, from rank 0; on a terminal a bar below the lines."""

    def __init__(self) -> None:
        self.out = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.begun: tuple[float, int] | None = None  # when the first step of this process had ended, and which it was

    def fit_start(self, trainer: Run) -> None:
        if not runtime.is_rank0():
            return
        model, total = trainer.config.model, trainer.timeline.total_steps
        self.out.print(
            f"{model.n_params():,} parameters, {model.n_active_params():,} active; "
            f"{trainer.loader.rows_per_epoch:,} rows of {trainer.loader.max_seq_len} tokens an epoch; {total:,} steps; "
            f"{runtime.world_size()} x {trainer.device.type}; saving to {trainer.config.save_folder}"
        )
        if trainer.eval_loader is not None:
            self._warn_of_evaluation(trainer, trainer.eval_loader.n_rows)
        if trainer.device.type == "cuda":
            self.out.print("the first step also compiles the model and times the kernels' tile sizes: about a minute")
        if self.out.is_terminal and trainer.config.progress_bar:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.out, transient=True)
            self.task = self.progress.add_task("train", total=total, completed=trainer.state.step)
            self.progress.start()

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if not runtime.is_rank0():
            return
        step, now = trainer.state.step, time.monotonic()
        self.begun = self.begun or (now, step)  # the first step compiles, and says nothing about the others
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
        due = trainer.timeline.due(trainer.config.console_log_interval, step)
        if due or step == trainer.timeline.total_steps or is_evaluated(metrics):
            seconds, steps = now - self.begun[0], step - self.begun[1]
            left = seconds / steps * (trainer.timeline.total_steps - step) if steps else None
            clock = "" if self.out.is_terminal else f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  "
            self.out.print(clock + line(metrics, trainer.timeline.total_steps, left))

    def _warn_of_evaluation(self, trainer: Run, rows: int) -> None:
        config = trainer.config
        if config.eval_subset_num_batches != -1:
            rows = min(rows, config.eval_subset_num_batches * config.device_eval_batch_size)
        share = trainer.timeline.share_of_evaluation(rows, config.eval_interval)
        if share > MUCH_EVALUATION:
            self.out.print(
                f"evaluation: {rows:,} rows every {config.eval_interval} take about {share:.0%} of the time; "
                "eval_interval and eval_subset_num_batches set it"
            )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def tasks_line(metrics: Metrics) -> list[str]:
    """Of tasks: what the gauntlet makes of them, or without one the accuracy of each, categories left out."""
    found = {key.removeprefix(COMPOSITE): value for key, value in metrics.items() if key.startswith(COMPOSITE)}
    for key, value in metrics.items() if not found else ():
        task, _, metric = key.removeprefix(PREFIX).rpartition("/")
        if key.startswith(PREFIX) and metric.endswith("Accuracy") and task.count("/") == 1:
            found[task] = value
    return [f"{name} {value:.4f}" for name, value in found.items()]


def line(metrics: Metrics, total_steps: int, seconds_left: float | None = None) -> str:
    """The few numbers of a step that one wants to see go by."""
    parts = [f"step {metrics['step']:>{len(str(total_steps))}}/{total_steps}"]
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
    for key, value in metrics.items():  # of eval_loaders: metrics/eval/LABEL/LanguageCrossEntropy
        label, _, name = key.removeprefix(EVALUATED).partition("/")
        if key.startswith(EVALUATED) and name == "LanguageCrossEntropy":
            parts.append(f"{label} {value:.4f}")
    parts += tasks_line(metrics)
    if seconds_left:
        parts.append(f"{datetime.timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)
