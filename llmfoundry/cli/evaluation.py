"""Evaluation by tasks from the command line: our and LLM Foundry's YAMLs of models, and lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmfoundry import launch
from llmfoundry.atomic import write_output
from llmfoundry.cli.opening import (
    HUGGING_FACE,
    Opened,
    Ready,
    is_hugging_face,
    open_checkpoint,
    open_hugging_face,
)
from llmfoundry.cli.prompts import check_output
from llmfoundry.code import run_plugins
from llmfoundry.config import ConfigError, check
from llmfoundry.settings import from_dotlist, load_yaml

if TYPE_CHECKING:
    from llmfoundry.cli.evaluation_yaml import TaskSettings
    from llmfoundry.eval.icl import Score


class TaskOptions(NamedTuple):
    """The options of `eval.py` that concern tasks."""

    icl_tasks: str | None
    gauntlet: str | None
    tasks: str | None
    num_fewshot: int | None
    limit: int | None
    include_path: str | None
    apply_chat_template: bool
    output: Path | None
    allow_code: bool = False

    def check(self) -> None:
        """Refuse options that lack the option they belong to, and a file that cannot be written; raise ConfigError."""
        if self.output is not None:
            check_output(self.output)
        if self.gauntlet and not self.icl_tasks:
            raise ConfigError(f"--gauntlet {self.gauntlet}: is for --icl-tasks FILE")
        if self.icl_tasks and self.tasks:
            raise ConfigError("--icl-tasks and --tasks: choose one")
        for name, value in (
            ("--num-fewshot", self.num_fewshot),
            ("--limit", self.limit),
            ("--include-path", self.include_path),
            ("--apply-chat-template", self.apply_chat_template or None),
        ):
            if value is not None and not self.tasks:
                raise ConfigError(f"{name}{'' if value is True else f' {value}'}: is for --tasks NAMES")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"--include-path {self.include_path}: no such folder")


class Results(NamedTuple):
    """The scores of one model."""

    scores: dict[str, Score]
    composites: dict[str, float]  # gauntlet scores


def evaluate_by_tasks(checkpoint: str, overrides: list[str], keys: Sequence[str], options: TaskOptions) -> None:
    """Evaluate an llmfoundry checkpoint, or `hf:` with a folder or hub id, on the tasks that options name.

    Args:
        overrides: overrides of the run's settings; for a Hugging Face model, of `TaskSettings`.
        keys: the settings of a run that may be overridden.
    """
    from llmfoundry.cli.evaluation_yaml import TaskSettings

    if is_hugging_face(checkpoint):
        settings = check(TaskSettings, _with_files(from_dotlist(overrides), options))
        ready = open_hugging_face(checkpoint.removeprefix(HUGGING_FACE), settings.precision_here())
    else:
        opened = open_checkpoint(checkpoint, overrides, keys, allow_code=options.allow_code)
        ready = opened.ready
        settings = check(TaskSettings, _with_files(_settings_of(opened), options))
    results = {checkpoint: _evaluated(ready, settings, options)}
    _show(results)
    _write(results, options)


def evaluate_opened(opened: Opened, texts: dict[str, Score], options: TaskOptions) -> None:
    """Evaluate a checkpoint on the tasks of its own run, if the run has any.

    Args:
        texts: results of the evaluation on texts, for `--output`.
    """
    from llmfoundry.cli.evaluation_yaml import TaskSettings

    config, name = opened.config, str(opened.folder)
    if not config.icl_tasks:
        _write({name: Results(texts, {})}, options)
        return
    settings = check(TaskSettings, _settings_of(opened)).model_copy(
        update={"icl_tasks": config.icl_tasks, "eval_gauntlet": config.eval_gauntlet}
    )
    found = _evaluated(opened.ready, settings, options)
    _show({name: found})
    _write({name: Results(texts | found.scores, found.composites)}, options)


def evaluate_yaml(path: str, overrides: list[str], options: TaskOptions) -> None:
    """Evaluate the models that a YAML lists on its tasks."""
    from llmfoundry.cli.evaluation_yaml import VARIABLES, EvaluationConfig, translated
    from llmfoundry.eval.icl import with_tasks_read

    # LLM Foundry's README sets these at the top level, and its files read them under `variables`.
    theirs = [f"variables.{item}" for item in overrides if item.partition("=")[0] in VARIABLES]
    data = load_yaml(path, overrides + theirs)
    run_plugins(data)
    data = _with_files(with_tasks_read(translated(data), Path(path).parent), options)
    config = check(EvaluationConfig, data)
    results: dict[str, Results] = {}
    for model in config.models:
        results[model.model_name] = _evaluated(model.open(config.precision_here(), options.allow_code), config, options)
    _show(results)
    _write(results, options)


def _settings_of(opened: Opened) -> dict[str, object]:
    config = opened.config
    return {
        "device_eval_batch_size": config.device_eval_batch_size,
        "icl_seq_len": config.icl_seq_len,
        "icl_subset_num_batches": config.icl_subset_num_batches,
    }


def _with_files(data: Mapping[str, object], options: TaskOptions) -> dict[str, object]:
    """Return settings with tasks and gauntlet from the files that options name."""
    from llmfoundry.eval.icl import with_tasks_read

    if options.icl_tasks is None:
        return dict(data)
    files = {"icl_tasks": options.icl_tasks, "eval_gauntlet": options.gauntlet}
    return {**data, **with_tasks_read(files, Path())}


def _evaluated(ready: Ready, settings: TaskSettings, options: TaskOptions) -> Results:
    """Evaluate one model on the tasks."""
    from llmfoundry.eval.icl import build_tasks, evaluate_tasks
    from llmfoundry.eval.icl_questions import Reader

    special = ready.special
    if options.apply_chat_template:
        if ready.tokenizer.chat_template is None:
            raise ConfigError("--apply-chat-template: the tokenizer has no chat template, so this may be a base model")
        special = special._replace(parse=True)  # templates write special tokens
    reader = Reader(ready.tokenizer, special)
    rank, world = ready.mesh.data_rank, ready.mesh.data_ranks
    if options.tasks:
        from llmfoundry.eval.likelihood import Ranks

        try:
            from llmfoundry.eval.lm_eval import FoundryLM, evaluate_harness
        except ImportError as error:
            raise ConfigError(f"--tasks: needs lm-evaluation-harness ({error}); pip install lm-eval") from None
        ranks = Ranks(settings.device_eval_batch_size, rank, world)
        length = min(settings.icl_seq_len, ready.model.config.max_seq_len)
        lm = FoundryLM(ready.model, reader, ranks, length)
        return Results(
            evaluate_harness(
                lm,
                options.tasks.split(","),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                include_path=options.include_path,
                apply_chat_template=options.apply_chat_template,
            ),
            {},
        )
    batches = settings.icl_subset_num_batches
    tasks = build_tasks(
        settings.icl_tasks,
        reader,
        max_seq_len=settings.icl_seq_len,
        batch_size=settings.device_eval_batch_size,
        max_batches=-1 if batches is None else batches,
    )
    gauntlet = settings.eval_gauntlet
    if gauntlet is not None:
        gauntlet.warn_of_missing(tasks)
    scores = evaluate_tasks(ready.model, tasks, rank=rank, world=world, report=True)
    assert scores is not None
    return Results(scores, gauntlet.composite(scores, tasks) if gauntlet is not None else {})


def _show(results: Mapping[str, Results]) -> None:
    """Print a table; on rank 0."""
    from llmfoundry.eval.icl import table

    if launch.is_rank0():
        scores = {name: found.scores for name, found in results.items()}
        print(table(scores, {name: found.composites for name, found in results.items()}))


def _write(results: Mapping[str, Results], options: TaskOptions) -> None:
    """Write the file named by `--output`; on rank 0."""
    if not launch.is_rank0() or options.output is None:
        return
    data = {
        name: {
            "metrics": {key: score._asdict() for key, score in found.scores.items()},
            "gauntlet": found.composites,
        }
        for name, found in results.items()
    }
    try:
        write_output(options.output, json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--output {options.output}: {(error.strerror or str(error)).lower()}") from None
