"""`convert.py from-hf | from-composer | to-hf | upcycle SOURCE OUT`: between others' checkpoints and ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from llmfoundry.checkpoint import convert
from llmfoundry.cli.command import command
from llmfoundry.cli.foundry import convert_words
from llmfoundry.cli.inference import add_allow_code
from llmfoundry.cli.parser import Parser, program
from llmfoundry.config import check
from llmfoundry.hf.upcycle import Upcycling
from llmfoundry.integrations.composer_checkpoint import from_composer
from llmfoundry.settings import from_dotlist


@command
def convert_main(argv: Sequence[str] | None = None) -> None:
    """`convert.py from-hf | from-composer | to-hf | upcycle SOURCE OUT`: between others' checkpoints and ours."""
    parser = Parser(
        program("convert"),
        "Convert checkpoints. Tensors are read and written one after the other, so memory use stays small.",
        [
            "llmfoundry convert from-hf allenai/OLMoE-1B-7B-0924 ckpt/olmoe",
            "llmfoundry convert to-hf runs/moe out/moe",
            "llmfoundry convert upcycle HuggingFaceTB/SmolLM2-135M ckpt/grown moe_num_experts=8 moe_top_k=2",
        ],
    )
    ways = parser.add_subparsers(dest="direction", required=True, metavar="COMMAND")
    into = ways.add_parser("from-hf", help="Hugging Face folder or hub id to llmfoundry checkpoint")
    composer = ways.add_parser("from-composer", help="LLM Foundry or Composer checkpoint to llmfoundry checkpoint")
    back = ways.add_parser("to-hf", help="llmfoundry checkpoint to Hugging Face folder")
    grow_ = ways.add_parser("upcycle", help="dense checkpoint of either format to mixture of experts")
    for each in (into, composer, back, grow_):
        each.add_argument("source", help="what to convert: a folder, a run or a hub id")
        each.add_argument("out", type=Path, help="a folder that does not exist, or is empty")
    composer.add_argument("--config", metavar="YAML", help="its training YAML; default: the config in the checkpoint")
    back.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: as stored")
    back.add_argument("--model-type", help="the architecture, e.g. mixtral; default: the first that fits")
    back.add_argument("--adapters", action="store_true", help="only the adapters (LoRA), in peft's format")
    back.add_argument("--base-model", help="for --adapters: the name of the base model")
    grow_.add_argument("--seed", type=int, default=17, help="of the new routers; default: 17")
    for each in (back, grow_):
        add_allow_code(each)
    grow_.add_argument("plan", nargs="+", metavar="key=value", help="moe_num_experts=8 moe_top_k=2 granularity=1 ...")
    args = parser.parse_args(convert_words(argv))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on two shared cores, two threads copied 2 to 4 times slower
    try:
        _convert(args)
    finally:
        torch.set_num_threads(threads)
    print(f"written to {args.out}")


def _convert(args: argparse.Namespace) -> None:
    if args.direction == "from-hf":
        config = convert.from_hf(args.source, args.out, _progress)
    elif args.direction == "from-composer":
        config = from_composer(args.source, args.out, args.config, _progress)
    elif args.direction == "upcycle":
        plan = check(Upcycling, from_dotlist(args.plan))
        config = convert.grow(args.source, args.out, plan, args.seed, _progress, args.allow_code)
    elif args.adapters:
        convert.adapters_to_peft(args.source, args.out, args.base_model, args.allow_code)
    else:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        with _ours(args.source) as source:
            convert.to_hf(source, args.out, _progress, dtype, args.model_type, args.allow_code)
    if args.direction != "to-hf":
        print(f"{config.n_params():,} parameters, {config.n_active_params():,} active; to train it further:")
        print(f"  llmfoundry train {args.out / 'config.yaml'} load_path={args.out} load_weights_only=true")


@contextmanager
def _ours(source: str) -> Iterator[str]:
    """Yield the path of an llmfoundry checkpoint: the source, or a temporary conversion of a Composer checkpoint."""
    path = Path(source)
    if not path.is_file() and not (path / ".metadata").is_file():
        yield source
        return
    with TemporaryDirectory(dir=path.parent) as folder:
        from_composer(path, Path(folder) / "ours", None, _progress)
        yield str(Path(folder) / "ours")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar in bytes on a terminal; yield the function that advances it."""
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=RichConsole(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("convert", total=total)
        yield lambda count: bar.advance(task, count)
