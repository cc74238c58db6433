"""A run with tasks: evaluated at each interval, logged, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.train import train_main
from tests.eval.tasks import write_tasks
from tests.test_cli import recipe  # noqa: F401  a fixture

CHOICE = "metrics/choice/3-shot/InContextLearningMultipleChoiceAccuracy"
AVERAGE = "icl/metrics/eval_gauntlet/default_average"
GAUNTLET = {
    "categories": [{"name": "all", "benchmarks": [{"name": "choice", "num_fewshot": 3, "random_baseline": 0.25}]}]
}


@pytest.fixture
def with_tasks(recipe: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The YAML of a run of four steps with tasks, one file of them beside it."""
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": write_tasks(tmp_path)}))
    config = yaml.safe_load(recipe.read_text())
    config |= {
        "icl_tasks": "tasks.yaml", "eval_gauntlet": GAUNTLET, "icl_seq_len": 32, "icl_subset_num_batches": 2,
        "device_eval_batch_size": 8, "max_duration": "4ba", "eval_interval": "2ba", "eval_first": True,
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(config))
    return recipe


def test_a_run_is_evaluated_by_tasks(
    with_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    assert train_main([str(with_tasks)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if CHOICE in line] == [0, 2, 4]
    last = lines[-1]
    assert 0 <= last[CHOICE] <= 1 and last[AVERAGE] == pytest.approx((last[CHOICE] - 0.25) / 0.75)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary[CHOICE] == last[CHOICE] and summary[AVERAGE] == last[AVERAGE]
    assert f"default_average {last[AVERAGE]:.4f}" in capsys.readouterr().out
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["icl_tasks"][0]["dataset_uri"] == str(tmp_path / "choice.jsonl"), "whole, for later use"
    caplog.set_level("INFO")
    assert train_main([str(with_tasks), "autoresume=true"]) == 0
    assert "already complete at step 4" in caplog.text


def test_wrong_settings_are_named(with_tasks: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(with_tasks), "--dry-run"]) == 0
    assert "evaluation: 9 tasks every 2ba" in capsys.readouterr().out
    for override, says in (
        ("icl_tasks=nowhere.yaml", "icl_tasks: nowhere.yaml: no such file"),
        ("icl_tasks=[]", "eval_gauntlet: summarizes icl_tasks, and there are none"),
        ("icl_subset_num_batches=0", "icl_subset_num_batches=0 asks no question"),
        ("eval_gauntlet.weighting=SOME", "eval_gauntlet.weighting: input should be 'EQUAL'"),
        ("eval_gauntlet.averages.all=[all]", "averages.all: is the name of a category too"),
    ):
        assert train_main([str(with_tasks), "--dry-run", "eval_first=false", override]) == 2
        assert says in capsys.readouterr().err
