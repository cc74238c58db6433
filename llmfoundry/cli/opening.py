"""A checkpoint of ours, or a Hugging Face one, as a model ready for inference.

Under torchrun, the model is sharded over all processes, and its experts are divided as in the run if that fits.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmfoundry import launch
from llmfoundry.cli.command import read_run_config
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmfoundry.data.tokenizer import SpecialTokens
    from llmfoundry.model.transformer import CausalLM, CausalLMConfig
    from llmfoundry.parallel.mesh import Mesh
    from llmfoundry.train.config import RunConfig

HUGGING_FACE = "hf:"  # before the id of a hub, or a folder


class Opened(NamedTuple):
    """A checkpoint, ready for inference on this process's device.

    Attributes:
        config: of the run that saved it; of a Hugging Face checkpoint, that of a run that would go on from it.
        folder: where its generation_config.json is.
        special: how its texts were read.
        trained: whether a training run of ours saved it; else it was converted.
    """

    config: RunConfig
    folder: Path
    model: CausalLM
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    trained: bool


def open_checkpoint(path: str, overrides: list[str], keys: Sequence[str]) -> Opened:
    """Load a checkpoint's model and tokenizer; all ranks together.

    Args:
        path: a checkpoint or a run's save_folder; a Hugging Face folder or GGUF file; hf:<hub id>.
        overrides: applied to its config; the weights must still fit the model.
        keys: what may be overridden.

    Raises:
        ConfigError: it is missing or damaged, or an override names something else.
    """
    from llmfoundry.train.config import RunConfig

    for item in overrides:
        key = re.split(r"[.:=[]", item.removeprefix("~"), maxsplit=1)[0]
        if key not in keys and key in RunConfig.model_fields:
            raise ConfigError(f"{item}: cannot be changed here; you can change: {', '.join(keys)}")
    if path.startswith(HUGGING_FACE) or path.endswith(".gguf") or (Path(path) / "config.json").is_file():
        return _open_theirs(path.removeprefix(HUGGING_FACE), overrides)
    return _open_ours(path, overrides)


def _open_ours(folder: str, overrides: list[str]) -> Opened:
    from llmfoundry import runtime
    from llmfoundry.checkpoint.manifest import CONFIG, CONVERTED
    from llmfoundry.checkpoint.reading import load_model_only, read
    from llmfoundry.hf.pretrained import tokenizer_of
    from llmfoundry.model.transformer import CausalLMConfig
    from llmfoundry.train.resume import is_trained, with_rule_of
    from llmfoundry.train.trainer import check_device

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
    return Opened(config, contents.path, model.eval(), mesh, tokenizer, special, is_trained(contents))


def _open_theirs(name: str, overrides: list[str]) -> Opened:
    from llmfoundry import runtime
    from llmfoundry.checkpoint.convert import recipe
    from llmfoundry.hf.pretrained import load_weights, open_checkpoint, tokenizer_of
    from llmfoundry.model.transformer import CausalLMConfig
    from llmfoundry.settings import write_resolved
    from llmfoundry.train.trainer import check_device

    place = runtime.start()
    checkpoint = open_checkpoint(name)
    tokenizer = tokenizer_of(checkpoint.path)
    if tokenizer is None:
        raise ConfigError(f"{checkpoint.path}: holds no tokenizer")
    data = recipe(checkpoint.config, checkpoint.path, has_tokenizer=True) | {
        "tokenizer": {"name": str(checkpoint.path)}
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(write_resolved(data))
        file.flush()
        config = read_run_config(file.name, overrides)
    assert isinstance(config.model, CausalLMConfig)
    check_device(config.model, place, config.precision_on(place.type))
    model, mesh = _build(config, config.model)
    load_weights(model, name, ["model"] if overrides else ())  # what an override changes is asked for
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    special = config.tokenizer.special_tokens(tokenizer)
    return Opened(config, folder, model.eval(), mesh, tokenizer, special, trained=False)


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
