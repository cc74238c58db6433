"""A family maps one `transformers` architecture to llmfoundry: its config and its tensors. Each has a file in
families/.

Subclassing `Family` in a file there registers it. Both maps are verified here, so a family only states what it knows. A
Hugging Face setting that no rule has read and that is not at its default raises an error. An llmfoundry model is only
written if the written config, read back, has the same facts.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from typing import ClassVar, cast

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from llmfoundry.config import ConfigError
from llmfoundry.hf import families
from llmfoundry.hf.facts import differences, facts
from llmfoundry.hf.pieces import Pieces, Spec
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
ConfigDict = dict[str, Value]  # the contents of a config.json

# Settings that do not affect what a model computes: dropout, initialization, caches, token ids, classification heads.
_HARMLESS = {
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "emb_pdrop", "initializer_range",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "pretraining_tp",
    "reorder_and_upcast_attn",
}  # fmt: skip

_MOST_LAYERS = 10_000


# Keys that older versions of `transformers` wrote into every config.json.
_OLD = {
    "model_type", "torch_dtype", "transformers_version", "auto_map", "_name_or_path", "torchscript", "is_decoder",
    "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "decoder_start_token_id",
    "tie_encoder_decoder", "pruned_heads", "use_bfloat16", "tf_legacy_loss", "use_return_dict", "prefix",
    "finetuning_task", "task_specific_params", "tokenizer_class", "sep_token_id",
}  # fmt: skip


def said_of_any_model() -> set[str]:
    """Return the config.json keys that do not affect what a model computes, in any family."""
    own = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    return own | _OLD | _HARMLESS | set(GenerationConfig().to_dict())


class Theirs:
    """A `transformers` config with its defaults filled in, which records the settings that were read."""

    def __init__(self, config: PreTrainedConfig, where: str = "config.json") -> None:
        self._config, self._where = config, where
        self._read: set[str] = set()
        self._parts: list[Theirs] = []

    def __getitem__(self, key: str) -> Value:
        self._read.add(key)
        return cast(Value, getattr(self._config, key, None))

    def int(self, key: str) -> int:
        """Return a setting that must be an integer."""
        value = self[key]
        if not isinstance(value, int):
            raise ConfigError(f"{self._where}: {key} must be a whole number, found {value!r}")
        return value

    def part(self, key: str) -> Theirs:
        """Return a nested config."""
        self._read.add(key)
        part = Theirs(getattr(self._config, key), f"{self._where}: {key}")
        self._parts.append(part)
        return part

    def must_be(self, key: str, value: Value) -> None:
        """Raise ConfigError unless a setting has the only supported value."""
        if self[key] != value:
            raise ConfigError(f"{self._where}: {key}={self[key]!r} is not supported, only {value!r}")

    def check_all_read(self) -> None:
        """Raise ConfigError if a setting that is not at its default has not been read."""
        own = {field.name for field in dataclasses.fields(self._config)}
        own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
        default = type(self._config)()
        for key in sorted(own - self._read - _HARMLESS):
            value = getattr(self._config, key)
            if not key.startswith("summary_") and value != getattr(default, key):
                raise ConfigError(f"{self._where}: {key}={value!r} is not supported")
        for part in self._parts:
            part.check_all_read()


class Family:
    """Base class of the families."""

    model_type: ClassVar[str] = ""  # in config.json
    title: ClassVar[str]  # the name that its authors use
    architecture: ClassVar[str]  # the class in `transformers`
    prefix: ClassVar[str] = "model."  # of tensor names; checkpoints of the bare decoder omit it
    head: ClassVar[str] = "lm_head.weight"  # absent if the embeddings are tied
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    sizes: ClassVar[dict[str, str]]  # Hugging Face names of the settings with the same meaning, by llmfoundry name
    layouts: ClassVar[tuple[str, ...]] = ("",)  # of tensors; `transformers` writes the first
    buffers: ClassVar[str] = r".*\.rotary_emb\.inv_freq"  # regex of tensors that are not weights
    turn: ClassVar[int | None] = 0  # export tries lower values first; None: only if requested by name
    code: ClassVar[str] = ""  # file of this package that is written beside the weights, for `transformers` to run
    _known: ClassVar[dict[str, type[Family]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "model_type" in vars(cls):
            Family._known[cls.model_type] = cls

    def reads(self, data: Mapping[str, object]) -> bool:
        """Return whether a config.json belongs to this family."""
        return data.get("model_type") == self.model_type

    def read(self, data: Mapping[str, object], where: str) -> CausalLMConfig:
        """Convert a config.json to an llmfoundry config. The `transformers` class fills in missing settings.

        Raises:
            ConfigError: if a setting is not supported.
        """
        try:
            theirs = Theirs(CONFIG_MAPPING[self.model_type].from_dict(copy.deepcopy(dict(data))), where)
        except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
        config = self.to_ours(theirs)
        theirs.check_all_read()
        return config

    def weights(self, names: Iterable[str], config: CausalLMConfig) -> set[str]:
        """Return the names that are weights of the model, leaving out buffers that the Hugging Face code computes."""
        return {name for name in names if re.fullmatch(self.buffers, name) is None}

    def sizes_of(self, theirs: Theirs) -> dict[str, object]:
        """Return the settings that are copied unchanged."""
        return {ours: theirs[name] for ours, name in self.sizes.items()}

    def sizes_to(self, config: CausalLMConfig) -> ConfigDict:
        """The inverse of `sizes_of`."""
        return {name: getattr(config, ours) for ours, name in self.sizes.items()}

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Convert a Hugging Face config to an llmfoundry config."""
        raise NotImplementedError

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """Convert an llmfoundry config to config.json settings, as far as this family can express it."""
        raise NotImplementedError

    def layout_of(self, specs: Mapping[str, Spec]) -> str | None:
        """Return the layout of a checkpoint's tensors; None: the one in `layouts` with the most names in common."""
        return None

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add the mapping of every tensor to `pieces`."""
        raise NotImplementedError


@functools.cache
def known_families() -> dict[str, Family]:
    """Return all families by `model_type`."""
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    return {name: kind() for name, kind in sorted(Family._known.items())}


def family_of(model_type: object, as_it_is: bool = False, where: str = "") -> Family:
    """Return the family of a `model_type`. Types that llmfoundry cannot express use the `transformers` module
    unchanged.

    Args:
        as_it_is: always use the `transformers` module.
        where: prefix of error messages.

    Raises:
        ConfigError: if `transformers` has no causal language model of this type.
    """
    known, module = known_families(), importlib.import_module("llmfoundry.hf.module")
    if not as_it_is and isinstance(model_type, str) and model_type in known:
        return known[model_type]
    if not module.is_known(model_type):
        raise ConfigError(
            f"{where}model_type {model_type!r:.80} is not supported; supported are {', '.join(known)}, and all causal "
            f"models of transformers {transformers.__version__}"
        )
    found = module.AsItIs(model_type)
    assert isinstance(found, Family)
    return found


def read_config(
    data: Mapping[str, object], where: str = "config.json", as_it_is: bool = False
) -> tuple[Family, CausalLMConfig]:
    """Return the family of a config.json, and the llmfoundry config.

    Args:
        as_it_is: use the `transformers` module, even if llmfoundry can express the model.

    Raises:
        ConfigError: if the model type or a setting is not supported.
    """
    readers = [family for family in known_families().values() if family.reads(data)]
    family = readers[0] if readers and not as_it_is else family_of(data.get("model_type"), as_it_is, f"{where}: ")
    if data.get("quantization_config"):
        raise ConfigError(
            f"{where}: quantization_config is set: these weights are quantised; save them unquantised first, "
            "in `transformers` by from_pretrained(..., dtype=torch.bfloat16) and save_pretrained"
        )
    n_layers = data.get(family.sizes["n_layers"])
    if isinstance(n_layers, int) and n_layers > _MOST_LAYERS:  # `transformers` would build a list of this length
        raise ConfigError(f"{where}: {family.sizes['n_layers']}={n_layers}; {_MOST_LAYERS} is the most that is read")
    try:
        return family, family.read(data, where)
    except ConfigError as error:
        if where in str(error):
            raise
        raise ConfigError(f"{where}: {str(error).removeprefix('config.json: ')}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, ArithmeticError, RuntimeError) as error:
        # A setting of the wrong type can fail anywhere.
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: holds a setting that cannot be ({type(error).__name__}: {why})") from None


def write_config(config: CausalLMConfig, model_type: str | None = None) -> tuple[Family, ConfigDict]:
    """Return the family that an llmfoundry model is written as, and its config.json.

    Args:
        model_type: None: the first family that can represent the model.

    Raises:
        ConfigError: if the family, or every family, cannot express a setting of this model.
    """
    family, data, lacking = _closest(config, model_type)
    if lacking:
        who = (
            "no supported family can hold this model; the nearest is"
            if model_type is None
            else "this model does not fit"
        )
        raise ConfigError(f"{who} {family.model_type}, which lacks {', '.join(lacking)}")
    return family, data


def export_note(config: ModelConfig) -> str:
    """Say in one line whether a model can be exported to Hugging Face, before it is trained."""
    if not isinstance(config, CausalLMConfig):
        return f"Hugging Face export: not possible with model.name={config.name}"
    family, _, lacking = _closest(config)
    if lacking:
        return f"Hugging Face export: not possible; the nearest family, {family.title}, lacks {', '.join(lacking)}"
    if family.code:
        return "Hugging Face export: with modelling code of its own, loaded with trust_remote_code=True"
    return f"Hugging Face export: as {family.title}"


def _closest(config: CausalLMConfig, model_type: str | None = None) -> tuple[Family, ConfigDict, list[str]]:
    """Return the first family that can express the model, or the nearest one; its config.json; and what it lacks."""
    settings = getattr(config, "hf_config", None)
    if isinstance(settings, dict) and model_type in (None, settings.get("model_type")):
        family = family_of(settings.get("model_type"), as_it_is=True)
        return family, {"architectures": [family.architecture], **family.to_theirs(config)}, []
    by_turn = [(family.turn, family) for family in known_families().values() if family.turn is not None]
    in_turn = [family for _, family in sorted(by_turn, key=lambda each: each[0])]
    candidates = in_turn if model_type is None else [family_of(model_type)]
    found = []
    for family in candidates:
        data, lacking = _written(family, config)
        if not lacking:
            return family, data, []
        found.append((family, data, lacking))
    # A family that cannot express a whole component is farther than any other.
    return min(found, key=lambda each: (not each[1], len(each[2])))


def _written(family: Family, config: CausalLMConfig) -> tuple[ConfigDict, list[str]]:
    """Return the config.json of a model in a family, and the facts that it cannot express."""
    try:
        said = family.to_theirs(config)
        data: ConfigDict = {"architectures": [family.architecture], "model_type": family.model_type, **said}
        _, again = read_config(
            data | {"bos_token_id": None, "eos_token_id": None}
        )  # default token ids may exceed the vocabulary
    except ConfigError as error:
        return {}, [str(error)]
    lost = differences(facts(config), facts(again))
    return data, [f"{name}={ours!r}" for name, (ours, _) in lost.items()]
