"""The evaluation of a run: the loss on its texts, and its tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfoundry.config import ResourceError
from llmfoundry.eval.icl import Task, build_tasks, evaluate_tasks
from llmfoundry.eval.icl_questions import Reader
from llmfoundry.eval.perplexity import evaluate
from llmfoundry.train.config import RunConfig
from llmfoundry.train.out_of_memory import first_of
from llmfoundry.train.run import EVALUATED, Metrics, Run

Stopped = Callable[[], bool]  # asked before each batch, with the same answer on every rank; true ends the evaluation


def tasks_of(config: RunConfig, reader: Reader) -> list[Task]:
    """The tasks of a run; empty if no evaluation is ever due.

    Raises:
        ConfigError: as `build_tasks`.
    """
    if not config.eval_first and config.eval_interval.value == 0:
        return []
    batches = config.icl_subset_num_batches
    tasks = build_tasks(
        config.icl_tasks,
        reader,
        max_seq_len=config.icl_seq_len,
        batch_size=config.device_eval_batch_size,
        max_batches=-1 if batches is None else batches,
    )
    if config.eval_gauntlet is not None:
        config.eval_gauntlet.warn_of_missing(tasks)
    return tasks


def evaluates(run: Run) -> bool:
    """Whether a run is evaluated at intervals and at its end."""
    return bool(run.config.evaluations or run.tasks) and run.config.eval_interval.value > 0


def evaluated(run: Run, stopped: Stopped) -> Metrics:
    """Evaluate on all ranks together and return the metrics; empty if it was stopped.

    Raises:
        ResourceError: out of memory.
    """
    run.model.eval()
    try:
        texts = _by_texts(run, stopped)
        tasks = _by_tasks(run, stopped) if texts is not None else None
    except torch.OutOfMemoryError as error:
        rows = run.config.device_eval_batch_size
        raise ResourceError(
            f"out of memory in an evaluation; a smaller device_eval_batch_size than {rows} needs less "
            f"({first_of(str(error))})"
        ) from None
    run.model.train()
    return texts | tasks if texts is not None and tasks is not None else {}


def _by_texts(run: Run, stopped: Stopped) -> Metrics | None:
    """Metrics of the eval loaders; None if it was stopped."""
    metrics: Metrics = {}
    for loader in [*([run.eval_loader] if run.eval_loader is not None else []), *run.eval_loaders]:
        found = evaluate(
            run.model,
            loader,
            rows=run.config.device_eval_batch_size,
            device=run.device,
            max_batches=run.config.eval_subset_num_batches,
            rank=run.mesh.data_rank,
            world=run.mesh.data_ranks,
            stopped=stopped,
        )
        if found is None:
            return None
        name = f"{EVALUATED}{loader.label}/" if loader in run.eval_loaders else EVALUATED
        metrics[f"{name}LanguageCrossEntropy"] = found.nats_per_token
        if found.bits_per_byte is not None:
            metrics[f"{name}bits_per_byte"] = found.bits_per_byte
    return metrics


def _by_tasks(run: Run, stopped: Stopped) -> Metrics | None:
    """Metrics of `icl_tasks` and their gauntlet; None if it was stopped."""
    mesh, gauntlet = run.mesh, run.config.eval_gauntlet
    scores = evaluate_tasks(run.model, run.tasks, rank=mesh.data_rank, world=mesh.data_ranks, stopped=stopped)
    if scores is None:
        return None
    metrics: Metrics = {name: score.value for name, score in scores.items()}
    return metrics | (gauntlet.composite(scores, run.tasks) if gauntlet is not None else {})
