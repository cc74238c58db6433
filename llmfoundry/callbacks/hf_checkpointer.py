"""`hf_checkpointer`: the model as a Hugging Face folder, every so often. The words are LLM Foundry's.

    callbacks:
      hf_checkpointer: {save_folder: runs/{run_name}, save_interval: 1000ba, precision: bfloat16}

The folder may be in a store (`s3://bucket/{run_name}`): an export is written here, uploaded, and deleted here.
Writes `save_folder/huggingface/ba1000` and so on, each with the tokenizer, as `convert.py to-hf` would; with
`model.lora` the adapters alone, as peft reads them. Training waits.
"""

from __future__ import annotations

import glob
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from pydantic import field_validator

from llmfoundry import hf, runtime
from llmfoundry.checkpoint.reading import HUGGING_FACE
from llmfoundry.checkpoint.store import STORE_ERRORS
from llmfoundry.config import ConfigError, PathPattern, is_theirs, is_url, reason
from llmfoundry.data.remote import PlacePattern, listing, put_folder
from llmfoundry.hf.adapters import peft_names
from llmfoundry.hf.family import write_config
from llmfoundry.hf.tokenizer import save_tokenizer
from llmfoundry.model.adapters import save_peft
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.train.callback import AtIntervals, CallbackConfig, Run
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Interval

log = logging.getLogger(__name__)

Precision = Literal["float32", "float16", "bfloat16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUBFOLDER = "huggingface"


class HFCheckpointerConfig(CallbackConfig, names=("hf_checkpointer",)):
    """Where, when and how; {run_name}, {epoch}, {batch} and others are filled in, in both names."""

    save_folder: PlacePattern  # where the exports go: a folder, or a URL (s3://...)
    save_interval: Interval  # and after the last step
    huggingface_folder_name: PathPattern = "ba{batch}"  # of one export, below save_folder
    precision: Precision = "float32"  # of the weights
    overwrite: bool = True  # false: what is there is kept
    flatten_imports: list[str] = ["llmfoundry"]  # no code is exported, so there is nothing to flatten
    # Not supported: models are not registered with MLflow
    mlflow_registered_model_name: str | None = None
    mlflow_logging_config: dict[str, object] | None = None  # accepted, without effect
    final_register_only: bool = False  # not supported: models are not registered
    register_wait_seconds: int = 7200  # accepted, without effect

    @field_validator("mlflow_registered_model_name", "final_register_only")
    @classmethod
    def _registers_nothing(cls, value: str | bool | None) -> str | bool | None:
        if value:
            raise ValueError("models are not registered with MLflow here; leave it out, and register the folder")
        return value

    def build(self) -> HFCheckpointer:
        return HFCheckpointer(self)

    def check_run(self, run: RunConfig) -> None:
        """Refuse at once what could not be written after hours."""
        model = run.model
        if isinstance(model, CausalLMConfig) and model.lora is not None:
            model = model.model_copy(update={"lora": None})
        if (note := hf.export_note(model)).startswith("Hugging Face export: not possible"):
            raise ConfigError(f"callbacks.hf_checkpointer: {note}")


class HFCheckpointer(AtIntervals):
    """All ranks gather the weights, tensor by tensor; rank 0 writes."""

    def __init__(self, config: HFCheckpointerConfig) -> None:
        super().__init__(config.save_interval)
        self.config = config

    def act(self, trainer: Run) -> None:
        name = trainer.filled(self.config.huggingface_folder_name)
        place = f"{trainer.filled(self.config.save_folder).rstrip('/')}/{SUBFOLDER}/{name}"
        try:
            self._export(trainer, place)
        except STORE_ERRORS as error:
            if runtime.is_rank0():
                why = reason(error).removeprefix(f"{place}.new: cannot be written: ")
                log.error("step %d: hf_checkpointer: %s could not be written: %s; the run goes on",
                          trainer.state.step, place, why)  # fmt: skip

    def _export(self, trainer: Run, place: str) -> None:
        target = runtime.on_rank0(lambda: self._target(place))
        if target is None:
            return
        try:
            self._write(trainer, target)
            runtime.on_rank0(lambda: _put(target, place))
        finally:  # of a failed export, nothing is left
            if runtime.is_rank0():
                shutil.rmtree(target.parent if is_url(place) else target, ignore_errors=True)
        log.info("step %d: written for transformers to %s", trainer.state.step, place)

    def _write(self, trainer: Run, target: Path) -> None:
        if trainer.model.config.lora is not None:
            self._write_adapters(trainer, target)
        else:
            dtype = DTYPES[self.config.precision]
            hf.save_pretrained(trainer.model, trainer.tokenizer, target, dtype=dtype, generation=trainer.generation,
                               optimizer=trainer.optimizer)  # fmt: skip

    def _write_adapters(self, trainer: Run, target: Path) -> None:
        """With `model.lora`: the adapters alone, as peft reads them; the folder of their base stays where it was."""
        base = trainer.model.config.model_copy(update={"lora": None})
        family, _ = write_config(base)
        source = trainer.config.load_path or ""
        name = source.removeprefix(HUGGING_FACE) if is_theirs(source) else None
        save_peft(trainer.model, target, peft_names(family, base), name, trainer.optimizer)
        runtime.on_rank0(lambda: save_tokenizer(trainer.tokenizer, target))

    def _target(self, place: str) -> Path | None:
        """Where the new folder is written; None if an older one is to be kept."""
        folder = Path(place)
        if (bool(listing(place)) if is_url(place) else folder.exists()) and not self.config.overwrite:
            log.warning("hf_checkpointer: %s already exists and is kept (overwrite: false)", place)
            return None
        if is_url(place):
            return Path(tempfile.mkdtemp(prefix="export-")) / folder.name
        target = folder.with_name(f"{folder.name}.new")
        for left in target.parent.glob(f"{glob.escape(target.name)}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        return target


def _put(written: Path, place: str) -> None:
    """Give what was written its name, which an older folder may have."""
    if is_url(place):
        put_folder(written, place, "config.json")
        return
    folder, old = Path(place), written.with_name(f"{written.name}.old")
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
