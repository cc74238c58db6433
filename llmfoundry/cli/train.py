"""`train.py YAML [--dry-run] [key=value ...]`: train a model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmfoundry import launch
from llmfoundry.cli.command import command, read_run_config, read_translated
from llmfoundry.cli.parser import Parser, integer, number, program
from llmfoundry.config import ConfigError, check
from llmfoundry.planning.hardware import GIB, GPU_MEMORY
from llmfoundry.private import cleaned, disclosed
from llmfoundry.settings import write_resolved
from llmfoundry.stopping import on_signal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmfoundry.data.loader import Loader
    from llmfoundry.train.config import RunConfig

log = logging.getLogger(__name__)

MOST_GPUS = 2**14  # maximum number of GPUs that a plan considers


@command
def train_main(argv: Sequence[str] | None = None) -> None:
    """`train.py YAML [--dry-run] [--gpus N] [--gpu-memory GIB] [key=value ...]`."""
    parser = _parser(
        "train",
        "Train a model. Ctrl-C saves and stops; the same command with autoresume=true continues the run.",
        "llmfoundry train yamls/moe.yaml",
        "llmfoundry train yamls/moe.yaml optimizer.lr=1.0e-3 max_duration=100ba save_folder=runs/short",
        "llmfoundry train yamls/olmoe-1b-7b.yaml --dry-run --gpus 8",
        "torchrun --nproc-per-node 8 scripts/train.py yamls/olmoe-1b-7b.yaml",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved YAML and the plan; train nothing")
    parser.add_argument("--explain", action="store_true", help="print what each key became; train nothing")
    _add_plan(parser, "with --dry-run: ")
    args = parser.parse_intermixed_args(argv)
    with on_signal():
        _run(args)


def _parser(name: str, description: str, *examples: str) -> Parser:
    parser = Parser(program(name), description, examples)
    parser.add_argument("yaml", help="the run, e.g. yamls/moe.yaml")
    parser.add_overrides("replace settings of the YAML: model.n_layers=2")
    return parser


def _add_plan(parser: Parser, condition: str = "") -> None:
    parser.add_argument("--show-batch", action="store_true", help="print the first batch, decoded")
    parser.add_argument(
        "--gpus", type=integer(1, MOST_GPUS), default=None, metavar="N", help=f"{condition}plan for N GPUs"
    )
    parser.add_argument(
        "--gpu-memory", type=number(0, above=True), default=None, metavar="GIB",
        help=f"{condition}memory of one GPU; default: {GPU_MEMORY / GIB:g}, an H100 with 80 GB",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    for option, value in (("--gpus", args.gpus), ("--gpu-memory", args.gpu_memory)):
        if value is not None and not args.dry_run:
            raise ConfigError(f"{option} {value:g}: needs --dry-run; training uses the processes that torchrun starts")
    if args.explain:
        _explain(args.yaml, args.overrides)
        return
    config = read_run_config(args.yaml, args.overrides)
    config.model.check_trainable()
    if args.dry_run:
        _dry_run(config, args.gpus, GPU_MEMORY if args.gpu_memory is None else args.gpu_memory * GIB)
        if args.show_batch:
            tokenizer = config.tokenizer.build(config.train_loader.dataset)
            _show_batch(
                config,
                config.train_loader.build(
                    tokenizer,
                    seed=config.seed,
                    max_seq_len=config.max_seq_len,
                    sequence_ids=sees_documents(config),
                    special=config.tokenizer.special_tokens(tokenizer),
                ),
                tokenizer,
            )
    else:
        _train(config, args.show_batch)


@command
def plan_main(argv: Sequence[str] | None = None) -> None:
    """`plan YAML [--gpus N] [--gpu-memory GIB] [key=value ...]`: `train --dry-run`."""
    parser = _parser(
        "plan",
        "Print the resolved YAML, the size of the model, and the memory and time of a run. Needs no GPU and no data.",
        "llmfoundry plan yamls/moe.yaml",
        "llmfoundry plan yamls/dbrx-132b.yaml --gpus 64",
        "llmfoundry plan yamls/olmoe-1b-7b.yaml --gpus 8 --gpu-memory 40 parallel.recompute=full",
    )
    _add_plan(parser)
    parser.set_defaults(dry_run=True, explain=False)
    _run(parser.parse_intermixed_args(argv))


@command
def explain_main(argv: Sequence[str] | None = None) -> None:
    """`explain YAML [key=value ...]`: `train --explain`."""
    parser = _parser(
        "explain",
        "Print what each key of a YAML became. For files written for LLM Foundry.",
        "llmfoundry explain yamls/moe.yaml",
    )
    args = parser.parse_intermixed_args(argv)
    _explain(args.yaml, args.overrides)


def _explain(path: str, overrides: list[str]) -> None:
    from llmfoundry.integrations.explain import explained

    given, data, environment, notes = read_translated(path, overrides)
    for line in explained(disclosed(given, environment), notes):
        print(cleaned(line))
    from llmfoundry.train.config import RunConfig

    check(RunConfig, data)  # its errors are reported last


def _dry_run(config: RunConfig, gpus: int | None, gpu_memory: float) -> None:
    from llmfoundry import hf
    from llmfoundry.planning.report import describe

    print(write_resolved(config.disclosed()))
    print(_sizes(config))
    print(hf.export_note(config.model))
    for line in _evaluations(config):
        print(line)
    if gpus is None and launch.world_size() > 1:
        gpus = launch.world_size()
    try:
        for line in describe(config, gpus, gpu_memory):
            print(line, flush=True)
    except (RuntimeError, OverflowError) as error:
        if not isinstance(error, OverflowError) and "overflow" not in str(error):
            raise
        raise ConfigError(f"the model is too large to be planned: {error}".splitlines()[0]) from None


def _train(config: RunConfig, show_batch: bool) -> None:
    from llmfoundry import hf
    from llmfoundry.callbacks.console import Console
    from llmfoundry.callbacks.report import Report, ReportConfig
    from llmfoundry.callbacks.speed_monitor import SpeedMonitor, SpeedMonitorConfig
    from llmfoundry.train.build import build

    trainer = build(config)
    log.info("%s", hf.export_note(config.model))
    if show_batch and launch.is_rank0():
        _show_batch(config, trainer.loader, trainer.tokenizer)
    if not any(isinstance(callback, SpeedMonitor) for callback in trainer.callbacks):
        # Every run reports its speed, also to its loggers.
        trainer.callbacks.insert(0, SpeedMonitorConfig(name="speed_monitor").build())
    if not any(isinstance(callback, Report) for callback in trainer.callbacks):
        # Every run writes a report page. It comes before the loggers, because it adds metrics per layer.
        trainer.named["callbacks.report"] = ReportConfig().build()
        trainer.callbacks.insert(1, trainer.named["callbacks.report"])
    if config.log_to_console:
        trainer.callbacks.append(Console())
    trainer.fit()
    if launch.is_rank0() and not trainer.stopping:
        report = trainer.config.folder / "report.html"
        drawn = f"; open {report} in a browser" if report.exists() else ""
        log.info("done%s; next: llmfoundry generate --checkpoint %s", drawn, trainer.config.save_folder)


def _evaluations(config: RunConfig) -> Iterator[str]:
    """Yield the share of time that evaluation will take."""
    from llmfoundry.train.duration import Timeline

    if config.icl_tasks and config.eval_interval.value:
        n = sum(len(task.num_fewshot) for task in config.icl_tasks)
        yield f"evaluation: {n} tasks every {config.eval_interval}; icl_subset_num_batches limits their questions"
    if not config.evaluations or not config.eval_interval.value:
        return
    if config.eval_subset_num_batches == -1:
        yield f"evaluation: all rows of eval_loader every {config.eval_interval}; eval_subset_num_batches limits them"
        return
    rows, share = config.eval_subset_num_batches * config.device_eval_batch_size, ""
    lengths = (config.eval_interval, config.max_duration)
    # The data determines the length of an epoch, and the machine how much fits into an hour.
    if not any(each.unit == "ep" or each.seconds is not None for each in lengths):
        timeline = Timeline.of(config.max_duration, rows_per_step=config.global_train_batch_size,
                               tokens_per_row=config.max_seq_len, rows_per_epoch=0)  # fmt: skip
        share = f": up to {timeline.share_of_evaluation(rows, config.eval_interval):.1%} of the time"
    yield f"evaluation: at most {rows:,} rows every {config.eval_interval}{share}"


def sees_documents(config: RunConfig) -> bool:
    """Return whether attention keeps documents apart."""
    from llmfoundry.model.transformer import CausalLMConfig

    assert isinstance(config.model, CausalLMConfig)
    return config.model.attn_config.attn_uses_sequence_id


def _show_batch(config: RunConfig, loader: Loader, tokenizer: PreTrainedTokenizerBase) -> None:
    from llmfoundry.data.show import shown

    for line in shown(loader.batch(0, config.global_train_batch_size), tokenizer, loader.labels):
        print(line, flush=True)


def _sizes(config: RunConfig) -> str:
    model = config.model
    flops = model.flops_per_token(config.max_seq_len)
    return (
        f"parameters: {model.n_params():,} ({model.n_params() / 1e9:.3f} B)\n"
        f"active parameters: {model.n_active_params():,} ({model.n_active_params() / 1e9:.3f} B)\n"
        f"training FLOPs per token: {flops:.4g} (sequences of {config.max_seq_len} tokens)"
    )
