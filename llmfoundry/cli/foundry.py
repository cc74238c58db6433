"""The command lines of LLM Foundry's scripts, as ours: `generate`, `convert` and `data_prep` take either.

What of theirs tuned the loading of a model is left out with a note; what would change the result without an equivalent
is refused.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from llmfoundry.cli.command import command
from llmfoundry.cli.parser import Parser
from llmfoundry.config import ConfigError
from llmfoundry.integrations.foundry_paths import our_checkpoint

log = logging.getLogger(__name__)

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Arguments of their hf_generate that change no token here.
_LOADING = ("max_seq_len", "max_batch_size", "eos_token_id", "pad_token_id", "model_dtype", "autocast_dtype",
            "revision", "device", "device_map", "attn_impl", "use_cache", "warmup", "trust_remote_code",
            "use_auth_token")  # fmt: skip


def generate_words(argv: Sequence[str] | None) -> list[str]:
    """The arguments of `generate`, also where they are hf_generate's (`--name_or_path DIR --prompts TEXT ...`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not _has(words, "--name_or_path", "-n"):
        return words
    parser = Parser("llmfoundry generate", allow_abbrev=False)
    parser.add_argument("-n", "--name_or_path", required=True)
    parser.add_argument("-p", "--prompts", nargs="+", required=True)
    parser.add_argument("--max_new_tokens", default="100")
    parser.add_argument("--temperature", default="1.0")
    parser.add_argument("--top_p", default="1.0")
    parser.add_argument("--seed", default="42")
    parser.add_argument("--do_sample", nargs="?", const="true", default="true")
    refused = {"top_k": "0", "repetition_penalty": "1.0", "no_repeat_ngram_size": "0"}
    for key, off in refused.items():
        parser.add_argument(f"--{key}", default=off)
    for key in _LOADING:
        parser.add_argument(f"--{key}", nargs="?", const="true")
    args = parser.parse_args(words)
    for key, off in refused.items():
        if float(getattr(args, key)) != float(off):
            raise ConfigError(f"--{key} {getattr(args, key)}: is not supported; use --temperature and --top_p")
    for key in _LOADING:
        if getattr(args, key) is not None:
            log.info("--%s: left out, it changes no token here", key)
    sampled = args.do_sample.lower() in ("yes", "true", "t", "y", "1")
    return [
        "--checkpoint", _ours(args.name_or_path), *(f"--prompt={prompt}" for prompt in args.prompts),
        "--max-new-tokens", args.max_new_tokens, "--temperature", args.temperature if sampled else "0",
        "--top-p", args.top_p, "--seed", args.seed,
    ]  # fmt: skip


def convert_words(argv: Sequence[str] | None) -> list[str]:
    """The arguments of `convert`, also where they are convert_composer_to_hf's (`--composer_path FILE ...`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not _has(words, "--composer_path"):
        return words
    parser = Parser("llmfoundry convert", allow_abbrev=False)
    parser.add_argument("--composer_path", required=True)
    parser.add_argument("--hf_output_path", required=True)
    parser.add_argument("--output_precision", choices=sorted(_DTYPES), default="fp32")
    parser.add_argument("--local_checkpoint_save_location")
    parser.add_argument("--hf_repo_for_upload")
    parser.add_argument("--test_uploaded_model", action="store_true")
    parser.add_argument("--trust_remote_code", action="store_true")
    args = parser.parse_args(words)
    if args.hf_repo_for_upload is not None or args.test_uploaded_model:
        raise ConfigError(
            "--hf_repo_for_upload: nothing is uploaded here; write "
            f"`huggingface-cli upload {args.hf_repo_for_upload} {args.hf_output_path}` after the conversion"
        )
    return ["to-hf", _ours(args.composer_path), args.hf_output_path, "--dtype", _DTYPES[args.output_precision]]


def _ours(path: str) -> str:
    if (found := our_checkpoint(path)) != path:
        log.info("%s: is now %s", path, found)
    return found


@command
def data_prep_main(argv: Sequence[str] | None = None) -> None:
    """`data_prep convert_dataset_hf | convert_dataset_json | convert_text_to_mds ...`, by their arguments."""
    parser = Parser(
        "llmfoundry data_prep",
        "Write MDS folders of text or tokens, by LLM Foundry's command lines.",
        ["llmfoundry data_prep convert_dataset_json --path texts.jsonl --out_root mds --split train"],
    )
    ways = parser.add_subparsers(dest="way", required=True)
    hub = ways.add_parser("convert_dataset_hf", help="a dataset of the Hugging Face hub, or a folder")
    hub.add_argument("--dataset", required=True, help="a hub id or a folder")
    hub.add_argument("--data_subset", help="its configuration, e.g. en")
    hub.add_argument("--splits", nargs="+", default=["train", "train_small", "val", "val_small", "val_xsmall"])
    lines = ways.add_parser("convert_dataset_json", help="JSON lines with a column text")
    lines.add_argument("--path", required=True, help="a file, folder, glob or hub id")
    lines.add_argument("--split", default="train")
    texts = ways.add_parser("convert_text_to_mds", help="text files")
    texts.add_argument("--input_folder", dest="path", required=True)
    texts.add_argument("--output_folder", dest="out_root", type=Path, required=True)
    for each in (hub, lines, texts):
        if each is not texts:
            each.add_argument("--out_root", type=Path, required=True)
        each.add_argument("--compression", help="zstd[:level], gz, bz2, br or snappy")
        each.add_argument("--concat_tokens", type=int, metavar="N", help="write rows of N tokens; default: texts")
        each.add_argument("--tokenizer", help="for --concat_tokens: a folder or hub id")
        each.add_argument("--bos_text", default="", help="put before each text")
        each.add_argument("--eos_text", default="", help="put after each text")
        each.add_argument("--no_wrap", action="store_true", help="start a new row for each text")
        each.add_argument("--use_tokenizer_eos", action="store_true", help="put the end-of-text token after each text")
        each.add_argument("--num_workers", type=int, help="has no effect")
        each.add_argument("--processes", type=int, help="has no effect")
    args = parser.parse_args(argv)
    if (args.concat_tokens is None) != (args.tokenizer is None):
        raise ConfigError("--concat_tokens N and --tokenizer NAME belong together; without both, texts are written")
    _prepare(args)


def _prepare(args: argparse.Namespace) -> None:
    from llmfoundry.integrations import data_prep

    tokens = None
    if args.tokenizer is not None:
        tokens = data_prep.how(
            args.tokenizer, args.concat_tokens, args.bos_text, None if args.use_tokenizer_eos else args.eos_text,
            wrap=not args.no_wrap,
        )  # fmt: skip
    if args.way == "convert_dataset_hf":
        parts = {name: data_prep.part_of(args.dataset, name) for name in args.splits}
    else:
        parts = {getattr(args, "split", ""): data_prep.Part("")}
    for name in parts:
        if (args.out_root / name).is_dir() and any((args.out_root / name).iterdir()):
            raise ConfigError(f"{args.out_root / name}: is not empty; choose another folder")
    for name, part in parts.items():
        if args.way == "convert_dataset_hf":
            texts = data_prep.hub_texts(args.dataset, args.data_subset, part.split)
        else:
            texts = data_prep.file_texts(args.path)
        count = data_prep.write(texts, args.out_root / name, tokens, part.most, args.compression)
        what = "texts" if tokens is None else f"rows of {tokens.length:,} tokens"
        print(f"{count:,} {what} written to {args.out_root / name}")


def _has(words: Sequence[str], *options: str) -> bool:
    return any(word.split("=")[0] in options for word in words)
