"""`train.py YAML [--dry-run] [key=value ...]` and `prepare_data.py YAML`: train a model, or prepare its data ahead."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmfoundry import launch
from llmfoundry.cli.command import command, read_config
from llmfoundry.config import ConfigError, dump
from llmfoundry.planning.hardware import GIB, GPU_MEMORY
from llmfoundry.settings import write_resolved

if TYPE_CHECKING:
    from llmfoundry.train.config import RunConfig

log = logging.getLogger(__name__)


@command
def train_main(argv: Sequence[str] | None = None) -> None:
    """`train.py YAML [--dry-run] [--gpus N] [--gpu-memory GIB] [key=value ...]`."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a model.")
    parser.add_argument("yaml", help="the run, e.g. yamls/moe.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="put over the YAML, e.g. model.n_layers=2"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the run would be, and train nothing")
    parser.add_argument("--gpus", type=int, default=None, help="for --dry-run: plan for so many GPUs")
    parser.add_argument(
        "--gpu-memory", type=float, default=None, metavar="GIB",
        help=f"for --dry-run: what one of them holds; {GPU_MEMORY / GIB:g}, as an H100 80GB shows it, if left out",
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    if args.gpus is not None and (args.gpus < 1 or not args.dry_run):
        raise ConfigError(f"--gpus {args.gpus}: is for --dry-run, and 1 or more")
    if args.gpu_memory is not None and (not math.isfinite(args.gpu_memory) or not args.dry_run):
        raise ConfigError(f"--gpu-memory {args.gpu_memory:g}: is for --dry-run, and a number of GiB")
    config = read_config(args.yaml, args.overrides)
    config.model.check_trainable()
    if args.dry_run:
        _dry_run(config, args.gpus, GPU_MEMORY if args.gpu_memory is None else args.gpu_memory * GIB)
    else:
        _train(config)


def _dry_run(config: RunConfig, gpus: int | None, gpu_memory: float) -> None:
    from llmfoundry import hf
    from llmfoundry.planning.report import describe

    print(write_resolved(dump(config)))
    print(_sizes(config))
    print(hf.export_note(config.model))
    for line in _evaluations(config):
        print(line)
    if gpus is None and launch.world_size() > 1:
        gpus = launch.world_size()
    for line in describe(config, gpus, gpu_memory):
        print(line, flush=True)


def _train(config: RunConfig) -> None:
    from llmfoundry import hf
    from llmfoundry.callbacks.console import Console
    from llmfoundry.callbacks.report import Report, ReportConfig
    from llmfoundry.callbacks.speed_monitor import SpeedMonitor, SpeedMonitorConfig
    from llmfoundry.train.trainer import build

    trainer = build(config)
    log.info("%s", hf.export_note(config.model))
    if not any(isinstance(callback, SpeedMonitor) for callback in trainer.callbacks):
        # Every run reports its speed, to its loggers too.
        trainer.callbacks.insert(0, SpeedMonitorConfig(name="speed_monitor").build())
    if not any(isinstance(callback, Report) for callback in trainer.callbacks):
        trainer.callbacks.append(ReportConfig().build())  # every run leaves a page
    if config.log_to_console:
        trainer.callbacks.append(Console())
    trainer.fit()


def _evaluations(config: RunConfig) -> Iterator[str]:
    """How much of the time evaluation will take."""
    from llmfoundry.train.duration import Timeline

    if config.eval_loader is None or not config.eval_interval.value:
        return
    if config.eval_subset_num_batches == -1:
        yield f"evaluation: all rows of eval_loader every {config.eval_interval}; eval_subset_num_batches limits them"
        return
    rows, share = config.eval_subset_num_batches * config.device_eval_batch_size, ""
    if "ep" not in (config.eval_interval.unit, config.max_duration.unit):  # whose length the data decides
        timeline = Timeline.of(config.max_duration, rows_per_step=config.global_train_batch_size,
                               tokens_per_row=config.max_seq_len, rows_per_epoch=0)  # fmt: skip
        share = f": up to {timeline.share_of_evaluation(rows, config.eval_interval):.1%} of the time"
    yield f"evaluation: at most {rows:,} rows every {config.eval_interval}{share}"


def _sizes(config: RunConfig) -> str:
    model = config.model
    flops = model.flops_per_token(config.max_seq_len)
    return (
        f"parameters: {model.n_params():,} ({model.n_params() / 1e9:.3f} B)\n"
        f"active parameters: {model.n_active_params():,} ({model.n_active_params() / 1e9:.3f} B)\n"
        f"training FLOPs per token: {flops:.4g} (sequences of {config.max_seq_len} tokens)"
    )


@command
def prepare_data_main(argv: Sequence[str] | None = None) -> None:
    """`prepare_data.py YAML [key=value ...]`: tokenise a run's datasets ahead of it, on a machine without GPUs."""
    parser = argparse.ArgumentParser(prog="prepare_data.py", description="Tokenise a run's datasets ahead of it.")
    parser.add_argument("yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.yaml, args.overrides)
    from llmfoundry.data.packing import prepare
    from llmfoundry.data.sources import check_apart

    also = [config.evaluation.dataset] if config.evaluation is not None else []
    check_apart(config.train_loader.dataset, *also)
    tokenizer = config.tokenizer.build(config.train_loader.dataset, also)
    for name, part in (("train_loader", config.train_loader), ("eval_loader", config.evaluation)):
        if part is not None:
            stream = prepare(part.dataset, tokenizer, config.tokenizer.special_tokens(tokenizer))
            print(f"{name}: {stream.n_tokens:,} tokens of {stream.n_bytes:,} bytes in {Path(stream.folder)}")
