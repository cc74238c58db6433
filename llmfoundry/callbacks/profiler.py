"""`profiler`: where the time of a step goes, as a table by part and as a trace for chrome://tracing or Perfetto.

    callbacks:
      profiler: {start: 10, steps: 3}    # `save_folder/profile/steps-10-12-rank-0.json.gz`, and .txt beside it

On a GPU the table sums kernels; on a CPU it sums operators, each without those that it calls.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llmfoundry import runtime
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

log = logging.getLogger(__name__)

# The first pattern that a name of a kernel or operator has decides its part.
PARTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        ("communication", r"nccl|gloo|c10d|all_?(gather|reduce|to_all)|reduce_scatter|split_with_sizes|chunk_cat"),
        ("experts", r"up_kernel|up_backward|grouped|weight_grad|experts_(forward|backward|weight)|_GroupedExperts"),
        ("gather and sum of rows", r"spread_kernel|sum_rows|slot_sums|index_select|sort_by_expert"),
        (
            "router",
            r"top_?k|_(count|prefix|start|place|tiles)_kernel|router|UpcastLinear",
        ),
        ("attention", r"attention|flash|fmha|sdpa|flex"),
        ("loss", r"cross_entropy|nll_loss|log_softmax|softmax_backward|LinearCrossEntropy"),
        ("update", r"adam|optimizer|lion|multi_tensor|foreach|lpnorm|linalg_vector_norm"),
        ("dense products", r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm|matmul|linear|_?mm)|mkldnn|onednn"),
        ("copies and casts", r"memcpy|memset|copy|convert|aten::(to|_to_copy|cat|contiguous|clone|zero_|fill_)"),
    )
)
OTHER, IDLE = "other", "idle"


class ProfilerConfig(CallbackConfig, names=("profiler",)):
    """Profiles `steps` steps from step `start` on."""

    start: int = Field(10, ge=2)  # the first step profiled; those before compile and tune
    steps: int = Field(3, ge=1)  # how many steps are recorded
    all_ranks: bool = False  # else rank 0 alone
    shapes: bool = False  # of the operators' inputs, in the trace
    memory: bool = False  # allocations, in the trace

    def build(self) -> Profiler:
        return Profiler(self)


class Line(NamedTuple):
    """One row of the table."""

    part: str
    milliseconds: float  # per step
    share: float  # of the step


class Profiler(Callback):
    """Writes to `save_folder/profile` when the last profiled step is done."""

    def __init__(self, config: ProfilerConfig) -> None:
        self.config = config
        self._running: profile | None = None
        self._seconds = 0.0

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if runtime.rank() != 0 and not self.config.all_ranks:
            return
        first, step = self.config.start, trainer.state.step
        seconds = metrics.get("time/step_seconds")
        if self._running is not None and isinstance(seconds, float):
            self._seconds += seconds
        if step == first - 1:
            activities = [ProfilerActivity.CPU]
            if trainer.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(
                activities=activities, record_shapes=self.config.shapes, profile_memory=self.config.memory
            )
            self._running.start()
        elif step == first + self.config.steps - 1 and self._running is not None:
            self._finish(trainer)

    def close(self) -> None:
        if self._running is not None:  # the run ended before the last step to profile
            self._running.stop()
            self._running = None
            log.warning("profiler: the run ended before step %d; nothing is written",
                        self.config.start + self.config.steps - 1)  # fmt: skip

    def _finish(self, trainer: Run) -> None:
        assert self._running is not None
        found, self._running = self._running, None
        found.stop()
        last = self.config.start + self.config.steps - 1
        name = f"steps-{self.config.start}-{last}-rank-{runtime.rank()}"
        folder = Path(trainer.config.save_folder) / "profile"
        text = table(self._lines(found, trainer.device))
        try:
            folder.mkdir(exist_ok=True)
            found.export_chrome_trace(str(folder / f"{name}.json.gz"))
            (folder / f"{name}.txt").write_text(text)
        except OSError as error:
            log.warning("profiler: %s cannot be written: %s; the run goes on", folder, error.strerror)
        log.info("steps %d to %d of rank %d, per step (trace: %s):\n%s", self.config.start, last, runtime.rank(),
                 folder / f"{name}.json.gz", text)  # fmt: skip

    def _lines(self, found: profile, device: torch.device) -> list[Line]:
        events = found.events() or []
        wall = self._seconds * 1e6  # microseconds
        if device.type == "cuda":
            kernels = [e for e in events if e.device_type == DeviceType.CUDA]
            spans = [(e.name, e.time_range.start, e.time_range.end) for e in kernels]
            return by_part(((name, end - start) for name, start, end in spans), wall, self.config.steps,
                           idle=wall - covered((start, end) for _, start, end in spans))  # fmt: skip
        cpu = ((e.name, e.self_cpu_time_total) for e in events)
        return by_part(cpu, wall, self.config.steps, idle=None)


def by_part(costs: Iterable[tuple[str, float]], wall: float, steps: int, idle: float | None) -> list[Line]:
    """Sum microseconds by part of the step, the largest first; shares are of `wall`.

    Kernels of several streams may overlap, so that shares can add up to more than one.
    """
    sums: Counter[str] = Counter()
    for name, microseconds in costs:
        sums[part_of(name)] += microseconds  # type: ignore[assignment]
    if idle is not None:
        sums[IDLE] = max(0.0, idle)  # type: ignore[assignment]
    return [Line(part, cost / 1e3 / steps, cost / wall if wall else 0.0) for part, cost in sums.most_common()]


def part_of(name: str) -> str:
    """The part of a step that a kernel or operator belongs to."""
    return next((part for part, pattern in PARTS if pattern.search(name)), OTHER)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def table(lines: list[Line]) -> str:
    """The table as text."""
    rows = [f"{line.part:<24}{line.milliseconds:>10.2f} ms{line.share:>8.1%}" for line in lines]
    return "\n".join(rows) + "\n"
