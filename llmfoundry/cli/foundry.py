"""Accept the command lines of LLM Foundry's scripts: `generate`, `convert` and `data_prep` take theirs and ours.

Their options that only tune the loading of a model are left out with a note; options that would change the result and
have no equivalent are refused.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from llmfoundry.cli.command import command
from llmfoundry.cli.parser import Parser
from llmfoundry.config import ConfigError, reason
from llmfoundry.integrations.foundry_paths import our_checkpoint
from llmfoundry.strict_json import parse_json

log = logging.getLogger(__name__)

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Arguments of LLM Foundry's hf_generate, and the message if they are given.
_NO_TOKEN = "left out, it changes no token here"
_ROUNDING = "left out, numbers are rounded as `precision` says: auto is bf16 on a GPU and float32 on a CPU"
_LEFT_OUT = dict.fromkeys(
    ("max_seq_len", "pad_token_id", "device", "device_map", "attn_impl", "use_cache", "warmup", "trust_remote_code",
     "use_auth_token"), _NO_TOKEN,
) | dict.fromkeys(("model_dtype", "autocast_dtype"), _ROUNDING)  # fmt: skip
_PROMPTS = ("My name is", "This is an explanation of deep learning to a five year old. Deep learning is")
# Commands of LLM Foundry's data_prep that are not available, and what to do instead.
_NO_PREPARATION = {
    "convert_finetuning_dataset": "is not needed: train on the dataset itself, by train_loader: {name: finetuning, "
    "dataset: {hf_name: ..., preprocessing_fn: ...}}",
    "convert_delta_to_json": "Databricks is not reached from here; write the table as parquet, which is read as it is",
    "delta_to_contrastive_mds": "embedding models are not trained here",
}
_FILE = "file::"  # prefix of a file name in --prompts


def generate_words(argv: Sequence[str] | None) -> list[str]:
    """Return the arguments of `generate`; translate those of hf_generate (`--name_or_path DIR --prompts TEXT ...`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not _has(words, "--name_or_path", "-n"):
        return words
    parser = Parser("llmfoundry generate", allow_abbrev=False)
    parser.add_argument("-n", "--name_or_path", required=True)
    parser.add_argument("-p", "--prompts", nargs="+", default=list(_PROMPTS))
    parser.add_argument("--prompt-delimiter")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--max_batch_size", type=int)
    # In LLM Foundry, each may have several values, which are tried in turn.
    tried = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "seed": 42}
    refused = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    for key, value in (tried | refused).items():
        parser.add_argument(f"--{key}", type=type(value), nargs="+", default=[value])
    parser.add_argument("--do_sample", nargs="?", const="true", default="true")
    for key in ("eos_token_id", "revision"):
        parser.add_argument(f"--{key}")
    for key in _LEFT_OUT:
        parser.add_argument(f"--{key}", nargs="?", const="true")
    args = parser.parse_args(words)
    for key, off in refused.items():
        if getattr(args, key) != [off]:
            raise ConfigError(f"--{key}: is not supported; use --temperature, --top_k and --top_p")
    for key in tried:
        if len(getattr(args, key)) > 1:
            raise ConfigError(f"--{key}: has several values; run the command once for each")
    if args.eos_token_id is not None:
        raise ConfigError(
            "--eos_token_id: is not supported; write eos_token_id into the model's generation_config.json"
        )
    if args.revision is not None and not Path(args.name_or_path).exists():
        raise ConfigError(
            f"--revision: is not supported; download it first, hf download {args.name_or_path} --revision "
            f"{args.revision} --local-dir FOLDER, and name the folder"
        )
    for key, why in _LEFT_OUT.items():
        if getattr(args, key) is not None:
            log.info("--%s: %s", key, why)
    prompts = [text for word in args.prompts for text in _prompts(word, args.prompt_delimiter)]
    batch = [] if args.max_batch_size is None else ["--batch-size", str(args.max_batch_size)]
    return [
        "--checkpoint", _ours(args.name_or_path), *(f"--prompt={prompt}" for prompt in prompts),
        "--max-new-tokens", str(args.max_new_tokens), "--top-p", str(args.top_p[0]), "--top-k", str(args.top_k[0]),
        "--temperature", str(args.temperature[0]) if _truth("do_sample", args.do_sample) else "0",
        "--seed", str(args.seed[0]), *batch,
    ]  # fmt: skip


def _prompts(word: str, delimiter: str | None) -> list[str]:
    """Return the prompts that a word of --prompts stands for: itself or, with `file::`, the texts of a file."""
    if word.startswith("dataset::"):
        raise ConfigError(f"--prompts {word}: is not supported; write the prompts into a file, and file::FILE")
    if not word.startswith(_FILE):
        return [word]
    path = Path(word.removeprefix(_FILE)).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {word}: cannot be read: {reason(error)}") from None
    return [text] if delimiter is None else [part for part in text.split(delimiter) if part]


def _truth(key: str, word: str) -> bool:
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ConfigError(f"--{key} {word}: must be true or false")


def convert_words(argv: Sequence[str] | None) -> list[str]:
    """Return the arguments of `convert`; translate those of convert_composer_to_hf (`--composer_path FILE ...`)."""
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
    """`data_prep convert_dataset_hf | convert_dataset_json | convert_text_to_mds ...`, with their arguments."""
    parser = Parser(
        "llmfoundry data_prep",
        "Write MDS folders of text or tokens, by LLM Foundry's command lines.",
        ["llmfoundry data_prep convert_dataset_json --path texts.jsonl --out_root mds"],
    )
    ways = parser.add_subparsers(dest="way", required=True, metavar="COMMAND")
    hub = ways.add_parser("convert_dataset_hf", help="a dataset of the Hugging Face hub, or a folder")
    lines = ways.add_parser("convert_dataset_json", help="JSON lines with a column text")
    texts = ways.add_parser("convert_text_to_mds", help="text files")
    _add(hub, "dataset", required=True, help="a hub id or a folder")
    _add(hub, "data_subset", help="its configuration, e.g. en")
    _add(hub, "splits", nargs="+", default=["train", "train_small", "val", "val_small", "val_xsmall"])
    _add(lines, "path", required=True, help="a file, folder or glob")
    _add(lines, "split", choices=("train",), default="train", help="a file is one split, which has this name")
    _add(texts, "input_folder", dest="path", required=True)
    _add(texts, "output_folder", dest="out_root", required=True)
    for each in (hub, lines, texts):
        if each is not texts:
            _add(each, "out_root", required=True, help="a folder, or the URL of one")
        _add(each, "compression", help="zstd[:level], gz, bz2, br or snappy")
        _add(each, "concat_tokens", type=int, metavar="N", help="write rows of N tokens; default: texts")
        _add(each, "tokenizer", help="for --concat_tokens: a folder or hub id")
        _add(each, "tokenizer_kwargs", default="{}", metavar="JSON", help="settings that the tokenizer is loaded with")
        _add(each, "bos_text", default="", help="put before each text")
        _add(each, "eos_text", default="", help="put after each text")
        _add(each, "no_wrap", action="store_true", help="start a new row for each text")
        _add(each, "use_tokenizer_eos", action="store_true", help="put the end-of-text token after each text")
        for key in ("num_workers", "processes", "max_mds_writer_workers", "logging_level"):
            _add(each, key, help="has no effect")
        for key in ("reprocess", "trust_remote_code"):
            _add(each, key, nargs="?", const="true", help="has no effect")
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _NO_PREPARATION:
        raise ConfigError(f"data_prep {words[0]}: {_NO_PREPARATION[words[0]]}")
    args = parser.parse_args(words)
    if (args.concat_tokens is None) != (args.tokenizer is None):
        raise ConfigError("--concat_tokens N and --tokenizer NAME belong together; without both, texts are written")
    _prepare(args)


def _add(parser: argparse.ArgumentParser, name: str, **how: Any) -> None:
    """Add an option, spelled as in their scripts and as in their command `llmfoundry`: with dashes."""
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **how)


def _words(text: str) -> dict[str, str | int | float | bool | None]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"--tokenizer_kwargs {text}: is not valid JSON: {error}") from None
    if not isinstance(found, dict) or any(isinstance(value, list | dict) for value in found.values()):
        raise ConfigError(f"--tokenizer_kwargs {text}: must be a mapping of names to plain values")
    found.pop("trust_remote_code", None)  # a tokenizer's code is never run
    return cast(dict[str, str | int | float | bool | None], found)


def _prepare(args: argparse.Namespace) -> None:
    from llmfoundry.data.remote import place
    from llmfoundry.integrations import data_prep

    tokens = None
    if args.tokenizer is not None:
        tokens = data_prep.how(
            args.tokenizer, args.concat_tokens, args.bos_text, None if args.use_tokenizer_eos else args.eos_text,
            not args.no_wrap, _words(args.tokenizer_kwargs),
        )  # fmt: skip
    if args.way == "convert_dataset_hf":
        names = [name.strip() for word in args.splits for name in word.split(",") if name.strip()]
        parts = {name: data_prep.part_of(args.dataset, name) for name in names}
    else:
        parts = {"": data_prep.Part("")}
    if not parts or not args.out_root:
        raise ConfigError("--splits and the folder to write to must not be empty")
    try:
        args.out_root = place(args.out_root)
    except ValueError as error:
        raise ConfigError(f"--out_root {error}") from None
    folders = {name: f"{args.out_root.rstrip('/')}/{name}".rstrip("/") for name in parts}
    for folder in folders.values():
        if Path(folder).is_dir() and any(Path(folder).iterdir()):
            raise ConfigError(f"{folder}: is not empty; choose another folder")
    for name, part in parts.items():
        if args.way == "convert_dataset_hf":
            texts = data_prep.hub_texts(args.dataset, args.data_subset, part.split)
        else:
            texts = data_prep.file_texts(args.path)
        count = data_prep.write(texts, folders[name], tokens, part.most, args.compression)
        what = "texts" if tokens is None else f"rows of {tokens.length:,} tokens"
        print(f"{count:,} {what} written to {folders[name]}")


def _has(words: Sequence[str], *options: str) -> bool:
    return any(word.split("=")[0] in options for word in words)
