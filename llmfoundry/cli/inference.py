"""`generate.py` and `eval.py`: generate text from a checkpoint, or evaluate it on a dataset.

Under torchrun, the model is sharded over all processes, and its experts are divided as in the run if that fits.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmfoundry import launch
from llmfoundry.cli.command import command
from llmfoundry.cli.evaluation import TaskOptions, evaluate_by_tasks, evaluate_opened, evaluate_yaml
from llmfoundry.cli.foundry import generate_words
from llmfoundry.cli.opening import Opened, open_checkpoint
from llmfoundry.cli.parser import Parser, integer, number, program
from llmfoundry.cli.prompts import Row, check_output, prompt_of, read_prompts, read_template, write_completions
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from llmfoundry.eval.icl import Score

# The settings that are used when a checkpoint is opened; overriding others would have no effect.
GENERATING = "code_paths", "model", "precision", "parallel", "load_path"  # load_path: if an adapter base has moved
EVALUATING = (
    *GENERATING, "eval_loader", "eval_loaders", "max_seq_len", "device_eval_batch_size", "eval_subset_num_batches",
    "icl_tasks", "eval_gauntlet", "icl_seq_len", "icl_subset_num_batches",
)  # fmt: skip
CHECKPOINT = "a checkpoint, a run's save_folder (its newest), a Hugging Face folder or GGUF file, or hf:<hub id>"

_COMMANDING = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), *range(11, 32), *range(127, 160))}


@command
def generate_main(argv: Sequence[str] | None = None) -> None:
    """`generate.py --checkpoint DIR --prompt TEXT [key=value ...]`, or `--prompts FILE --output FILE.jsonl`."""
    parser = Parser(
        program("generate"),
        "Continue prompts with a trained model.",
        [
            'llmfoundry generate --checkpoint runs/moe --prompt "def "',
            'llmfoundry generate --checkpoint hf:allenai/OLMoE-1B-7B-0924 --prompt "The" --temperature 0',
            "llmfoundry generate --checkpoint runs/moe --prompts prompts.jsonl --output answers.jsonl",
        ],
    )
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_overrides("e.g. model.ffn_config.moe_impl=auto")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="the text to continue; may be repeated")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="a .txt with a prompt per line, or a .jsonl with `prompt` or `messages` in each",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines: each prompt and its completion")
    parser.add_argument("--template", type=Path, metavar="FILE", help="a chat template, for `messages`")
    parser.add_argument(
        "--batch-size", type=integer(1), default=16, help="prompts per forward pass and process; default: 16"
    )
    add_sampling(parser, max_new_tokens=200)
    add_allow_code(parser)
    parser.add_argument(
        "--parse-special", action=argparse.BooleanOptionalAction, default=None,
        help="read special tokens in the prompt, such as <|endoftext|>, as tokens and not as text; default: as in "
        "training; yes for a converted checkpoint",
    )  # fmt: skip
    args = parser.parse_intermixed_args(generate_words(argv))
    rows: list[Row] = [{"prompt": text} for text in args.prompt or ([] if args.prompts else [""])]
    if args.prompts is not None:
        rows += read_prompts(args.prompts)
    if args.output is not None:
        check_output(args.output)
    template = read_template(args.template)
    opened = open_checkpoint(args.checkpoint, args.overrides, GENERATING, allow_code=args.allow_code)
    from llmfoundry.eval.generate import Sampling, generate
    from llmfoundry.eval.generate_many import generate_many, request_of
    from llmfoundry.eval.likelihood import Ranks
    from llmfoundry.hf.generation import stop_tokens

    ready, parse, stop = opened.ready, args.parse_special, stop_tokens(opened.folder)
    if parse is None:
        parse = ready.special.parse or not opened.trained
    special = ready.special._replace(parse=parse)
    how = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed, args.top_k)
    if len(rows) == 1 and args.prompts is None and args.output is None:
        emit = show if launch.is_rank0() else None
        generate(
            ready.model, ready.tokenizer, str(rows[0]["prompt"]), **how._asdict(), special=special, stop=stop, emit=emit
        )
        if launch.is_rank0():
            show("\n")
        return
    requests = [request_of(prompt_of(row), ready.tokenizer, special, template) for row in rows]
    ranks = Ranks(args.batch_size, ready.mesh.data_rank, ready.mesh.data_ranks)
    found = generate_many(ready.model, ready.tokenizer, requests, how, ranks, stop)
    if not launch.is_rank0():
        deque(found, maxlen=0)  # take part in every forward
    elif args.output is not None:
        write_completions(args.output, rows, found)
        print(f"{len(rows):,} completions written to {args.output}")
    else:
        for number, (request, one) in enumerate(zip(requests, found, strict=True)):
            show("\n" * (number > 0) + request.shown + one.text + "\n")  # a blank line between texts


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a checkpoint run code."""
    parser.add_argument("--allow-code", action="store_true", help="run the code that the checkpoint's config names")


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options of sampling."""
    parser.add_argument("--max-new-tokens", type=integer(1), default=max_new_tokens, metavar="N",
                        help=f"length of an answer; default: {max_new_tokens}")  # fmt: skip
    parser.add_argument(
        "--temperature", type=number(0), default=0.8, help="default: 0.8; 0: always the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), default=0.95,
        help="draw from the likeliest tokens that together have this probability; default: 0.95",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=integer(0), default=0, metavar="K",
        help="draw from the K likeliest tokens; default: 0, all of them",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random draws; default: 0")


def show(text: str) -> None:
    """Print a model's text at once. On a terminal, control characters are replaced."""
    sys.stdout.write(text.translate(_COMMANDING) if sys.stdout.isatty() else text)
    sys.stdout.flush()


@command
def eval_main(argv: Sequence[str] | None = None) -> None:
    """`eval.py --checkpoint DIR [key=value ...]`, or `eval.py YAML [key=value ...]` with several models.

    What a run evaluates is evaluated: the loss on its texts, and its tasks; or the tasks of a file, or of
    EleutherAI's lm-evaluation-harness. Overrides of `model` take effect as far as the weights fit: another backend,
    longer contexts, fewer experts per token.
    """
    parser = Parser(
        program("eval"),
        "Measure the loss of a checkpoint on text, or its scores on tasks.",
        [
            "llmfoundry eval --checkpoint runs/moe",
            "llmfoundry eval --checkpoint runs/moe eval_loader.dataset.name=text_files eval_loader.dataset.path=texts",
            "llmfoundry eval --checkpoint runs/moe --icl-tasks tasks.yaml --output scores.json",
        ],
    )
    parser.add_argument("--checkpoint", help=CHECKPOINT)
    parser.add_overrides("replace settings of the run; without --checkpoint, first a YAML that lists models")
    parser.add_argument("--icl-tasks", metavar="FILE", help="a YAML with icl_tasks")
    parser.add_argument("--gauntlet", metavar="FILE", help="a YAML with eval_gauntlet, for --icl-tasks")
    parser.add_argument("--tasks", help="tasks of lm-evaluation-harness (pip install lm-eval), e.g. hellaswag,arc_easy")
    parser.add_argument("--num-fewshot", type=integer(0), help="for --tasks: solved examples; default: each task's own")
    parser.add_argument("--limit", type=integer(1), metavar="N", help="for --tasks: only the first N questions of each")
    parser.add_argument("--include-path", metavar="DIR", help="for --tasks: a folder with further tasks")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="for --tasks: put questions in the tokenizer's chat template"
    )
    parser.add_argument(
        "--by-position",
        type=integer(1),
        metavar="N",
        help="also the loss on texts by position: N ranges of the sequence",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the scores as JSON")
    add_allow_code(parser)
    args = parser.parse_intermixed_args(argv)
    options = TaskOptions(
        args.icl_tasks, args.gauntlet, args.tasks, args.num_fewshot, args.limit, args.include_path,
        args.apply_chat_template, args.output, args.allow_code,
    )  # fmt: skip
    options.check()
    if args.checkpoint is None:
        if not args.overrides or not args.overrides[0].endswith((".yaml", ".yml")):
            parser.error("the following arguments are required: --checkpoint, or a YAML that lists models")
        evaluate_yaml(args.overrides[0], args.overrides[1:], options)
    elif options.icl_tasks or options.tasks:
        evaluate_by_tasks(args.checkpoint, args.overrides, EVALUATING, options)
    else:
        opened = open_checkpoint(args.checkpoint, args.overrides, EVALUATING, allow_code=args.allow_code)
        if not opened.config.evaluations and not opened.config.icl_tasks:
            raise ConfigError("eval_loader: is missing; give one, e.g. eval_loader.dataset.name=text_files")
        evaluate_opened(opened, _evaluate_texts(opened, args.by_position), options)


def _evaluate_texts(opened: Opened, n_ranges: int | None) -> dict[str, Score]:
    """Print the loss on each text of a run; return it under the names that training logs."""
    from llmfoundry import runtime
    from llmfoundry.eval.icl import Score
    from llmfoundry.eval.perplexity import evaluate
    from llmfoundry.train.run import EVALUATED

    config, (model, mesh, tokenizer, special) = opened.config, opened.ready
    scores: dict[str, Score] = {}
    for part in config.evaluations:
        loader = part.build(
            tokenizer,
            seed=config.seed,
            max_seq_len=config.max_seq_len,
            sequence_ids=model.config.attn_config.attn_uses_sequence_id,
            special=special,
        )
        found = evaluate(
            model,
            loader,
            rows=config.device_eval_batch_size,
            device=runtime.device(),
            max_batches=config.eval_subset_num_batches,
            rank=mesh.data_rank,
            world=mesh.data_ranks,
            bar=launch.is_rank0(),
        )
        assert found is not None
        bits = f", {found.bits_per_byte:.4f} bits per byte" if found.bits_per_byte is not None else ""
        label = f"{part.label}: " if part.label else ""
        if launch.is_rank0():
            print(f"{label}{found.nats_per_token:.4f} nats per token{bits} over {found.tokens:,} tokens")
        name = EVALUATED + (f"{part.label}/" if part.label else "")
        scores[f"{name}LanguageCrossEntropy"] = Score(found.nats_per_token, None, found.tokens)
        if found.bits_per_byte is not None:
            scores[f"{name}bits_per_byte"] = Score(found.bits_per_byte, None, found.tokens)
        for places, nats in found.by_position(n_ranges) if n_ranges is not None else ():
            where = f"tokens {places.start + 1} to {places.stop}"
            if launch.is_rank0():
                print(f"{label}{where}: {nats:.4f} nats per token")
            scores[f"{name}{where}"] = Score(nats, None, int(found.position_tokens[places.start : places.stop].sum()))
    return scores
