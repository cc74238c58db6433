"""`generate.py` and `eval.py`: a checkpoint writes text, or is measured on a dataset."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence

import torch

from llmfoundry import runtime
from llmfoundry.checkpoint import checkpointer as checkpoint
from llmfoundry.cli.command import command, read_config
from llmfoundry.config import ConfigError
from llmfoundry.eval.generate import generate
from llmfoundry.eval.perplexity import evaluate
from llmfoundry.model.transformer import CausalLM, CausalLMConfig, cast_parameters
from llmfoundry.train.config import RunConfig
from llmfoundry.train.trainer import check_device

# What is read of a run's settings where its checkpoint is used: no other override could take effect.
GENERATING = "code_paths", "model", "precision", "load_path"  # of adapters: where their base is now
EVALUATING = (*GENERATING, "eval_loader", "max_seq_len", "device_eval_batch_size", "eval_subset_num_batches")


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
    moved = config.load_path if config.load_path != contents.config.get("load_path") else None
    checkpoint.load_model_only(contents, model, base_path=moved)
    return config, model.eval(), contents


@command
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


@command
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
