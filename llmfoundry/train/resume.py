"""What a run begins from, decided once and before anything is built: nothing, its own newest checkpoint, or another's.

Settings that would change what a checkpoint's state means are refused (checkpoint/identity.py).
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from llmfoundry import hf, runtime
from llmfoundry.checkpoint.checkpointer import Checkpointer
from llmfoundry.checkpoint.composer_files import open_composer
from llmfoundry.checkpoint.composer_names import copies_from, is_composer, load_composer
from llmfoundry.checkpoint.finding import file_here
from llmfoundry.checkpoint.identity import (
    DATA,
    MIXTURE,
    ROWS,
    Comparison,
    Difference,
    check_allowed,
    check_names,
    compare,
    is_allowed,
)
from llmfoundry.checkpoint.reading import HUGGING_FACE, Base, Contents, base_of, find_base, load_model_only, read
from llmfoundry.config import ConfigError, is_theirs
from llmfoundry.hf.facts import weight_differences
from llmfoundry.hf.generation import read_generation
from llmfoundry.hf.pretrained import open_checkpoint
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.private import cleaned
from llmfoundry.settings import read_resolved
from llmfoundry.train.config import RunConfig
from llmfoundry.train.outputs import is_free

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """What a run begins from.

    Attributes:
        how: new: initial weights. weights: a new run on a checkpoint's weights. continue: all that a checkpoint holds,
            in another folder. resume: the same in the run's own folder.
        contents: a checkpoint of ours.
        hugging_face: a folder or hub id; weights only.
        composer: a FILE.pt or sharded folder of Composer's; weights only.
        base: what checkpoints of this run leave out, as it is there already.
        changes: settings that differ from the checkpoint's, and are taken.
        generation: a generation_config.json.
        rows_anew: the checkpoint's place in the data means nothing here: rows are counted from the first.
    """

    how: Literal["new", "weights", "continue", "resume"]
    contents: Contents | None = None
    hugging_face: str | None = None
    composer: str | None = None
    base: Base | None = None
    changes: tuple[Difference, ...] = ()
    generation: str | None = None
    rows_anew: bool = False


def find_start(config: RunConfig, checkpointer: Checkpointer) -> Start:
    """Find what a run begins from, and whether it may; all ranks together, and nothing is loaded.

    Raises:
        ConfigError: if a checkpoint is missing or damaged, or was saved by a run with incompatible settings.
    """
    model = config.model
    assert isinstance(model, CausalLMConfig)
    check_names(config, model, config.load_allow)
    contents = checkpointer.newest() if config.autoresume else None
    if contents is not None:
        return _from_ours(config, model, "resume", contents)
    _check_same_folder(config, model)
    if config.load_path is None:
        return Start("new")
    if is_theirs(config.load_path):
        return _from_hugging_face(config, model, config.load_path.removeprefix(HUGGING_FACE))
    if is_composer(config.load_path):
        return _from_composer(file_here(config.load_path), model, config.load_weights_only)
    if config.load_weights_only:
        return _from_ours(config, model, "weights", read(config.load_path, "model"))
    return _from_ours(config, model, "continue", read(config.load_path, "everything"))


def _from_ours(
    config: RunConfig, model: CausalLMConfig, how: Literal["weights", "continue", "resume"], contents: Contents
) -> Start:
    comparison = compare(
        config, model, contents.config, weights_only=how == "weights", now=config.disclosed()
    )  # fmt: skip
    remedy = {
        "weights": "its config.yaml has the model's settings",
        "continue": "start a new run from its weights with load_weights_only=true",
        "resume": "choose another save_folder",
    }[how]
    check_allowed(comparison, config.load_allow, contents.place, remedy)
    if contents.base is not None:
        moved = config.load_path if how == "resume" else None
        found = find_base(contents.base, contents.path, moved)
        contents = contents._replace(base=contents.base._replace(path=found))
    base = None
    if model.lora is not None and not config.save_frozen_weights:
        base = base_of(contents) if how == "weights" else contents.base
    anew = any(difference.key in ROWS for difference in comparison.identity)
    changes = () if how == "weights" else (*comparison.identity, *comparison.others)
    generation = read_generation(contents.path)
    return Start(how, contents, base=base, changes=changes, generation=generation, rows_anew=anew)


def _from_hugging_face(config: RunConfig, model: CausalLMConfig, name: str) -> Start:
    theirs = open_checkpoint(name, as_it_is=model.name == "transformers")
    found = weight_differences(theirs.config, model)
    comparison = Comparison([Difference(f"model.{key}", *both) for key, both in found.items()], [])
    check_allowed(comparison, config.load_allow, name, "convert.py from-hf writes a config.yaml with its settings")
    return Start(
        "weights", hugging_face=name,
        base=base_of(name) if model.lora is not None and not config.save_frozen_weights else None,
        generation=theirs.generation,
    )  # fmt: skip


def _from_composer(path: str, model: CausalLMConfig, weights_only: bool) -> Start:
    if not weights_only:
        raise ConfigError(
            f"load_path: {path}: only the weights of a Composer checkpoint can be loaded; start a new run "
            "from them: load_weights_only=true"
        )
    if model.lora is not None and model.lora.quantize is not None:
        raise ConfigError(
            f"load_path: {path}: weights of a Composer checkpoint cannot be quantized as they are read; convert them: "
            f"convert.py from-composer {path} OUT"
        )
    copies_from(open_composer(Path(path)), model)  # checked before anything is built
    log.info("%s: all tensors fit the model; its settings come from this YAML and were not compared", path)
    return Start("weights", composer=path)


def _check_same_folder(config: RunConfig, model: CausalLMConfig) -> None:
    """A folder without a checkpoint may hold the metrics of another run, which would be lost."""
    folder = config.folder
    if not config.autoresume or runtime.on_rank0(lambda: is_free(folder)):
        return
    before = runtime.on_rank0(lambda: read_resolved(folder / "config.yaml"))
    comparison = compare(config, model, before, weights_only=False, now=config.disclosed())
    check_allowed(comparison, config.load_allow, str(folder), "choose another save_folder")
    log.warning("%s: holds no checkpoint; starting from the first step", folder)


def load_weights(start: Start, model: CausalLM, allow: list[str]) -> None:
    """Load the weights that a new run begins from, if it begins from any."""
    if start.hugging_face is not None:
        hf.load_weights(model, start.hugging_face, allow=allow)
    elif start.composer is not None:
        load_composer(start.composer, model)
    elif start.contents is not None and start.how == "weights":
        load_model_only(start.contents, model)


def load_reference(path: str, model: CausalLM, allow: list[str]) -> None:
    """Load the weights of `load_path` into a model beside the one that is trained."""
    if is_theirs(path):
        hf.load_weights(model, path.removeprefix(HUGGING_FACE), allow=allow)
    else:
        load_model_only(read(path, "model"), model)


def check_data(start: Start, fingerprint: str, allow: list[str], mixed: bool) -> Start:
    """Compare the data of a run with that of the checkpoint that it continues: wherever it lies, its tokens count.

    Args:
        mixed: whether the data is a mixture, which `load_allow: [mixture]` lets go on where its sources are.

    Returns:
        `start`, with `rows_anew` set if the data is new.

    Raises:
        ConfigError: if the data is new, and `load_allow` does not name it.
    """
    contents = start.contents
    if contents is None or start.how == "weights" or contents.trainer.get("data") == fingerprint:
        return start
    if mixed and is_allowed(MIXTURE, allow):
        return start
    if not is_allowed(DATA, allow):
        mixture = "continue each source of the new mixture: load_allow=[mixture]; or " if mixed else ""
        raise ConfigError(
            f"{contents.place}: was trained on other data or with another tokenizer (changed files count too); "
            f"restore them; or {mixture}continue with the new data from its first row and the same optimizer state: "
            "load_allow=[data]; or start a new run from its weights with load_path and load_weights_only=true"
        )
    return start._replace(rows_anew=True)


def command_to_continue() -> str:
    """Return the command that resumes this run from its newest checkpoint: its own, with `autoresume=true`."""
    words = list(sys.orig_argv)
    if Path(sys.argv[0]).name == "llmfoundry":  # instead of the paths of its script and of Python
        words = ["llmfoundry", *sys.argv[1:]]
    launcher = Path(f"/proc/{os.getppid()}/cmdline")
    if "TORCHELASTIC_RUN_ID" in os.environ and launcher.exists():  # torchrun started this rank
        words = launcher.read_text().rstrip("\0").split("\0")
    words = [cleaned(word) for word in words if not word.startswith("autoresume=")]
    return shlex.join([*words, "autoresume=true"])
