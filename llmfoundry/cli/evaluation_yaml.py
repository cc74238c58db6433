"""The YAML of `eval.py`: models, and the tasks to evaluate them on, in LLM Foundry's keys."""

from __future__ import annotations

import logging
from typing import Literal, Self

from pydantic import Field, model_validator

import llmfoundry.model.transformer  # noqa: F401  registers its model
from llmfoundry import runtime
from llmfoundry.checkpoint.composer_names import is_composer, load_composer
from llmfoundry.checkpoint.finding import file_here
from llmfoundry.checkpoint.reading import load_model_only, read
from llmfoundry.cli.opening import HUGGING_FACE, Ready, build_model, open_checkpoint, open_hugging_face
from llmfoundry.config import Config, ConfigError, check, is_theirs
from llmfoundry.data.tokenizer import TokenizerConfig
from llmfoundry.eval.gauntlet import GauntletConfig
from llmfoundry.eval.icl_tasks import TaskConfig
from llmfoundry.hf.tokenizer import tokenizer_of
from llmfoundry.integrations.foundry_paths import checkpoint_named
from llmfoundry.integrations.foundry_yaml import translate
from llmfoundry.integrations.hf_causal_lm import GONE, ONLY
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.parallel.mesh import ParallelConfig
from llmfoundry.train.config import Precision, inference_precision, precision_on
from llmfoundry.train.machine import check_device
from llmfoundry.train.run_tokenizer import with_rule_of

log = logging.getLogger(__name__)

# LLM Foundry keys that do not affect results here.
_GONE = (
    "seed", "run_name", "fsdp_config", "python_log_level", "log_config", "console_log_interval", "metadata",
    "dist_timeout", "callbacks", "loggers", "eval_subset_num_batches",
)  # fmt: skip
VARIABLES = ("model_name_or_path", "tokenizer_name")  # top-level keys that only serve `${...}`
_GONE_OF_MODELS = {
    "name", "pretrained", "init_device", "use_train_metrics", "additional_train_metrics", "additional_eval_metrics",
    *GONE,
}  # fmt: skip
_LENGTHS = ("max_seq_len", "n_positions", "max_position_embeddings")


class TaskSettings(Config):
    """How models are evaluated on tasks."""

    icl_tasks: list[TaskConfig] = []
    eval_gauntlet: GauntletConfig | None = None
    icl_seq_len: int = Field(1024, gt=1)  # tokens per row
    # Batches per task, over all ranks together; None or -1: all
    icl_subset_num_batches: int | None = Field(None, ge=-1)
    device_eval_batch_size: int = Field(16, gt=0)  # rows per forward on one rank
    precision: Precision | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.icl_subset_num_batches == 0:
            raise ValueError("icl_subset_num_batches=0 asks no question; write -1 for all questions, or 1 or more")
        return self

    def precision_here(self) -> Precision:
        """Return the precision on this machine; raise ConfigError if it is not available."""
        precision = precision_on(self.precision, runtime.device().type)
        if precision == "amp_fp8":
            log.info("precision: amp_fp8 is for training; this computes in amp_bf16")
        return inference_precision(precision)


class EvaluatedModel(Config):
    """An entry of `models`.

    Either an llmfoundry checkpoint by `load_path` (its `model` may be left out), or a Hugging Face folder or hub id, as
    load_path `hf:NAME` or as a model `hf_causal_lm`.
    """

    model_name: str  # the model's name in the results
    load_path: str | None = None
    model: ModelConfig | None = None
    tokenizer: TokenizerConfig | None = None  # None: the checkpoint's own

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if self.load_path is None:
            raise ValueError("load_path: is missing; name the checkpoint that holds the model's weights")
        return self

    def open(self, precision: Precision, allow_code: bool = False) -> Ready:
        """Load the model; all ranks together.

        Args:
            allow_code: whether to run code that its config names.
        """
        assert self.load_path is not None
        named = self.tokenizer if self.tokenizer is not None and self.tokenizer.name != "bpe" else None
        if is_theirs(self.load_path):
            tokenizer = named.loaded() if named is not None else None
            assert self.model is None or isinstance(self.model, CausalLMConfig)
            return open_hugging_face(self.load_path.removeprefix(HUGGING_FACE), precision, tokenizer, self.model)
        if self.model is None:
            overrides = [f"precision={precision}"]
            ready = open_checkpoint(self.load_path, overrides, ("code_paths", "precision"), allow_code=allow_code).ready
            return ready if named is None else ready._replace(tokenizer=named.loaded())
        assert isinstance(self.model, CausalLMConfig)
        place = runtime.start()
        check_device(self.model, place, precision)
        if is_composer(self.load_path):
            if named is None or self.tokenizer is None:
                raise ConfigError(f"{self.load_path}: is a Composer checkpoint; name its tokenizer: {{name: ...}}")
            tokenizer = named.loaded()
            model, mesh = build_model(self.model, ParallelConfig(compile=False), precision)
            load_composer(file_here(self.load_path), model)
            return Ready(model.eval(), mesh, tokenizer, self.tokenizer.special_tokens(tokenizer))
        contents = read(self.load_path)
        own = tokenizer_of(contents.tokenizer) if contents.tokenizer is not None else None
        tokenizer = named.loaded() if named is not None else own
        if tokenizer is None:
            raise ConfigError(f"{contents.path}: holds no tokenizer; name one: tokenizer: {{name: ...}}")
        special = with_rule_of(self.tokenizer or TokenizerConfig(), contents).special_tokens(tokenizer)
        model, mesh = build_model(self.model, ParallelConfig(compile=False), precision)
        load_model_only(contents, model)
        return Ready(model.eval(), mesh, tokenizer, special)


class EvaluationConfig(TaskSettings):
    """The whole file."""

    models: list[EvaluatedModel] = Field(min_length=1)
    code_paths: list[str] = []  # Python files that register plug-ins

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [model.model_name for model in self.models]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"models: two are called {twice!r}, and results are listed by model_name; rename one")
        return self


def translated(data: dict[str, object]) -> dict[str, object]:
    """Translate a file of LLM Foundry's: `max_seq_len` becomes `icl_seq_len`, and models get the keys of training.

    Raises:
        ConfigError: if a key asks for something that is not supported.
    """
    data = dict(data)
    for key in _GONE:
        if data.pop(key, None) is not None:
            log.info("%s: ignored: it does not change scores", key)
    for key in ("eval_loader", "eval_loaders"):
        if data.pop(key, None) is not None:
            raise ConfigError(f"{key}: a file of models is evaluated by tasks; for texts: eval.py --checkpoint DIR")
    for key in VARIABLES:
        data.pop(key, None)
    if data.get("precision") == "amp_fp16":
        log.info("precision: amp_fp16 is now auto: amp_bf16 on a GPU, else fp32; scores may differ in the last digits")
        data["precision"] = "auto"
    if "max_seq_len" in data:
        data.setdefault("icl_seq_len", data["max_seq_len"])
        del data["max_seq_len"]
    if "model" in data:  # a single model, with the keys of a training YAML
        if "models" in data:
            raise ConfigError("model: models is also given; keep one")
        one = {key: data.pop(key) for key in ("model", "tokenizer", "load_path", "model_name") if key in data}
        name = one["model"].get("name", "model") if isinstance(one["model"], dict) else "model"
        data["models"] = [{"model_name": name} | one]
    models = data.get("models")
    if isinstance(models, list):
        data["models"] = [_model(f"models.{number}", entry) for number, entry in enumerate(models)]
    return data


def _model(where: str, entry: object) -> object:
    """Translate an entry of `models`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), dict):
        return entry
    model = entry["model"]
    if isinstance(entry.get("load_path"), str):
        entry = entry | {"load_path": checkpoint_named(entry["load_path"])}
    if model.get("name") == "hf_causal_lm":
        return _hugging_face(where, entry, dict(model))
    try:
        # The other parts of the run are only there so that `translate` accepts the keys of the model.
        ours = translate({"model": model, "run_name": "eval", "save_folder": "eval"})[0]["model"]
        assert isinstance(ours, dict)
        return entry | {"model": check(ModelConfig, ours, f"{where}.model")}
    except ConfigError as error:
        raise ConfigError("\n".join(_placed(where, line) for line in str(error).splitlines())) from None


def _placed(where: str, line: str) -> str:
    return line if line.startswith(where) else f"{where}.{line}"


def _hugging_face(where: str, entry: dict[str, object], model: dict[str, object]) -> dict[str, object]:
    """Translate a model `hf_causal_lm` into a load_path."""
    name = model.pop("pretrained_model_name_or_path", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where}.model.pretrained_model_name_or_path: is missing; name a folder or hub id")
    if model.get("pretrained") is False:
        raise ConfigError(f"{where}.model.pretrained: false gives random weights; there is nothing to evaluate")
    overrides = model.pop("config_overrides", None) or {}
    if not isinstance(overrides, dict) or overrides.keys() - set(_LENGTHS):
        raise ConfigError(f"{where}.model.config_overrides: only {', '.join(_LENGTHS)} are accepted, and ignored")
    for key in (key for key in list(model) if key in _GONE_OF_MODELS or model[key] in (None, False)):
        del model[key]
    if model:
        first = min(model)
        raise ConfigError(f"{where}.model.{first}: is not supported; {ONLY.get(first, (None, 'leave it out'))[1]}")
    rest = {key: value for key, value in entry.items() if key != "model"}
    path = rest.get("load_path")
    return rest if path is not None else rest | {"load_path": f"{HUGGING_FACE}{name}"}
