"""`generate.py` and `eval.py`: a checkpoint writes text, or is measured on a dataset.

Under torchrun, the model is sharded over all processes, and its experts are divided as in the run if that fits.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmfoundry import launch
from llmfoundry.cli.command import command, read_run_config
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmfoundry.checkpoint.reading import Contents
    from llmfoundry.data.tokenizer import SpecialTokens
    from llmfoundry.model.transformer import CausalLM, CausalLMConfig
    from llmfoundry.parallel.mesh import Mesh
    from llmfoundry.train.config import RunConfig

# The settings of a run that are read where its checkpoint is used: no other override could take effect.
GENERATING = "code_paths", "model", "precision", "parallel", "load_path"  # load_path: where the base of adapters is now
EVALUATING = (
    *GENERATING, "eval_loader", "eval_loaders", "max_seq_len", "device_eval_batch_size", "eval_subset_num_batches"
)  # fmt: skip


class Opened(NamedTuple):
    """A checkpoint, ready for inference on this process's device."""

    config: RunConfig
    contents: Contents
    model: CausalLM
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens


def _open_checkpoint(folder: str, overrides: list[str], keys: Sequence[str]) -> Opened:
    """Load a checkpoint's model and tokenizer; all ranks together.

    Args:
        overrides: applied to its config; the weights must still fit the model.
        keys: what may be overridden.
    """
    from llmfoundry import runtime
    from llmfoundry.checkpoint.manifest import CONFIG, CONVERTED
    from llmfoundry.checkpoint.reading import load_model_only, read
    from llmfoundry.hf.pretrained import tokenizer_of
    from llmfoundry.model.transformer import CausalLMConfig
    from llmfoundry.train.config import RunConfig
    from llmfoundry.train.resume import with_rule_of
    from llmfoundry.train.trainer import check_device

    for item in overrides:
        key = re.split(r"[.:=[]", item.removeprefix("~"), maxsplit=1)[0]
        if key not in keys and key in RunConfig.model_fields:
            raise ConfigError(f"{item}: cannot be changed here; you can change: {', '.join(keys)}")
    place = runtime.start()
    contents = read(folder)
    # What a conversion wrote is for editing; the settings of its weights are on record beside it.
    settings = CONVERTED if CONVERTED in contents.files else CONFIG
    config = read_run_config(str(contents.path / settings), overrides)
    assert isinstance(config.model, CausalLMConfig)
    check_device(config.model, place, config.precision_on(place.type))
    tokenizer = tokenizer_of(contents.tokenizer) if contents.tokenizer is not None else None
    if tokenizer is None:
        raise ConfigError(f"{contents.path}: holds no tokenizer")
    special = with_rule_of(config.tokenizer, contents).special_tokens(tokenizer)
    model, mesh = _build(config, config.model)
    moved = config.load_path if config.load_path != contents.config.get("load_path") else None
    load_model_only(contents, model, base_path=moved)
    return Opened(config, contents, model.eval(), mesh, tokenizer, special)


def _build(config: RunConfig, model_config: CausalLMConfig) -> tuple[CausalLM, Mesh]:
    """The model without its weights: whole in one process, sharded over several."""
    import torch

    from llmfoundry import runtime
    from llmfoundry.model.transformer import cast_parameters
    from llmfoundry.parallel.apply import parallelize
    from llmfoundry.parallel.expert import n_experts
    from llmfoundry.parallel.mesh import ParallelConfig, build_mesh, plan_mesh

    place = runtime.device()
    precision = config.precision_on(place.type)
    experts = n_experts(model_config)
    with torch.device("meta"):
        model = model_config.build()
    if launch.world_size() == 1:
        if precision == "amp_bf16":  # weights are saved in float32; a GPU computes as in the run
            cast_parameters(model, torch.bfloat16)
        return model.to_empty(device=place), build_mesh(ParallelConfig(), place.type, experts)
    update = {"compile": False, "recompute": "none", "recompute_save": None, "cpu_offload": False}
    parallel = config.parallel.model_copy(update=update)
    try:
        plan_mesh(parallel, launch.world_size(), experts)
    except ConfigError:  # the run had another number of processes
        parallel = ParallelConfig(compile=False)
    mesh = build_mesh(parallel, place.type, experts)
    return parallelize(model, mesh, parallel, precision).to_empty(device=place), mesh


@command
def generate_main(argv: Sequence[str] | None = None) -> None:
    """`generate.py --checkpoint DIR --prompt TEXT [key=value ...]`."""
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
    parser.add_argument(
        "--parse-special", action=argparse.BooleanOptionalAction, default=None,
        help="read special tokens that the prompt spells as such; default: as in training, and for a converted "
        "checkpoint that was not trained here, yes",
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise ConfigError("--temperature must be a number of 0 or more, --top-p in (0, 1], --max-new-tokens 1 or more")
    opened = _open_checkpoint(args.checkpoint, args.overrides, GENERATING)
    from llmfoundry.eval.generate import generate
    from llmfoundry.hf.generation import stop_tokens
    from llmfoundry.train.resume import is_trained

    parse = args.parse_special
    if parse is None:
        parse = opened.special.parse or not is_trained(opened.contents)
    generate(
        opened.model,
        opened.tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        special=opened.special._replace(parse=parse),
        stop=stop_tokens(opened.contents.path),
        emit=_write if launch.is_rank0() else None,
    )
    if launch.is_rank0():
        _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@command
def eval_main(argv: Sequence[str] | None = None) -> None:
    """`eval.py --checkpoint DIR [key=value ...]`: validation loss of a checkpoint, on its own or another dataset.

    Overrides of `model` take effect as far as the weights fit: another backend, longer contexts, fewer experts per
    token.
    """
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
    config, _, model, mesh, tokenizer, special = _open_checkpoint(args.checkpoint, args.overrides, EVALUATING)
    from llmfoundry import runtime
    from llmfoundry.eval.perplexity import evaluate

    if not config.evaluations:
        raise ConfigError("eval_loader: is missing; give one, e.g. eval_loader.dataset.name=text_files")
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
