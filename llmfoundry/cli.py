"""The commands. `scripts/*.py` are doors to the functions here.

Exit codes: 0 done (also after a requested stop), 2 a mistake of the user's (one clear line a machine), 1 anything
else (with a traceback, and the rank that it happened on). torchrun's own is 1 for both.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
import yaml
from rich.console import Console as RichConsole
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from llmfoundry import runtime
from llmfoundry.callbacks.console import Console  # importing the package registers all monitors and loggers
from llmfoundry.callbacks.speed_monitor import SpeedMonitor, SpeedMonitorConfig
from llmfoundry.config import ConfigError, check, dump, from_dotlist, import_code, load_yaml
from llmfoundry.data.packing import prepare
from llmfoundry.eval.generate import generate
from llmfoundry.eval.perplexity import evaluate
from llmfoundry.hf.upcycle import Upcycling
from llmfoundry.integrations.foundry_yaml import translate
from llmfoundry.model.config import CausalLMConfig
from llmfoundry.model.transformer import CausalLM, cast_parameters
from llmfoundry.parallel.hardware import GIB, GPU_MEMORY
from llmfoundry.parallel.report import describe
from llmfoundry.train import checkpoint, convert
from llmfoundry.train.config import RunConfig
from llmfoundry.train.trainer import build, check_device

log = logging.getLogger("llmfoundry")
# Seconds for local rank 0 to print a mistake before another rank exits, on which torchrun ends them all.
HEAD_START = 5.0
# What is read of a run's settings where its checkpoint is used: no other override could take effect.
GENERATING = "code_paths", "model", "precision"
EVALUATING = (*GENERATING, "eval_loader", "max_seq_len", "device_eval_batch_size", "eval_subset_num_batches")
Command = Callable[[Sequence[str] | None], int]


def _command(run: Callable[[Sequence[str] | None], None]) -> Command:
    """Give a command its exit code."""

    @wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        rank = f"[rank {runtime.rank()}] " if runtime.world_size() > 1 else ""
        level = logging.INFO if runtime.is_rank0() else logging.WARNING
        logging.basicConfig(level=level, format=f"{rank}%(message)s", stream=sys.stderr)
        for noisy in ("httpx", "datasets", "filelock", "fsspec"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            run(argv)
        except ConfigError as error:
            if runtime.local_rank() == 0:  # most mistakes are every rank's
                print(f"{rank}error: {error}", file=sys.stderr, flush=True)
            else:
                time.sleep(HEAD_START)
            _tell_torchrun(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            print(f"{rank}interrupted", file=sys.stderr)
            return 1
        except Exception:
            print(f"{rank}{traceback.format_exc()}", file=sys.stderr, flush=True)
            _tell_torchrun(traceback.format_exc())
            return 1
        runtime.stop()
        return 0

    return main


def _tell_torchrun(why: str) -> None:
    """Leave what went wrong where torchrun looks for it: its report names the rank that failed first, and ends so.

    It compares whole seconds, and ranks that lose this one fail as soon as it is gone: so it stays for one more.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": why, "timestamp": str(int(time.time()))}  # the form that its own handler writes
        Path(file).write_text(json.dumps({"message": {"message": why, "extraInfo": details}}))
        time.sleep(1.0)


def read_config(path: str, overrides: list[str]) -> RunConfig:
    """A YAML file as a checked config; LLM Foundry's legacy words are translated, out loud."""
    data = load_yaml(path, overrides)
    paths = data.get("code_paths") or []
    if not isinstance(paths, list) or not all(isinstance(item, str) for item in paths):
        raise ConfigError(f"code_paths: must be a list of Python files, found {paths!r}")
    import_code(paths)
    data, notes = translate(data)
    for note in notes:
        log.info("%s", note)
    return check(RunConfig, data)


@_command
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
    config = read_config(args.yaml, args.overrides)
    if args.gpus is not None and (args.gpus < 1 or not args.dry_run):
        raise ConfigError(f"--gpus {args.gpus}: is for --dry-run, and 1 or more")
    if args.gpu_memory is not None and (not math.isfinite(args.gpu_memory) or not args.dry_run):
        raise ConfigError(f"--gpu-memory {args.gpu_memory:g}: is for --dry-run, and a number of GiB")
    if args.dry_run:
        print(yaml.safe_dump(dump(config), sort_keys=False))
        print(_sizes(config))
        gpus = args.gpus if args.gpus is not None else runtime.world_size()
        print(describe(config.model, config.parallel, world=gpus, global_rows=config.global_train_batch_size,
                       micro_rows=config.device_train_microbatch_size, seq_len=config.max_seq_len,
                       compute_bytes=4 if config.precision == "fp32" else 2,
                       gpu_memory=GPU_MEMORY if args.gpu_memory is None else args.gpu_memory * GIB))  # fmt: skip
        return
    trainer = build(config)
    if not any(isinstance(callback, SpeedMonitor) for callback in trainer.callbacks):
        trainer.callbacks.insert(
            0, SpeedMonitorConfig(name="speed_monitor").build()
        )  # every run says how fast it is, to its loggers too
    if config.log_to_console:
        trainer.callbacks.append(Console())
    trainer.fit()


def _sizes(config: RunConfig) -> str:
    model = config.model
    flops = model.flops_per_token(config.max_seq_len)
    return (
        f"parameters: {model.n_params():,} ({model.n_params() / 1e9:.3f} B)\n"
        f"active parameters: {model.n_active_params():,} ({model.n_active_params() / 1e9:.3f} B)\n"
        f"training FLOPs a token: {flops:.4g} (sequences of {config.max_seq_len} tokens)"
    )


def _open_checkpoint(
    folder: str, overrides: list[str], keys: Sequence[str]
) -> tuple[RunConfig, CausalLM, checkpoint.Contents]:
    """A checkpoint's model on this device, ready for inference.

    Args:
        overrides: put over its config; the weights must fit the model then.
        keys: what may be overridden.
    """
    for item in overrides:
        key = re.split(r"[.=[]", item, maxsplit=1)[0]
        if key not in keys and key in RunConfig.model_fields:
            raise ConfigError(f"{item}: has no effect here; what has: {', '.join(keys)}")
    contents = checkpoint.read(folder)
    config = read_config(str(contents.path / "config.yaml"), overrides)
    assert isinstance(config.model, CausalLMConfig)
    place = runtime.device()
    check_device(config.model, place, config.precision_on(place.type))
    with torch.device("meta"):
        model = config.model.build()
    # Weights are saved in float32; a GPU computes in what the run did.
    if config.precision_on(place.type) == "amp_bf16":
        cast_parameters(model, torch.bfloat16)
    model = model.to_empty(device=place)
    checkpoint.load_model_only(contents.path, model)
    return config, model.eval(), contents


@_command
def generate_main(argv: Sequence[str] | None = None) -> None:
    """`generate.py --checkpoint DIR --prompt TEXT [key=value ...]`."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(prog="generate.py", description="Write text with a trained model.")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or the save_folder of a run (its newest)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. model.ffn_config.moe_impl=auto"
    )
    parser.add_argument("--prompt", default="", help="what to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise ConfigError("--temperature must be a number of 0 or more, --top-p in (0, 1], --max-new-tokens 1 or more")
    _, model, contents = _open_checkpoint(args.checkpoint, args.overrides, GENERATING)
    if contents.tokenizer is None:
        raise ConfigError(f"{contents.path}: holds no tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(contents.tokenizer, local_files_only=True)
    text = generate(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(text)


@_command
def eval_main(argv: Sequence[str] | None = None) -> None:
    """`eval.py --checkpoint DIR [key=value ...]`: validation loss of a checkpoint, on its own or another dataset.

    Overrides of `model` take effect as far as the weights fit: another backend, more context, fewer experts a token.
    """
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(prog="eval.py", description="Validation loss of a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, or the save_folder of a run (its newest)")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="e.g. eval_loader.dataset.name=text_files eval_loader.dataset.path=texts/",
    )
    args = parser.parse_intermixed_args(argv)
    config, model, contents = _open_checkpoint(args.checkpoint, args.overrides, EVALUATING)
    if config.eval_loader is None:
        raise ConfigError("eval_loader: is missing; give one, e.g. eval_loader.dataset.name=text_files")
    if contents.tokenizer is None:
        raise ConfigError(f"{contents.path}: holds no tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(contents.tokenizer, local_files_only=True)
    assert isinstance(config.model, CausalLMConfig)
    loader = config.eval_loader.build(
        tokenizer,
        seed=config.seed,
        max_seq_len=config.max_seq_len,
        sequence_ids=config.model.attn_config.attn_uses_sequence_id,
    )
    found = evaluate(model, loader, rows=config.device_eval_batch_size, device=runtime.device(),
                     max_batches=config.eval_subset_num_batches)  # fmt: skip
    assert found is not None
    bits = f", {found.bits_per_byte:.4f} bits a byte" if found.bits_per_byte is not None else ""
    print(f"{found.nats_per_token:.4f} nats a token{bits} over {found.tokens:,} tokens")


@_command
def convert_main(argv: Sequence[str] | None = None) -> None:
    """`convert.py from-hf | to-hf | upcycle SOURCE OUT`: between Hugging Face folders and checkpoints of ours."""
    parser = argparse.ArgumentParser(prog="convert.py", description="Convert checkpoints, as streams.")
    ways = parser.add_subparsers(dest="way", required=True)
    into = ways.add_parser("from-hf", help="a Hugging Face folder or hub id, as a checkpoint of ours")
    back = ways.add_parser("to-hf", help="a checkpoint of ours, as a Hugging Face folder")
    grow_ = ways.add_parser("upcycle", help="a dense checkpoint, theirs or ours, as a mixture of experts")
    for each in (into, back, grow_):
        each.add_argument("source")
        each.add_argument("out", type=Path, help="a folder that does not exist, or is empty")
    back.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; else as stored")
    back.add_argument("--model-type", help="the family, e.g. mixtral; else the first that can hold the model")
    back.add_argument("--adapters", action="store_true", help="only the adapters (LoRA), in peft's format")
    back.add_argument("--base-model", help="for --adapters: what they adapt")
    grow_.add_argument("--seed", type=int, default=17)
    grow_.add_argument("plan", nargs="+", metavar="key=value", help="moe_num_experts=8 moe_top_k=2 granularity=1 ...")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on two shared cores, two threads copied 2 to 4 times more slowly
    try:
        _convert(args)
    finally:
        torch.set_num_threads(threads)
    print(f"written to {args.out}")


def _convert(args: argparse.Namespace) -> None:
    if args.way == "from-hf":
        config = convert.from_hf(args.source, args.out, _progress)
    elif args.way == "upcycle":
        plan = check(Upcycling, from_dotlist(args.plan))
        config = convert.grow(args.source, args.out, plan, args.seed, _progress)
    elif args.adapters:
        convert.adapters_to_peft(args.source, args.out, args.base_model)
    else:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        convert.to_hf(args.source, args.out, _progress, dtype, args.model_type)
    if args.way != "to-hf":
        print(f"{config.n_params():,} parameters, {config.n_active_params():,} active; to go on from them:")
        print(f"  train.py {args.out / 'config.yaml'} load_path={args.out} load_weights_only=true")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar of bytes, on a terminal."""
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=RichConsole(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("convert", total=total)
        yield lambda count: bar.advance(task, count)


@_command
def prepare_data_main(argv: Sequence[str] | None = None) -> None:
    """`prepare_data.py YAML [key=value ...]`: tokenise a run's datasets ahead of it, on a machine without GPUs."""
    parser = argparse.ArgumentParser(prog="prepare_data.py", description="Tokenise a run's datasets ahead of it.")
    parser.add_argument("yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    config = read_config(args.yaml, args.overrides)
    also = [config.eval_loader.dataset] if config.eval_loader is not None else []
    tokenizer = config.tokenizer.build(config.train_loader.dataset, also)
    for name, part in (("train_loader", config.train_loader), ("eval_loader", config.eval_loader)):
        if part is not None:
            stream = prepare(part.dataset, tokenizer)
            print(f"{name}: {stream.n_tokens:,} tokens of {stream.n_bytes:,} bytes in {Path(stream.folder)}")
