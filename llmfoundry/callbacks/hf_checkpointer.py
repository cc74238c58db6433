"""`hf_checkpointer`: exports the model as a Hugging Face folder at intervals. The keys are LLM Foundry's.

    callbacks:
      hf_checkpointer: {save_folder: runs/{run_name}, save_interval: 1000ba, precision: bfloat16}

The folder may be in a store (`s3://bucket/{run_name}`): an export is written locally, uploaded, and deleted locally.
Folders are named `save_folder/huggingface/ba1000` and so on. Each contains the tokenizer, as with `convert.py to-hf`;
with `model.lora` it contains only the adapters, in peft's format. Training waits for the export.
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
    """Where, when and how to export. Both names may contain {run_name}, {epoch}, {batch} and others."""

    save_folder: PlacePattern  # folder of the exports: a path or a URL (s3://...)
    save_interval: Interval  # interval between exports; also exports after the last step
    huggingface_folder_name: PathPattern = "ba{batch}"  # name of one export's folder below save_folder/huggingface
    precision: Precision = "float32"  # dtype of the exported weights
    overwrite: bool = True  # false: keep an existing export of the same name
    flatten_imports: list[str] = ["llmfoundry"]  # accepted, without effect: no code is exported
    mlflow_registered_model_name: str | None = None  # not supported: models are not registered with MLflow
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
        """Refuse at the start what could not be exported hours later."""
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
                log.error("step %d: hf_checkpointer: %s could not be written: %s; training continues",
                          trainer.state.step, place, why)  # fmt: skip

    def _export(self, trainer: Run, place: str) -> None:
        target = runtime.on_rank0(lambda: self._target(place))
        if target is None:
            return
        try:
            self._write(trainer, target)
            runtime.on_rank0(lambda: _put(target, place))
        finally:  # a failed export leaves nothing
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
        """With `model.lora`, write only the adapters, in peft's format; their base is not exported."""
        base = trainer.model.config.model_copy(update={"lora": None})
        family, _ = write_config(base)
        source = trainer.config.load_path or ""
        name = source.removeprefix(HUGGING_FACE) if is_theirs(source) else None
        save_peft(trainer.model, target, peft_names(family, base), name, trainer.optimizer)
        runtime.on_rank0(lambda: save_tokenizer(trainer.tokenizer, target))

    def _target(self, place: str) -> Path | None:
        """Return the folder to write to; None if an existing one is to be kept."""
        folder = Path(place)
        if (bool(listing(place)) if is_url(place) else folder.exists()) and not self.config.overwrite:
            log.warning("hf_checkpointer: %s already exists and is kept (overwrite: false)", place)
            return None
        if is_url(place):
            return Path(tempfile.mkdtemp(prefix="export-")) / folder.name
        target = folder.with_name(f"{folder.name}.new")
        for left in target.parent.glob(f"{glob.escape(target.name)}*"):  # left by a killed run
            shutil.rmtree(left, ignore_errors=True)
        return target


def _put(written: Path, place: str) -> None:
    """Move a finished export to its final name, replacing an older folder."""
    if is_url(place):
        put_folder(written, place, "config.json")
        return
    folder, old = Path(place), written.with_name(f"{written.name}.old")
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
