"""`early_stopper`: when it ends a run, and that the run stays ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmfoundry.cli.train import train_main
from tests.callbacks.conftest import lines

# Nothing is ever learned: the first evaluation is the best.
STUCK = ["optimizer.lr=1.0e-12", "max_duration=20ba", "eval_interval=2ba", "device_eval_batch_size=4"]
WATCHED = "monitor: LanguageCrossEntropy, dataloader_label: eval, min_delta: 0.01"


def test_a_metric_that_does_not_improve_ends_the_run_for_good(tiny: Path, tmp_path: Path) -> None:
    command = [str(tiny), *STUCK, f"callbacks.early_stopper={{{WATCHED}, patience: 3ba}}"]
    assert train_main(command) == 0
    found = lines(tmp_path / "run")
    assert found[-1]["step"] == 6, "best at 2, then looked at 4 (2 steps later) and 6"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["validation/nats_per_token"] == found[-1]["metrics/eval/LanguageCrossEntropy"]
    assert (tmp_path / "run" / "checkpoints" / "step-6").is_dir()
    assert train_main([*command, "autoresume=true"]) == 0
    assert lines(tmp_path / "run") == found
    more = [*command[:-1], "autoresume=true", f"callbacks.early_stopper={{{WATCHED}, patience: 7ba}}"]
    assert train_main(more) == 0, "more patience goes on, with the best value of before"
    assert lines(tmp_path / "run")[-1]["step"] == 10


def test_a_run_that_improves_goes_on(tiny: Path, tmp_path: Path) -> None:
    options = ["max_duration=8ba", "eval_interval=2ba", "optimizer.lr=0.01"]
    assert train_main([str(tiny), *options, f"callbacks.early_stopper={{{WATCHED}, patience: 1ba}}"]) == 0
    assert lines(tmp_path / "run")[-1]["step"] == 8


@pytest.mark.parametrize("monitor", ["LanguageCrossEntropy", "LanguagePerplexity", "loss/train/total"])
def test_the_training_loss_is_watched_at_every_step(tiny: Path, tmp_path: Path, monitor: str) -> None:
    stopper = f"{{monitor: {monitor}, dataloader_label: train, comp: lt, min_delta: 1000, patience: 3ba}}"
    assert train_main([str(tiny), "max_duration=20ba", f"callbacks.early_stopper={stopper}"]) == 0
    found = lines(tmp_path / "run")
    assert found[-1]["step"] == 5
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "validation/nats_per_token" in summary, "the run ends with its evaluation"


@pytest.mark.parametrize(
    ("stopper", "said"),
    [
        ("{monitor: x, dataloader_label: wiki}", "dataloader_label: 'wiki' is not in this run; known: train, eval"),
        ("{monitor: LanguageCrossEntropie, dataloader_label: eval}", "no metric metrics/eval/LanguageCrossEntropie"),
    ],
)
def test_mistakes_are_told(tiny: Path, capsys: pytest.CaptureFixture[str], stopper: str, said: str) -> None:
    assert train_main([str(tiny), "eval_interval=1ba", f"callbacks.early_stopper={stopper}"]) == 2
    assert said in capsys.readouterr().err
