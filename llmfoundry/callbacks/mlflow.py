"""`mlflow`: logs metrics and settings to MLflow. The keys are Composer's; needs the package mlflow or mlflow-skinny.

    loggers:
      mlflow: {experiment_name: moe, tracking_uri: "http://mlflow.example.org:5000", tags: {team: nlp}}

The save folder keeps the id of the MLflow run, which a resumed run continues.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmfoundry import runtime
from llmfoundry.atomic import atomic_write
from llmfoundry.callbacks.reach import why_unreachable
from llmfoundry.config import ConfigError
from llmfoundry.train.callback import Callback, LoggerConfig, Metrics, Run, Table
from llmfoundry.train.config import RankZeroOnly

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

RUN_ID = "mlflow-run-id"  # name of a file in the save_folder
DEFAULT_EXPERIMENT = "my-mlflow-experiment"
MOST_METRICS, MOST_PARAMS, MOST_CHARACTERS = 1000, 100, 500  # per request; per setting


class MLflowConfig(LoggerConfig, names=("mlflow",)):
    """Where to log, and what to leave out."""

    experiment_name: str | None = None  # None: $MLFLOW_EXPERIMENT_NAME, or my-mlflow-experiment
    run_name: str | None = None  # None: the run's name
    tracking_uri: str | None = None  # None: $MLFLOW_TRACKING_URI, or MLflow's own default
    tags: dict[str, str | int | float | bool] = {}  # tags of the MLflow run
    run_group: str | None = None  # added to the MLflow run as a tag
    flush_interval: float = Field(10.0, ge=0)  # seconds between requests
    synchronous: bool = False  # true: training waits for the server's responses
    log_system_metrics: bool = True  # log MLflow's own system metrics, from a thread (needs psutil)
    rename_metrics: dict[str, str] = {}  # names in metrics.jsonl, and their names in MLflow
    ignore_metrics: list[str] = []  # glob patterns of metrics that are not sent
    ignore_hyperparameters: list[str] = []  # glob patterns of dotted settings that are not sent
    log_duplicated_metric_every_n_steps: int = Field(100, ge=1)  # steps between logs of a value that does not change
    resume: bool = True  # accepted, without effect: a resumed run always continues its MLflow run
    logging_buffer_seconds: float | None = None  # not supported; use flush_interval
    rank_zero_only: RankZeroOnly = True  # only true is supported: metrics cover all ranks, and rank 0 logs them
    # Not supported: models are not registered
    model_registry_prefix: Literal[""] = ""
    model_registry_uri: None = None  # not supported: models are not registered

    def build(self) -> MLflow:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError("loggers.mlflow: needs MLflow (pip install mlflow-skinny)")
        runtime.on_rank0(self._connect)
        return MLflow(self)

    def client(self) -> MlflowClient:
        """Return a connection to `tracking_uri`."""
        import mlflow  # slow to import, and optional

        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        return mlflow.MlflowClient()

    def _connect(self) -> None:
        """Raise ConfigError if the server or store cannot be used; on rank 0."""
        import mlflow

        uri = self.tracking_uri or mlflow.get_tracking_uri()
        if uri.startswith("http") and (reason := why_unreachable(uri)):
            raise ConfigError(f"loggers.mlflow.tracking_uri: {uri} cannot be reached: {reason}")
        try:
            self.client().search_experiments(max_results=1)
        except (mlflow.exceptions.MlflowException, OSError, ImportError) as error:
            raise ConfigError(f"loggers.mlflow.tracking_uri: {uri}: {' '.join(str(error).split())}") from None


class MLflow(Callback):
    """Collects metrics for a few seconds and sends them together, from rank 0.

    If the server returns an error, a warning is logged and training continues.
    """

    def __init__(self, config: MLflowConfig) -> None:
        self.config = config
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._waiting: list[Metric] = []
        self._sent = time.monotonic()
        self._last: dict[str, tuple[float, int]] = {}  # value and step of each metric's last log
        self._system: object = None
        self._status = "FAILED"

    def fit_start(self, trainer: Run) -> None:
        if not runtime.is_rank0():
            return
        self._client = self.config.client()
        file = trainer.config.folder / RUN_ID
        is_new = not file.exists()
        self._run_id = self._new_run(trainer) if is_new else file.read_text().strip()
        if is_new:
            self._try(partial(atomic_write, file, [self._run_id.encode()]))
            self._log_settings(trainer)
        else:
            self._client.update_run(self._run_id, status="RUNNING")
        if self.config.log_system_metrics:
            self._watch_system()

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if self._client is None:
            return
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), trainer.state.step
        for key, value in metrics.items():
            if isinstance(value, list) or _matches(key, self.config.ignore_metrics):
                continue
            before = self._last.get(key)
            if before is not None and before[0] == value:
                if step - before[1] < self.config.log_duplicated_metric_every_n_steps:
                    continue
            self._last[key] = value, step
            self._waiting.append(Metric(self.config.rename_metrics.get(key, key), float(value), now, step))
        if time.monotonic() - self._sent >= self.config.flush_interval:
            self._flush(self.config.synchronous)

    def table(self, trainer: Run, table: Table) -> None:
        if self._client is not None:
            text = json.dumps({"columns": table.columns, "data": table.rows}, ensure_ascii=False)
            name = f"{table.name}_step{trainer.state.step}.json"
            self._try(partial(self._client.log_text, self._run_id, text, name))

    def fit_end(self, trainer: Run) -> None:
        self._status = "FINISHED"

    def close(self) -> None:
        if self._client is None:
            return
        self._flush(synchronous=True)
        if self._system is not None:
            self._system.finish()  # type: ignore[attr-defined]
        self._try(partial(self._client.set_terminated, self._run_id, status=self._status))

    def _new_run(self, trainer: Run) -> str:
        config = self.config
        assert self._client is not None
        name = config.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        run_name = config.run_name or trainer.config.run_name
        tags = (
            dict(config.tags) | {"run_name": run_name} | ({"run_group": config.run_group} if config.run_group else {})
        )
        return str(self._client.create_run(experiment, tags=tags, run_name=run_name).info.run_id)

    def _log_settings(self, trainer: Run) -> None:
        from mlflow.entities import Param

        assert self._client is not None
        params = [
            Param(key, str(value)[:MOST_CHARACTERS])
            for key, value in flattened(trainer.config.disclosed())
            if not _matches(key, self.config.ignore_hyperparameters)
        ]
        for start in range(0, len(params), MOST_PARAMS):
            part = params[start : start + MOST_PARAMS]
            self._try(partial(self._client.log_batch, self._run_id, params=part))

    def _watch_system(self) -> None:
        if importlib.util.find_spec("psutil") is None:
            log.warning("loggers.mlflow.log_system_metrics: needs psutil (pip install psutil); it is left out")
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self._run_id, sampling_interval=5, samples_before_logging=6, resume_logging=True)
        monitor.start()
        self._system = monitor

    def _flush(self, synchronous: bool) -> None:
        assert self._client is not None
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for start in range(0, len(waiting), MOST_METRICS):
            part = waiting[start : start + MOST_METRICS]
            self._try(partial(self._client.log_batch, self._run_id, part, synchronous=synchronous))

    def _try(self, send: Callable[[], object]) -> None:
        """Send something; an error is logged and does not end the run."""
        import mlflow

        try:
            send()
        except (mlflow.exceptions.MlflowException, OSError) as error:
            log.warning("loggers.mlflow: %s; training continues", " ".join(str(error).split()))


def flattened(data: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Yield settings as pairs of a dotted key and a value."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(key, pattern) for pattern in patterns)
