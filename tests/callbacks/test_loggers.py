"""Loggers on real runs: in memory, tensorboard's and W&B's other keys, MLflow with a store of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmfoundry.callbacks.inmemory import InMemory
from llmfoundry.callbacks.tensorboard import Tensorboard
from llmfoundry.cli.command import read_run_config
from llmfoundry.cli.train import train_main
from llmfoundry.config import check
from llmfoundry.train.build import build
from llmfoundry.train.config import RunConfig
from llmfoundry.train.run import Metrics
from llmfoundry.train.trainer import Trainer
from tests.callbacks.conftest import lines, tiny_run
from tests.full_disk import full_disk

TEXTS = "callbacks.generate_callback={prompts: [to be], interval: 2ba, max_new_tokens: 3}"


@pytest.mark.parametrize("name", ["inmemory", "in_memory_logger"])
def test_metrics_and_tables_stay_in_memory(tmp_path: Path, name: str) -> None:
    texts = {"generate_callback": {"prompts": ["to be"], "interval": "2ba", "max_new_tokens": 3}}
    trainer = build(check(RunConfig, tiny_run(tmp_path) | {"loggers": {name: None}, "callbacks": texts}))
    trainer.fit()
    logger = trainer.named[f"loggers.{name}"]
    assert isinstance(logger, InMemory)
    written = [(line["step"], line["loss/train/ce"]) for line in lines(tmp_path / "run")]
    assert logger.data["loss/train/ce"] == written and len(written) == 4
    assert logger.most_recent_values["step"] == 4
    ((first, table), (last, _)) = logger.tables["generations"]
    assert (first, last) == (2, 4) and table.columns == ["prompt", "generation"] and table.rows[0][0] == "to be"


def test_tensorboard_shows_tables_and_takes_composers_keys(tiny: Path, tmp_path: Path) -> None:
    log_dir = "loggers.tensorboard={log_dir: '" + str(tmp_path / "{run_name}") + "', flush_interval: 1}"
    assert train_main([str(tiny), log_dir, TEXTS, "run_name=first"]) == 0
    events = EventAccumulator(str(tmp_path / "first"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train/ce")] == [1, 2, 3, 4]
    assert [event.step for event in events.Tensors("generations/text_summary")] == [2, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of tensorboard's own thread
def test_tensorboard_on_a_full_disk_is_one_line_and_goes_on_when_there_is_room(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = Tensorboard._write

    def full(self: Tensorboard, trainer: Trainer, metrics: Metrics) -> None:
        with full_disk(10) if trainer.state.step in (1, 2) else nullcontext():
            write(self, trainer, metrics)

    monkeypatch.setattr(Tensorboard, "_write", full)
    log_dir = f"loggers.tensorboard={{log_dir: {tmp_path}/events, flush_interval: 1}}"
    assert train_main([str(tiny), log_dir, "max_duration=5ba"]) == 0
    line = "loggers.tensorboard: cannot be written: File too large; trying again every 1 steps"
    assert [each for each in caplog.messages if "tensorboard" in each] == [line]
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train/ce")] == [3, 4, 5]
    assert [each["step"] for each in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]


BLOCK = 2**15


def records(file: Path) -> bytes:
    """What a file of W&B holds; blocks of 32 KiB cut its records anywhere."""
    data, found, at = file.read_bytes(), b"", 7  # after the head of the file
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        found += data[at + 7 : at + 7 + size]
        at += 7 + size
    return found


def test_wandb_takes_composers_keys(tiny: Path, tmp_path: Path) -> None:
    own = "name: mine, entity: us, group: g, tags: [a], init_kwargs: {notes: hello, mode: offline}"
    assert train_main([str(tiny), f"loggers.wandb={{project: test, {own}, rank_zero_only: true}}", TEXTS]) == 0
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    held, deadline = b"", time.monotonic() + 30
    while b"generations" not in held and time.monotonic() < deadline:  # W&B's own process writes the file
        held = records(file)
        time.sleep(0.1)
    assert b"mine" in held and b"hello" in held and b"generations" in held
    assert all(b"moe/layer1/" + name in held for name in (b"max_load", b"router_entropy", b"confidence"))
    config = read_run_config(str(tmp_path / "run" / "config.yaml"), [])
    assert config.loggers["wandb"].run_name == "mine", "config.yaml reads as it was written"


@pytest.mark.parametrize(
    ("logger", "said"),
    [
        ("loggers.wandb={mode: offline, log_artifacts: true}", "loggers.wandb.log_artifacts: checkpoints are not"),
        ("loggers.tensorboard={rank_zero_only: false}", "loggers.tensorboard.rank_zero_only: metrics are of all"),
    ],
)
def test_what_is_not_supported_is_refused(
    tiny: Path, capsys: pytest.CaptureFixture[str], logger: str, said: str
) -> None:
    assert train_main([str(tiny), logger]) == 2
    assert said in capsys.readouterr().err


MLFLOW = os.environ.get("LLMFOUNDRY_MLFLOW", "")  # the site-packages of an environment that has mlflow
READ = """
import json, sys
sys.path.append(sys.argv[1])
import mlflow
client = mlflow.MlflowClient(sys.argv[2])
(run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss/train/ce")]
print(json.dumps({"name": run.info.run_name, "status": run.info.status, "tags": run.data.tags,
    "params": run.data.params, "metrics": run.data.metrics, "history": history,
    "files": [file.path for file in client.list_artifacts(run.info.run_id)]}))
"""
RUN = """
import sys
import time
sys.path.append(sys.argv.pop(1))
from llmfoundry.cli.train import train_main
sys.exit(train_main(sys.argv[1:]))
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that finds mlflow after our own packages."""
    environment = os.environ | {"MLFLOW_ALLOW_FILE_STORE": "true"}
    command = [sys.executable, "-c", script, MLFLOW, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.skipif(not MLFLOW, reason="LLMFOUNDRY_MLFLOW names no site-packages with mlflow")
def test_mlflow_holds_the_run_and_a_resumed_run_continues_it(tiny: Path, tmp_path: Path) -> None:
    store = f"file:{tmp_path / 'mlruns'}"
    keys = (
        f"tracking_uri: '{store}', experiment_name: ours, run_name: mine, tags: {{team: nlp}}, run_group: g, "
        "ignore_metrics: ['moe/*'], rename_metrics: {tokens: time/token}, ignore_hyperparameters: [tokenizer.*]"
    )
    command = [str(tiny), f"loggers.mlflow={{{keys}}}", TEXTS]
    done = python(RUN, *command)
    assert done.returncode == 0, done.stderr
    done = python(RUN, *command, "max_duration=6ba", "autoresume=true")
    assert done.returncode == 0, done.stderr
    read = python(READ, store)
    assert read.returncode == 0, read.stderr
    found = yaml.safe_load(read.stdout.splitlines()[-1])
    assert (found["name"], found["status"]) == ("mine", "FINISHED")
    assert found["tags"]["team"] == "nlp" and found["tags"]["run_group"] == "g"
    assert found["params"]["optimizer.lr"] == "0.01" and "tokenizer.name" not in found["params"]
    assert [tuple(each) for each in found["history"]] == [
        (line["step"], line["loss/train/ce"]) for line in lines(tmp_path / "run")
    ]
    assert len(found["history"]) == 6
    assert found["metrics"]["time/token"] == 6 * 128 and not any(key.startswith("moe/") for key in found["metrics"])
    assert "generations_step4.json" in found["files"]


@pytest.mark.skipif(not MLFLOW, reason="LLMFOUNDRY_MLFLOW names no site-packages with mlflow")
def test_an_mlflow_server_out_of_reach_is_found_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    done = python(RUN, str(tiny), "loggers.mlflow.tracking_uri=http://127.0.0.1:9")
    assert done.returncode == 2
    assert "error: loggers.mlflow.tracking_uri: http://127.0.0.1:9 cannot be reached" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(bool(MLFLOW), reason="mlflow is there")
def test_without_mlflow_the_error_says_what_to_install(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(tiny), "loggers.mlflow={}"]) == 2
    assert "pip install mlflow-skinny" in capsys.readouterr().err
