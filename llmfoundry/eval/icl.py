"""Evaluation by in-context learning tasks: from the YAML's `icl_tasks` to metrics with standard errors.

Metrics have LLM Foundry's names: `metrics/LABEL/N-shot/METRIC`, or `metrics/LABEL/N-shot/CATEGORY/METRIC`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llmfoundry.config import ConfigError
from llmfoundry.eval.icl_questions import Judged, Questions, Reader
from llmfoundry.eval.icl_rows import HUB
from llmfoundry.eval.icl_tasks import (
    CHOICE_ACCURACY,
    CHOICE_CALIBRATION,
    EXACT_MATCH,
    LM_ACCURACY,
    LM_CALIBRATION,
    TaskConfig,
)
from llmfoundry.eval.likelihood import Ranks
from llmfoundry.model.transformer import CausalLM
from llmfoundry.settings import load_yaml

log = logging.getLogger(__name__)

PREFIX = "metrics/"
N_BUCKETS = 10  # bins of confidence for the calibration error


class Score(NamedTuple):
    """The value of one metric."""

    value: float
    stderr: float | None  # of the mean over questions; None: unknown
    n: int  # number of questions


class Task(NamedTuple):
    """A task that is ready to run: one number of few-shot examples, one category."""

    name: str  # LABEL/N-shot, or LABEL/N-shot/CATEGORY
    metrics: list[str]
    questions: Questions
    n_rows: int  # rows in its data; the questions may be only the first of them
    batch_size: int


def build_tasks(
    configs: Sequence[TaskConfig], reader: Reader, *, max_seq_len: int, batch_size: int, max_batches: int = -1
) -> list[Task]:
    """Read the data of tasks and build their prompts.

    Args:
        max_seq_len: tokens per row, for tasks that do not set it.
        batch_size: rows per forward, for tasks that do not set it.
        max_batches: run at most this many batches of each task, over all ranks together; -1: all.

    Raises:
        ConfigError: if data is missing or malformed, or two tasks have the same name.
    """
    tasks: list[Task] = []
    for config in configs:
        rows_at_once = config.batch_size or batch_size
        for category, rows in config.by_category().items():
            per_batch = max(rows_at_once // config.n_choices(rows[0]), 1)  # never split a question
            limit = len(rows) if max_batches == -1 else max_batches * per_batch
            for n in config.num_fewshot:
                name = "/".join(filter(None, (config.label, f"{n}-shot", category)))
                if any(name == task.name for task in tasks):
                    raise ConfigError(f"icl_tasks: {name} is listed twice; give one of them another label")
                questions = config.build(rows, n, limit, reader, config.max_seq_len or max_seq_len)
                tasks.append(Task(name, config.metrics, questions, len(rows), rows_at_once))
    return tasks


def evaluate_tasks(
    model: CausalLM,
    tasks: Sequence[Task],
    *,
    rank: int = 0,
    world: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    report: bool = False,
) -> dict[str, Score] | None:
    """Evaluate a model on tasks.

    Args:
        model: in evaluation mode, sharded or not; every rank calls this.
        rank: this process's share of the questions, of `world`.
        stopped: called before every batch, with the same answer on every rank; True ends the evaluation.
        report: log each task when it is done.

    Returns:
        The metrics by name, the same on every rank; None if it was stopped.
    """
    scores: dict[str, Score] = {}
    for task in tasks:
        judged = task.questions.ask(model, Ranks(task.batch_size, rank, world, stopped))
        if judged is None:
            return None
        for metric in task.metrics:
            scores[f"{PREFIX}{task.name}/{metric}"] = score = _METRICS[metric](judged)
            if report:
                log.info("%s: %s %.4f", task.name, metric, score.value)
    return scores


def accuracy(judged: Sequence[Judged]) -> Score:
    """Return the share of correct answers."""
    n = len(judged)
    value = sum(one.correct for one in judged) / n
    return Score(value, math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None, n)


def calibration_error(judged: Sequence[Judged]) -> Score:
    """Expected calibration error: the gap between confidence and accuracy, averaged over ten equal bins of confidence.

    The middle of its bin stands for a question's confidence. Source: Guo et al. 2017, arXiv:1706.04599.
    """
    buckets: list[list[Judged]] = [[] for _ in range(N_BUCKETS)]
    for one in judged:
        buckets[min(int(one.confidence * N_BUCKETS), N_BUCKETS - 1)].append(one)
    gaps = (
        abs(sum(one.surest_correct for one in bucket) - len(bucket) * (number + 0.5) / N_BUCKETS)
        for number, bucket in enumerate(buckets)
    )
    return Score(sum(gaps) / len(judged), None, len(judged))


_METRICS: dict[str, Callable[[Sequence[Judged]], Score]] = {
    LM_ACCURACY: accuracy,
    CHOICE_ACCURACY: accuracy,
    EXACT_MATCH: accuracy,
    LM_CALIBRATION: calibration_error,
    CHOICE_CALIBRATION: calibration_error,
}


def with_tasks_read(data: Mapping[str, object], folder: Path) -> dict[str, object]:
    """Return the YAML's data, with tasks and gauntlet read from the files that it names.

    `icl_tasks` and `eval_gauntlet` may be paths, as may LLM Foundry's `icl_tasks_str` and `eval_gauntlet_str`.
    Relative paths, including those of task data, are looked for in the current folder, then beside the file that names
    them.

    Args:
        folder: the folder of the YAML.

    Raises:
        ConfigError: if a file is missing or malformed.
    """
    data = dict(data)
    for key in ("icl_tasks", "eval_gauntlet"):
        path, beside = data.pop(f"{key}_str", None), folder
        if path is not None and data.get(key) is not None:
            raise ConfigError(f"{key}_str: {key} is also given; keep one")
        path = data.get(key) if path is None else path
        if isinstance(path, str):
            file = Path(_found(path, folder))
            if not file.is_file():
                raise ConfigError(f"{key}: {path}: no such file, neither in {Path.cwd()} nor in {folder}")
            within = load_yaml(file)
            if key not in within:
                raise ConfigError(f"{file}: has no {key}")
            data[key], beside = within[key], file.parent
        if key == "icl_tasks" and isinstance(data.get(key), list):
            data[key] = [_with_paths(task, folder, beside) for task in data[key]]  # type: ignore[attr-defined]
        elif data.get(key, ...) is None:
            del data[key]  # present but empty
    return data


def _with_paths(task: object, *folders: Path) -> object:
    if not isinstance(task, dict) or not isinstance(task.get("dataset_uri"), str):
        return task
    return {**task, "dataset_uri": _found(task["dataset_uri"], *folders)}


def _found(path: str, *folders: Path) -> str:
    """Return the absolute path of a file in the current folder or one of `folders`, or its own path if none has it."""
    places = (folder / Path(path).expanduser() for folder in (Path(), *folders))
    return path if path.startswith(HUB) else next((str(each.absolute()) for each in places if each.is_file()), path)


def table(scores: Mapping[str, Mapping[str, Score]], composites: Mapping[str, Mapping[str, float]]) -> str:
    """Format results as a Markdown table.

    Args:
        scores: each model's scores, by the model's name.
        composites: each model's gauntlet scores, by the model's name.
    """
    rows = [("model", "task", "metric", "value", "stderr", "questions")]
    for model, found in scores.items():
        for name, score in found.items():
            task, _, metric = name.removeprefix(PREFIX).rpartition("/")
            error = "" if score.stderr is None else f"{score.stderr:.4f}"
            rows.append((model, task, metric, f"{score.value:.4f}", error, str(score.n)))
        for name, value in composites.get(model, {}).items():
            rows.append((model, name.rpartition("/")[2], "gauntlet", f"{value:.4f}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
