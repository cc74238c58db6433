"""The whole YAML as one type: it contains every key of a run.

Keys are LLM Foundry v0.22's if the idea is unchanged. Settings of one part (a model, an optimizer, a callback) are
defined where that part is built.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

import llmfoundry.model.transformer  # noqa: F401  registers its model
import llmfoundry.train.lion  # noqa: F401  registers its optimizer
import llmfoundry.train.muon  # noqa: F401  registers its optimizer
from llmfoundry import runtime
from llmfoundry.config import (
    Choice,
    Config,
    ConfigError,
    check_placeholders,
    dump,
    is_theirs,
    is_url,
    keyed,
    local_path,
)
from llmfoundry.data.loader import LoaderConfig
from llmfoundry.data.mixture import MixtureConfig
from llmfoundry.data.preferences import PreferencesConfig
from llmfoundry.data.remote import Place, data_path
from llmfoundry.data.sources import paired_run
from llmfoundry.data.tokenizer import TokenizerConfig
from llmfoundry.eval.gauntlet import GauntletConfig
from llmfoundry.eval.icl_tasks import TaskConfig
from llmfoundry.hf.module import TransformersConfig
from llmfoundry.layers.lora import LoRAConfig
from llmfoundry.model.config import ModelConfig
from llmfoundry.parallel.mesh import ParallelConfig
from llmfoundry.private import FromEnvironment, disclosed
from llmfoundry.train.duration import ClockTime, Duration
from llmfoundry.train.loss import CrossEntropyConfig, LossConfig
from llmfoundry.train.optim import OptimizerConfig
from llmfoundry.train.schedule import SchedulerConfig

Precision = Literal["fp32", "amp_bf16", "amp_fp8"]


def precision_on(asked: Precision | Literal["auto"], device_type: str) -> Precision:
    """What the key `precision` means on a kind of device.

    Raises:
        ConfigError: the requested precision is not available there.
    """
    if asked == "auto":
        return "amp_bf16" if device_type == "cuda" else "fp32"
    if asked != "fp32" and device_type != "cuda":
        raise ConfigError(f"precision: {asked} needs a GPU and there is none; write precision=fp32 or leave it out")
    return asked


def inference_precision(precision: Precision) -> Precision:
    """The precision of inference: bfloat16 if the run trained with 8-bit products."""
    return "amp_bf16" if precision == "amp_fp8" else precision


class GradientClipping(Config):
    """`algorithms.gradient_clipping`: scale all gradients so that their global L2 norm stays below a threshold."""

    clipping_type: Literal["norm"] = "norm"  # clip by the global L2 norm
    clipping_threshold: float = Field(1.0, gt=0)  # maximum norm


class Algorithms(Config):
    """What happens to the gradients between backward and update."""

    gradient_clipping: GradientClipping | None = None  # None: gradients are not clipped


class CallbackConfig(Choice, tag="name"):
    """Base of the monitors and other callbacks: the YAML's `callbacks`."""

    name: str  # in a YAML, the key under callbacks

    def build(self) -> object:
        """Build the `Callback`, before there is a trainer and before data is prepared: mistakes are refused here."""
        raise NotImplementedError

    def check_run(self, run: RunConfig) -> None:
        """Refuse a run that this callback cannot work with, before anything is written; raises ConfigError."""


def _one_rank_logs(value: bool) -> bool:
    if not value:
        raise ValueError("metrics are of all ranks, and rank 0 logs them; write true")
    return value


RankZeroOnly = Annotated[bool, AfterValidator(_one_rank_logs)]  # a key of Composer's loggers


class LoggerConfig(Choice, tag="name"):
    """Base of the loggers: the YAML's `loggers`."""

    name: str  # in a YAML, the key under loggers

    def build(self) -> object:
        """Build the logger, as `CallbackConfig.build`."""
        raise NotImplementedError


RUN_NAME = "{run_name}"


def _filled(data: Any, name: str, key: str = "") -> Any:
    """Data with `{run_name}` filled in where a key names a path."""
    if isinstance(data, dict):
        return {each: _filled(value, name, str(each)) for each, value in data.items()}
    is_path = isinstance(data, str) and key.endswith(("folder", "path", "dir"))
    return data.replace(RUN_NAME, name) if is_path else data


class RunConfig(Config):
    """One training run."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "learning_rate": "optimizer.lr",
        "batch_size": "global_train_batch_size",
        "per_device_train_batch_size": "device_train_microbatch_size",
        "per_device_eval_batch_size": "device_eval_batch_size",
        "gradient_accumulation_steps": "device_train_microbatch_size",
        "max_steps": "max_duration",
        "num_train_epochs": "max_duration",
        "epochs": "max_duration",
        "warmup_steps": "scheduler.t_warmup",
        "warmup_ratio": "scheduler.t_warmup",
        "max_grad_norm": "algorithms.gradient_clipping.clipping_threshold",
        "output_dir": "save_folder",
        "save_steps": "save_interval",
        "save_total_limit": "save_num_checkpoints_to_keep",
        "eval_steps": "eval_interval",
        "logging_steps": "console_log_interval",
        "resume_from_checkpoint": "load_path",
        "sequence_length": "max_seq_len",
        "seq_len": "max_seq_len",
        "num_experts": "model.ffn_config.moe_num_experts",
        "report_to": "loggers",
    }

    metadata: dict[str, object] = {}  # Your own values, kept in config.yaml and given to loggers
    run_name: str | None = None  # for loggers, and for {run_name} in paths; None: $RUN_NAME, or the save_folder's name
    code_paths: list[str] = []  # Python files that register plug-ins
    seed: int = Field(17, ge=0, lt=2**63)  # seed of initial weights, data order and dropout
    max_seq_len: int = Field(gt=0, le=2**31)  # tokens per row

    model: ModelConfig
    tokenizer: TokenizerConfig
    train_loader: LoaderConfig
    eval_loader: LoaderConfig | None = None  # text to evaluate on; a list is read as eval_loaders
    eval_loaders: list[LoaderConfig] = []  # several loaders, each with a label: metrics/eval/LABEL/...

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    loss: LossConfig = CrossEntropyConfig()  # the default, or {name: dpo, beta: 0.1} on preferences
    algorithms: Algorithms = Algorithms()  # gradient clipping
    # Length of the run. A wall-clock time (2h) counts all processes of the run, from the first step.
    max_duration: Duration
    # Latest end of this process: the run stops early enough to save, and the same command continues it. None: the end
    # of the Slurm job, if there is one; 0s: no limit.
    time_limit: ClockTime | None = None
    global_train_batch_size: int = Field(gt=0, le=2**31)  # rows per step, over all ranks
    # Rows of a forward; need not divide. auto: all of the rank's; each time that they do not fit, the next fewer that
    # make equal microbatches, or else half.
    device_train_microbatch_size: int | Literal["auto"] = "auto"
    # Maximum consecutive skipped updates (gradient not finite, loss too high) before the run ends
    max_skipped_steps: int = Field(10, ge=0)
    # Maximum share of skipped steps, beyond max_skipped_steps; above it the run fails (exit code 1)
    max_skipped_share: float = Field(0.1, ge=0, le=1)

    eval_interval: Duration = Duration.parse("1ep")  # 0ba: never
    eval_first: bool = False  # also evaluate before the first step, as step 0
    # Number of batches of device_eval_batch_size rows, over all ranks together; -1: all data
    eval_subset_num_batches: int = 256
    device_eval_batch_size: int = Field(16, gt=0, le=2**31)  # rows per forward in evaluation
    # In-context learning tasks to run at each evaluation: metrics/LABEL/N-shot/METRIC. A list, or a file that contains
    # one.
    icl_tasks: list[TaskConfig] = []
    # Summary of the tasks: icl/metrics/eval_gauntlet/NAME. A block, or a file that contains one.
    eval_gauntlet: GauntletConfig | None = None
    icl_seq_len: int = Field(1024, gt=1)  # tokens of a question with its examples; longer ones lose their beginning
    # Batches per task, over all ranks together; None or -1: all
    icl_subset_num_batches: int | None = Field(None, ge=-1)

    # auto: amp_bf16 on a GPU, fp32 on a CPU. amp_fp8: as amp_bf16, but experts and the linear layers of blocks multiply
    # 8-bit floats (e4m3) with one scale per row; needs a GPU of compute capability 9.0 (Hopper) or later.
    precision: Precision | Literal["auto"] = "auto"
    parallel: ParallelConfig = ParallelConfig()
    dist_timeout: float = Field(600.0, gt=0)  # seconds after which a collective fails that some rank has not joined
    # The same after the first step, which compiles and connects; None: dist_timeout. It must cover what one rank does
    # alone while others wait, such as an export.
    step_timeout: ClockTime | None = None
    # If no step, evaluation batch or save ends for this long, each rank writes its stacks to hang-rank-N.txt and exits
    # with 1; 0s: never. None: 0.8 of the collectives' timeout within a step, otherwise (first step, saves, callbacks)
    # 30min.
    hang_timeout: ClockTime | None = None

    # a folder, or a URL in a store (s3://, gs://, hf://, ...) to upload to; `{run_name}` is filled in
    save_folder: Place
    save_interval: Duration = Duration.parse("1ep")  # interval between checkpoints; 0ba: only at the end
    save_num_checkpoints_to_keep: int = -1  # number of newest checkpoints to keep; -1: all
    keep_every: Duration = Duration.parse("0ba")  # interval of additional checkpoints that are never deleted; 0ba: none
    # a thread writes and uploads while the next steps run; auto: on GPUs, and to a store
    save_async: bool | Literal["auto"] = "auto"
    save_failures_allowed: int = Field(3, ge=0)  # number of consecutive failed saves before the run stops with an error
    save_frozen_weights: bool = False  # with model.lora: also save the frozen weights that load_path provided
    autoresume: bool = False  # continue from the newest checkpoint in save_folder, if there is one
    # A checkpoint in a folder or at a URL. For weights only, also hf:<folder or hub id>, or Composer's FILE.pt or
    # sharded folder.
    load_path: str | None = None
    load_weights_only: bool = False  # start a new run from the checkpoint's weights instead of continuing its run
    # What may differ from the checkpoint although it changes the meaning of its state: tokenizer, data, or full keys,
    # e.g. [data, seed, model.attn_config.rope_theta]. With other data, seed or max_seq_len, rows are counted from the
    # first.
    load_allow: list[str] = []

    # Monitors and other callbacks, {NAME: {keys}}; the keys may be left out.
    callbacks: keyed(CallbackConfig) = {}  # type: ignore[valid-type]
    loggers: keyed(LoggerConfig) = {}  # type: ignore[valid-type]  # Loggers besides metrics.jsonl, {NAME: {keys}}
    progress_bar: bool = True  # on a terminal, show a live view below the lines; false: only lines
    log_to_console: bool = True  # false: print neither lines nor the live view
    console_log_interval: Duration = Duration.parse("1ba")  # interval between lines

    _environment: dict[str, FromEnvironment] = PrivateAttr(default_factory=dict)

    def remember(self, environment: dict[str, FromEnvironment]) -> None:
        """Record which values of the YAML came from the environment, by dotted path."""
        self._environment = environment

    def disclosed(self) -> dict[str, object]:
        """All settings as plain data without secrets (private.py), so that they may be written."""
        return disclosed(dump(self), self._environment)

    @model_validator(mode="before")
    @classmethod
    def _several_evaluations(cls, data: object) -> object:
        """Accept a list under eval_loader, as LLM Foundry writes it."""
        if not isinstance(data, dict) or not isinstance(data.get("eval_loader"), list):
            return data
        rest = {key: value for key, value in data.items() if key != "eval_loader"}
        return rest | {"eval_loaders": [*data["eval_loader"], *data.get("eval_loaders", [])]}

    @model_validator(mode="before")
    @classmethod
    def _name_run(cls, data: Any) -> Any:
        """Fill `{run_name}` into the paths of a run; a run without a name is named after its folder."""
        if not isinstance(data, dict):
            return data
        folder = data.get("save_folder")
        name = os.environ.get("RUN_NAME") if data.get("run_name") is None else data["run_name"]
        if name is None and isinstance(folder, str) and RUN_NAME in folder:
            raise ValueError(f"save_folder: {folder} needs a run_name; write run_name=...")
        if name is None and isinstance(folder, str):
            name = os.path.basename(os.path.normpath(os.path.expanduser(folder)))
        return _filled({**data, "run_name": name}, name) if isinstance(name, str) else data

    @field_validator("load_path")
    @classmethod
    def _local(cls, path: str | None) -> str | None:
        if path is None or is_theirs(path):
            return path
        if not path.strip():
            raise ValueError("is empty; write a checkpoint's folder, hf:NAME or a URL, or leave it out")
        return check_placeholders(data_path(path)) if is_url(path) else local_path(path)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_duration.unit == "dur":
            raise ValueError(f'max_duration: "{self.max_duration}" is a part of itself; write e.g. 10ba, 1ep, 2h')
        if not self.max_duration.value:
            raise ValueError(f'max_duration: "{self.max_duration}" is less than one step; write at least 1ba')
        if self.model.max_seq_len < self.max_seq_len:
            raise ValueError(f"max_seq_len={self.max_seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")
        micro = self.device_train_microbatch_size
        if isinstance(micro, int) and micro < 1:
            raise ValueError(f"device_train_microbatch_size={micro} is not a number of rows; write 1 or more, or auto")
        if self.eval_first and not self.evaluations and not self.icl_tasks:
            raise ValueError("eval_first=true has no text to evaluate on; add an eval_loader, or icl_tasks")
        if self.icl_subset_num_batches == 0:
            raise ValueError("icl_subset_num_batches=0 asks no question; write -1 for all questions, or 1 or more")
        if self.eval_gauntlet is not None and not self.icl_tasks:
            raise ValueError("eval_gauntlet: summarizes icl_tasks, and there are none; add some, or leave it out")
        self._check_labels()
        keep, batches = self.save_num_checkpoints_to_keep, self.eval_subset_num_batches
        if keep == 0 or keep < -1:
            raise ValueError(
                f"save_num_checkpoints_to_keep={keep} keeps nothing to resume from; write -1 for all, or 1 or more"
            )
        if batches == 0 or batches < -1:
            raise ValueError(
                f"eval_subset_num_batches={batches} evaluates on nothing; write -1 for all, or 1 or more "
                "(eval_interval: 0ba never evaluates)"
            )
        return self

    @model_validator(mode="after")
    def _base_is_quantized(self) -> Self:
        lora = self.lora
        if lora is None or lora.quantize is None:
            return self
        if self.load_path is None:
            raise ValueError(f"model.lora.quantize={lora.quantize} needs load_path, whose weights it quantises")
        if self.save_frozen_weights:
            raise ValueError(f"save_frozen_weights: not with model.lora.quantize={lora.quantize}; leave one out")
        return self

    @model_validator(mode="after")
    def _products_are_known(self) -> Self:
        if self.precision != "amp_fp8":
            return self
        if self.lora is not None:
            raise ValueError("precision: amp_fp8 with model.lora is not supported; write amp_bf16")
        if isinstance(self.model, TransformersConfig):
            raise ValueError("precision: amp_fp8 does not reach modules of transformers; write amp_bf16")
        return self

    @model_validator(mode="after")
    def _loss_fits_data(self) -> Self:
        parts = self.train_loader.dataset.parts()
        if any(isinstance(part, PreferencesConfig) != self.loss.pairs for part in parts):
            needed = "name: preferences" if self.loss.pairs else "other data, or loss: {name: dpo}"
            raise ValueError(f"loss={self.loss.name} does not fit the data of train_loader; it needs {needed}")
        if self.loss.pairs and isinstance(self.train_loader.dataset, MixtureConfig):
            raise ValueError(f"train_loader.datasets: loss={self.loss.name} reads one dataset, not a mixture")
        if any(isinstance(part, PreferencesConfig) for each in self.evaluations for part in each.dataset.parts()):
            raise ValueError(
                "eval_loader: preferences are for training; evaluate on the chosen answers as finetuning data, with "
                "preprocessing_fn: {response: chosen}"
            )
        if self.loss.pairs and self.lora is None:
            if self.load_path is None:
                raise ValueError(
                    f"loss={self.loss.name} needs load_path, whose weights are the reference, or model.lora"
                )
            if not is_theirs(self.load_path) and not self.load_weights_only:
                raise ValueError(f"loss={self.loss.name}: load_path is the reference; write load_weights_only=true")
        return self

    def _check_labels(self) -> None:
        labels = [part.label for part in self.eval_loaders]
        for number, label in enumerate(labels):
            if not label or "/" in label:
                raise ValueError(
                    f"eval_loaders.{number}.label: {label!r} is not a valid name in metrics; write e.g. label: wiki"
                )
            if labels.count(label) > 1:
                raise ValueError(f"eval_loaders.{number}.label: {label!r} is listed twice")
        if any(isinstance(part.dataset, MixtureConfig) for part in self.evaluations):
            raise ValueError(
                "eval_loader.datasets: a mixture has no end; list its datasets in eval_loaders, with labels"
            )
        if isinstance(self.train_loader.dataset, MixtureConfig):
            for number, phase in enumerate(self.train_loader.dataset.mixture):
                if phase.until is not None:
                    try:
                        Duration.parse(phase.until)
                    except ValueError as error:
                        raise ValueError(f"train_loader.mixture.{number}.until: {error}") from None

    @model_validator(mode="after")
    def _datasets_paired(self) -> Self:
        """Resolve what each dataset holds out, which depends on the other, so that config.yaml records it."""
        train, evaluations = self.train_loader, self.evaluations
        one, others = paired_run(train.dataset, [part.dataset for part in evaluations])
        update: dict[str, object] = {"train_loader": train.model_copy(update={"dataset": one})}
        found = [part.model_copy(update={"dataset": other}) for part, other in zip(evaluations, others, strict=True)]
        if self.eval_loader is not None:
            update["eval_loader"] = found.pop(0)
        return self.model_copy(update=update | {"eval_loaders": found})

    @property
    def folder(self) -> Path:
        """The local folder of the run: `save_folder` or, for a run in a store, a folder whose files are uploaded."""
        if not is_url(self.save_folder):
            return Path(self.save_folder)
        digest = hashlib.sha256(self.save_folder.rstrip("/").encode()).hexdigest()[:16]
        return runtime.cache_root() / "runs" / digest / PurePosixPath(self.save_folder).name

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters of the model, if it is of a kind that has them."""
        return getattr(self.model, "lora", None)

    @property
    def evaluations(self) -> list[LoaderConfig]:
        """`eval_loader` and all of `eval_loaders`."""
        return [*([self.eval_loader] if self.eval_loader is not None else []), *self.eval_loaders]

    @property
    def due_evaluations(self) -> list[LoaderConfig]:
        """The same if an evaluation is ever due; otherwise their data is not needed."""
        return self.evaluations if self.eval_first or self.eval_interval.value > 0 else []

    @property
    def loaders(self) -> dict[str, LoaderConfig]:
        """All loaders of the run, by their place in the YAML."""
        due = {f"eval_loaders.{part.label}" if part.label else "eval_loader": part for part in self.due_evaluations}
        return {"train_loader": self.train_loader} | due

    def precision_on(self, device_type: str) -> Precision:
        """The run's precision on a kind of device; raises ConfigError if it is not available there."""
        return precision_on(self.precision, device_type)

    def optimizer_on(self, device_type: str) -> OptimizerConfig:
        """The run's optimizer on a kind of device, with `master_weights: auto` resolved."""
        half = self.precision_on(device_type) != "fp32"
        return self.optimizer.decided(half and self.lora is None and not self.parallel.cpu_offload)
