"""`slow_ranks`: names the rank that holds up the others.

    callbacks:
      slow_ranks: {interval: 100ba}

Ranks step together, so every rank's step takes as long as the slowest one's. Two times are measured on each rank
separately: from the end of a step until the next step's rows are on the device (data, callbacks, saves), and the time
that the device takes for a small matrix product.
"""

from __future__ import annotations

import logging
import time

import torch
from pydantic import Field

from llmfoundry import runtime
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run
from llmfoundry.train.duration import Duration, Interval

log = logging.getLogger(__name__)

SIZE, PRODUCTS = {"cuda": 4096, "cpu": 256}, 10  # rows of the square matrices; about 5 ms
NOTABLE = 0.05  # of a step; report ranks that start later than the others by more than this


class SlowRanksConfig(CallbackConfig, names=("slow_ranks",)):
    """Costs one reduction per interval."""

    interval: Interval = Duration.parse("100ba")  # interval between measurements
    slower: float = Field(1.2, gt=1)  # warn of a device that takes this many times the median time

    def build(self) -> SlowRanks:
        return SlowRanks(self)


class SlowRanks(Callback):
    """Metrics are the same on every rank; rank 0 warns."""

    def __init__(self, config: SlowRanksConfig) -> None:
        self.config = config
        self._begins: list[float] = []  # of this rank, since the last measurement

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if not metrics["step"]:
            return
        self._begins.append(trainer.begin_seconds)
        if not trainer.timeline.due(self.config.interval, trainer.state.step):
            return
        own = [sum(self._begins) / len(self._begins), _probe(trainer.device)]
        self._begins.clear()
        found = runtime.of_ranks(own)  # (ranks, 2)
        median = found.median(0).values.tolist()
        begins, probes = found.T.tolist()
        late, slow = begins.index(max(begins)), probes.index(max(probes))
        metrics |= {
            "time/ranks/latest": late,
            "time/ranks/latest_begin_seconds": begins[late],
            "time/ranks/median_begin_seconds": median[0],
            "time/ranks/slowest_device": slow,
            "time/ranks/slowest_device_ratio": probes[slow] / median[1],
        }
        if begins[late] - median[0] > NOTABLE * float(metrics["time/step_seconds"]):  # type: ignore[arg-type]
            log.info(
                "step %d: rank %d starts its steps %.3f s after the others; its data or its host is slow",
                trainer.state.step, late, begins[late] - median[0],
            )  # fmt: skip
        if probes[slow] > self.config.slower * median[1]:
            log.info(
                "step %d: the device of rank %d takes %.2f times as long as the median for the same product",
                trainer.state.step, slow, probes[slow] / median[1],
            )  # fmt: skip


def _probe(device: torch.device) -> float:
    """Seconds that this device takes for a fixed amount of work."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.full((SIZE[device.type], SIZE[device.type]), 1e-3, dtype=dtype, device=device)
    seconds = []
    for _ in range(2):  # the first one selects a kernel
        _wait(device)
        begun = time.perf_counter()
        product = matrix
        for _ in range(PRODUCTS):
            product = product @ matrix
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return seconds[-1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
