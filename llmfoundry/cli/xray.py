"""`llmfoundry xray CHECKPOINT TEXT`: show which expert receives which token of a text, by layer."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmfoundry import launch
from llmfoundry.atomic import write_output
from llmfoundry.cli.command import command
from llmfoundry.cli.inference import CHECKPOINT, GENERATING, add_allow_code
from llmfoundry.cli.opening import open_checkpoint
from llmfoundry.cli.parser import Parser, integer, local
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from llmfoundry.model.transformer import CausalLMConfig

log = logging.getLogger(__name__)


@command
def xray_main(argv: Sequence[str] | None = None) -> None:
    """`xray CHECKPOINT TEXT [--layer N] [--json] [--html FILE] [key=value ...]`."""
    parser = Parser(
        "llmfoundry xray",
        "Show which experts take which tokens of a text, layer by layer.",
        [
            'llmfoundry xray runs/moe "for i in range(10): print(i)"',
            "llmfoundry xray runs/moe --file README.md --html experts.html",
            "git diff | llmfoundry xray runs/moe - --layer 1 --json",
        ],
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text itself; - reads it from stdin")
    parser.add_overrides("e.g. precision=fp32")
    parser.add_argument("--file", type=local, metavar="FILE", help="read the text from a file")
    parser.add_argument(
        "--layer", type=integer(0), action="append", metavar="N", help="only this layer; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: the tokens, their experts and weights")
    parser.add_argument("--html", type=local, metavar="FILE", help="write an interactive page")
    add_allow_code(parser)
    args = parser.parse_intermixed_args(argv)
    if args.file is not None and args.text is not None:
        args.text, args.overrides = None, [args.text, *args.overrides]
    if args.json and args.html is not None:
        raise ConfigError("--json and --html FILE are both given; choose one")
    text = _read(args.text, args.file)
    opened = open_checkpoint(args.checkpoint, args.overrides, GENERATING, _is_mixture, args.allow_code)
    from llmfoundry.eval.generate import check_ids, encoded
    from llmfoundry.report.xray import as_json, page, show, xray

    ready = opened.ready
    layers = _layers(args.layer, ready.model.config)
    special = ready.special._replace(parse=ready.special.parse or not opened.trained)
    ids = encoded(ready.tokenizer, text, special)
    check_ids(max(ids), ready.model.config.vocab_size)
    length = ready.model.config.max_seq_len
    if len(ids) > length:
        log.info("%d tokens are more than max_seq_len=%d: each %d are read by themselves", len(ids), length, length)
    found = xray(ready.model, ready.tokenizer, ids)
    if not launch.is_rank0():
        return
    if args.html is not None:
        try:
            write_output(args.html, page(found, layers, f"Experts of {args.checkpoint}"))
        except OSError as error:
            raise ConfigError(f"--html: {args.html} cannot be written: {error.strerror}") from None
        print(f"written to {args.html}")
    elif args.json:
        print(json.dumps(as_json(found, layers)))
    else:
        from rich.console import Console

        show(found, layers, Console(highlight=False, soft_wrap=True))


def _read(text: str | None, file: Path | None) -> str:
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--file: {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--file: {file} is not UTF-8: {error.reason} at byte {error.start}") from None
    elif text == "-":
        text = sys.stdin.read()
    if not text:
        raise ConfigError("TEXT is missing; write it after the checkpoint, or - for stdin, or --file FILE")
    return text


def _is_mixture(config: CausalLMConfig) -> None:
    from llmfoundry.report.experts import mixture_layers

    if not mixture_layers(config):
        if config.name == "transformers":
            raise ConfigError("the model runs as the module of transformers, whose experts, if any, cannot be shown")
        raise ConfigError("the model is dense: it has no experts to show")


def _layers(asked: list[int] | None, config: CausalLMConfig) -> list[int]:
    """Return the layers to show; raise ConfigError for a layer without experts."""
    from llmfoundry.report.experts import mixture_layers

    layers = mixture_layers(config)
    for layer in asked or ():
        if layer not in layers:
            raise ConfigError(f"--layer {layer}: this layer has no experts; choose among {', '.join(map(str, layers))}")
    return asked or layers
