"""`report`: keeps `save_folder/report.html`, a page of the run's curves and of what its experts do.

Every run has it. Every `interval` the loads of all experts go to experts.jsonl. At each evaluation a fixed sample of
text is routed (experts.json, confidence, churn), and the page is written anew.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import Field
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.moe.router import Router
from llmfoundry.report.experts import churn, coactivation, mixture_layers, route, tokens_of_experts
from llmfoundry.report.page import write_report
from llmfoundry.report.records import EXPERTS, PROBE
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run
from llmfoundry.train.duration import Duration
from llmfoundry.train.run import is_evaluated

log = logging.getLogger(__name__)
SAMPLES = 400  # of the loads in a whole run, if no interval is given


class ReportConfig(CallbackConfig, names=("report",)):
    """`callbacks: {report: {enabled: false}}` writes no page."""

    name: str = "report"
    enabled: bool = True  # false: no page is written
    interval: Duration | None = None  # between samples of the loads; None: a 400th of the run
    probe_tokens: int = Field(4096, ge=1)  # of the text that is routed at each evaluation, rounded up to whole rows

    def build(self) -> Report:
        return Report(self)


class Report(Callback):
    """Writes on rank 0; the probe is routed on all ranks."""

    def __init__(self, config: ReportConfig) -> None:
        self.config = config
        self._before: Tensor | None = None  # (L, T, K), what the last probe found
        self._failed = False

    def fit_start(self, trainer: Run) -> None:
        file = Path(trainer.config.save_folder) / EXPERTS
        if not self.config.enabled or not runtime.is_rank0() or not file.exists():
            return
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= trainer.state.step]
        if len(kept) < len(lines):  # a killed run wrote beyond its checkpoint
            file.write_text("".join(kept))

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if not self.config.enabled:
            return
        evaluated = is_evaluated(metrics)
        mixed = trainer.router is not None
        if mixed and (evaluated or self._due(trainer)):
            sample = self._sample(trainer)
            if evaluated:
                sample |= self._probe(trainer)
            self._write(trainer, sample)
        if evaluated:
            self._draw(trainer)

    def fit_end(self, trainer: Run) -> None:
        if self.config.enabled:
            self._draw(trainer)

    def _due(self, trainer: Run) -> bool:
        if self.config.interval is not None:
            return trainer.timeline.due(self.config.interval, trainer.state.step)
        return trainer.state.step % max(1, trainer.timeline.total_steps // SAMPLES) == 0

    def _sample(self, trainer: Run) -> dict[str, object]:
        """Loads and entropy of the last step, by layer; the one time that the host waits for them."""
        assert trainer.router is not None
        load = trainer.router.load / trainer.router.load.sum(1, keepdim=True)  # (L, E)
        tokens = trainer.config.global_train_batch_size * trainer.loader.max_seq_len
        entropy = trainer.router.entropy_sum / tokens  # (L,)
        sample: dict[str, object] = {
            "step": trainer.state.step,
            "load": [[round(share, 5) for share in layer] for layer in load.tolist()],
            "entropy": [round(value, 5) for value in entropy.tolist()],
            "layers": mixture_layers(trainer.model.config),
        }
        biases = [m.expert_bias for m in trainer.model.modules() if isinstance(m, Router) and m.expert_bias is not None]
        if biases:
            sample["bias"] = [[round(value, 6) for value in bias.tolist()] for bias in biases]
        return sample

    def _probe(self, trainer: Run) -> dict[str, object]:
        """Route the sample of text; the details replace experts.json."""
        loader = trainer.eval_loader or trainer.loader
        rows = min(-(-self.config.probe_tokens // loader.max_seq_len), loader.rows_per_epoch)
        batch = loader.batch(0, rows, 0, 1)
        on_device = batch.to(trainer.device)
        routing = route(trainer.model, on_device.tokens, on_device.sequence_ids)
        found: dict[str, object] = {"confidence": [round(value, 5) for value in routing.confidence.tolist()]}
        before, self._before = self._before, routing.experts
        if before is not None:
            found["churn"] = [round(value, 5) for value in churn(before, routing.experts)]
        if runtime.is_rank0():
            self._write_probe(trainer, routing.experts, batch.tokens.flatten())
        return found

    def _write_probe(self, trainer: Run, experts: Tensor, tokens: Tensor) -> None:
        assert trainer.router is not None
        n_experts = trainer.router.load.shape[1]
        layers = []
        for of_layer in experts:
            taken = tokens_of_experts(of_layer, tokens, n_experts, trainer.tokenizer)
            pairs = coactivation(of_layer, n_experts).round(2).tolist()
            layers.append({"pairs": pairs, "tokens": [t.tokens for t in taken], "kinds": [t.kinds for t in taken]})
        self._guarded(trainer, PROBE, json.dumps({"step": trainer.state.step, "layers": layers}), "w")

    def _write(self, trainer: Run, sample: dict[str, object]) -> None:
        if runtime.is_rank0():
            self._guarded(trainer, EXPERTS, json.dumps(sample) + "\n", "a")

    def _draw(self, trainer: Run) -> None:
        if not runtime.is_rank0():
            return
        folder = Path(trainer.config.save_folder)
        try:
            write_report([folder], folder / "report.html")
        except OSError as error:
            self._say(folder / "report.html", error)

    def _guarded(self, trainer: Run, name: str, text: str, mode: str) -> None:
        path = Path(trainer.config.save_folder) / name
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._say(path, error)

    def _say(self, path: Path, error: OSError) -> None:
        """A report that cannot be written must not end a run."""
        if not self._failed:
            log.warning("%s cannot be written: %s; the run goes on", path, error.strerror)
        self._failed = True
