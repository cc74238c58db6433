"""`report`: keeps `save_folder/report.html`, a page with the run's curves and statistics of its experts.

Every run has it. Every `interval` the loads of all experts are written to experts.jsonl, and statistics of each layer
are logged. At each evaluation a fixed sample of text is routed (experts.json, confidence, churn), and the page is
written again; in a run without evaluation, this happens 20 times and after the last step.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.atomic import append_line, atomic_write
from llmfoundry.config import ConfigError
from llmfoundry.data.loader import Batch
from llmfoundry.data.mixture import Mixture
from llmfoundry.moe.router import Router
from llmfoundry.report.experts import (
    churn,
    coactivation,
    fingerprints,
    mixture_layers,
    route,
    sources_of_experts,
    tokens_of_experts,
)
from llmfoundry.report.page import write_report
from llmfoundry.report.records import DEAD, EXPERTS, PROBE
from llmfoundry.strict_json import parse_json, read_lines, whole_number
from llmfoundry.train.callback import Callback, CallbackConfig, Json, Metrics, Run
from llmfoundry.train.duration import Duration
from llmfoundry.train.run import is_evaluated

log = logging.getLogger(__name__)
SAMPLES = 400  # of the loads per run, if no interval is given
PROBES, PROBE_STEPS = 20, 50  # probes per run without evaluations, and the minimum steps between them
SEARCHED = 4096  # the first rows of a mixture, searched for rows of each source


class ReportConfig(CallbackConfig, names=("report",)):
    """`callbacks: {report: {enabled: false}}` turns the page off."""

    name: str = "report"
    enabled: bool = True  # false: write no page, and log no statistics by layer
    interval: Duration | None = None  # interval between samples of the loads; None: 1/400 of the run
    probe_tokens: int = Field(4096, ge=1)  # tokens routed at each evaluation, rounded up to whole rows

    def build(self) -> Report:
        return Report(self)


class Report(Callback):
    """Writes on rank 0; the probe is routed on all ranks. Between samples nothing is read from the device."""

    def __init__(self, config: ReportConfig) -> None:
        self.config = config
        self._text: Batch | None = None  # the text to probe; None for a dense model
        self._before: Tensor | None = None  # (L, T) fingerprints of the previous probe's routing
        self._failed = False

    def fit_start(self, trainer: Run) -> None:
        file = trainer.config.folder / EXPERTS
        if self.config.enabled and trainer.balance is not None:
            self._text = probe_batch(trainer, self.config.probe_tokens)
        if not self.config.enabled or not runtime.is_rank0() or not file.exists():
            return
        try:
            kept = b"".join(line for line in read_lines(file) if _step_of(line) <= trainer.state.step)
            if len(kept) < file.stat().st_size:  # a killed run wrote lines past its checkpoint
                atomic_write(file, [kept])
        except (OSError, ValueError) as error:
            self._say(file, error)

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if not self.config.enabled:
            return
        if trainer.device.type == "cuda":  # known on the host; on a CPU it would differ between equal runs
            metrics.setdefault("memory/peak_allocated_mem", runtime.peak_memory_bytes(trainer.device) / 1e9)
        probed = is_evaluated(metrics) or self._due_unevaluated(trainer)
        if trainer.router is not None and (probed or self._due(trainer)):
            sample = self._sample(trainer)
            if probed:
                sample |= self._probe(trainer)
            metrics |= by_layer(sample)
            self._write(trainer, sample)
        if probed:
            self._draw(trainer, metrics)

    def state_dict(self) -> dict[str, Json]:
        if self._before is None:
            return {}
        packed = base64.b64encode(self._before.numpy().tobytes()).decode()
        return {"fingerprints": packed, "layers": len(self._before)}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        flat = np.frombuffer(base64.b64decode(str(state["fingerprints"])), dtype=np.int32)
        self._before = torch.from_numpy(flat.reshape(int(str(state["layers"])), -1).copy())

    def fit_end(self, trainer: Run) -> None:
        if self.config.enabled:
            self._draw(trainer)

    def _due(self, trainer: Run) -> bool:
        if self.config.interval is not None:
            return trainer.timeline.due(self.config.interval, trainer.state.step)
        step = trainer.state.step
        return step % max(1, (trainer.timeline.expected_steps(step) or step) // SAMPLES) == 0

    def _due_unevaluated(self, trainer: Run) -> bool:
        evaluates = (trainer.config.evaluations or trainer.tasks) and trainer.config.eval_interval.value
        step = trainer.state.step
        total = trainer.timeline.expected_steps(step) or step
        is_last = step == trainer.timeline.total_steps
        return not evaluates and (is_last or step % max(PROBE_STEPS, total // PROBES) == 0)

    def _sample(self, trainer: Run) -> dict[str, object]:
        """Return loads, entropy and biases of the last step, by layer. Only the biases are still on the device."""
        assert trainer.router is not None
        load = trainer.router.load / trainer.router.load.sum(1, keepdim=True)  # (L, E)
        tokens = trainer.config.global_train_batch_size * trainer.loader.max_seq_len
        routers = [module for module in trainer.model.modules() if isinstance(module, Router)]
        biases = [router.expert_bias for router in routers if router.expert_bias is not None]
        entropy = trainer.router.entropy_sum.unsqueeze(1) / tokens  # (L, 1)
        rows = [load, entropy, torch.stack(biases).cpu() if biases else load[:, :0]]
        columns = torch.cat([row.double() for row in rows], 1).tolist()  # (L, E + 1), or (L, 2 E + 1) with biases
        n = load.shape[1]
        sample: dict[str, object] = {
            "step": trainer.state.step,
            "load": [[round(share, 5) for share in layer[:n]] for layer in columns],
            "entropy": [round(layer[n], 5) for layer in columns],
            "layers": mixture_layers(trainer.model.config),
        }
        if biases:
            sample["bias"] = [[round(value, 6) for value in layer[n + 1 :]] for layer in columns]
        return sample

    def _probe(self, trainer: Run) -> dict[str, object]:
        """Route the sample of text and replace experts.json."""
        batch = self._text
        assert batch is not None
        on_device = batch.to(trainer.device)
        routing = route(trainer.model, on_device.tokens, on_device.sequence_ids, trainer.microbatches.rows)
        found: dict[str, object] = {"confidence": [round(value, 5) for value in routing.confidence.tolist()]}
        assert trainer.router is not None
        before, self._before = self._before, fingerprints(routing.experts, trainer.router.load.shape[1])
        if before is not None and before.shape == self._before.shape:  # otherwise a resumed run probes another text
            found["churn"] = [round(value, 5) for value in churn(before, self._before)]
        if runtime.is_rank0():
            self._write_probe(trainer, routing.experts, batch)
        return found

    def _write_probe(self, trainer: Run, experts: Tensor, batch: Batch) -> None:
        assert trainer.router is not None
        n_experts, labels = trainer.router.load.shape[1], trainer.loader.labels
        sources = None if batch.sources is None else batch.sources.repeat_interleave(batch.tokens.shape[1])  # (T,)
        layers = []
        for of_layer in experts:
            taken = tokens_of_experts(of_layer, batch.tokens.flatten(), n_experts, trainer.tokenizer)
            pairs = coactivation(of_layer, n_experts).round(2).tolist()
            layer = {"pairs": pairs, "tokens": [t.tokens for t in taken], "kinds": [t.kinds for t in taken]}
            if sources is not None:
                layer["sources"] = sources_of_experts(of_layer, sources, n_experts, len(labels)).round(3).tolist()
            layers.append(layer)
        probe = {"step": trainer.state.step, "sources": list(labels), "layers": layers}
        self._guarded(trainer.config.folder / PROBE, lambda path: atomic_write(path, [json.dumps(probe).encode()]))

    def _write(self, trainer: Run, sample: dict[str, object]) -> None:
        if runtime.is_rank0():
            self._guarded(trainer.config.folder / EXPERTS, lambda path: append_line(path, json.dumps(sample)))

    def _draw(self, trainer: Run, newest: Metrics | None = None) -> None:
        if not runtime.is_rank0():
            return
        folder = trainer.config.folder
        try:
            write_report([folder], folder / "report.html", dict(newest) if newest is not None else None)
        except (OSError, ConfigError) as error:
            self._say(folder / "report.html", error)

    def _guarded(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write(path)
        except OSError as error:
            self._say(path, error)

    def _say(self, path: Path, error: Exception) -> None:
        """Log a warning: a report that cannot be written must not end a run."""
        if not self._failed:
            why = error.strerror if isinstance(error, OSError) else error
            log.warning("%s cannot be written: %s; training continues", path, why)
        self._failed = True


def probe_batch(trainer: Run, tokens: int) -> Batch:
    """Return the fixed sample of text: validation text, or equally many rows of each source of a mixture."""
    loader = trainer.loader
    if isinstance(loader.order, Mixture):
        numbers = np.arange(min(SEARCHED, loader.rows_per_epoch))
        sources = loader.order.sources(numbers)
        each = max(1, -(-tokens // (loader.max_seq_len * len(loader.labels))))
        found = [numbers[sources == source][:each] for source in range(len(loader.labels))]
        return loader.gather(np.sort(np.concatenate(found)))
    loader = trainer.eval_loader or loader
    return loader.batch(0, min(-(-tokens // loader.max_seq_len), loader.rows_per_epoch))


def by_layer(sample: dict[str, object]) -> Metrics:
    """Return a sample as metrics: `moe/layerN/max_load` and others, where N is the layer's number in the model."""
    metrics: Metrics = {}
    loads, layers = sample["load"], sample["layers"]
    assert isinstance(loads, list) and isinstance(layers, list)
    for i, (layer, load) in enumerate(zip(layers, loads, strict=True)):
        even = 1 / len(load)
        figures = {
            "max_load": max(load) / even,
            "min_load": min(load) / even,
            "dead_experts": sum(share < DEAD * even for share in load),
        }
        for key, name in (("entropy", "router_entropy"), ("confidence", "confidence"), ("churn", "churn")):
            if isinstance(found := sample.get(key), list):
                figures[name] = found[i]
        if isinstance(biases := sample.get("bias"), list):
            figures["bias_range"] = max(biases[i]) - min(biases[i])
        metrics |= {f"moe/layer{layer}/{name}": value for name, value in figures.items()}
    return metrics


def _step_of(line: bytes) -> float:
    """Return the step of a line; a line that cannot be read sorts after the run, so that it is dropped."""
    try:
        said = parse_json(line)
        return whole_number(said["step"] if isinstance(said, dict) else None)
    except (ValueError, KeyError):
        return math.inf
