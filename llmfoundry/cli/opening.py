"""Load models for inference: an llmfoundry checkpoint with its run's settings, or a Hugging Face checkpoint.

Under torchrun, the model is sharded over all processes, and its experts are divided as in the run if that fits.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmfoundry import launch
from llmfoundry.cli.command import read_run_config
from llmfoundry.config import ConfigError, is_theirs, is_url

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmfoundry.data.tokenizer import SpecialTokens
    from llmfoundry.model.transformer import CausalLM, CausalLMConfig
    from llmfoundry.parallel.mesh import Mesh, ParallelConfig
    from llmfoundry.train.config import Precision, RunConfig


class Ready(NamedTuple):
    """A model in evaluation mode on this process's device."""

    model: CausalLM
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens  # the rule for texts


HUGGING_FACE = "hf:"  # prefix of a folder, or of a hub id


class Opened(NamedTuple):
    """A loaded checkpoint.

    Attributes:
        config: the config of the run that saved it; for a Hugging Face checkpoint, that of a run that would continue
            it.
        folder: the folder of its generation_config.json.
        trained: whether an llmfoundry run saved it; otherwise it was converted.
    """

    config: RunConfig
    folder: Path
    trained: bool
    ready: Ready


def is_hugging_face(path: str) -> bool:
    """Return whether a path names a Hugging Face checkpoint: a folder, a GGUF file, or `hf:` and a folder or hub id."""
    if is_url(path):
        return False
    return is_theirs(path) or path.endswith(".gguf") or (Path(path) / "config.json").is_file()


Check = Callable[["CausalLMConfig"], None]


def open_checkpoint(
    path: str, overrides: list[str], keys: Sequence[str], check: Check | None = None, allow_code: bool = False
) -> Opened:
    """Load a checkpoint's model and tokenizer; all ranks together.

    Args:
        path: a checkpoint or a run's save_folder, or its URL; a Hugging Face folder or GGUF file; hf:<folder or id>.
        overrides: overrides of its config; the weights must still fit the model.
        keys: the keys that may be overridden.
        check: refuses a model by its config, before any weight is read.
        allow_code: whether to run code that its config names.

    Raises:
        ConfigError: if the checkpoint is missing or damaged, or an override names another key.
    """
    from llmfoundry.train.config import RunConfig

    for item in overrides:
        key = re.split(r"[.:=[]", item.removeprefix("~"), maxsplit=1)[0]
        if key not in keys and key in RunConfig.model_fields:
            raise ConfigError(f"{item}: cannot be changed here; you can change: {', '.join(keys)}")
    if is_hugging_face(path):
        return _open_theirs(path.removeprefix(HUGGING_FACE), overrides, check)
    return _open_ours(path, overrides, check, () if allow_code else keys)


def _open_theirs(name: str, overrides: list[str], check: Check | None) -> Opened:
    from llmfoundry import runtime
    from llmfoundry.checkpoint.convert import recipe
    from llmfoundry.hf.pretrained import open_checkpoint as opened
    from llmfoundry.model.transformer import CausalLMConfig
    from llmfoundry.settings import write_resolved
    from llmfoundry.train.config import inference_precision

    found = opened(name)
    folder = found.path if found.path.is_dir() else found.path.parent
    data = recipe(found.config, folder, has_tokenizer=True) | {"tokenizer": {"name": str(found.path)}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(write_resolved(data))
        file.flush()
        config = read_run_config(file.name, overrides)
    assert isinstance(config.model, CausalLMConfig)
    if check is not None:
        check(config.model)
    precision = inference_precision(config.precision_on(runtime.start().type))
    # Overrides of the model are intended; shapes must fit.
    model = config.model if overrides else None
    ready = open_hugging_face(name, precision, config=model, allow=["model"], parallel=config.parallel)
    return Opened(config, folder, False, ready)


def _open_ours(folder: str, overrides: list[str], check: Check | None, untrusted: Sequence[str]) -> Opened:
    from llmfoundry import runtime
    from llmfoundry.checkpoint.manifest import CONFIG, CONVERTED
    from llmfoundry.checkpoint.reading import load_model_only, read
    from llmfoundry.hf.pretrained import tokenizer_of
    from llmfoundry.model.transformer import CausalLMConfig
    from llmfoundry.train.config import inference_precision
    from llmfoundry.train.machine import check_device
    from llmfoundry.train.run_tokenizer import with_rule_of
    from llmfoundry.train.trainer_json import is_trained

    place = runtime.start()
    contents = read(folder)
    # A converted checkpoint's config.yaml is for editing; the settings of its weights are stored separately.
    settings = CONVERTED if CONVERTED in contents.files else CONFIG
    config = read_run_config(str(contents.path / settings), overrides, untrusted)
    assert isinstance(config.model, CausalLMConfig)
    if check is not None:
        check(config.model)
    precision = inference_precision(config.precision_on(place.type))
    check_device(config.model, place, precision)
    tokenizer = tokenizer_of(contents.tokenizer) if contents.tokenizer is not None else None
    if tokenizer is None:
        raise ConfigError(f"{contents.place}: holds no tokenizer")
    special = with_rule_of(config.tokenizer, contents).special_tokens(tokenizer)
    model, mesh = build_model(config.model, config.parallel, precision)
    moved = config.load_path if config.load_path != contents.config.get("load_path") else None
    load_model_only(contents, model, base_path=moved)
    return Opened(config, contents.path, is_trained(contents), Ready(model.eval(), mesh, tokenizer, special))


def open_hugging_face(
    name: str,
    precision: Precision,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: CausalLMConfig | None = None,
    allow: Sequence[str] = (),
    parallel: ParallelConfig | None = None,
) -> Ready:
    """Load a Hugging Face folder or hub id as an llmfoundry model; all ranks together.

    Args:
        tokenizer: replaces its own tokenizer.
        config: replaces its settings, e.g. by other implementations; the weights must fit.
        allow: settings in which `config` may differ from the folder's.
        parallel: how to divide it over several processes; None: FSDP over all.
    """
    from llmfoundry import hf, runtime
    from llmfoundry.data.tokenizer import TokenizerConfig
    from llmfoundry.hf.pretrained import open_checkpoint, tokenizer_of
    from llmfoundry.parallel.mesh import ParallelConfig as Parallel
    from llmfoundry.train.machine import check_device

    place = runtime.start()
    found = open_checkpoint(name)
    config = config or found.config
    check_device(config, place, precision)
    tokenizer = tokenizer or tokenizer_of(found.path)
    if tokenizer is None:
        raise ConfigError(f"{found.path}: holds no tokenizer")
    model, mesh = build_model(config, parallel or Parallel(compile=False), precision)
    hf.load_weights(model, name, allow)
    # A text that spells a special token is encoded as that token, as in transformers.
    special = TokenizerConfig(parse_special_tokens=True).special_tokens(tokenizer)
    return Ready(model.eval(), mesh, tokenizer, special)


def build_model(config: CausalLMConfig, parallel: ParallelConfig, precision: Precision) -> tuple[CausalLM, Mesh]:
    """Build the model without its weights: whole in one process, sharded over several."""
    import torch

    from llmfoundry import runtime
    from llmfoundry.model.transformer import cast_parameters
    from llmfoundry.parallel.apply import parallelize
    from llmfoundry.parallel.expert import n_experts
    from llmfoundry.parallel.mesh import ParallelConfig, build_mesh, plan_mesh

    place = runtime.device()
    experts = n_experts(config)
    with torch.device("meta"):
        model = config.build()
    if launch.world_size() == 1:
        if precision == "amp_bf16":  # weights are saved in float32; a GPU computes as during training
            cast_parameters(model, torch.bfloat16)
        model = model.to_empty(device=place)
        model.init_buffers()
        return model, build_mesh(ParallelConfig(), place.type, experts)
    update = {
        "compile": False, "recompute": "none", "recompute_save": None, "cpu_offload": False,
        "exchange_tokens": "all_to_all",
    }  # fmt: skip
    parallel = parallel.model_copy(update=update)
    try:
        plan_mesh(parallel, launch.world_size(), experts)
    except ConfigError:  # the run had a different number of processes
        parallel = ParallelConfig(compile=False)
    mesh = build_mesh(parallel, place.type, experts)
    model = parallelize(model, mesh, parallel, precision).to_empty(device=place)
    model.init_buffers()
    return model, mesh
