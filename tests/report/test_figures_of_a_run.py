"""What the `report` callback takes from a run: figures by layer for loggers, probes by source, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmfoundry.callbacks.report import Report, by_layer
from llmfoundry.cli.train import train_main
from llmfoundry.report.experts import sources_of_experts
from llmfoundry.train.callback import Metrics, Run
from tests.callbacks.conftest import lines, tiny_run

BIASED = {"moe_score_fn": "sigmoid", "moe_bias_update_rate": 0.01, "moe_top_k": 2}


def run_with(folder: Path, ffn: dict[str, object] | None = None, **changes: object) -> list[dict[str, float]]:
    """Train the tiny run with other settings; returns the lines of metrics.jsonl."""
    config = tiny_run(folder) | changes
    config["model"]["ffn_config"] |= ffn or {}  # type: ignore[index]
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert train_main([str(path)]) == 0
    return lines(folder / "run")


def test_loggers_get_the_figures_of_each_layer(tmp_path: Path) -> None:
    found = run_with(tmp_path, BIASED | {"first_k_dense": 1}, eval_interval="2ba", loggers={"tensorboard": {}})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = {"max_load", "min_load", "dead_experts", "router_entropy", "bias_range"}
    probed = names | {"confidence", "churn"}
    assert {key for key in found[0] if key.startswith("moe/layer")} == {f"moe/layer1/{name}" for name in names}
    assert {key for key in found[3] if key.startswith("moe/layer")} == {f"moe/layer1/{name}" for name in probed}
    for name in probed:
        shown = {event.step: event.value for event in events.Scalars(f"moe/layer1/{name}")}
        assert shown[4] == pytest.approx(found[3][f"moe/layer1/{name}"])
    # The only mixture: its extremes are the model's.
    assert all(line["moe/layer1/max_load"] == pytest.approx(line["moe/max_load"], abs=1e-3) for line in found)
    assert found[0]["moe/layer1/bias_range"] == pytest.approx(0.02), "one step of the bias up, one down"


def test_figures_of_a_layer() -> None:
    sample = {"layers": [3], "load": [[0.5, 0.4985, 0.0015, 0.0]], "entropy": [0.7], "bias": [[0.1, 0, 0, -0.2]]}
    assert by_layer(sample) == {
        "moe/layer3/max_load": 2.0, "moe/layer3/min_load": 0.0, "moe/layer3/dead_experts": 2,
        "moe/layer3/router_entropy": 0.7, "moe/layer3/bias_range": pytest.approx(0.3),
    }  # fmt: skip


def test_a_run_without_evaluation_is_probed_at_its_end(tmp_path: Path) -> None:
    found = run_with(tmp_path, eval_loader=None)
    assert "moe/layer0/confidence" in found[-1] and "moe/layer0/confidence" not in found[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert '"probe_steps":[4]' in page


def test_the_page_drawn_at_an_evaluation_shows_it(tmp_path: Path) -> None:
    class Stopping(Report):
        """Leaves the page as it was at the second evaluation."""

        def fit_end(self, trainer: Run) -> None:
            pages.append((Path(trainer.config.save_folder) / "report.html").read_text())

    pages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmfoundry.callbacks.report.Report", Stopping)
        found = run_with(tmp_path, eval_interval="2ba")
    value = float(f"{found[-1]['metrics/eval/LanguageCrossEntropy']:.5g}")
    assert '"metrics/eval/LanguageCrossEntropy":{"x":[2.0,4.0],"y":[' in pages[0] and f",{value}]" in pages[0]


def test_an_expert_of_one_source_has_only_its_tokens() -> None:
    experts, sources = torch.tensor([[0], [0], [1], [1], [2], [2]]), torch.tensor([0, 0, 1, 1, 0, 1])
    ratio = sources_of_experts(experts.to(torch.int16), sources, 4, 2)
    assert ratio.tolist() == [[2, 0], [0, 2], [1, 1], [0, 0]]


def test_the_probe_of_a_mixture_of_sources_has_as_much_of_each(tmp_path: Path) -> None:
    for name, text in (("sums", "1 + 2 = 3\n"), ("words", "one and two\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text * 400)
    parts = [{"name": "text_files", "path": str(tmp_path / name), "weight": weight, "cache_dir": str(tmp_path / "c")}
             for name, weight in (("sums", 0.9), ("words", 0.1))]  # fmt: skip
    run_with(tmp_path, train_loader={"datasets": parts}, eval_loader=None,
             callbacks={"report": {"probe_tokens": 256}})  # fmt: skip
    probe = json.loads((tmp_path / "run" / "experts.json").read_text())
    assert probe["sources"] == ["sums", "words"]
    for layer in probe["layers"]:
        assert all(0 <= ratio <= 2 for of_expert in layer["sources"] for ratio in of_expert)  # 2: of two equal halves
        taken = [of_expert for of_expert in layer["sources"] if any(of_expert)]
        assert all(sum(of_expert) == pytest.approx(2, abs=0.01) for of_expert in taken)


@contextmanager
def counted_reads(found: list[str]) -> Iterator[None]:
    """Note each call that makes the host wait for values of a tensor."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):

            def noted(tensor: torch.Tensor, *args: object, name: str = name,
                      real: object = getattr(torch.Tensor, name)) -> object:  # fmt: skip
                found.append(name)
                return real(tensor, *args)  # type: ignore[operator]

            patch.setattr(torch.Tensor, name, noted)
        yield


def test_between_samples_nothing_is_read_and_of_a_sample_the_biases_and_then_all_at_once(tmp_path: Path) -> None:
    """Loads came to the host with the step's numbers; biases are written by its update."""
    reads: dict[int, list[str]] = {}

    class Counted(Report):
        def step_end(self, trainer: Run, metrics: Metrics) -> None:
            with counted_reads(reads.setdefault(trainer.state.step, [])):
                super().step_end(trainer, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmfoundry.callbacks.report.Report", Counted)
        run_with(tmp_path, BIASED, eval_interval="0ba", callbacks={"report": {"interval": "3ba"}}, max_duration="5ba")
    assert reads[1] == reads[2] == reads[4] == [] and reads[3] == ["cpu", "tolist"]
    assert len(reads[5]) > 0, "the probe of the end reads, so that the count is seen to work"


@pytest.mark.gpu
def test_between_samples_a_gpu_is_not_waited_for(tmp_path: Path) -> None:
    class Strict(Report):
        def step_end(self, trainer: Run, metrics: Metrics) -> None:
            torch.cuda.set_sync_debug_mode("error" if trainer.state.step in (1, 2, 4) else "default")
            super().step_end(trainer, metrics)
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmfoundry.callbacks.report.Report", Strict)
        run_with(tmp_path, BIASED, eval_interval="0ba", callbacks={"report": {"interval": "3ba"}}, max_duration="5ba")
