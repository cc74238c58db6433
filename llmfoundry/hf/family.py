"""A family: one architecture of `transformers`, as a map of configs and a map of tensors. One file each in families/.

Subclassing `Family` in a file there registers it. Both maps are checked from outside, so a family states only what it
knows. A setting of theirs that no rule has read and that is not at its default is an error. And a model of ours is only
written if the config that was written, read back, has the same facts.
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
ConfigDict = dict[str, Value]  # a config.json

# No concern of what a model computes: dropout, first values, caches, token ids, classification heads.
_HARMLESS = {
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "emb_pdrop", "initializer_range",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "pretraining_tp",
    "reorder_and_upcast_attn",
}  # fmt: skip

_MOST_LAYERS = 10_000


# What older versions of `transformers` wrote into any config.json.
_OLD = {
    "model_type", "torch_dtype", "transformers_version", "auto_map", "_name_or_path", "torchscript", "is_decoder",
    "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "decoder_start_token_id",
    "tie_encoder_decoder", "pruned_heads", "use_bfloat16", "tf_legacy_loss", "use_return_dict", "prefix",
    "finetuning_task", "task_specific_params", "tokenizer_class", "sep_token_id",
}  # fmt: skip


def said_of_any_model() -> set[str]:
    """Keys of a config.json that say nothing of what its model computes, in any family."""
    own = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    return own | _OLD | _HARMLESS | set(GenerationConfig().to_dict())


class Theirs:
    """A config of `transformers`, its defaults filled in; it remembers which settings were read."""

    def __init__(self, config: PreTrainedConfig, where: str = "config.json") -> None:
        self._config, self._where = config, where
        self._read: set[str] = set()
        self._parts: list[Theirs] = []

    def __getitem__(self, key: str) -> Value:
        self._read.add(key)
        return cast(Value, getattr(self._config, key, None))

    def int(self, key: str) -> int:
        """A whole number that must be there."""
        value = self[key]
        if not isinstance(value, int):
            raise ConfigError(f"{self._where}: {key} must be a whole number, found {value!r}")
        return value

    def part(self, key: str) -> Theirs:
        """A config inside of it."""
        self._read.add(key)
        part = Theirs(getattr(self._config, key), f"{self._where}: {key}")
        self._parts.append(part)
        return part

    def must_be(self, key: str, value: Value) -> None:
        """Raise ConfigError unless a setting has the one value that is supported."""
        if self[key] != value:
            raise ConfigError(f"{self._where}: {key}={self[key]!r} is not supported, only {value!r}")

    def check_all_read(self) -> None:
        """Raise ConfigError where a setting that is not at its default was passed over."""
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
    """Root of the families."""

    model_type: ClassVar[str] = ""  # of config.json
    title: ClassVar[str]  # its makers' name
    architecture: ClassVar[str]  # the class in `transformers`
    prefix: ClassVar[str] = "model."  # of the tensors that a checkpoint of the bare decoder has without it
    head: ClassVar[str] = "lm_head.weight"  # absent in a tied model
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    sizes: ClassVar[dict[str, str]]  # names of theirs, by ours, of settings that have one meaning in both
    layouts: ClassVar[tuple[str, ...]] = ("",)  # that tensors come in; the first is what `transformers` writes
    buffers: ClassVar[str] = r".*\.rotary_emb\.inv_freq"  # pattern of tensors that are not weights
    turn: ClassVar[int | None] = (
        0  # lower ones are tried first for a model that leaves; None: only if asked for by name
    )
    code: ClassVar[str] = ""  # file of this package that is written beside the weights, to be run by `transformers`
    _known: ClassVar[dict[str, type[Family]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "model_type" in vars(cls):
            Family._known[cls.model_type] = cls

    def reads(self, data: Mapping[str, object]) -> bool:
        """Whether a config.json is of this family."""
        return data.get("model_type") == self.model_type

    def read(self, data: Mapping[str, object], where: str) -> CausalLMConfig:
        """A config.json as our config: by way of the class of `transformers`, which fills in what it leaves out.

        Raises:
            ConfigError: a setting is not supported.
        """
        try:
            theirs = Theirs(CONFIG_MAPPING[self.model_type].from_dict(copy.deepcopy(dict(data))), where)
        except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
        config = self.to_ours(theirs)
        theirs.check_all_read()
        return config

    def weights(self, names: Iterable[str], config: CausalLMConfig) -> set[str]:
        """Of the names of a checkpoint's tensors those that are weights of the model, not what their code computes."""
        return {name for name in names if re.fullmatch(self.buffers, name) is None}

    def sizes_of(self, theirs: Theirs) -> dict[str, object]:
        """What our config takes over as it is."""
        return {ours: theirs[name] for ours, name in self.sizes.items()}

    def sizes_to(self, config: CausalLMConfig) -> ConfigDict:
        """The inverse of `sizes_of`."""
        return {name: getattr(config, ours) for ours, name in self.sizes.items()}

    def to_ours(self, theirs: Theirs) -> CausalLMConfig:
        """Our config of a model of theirs."""
        raise NotImplementedError

    def to_theirs(self, config: CausalLMConfig) -> ConfigDict:
        """The settings of config.json that describe a model of ours, as far as this family has words for it."""
        raise NotImplementedError

    def layout_of(self, specs: Mapping[str, Spec]) -> str | None:
        """The layout that these tensors of theirs are in; None: that of `layouts` with the most of their names."""
        return None

    def add_pieces(self, config: CausalLMConfig, pieces: Pieces, layout: str) -> None:
        """Add where each block of each tensor stands."""
        raise NotImplementedError


@functools.cache
def known_families() -> dict[str, Family]:
    """All families by `model_type`."""
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    return {name: kind() for name, kind in sorted(Family._known.items())}


def family_of(model_type: object, as_it_is: bool = False, where: str = "") -> Family:
    """The family of a `model_type`; one that our model cannot express is the module of `transformers` as it is.

    Args:
        as_it_is: take the module in any case.
        where: begins the message of an error.

    Raises:
        ConfigError: `transformers` has no causal model of this type.
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
    """A config.json as a family and our config.

    Args:
        as_it_is: as the module of `transformers`, also where our model could express it.

    Raises:
        ConfigError: the model type or a setting is not supported.
    """
    readers = [family for family in known_families().values() if family.reads(data)]
    family = readers[0] if readers and not as_it_is else family_of(data.get("model_type"), as_it_is, f"{where}: ")
    if data.get("quantization_config"):
        raise ConfigError(
            f"{where}: quantization_config is set: these weights are quantised; save them unquantised first, "
            "in `transformers` by from_pretrained(..., dtype=torch.bfloat16) and save_pretrained"
        )
    n_layers = data.get(family.sizes["n_layers"])
    if isinstance(n_layers, int) and n_layers > _MOST_LAYERS:  # `transformers` makes a list of them
        raise ConfigError(f"{where}: {family.sizes['n_layers']}={n_layers}; {_MOST_LAYERS} is the most that is read")
    try:
        return family, family.read(data, where)
    except ConfigError as error:
        if where in str(error):
            raise
        raise ConfigError(f"{where}: {str(error).removeprefix('config.json: ')}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, ArithmeticError, RuntimeError) as error:
        # A setting of an unexpected type may fail anywhere.
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: holds a setting that cannot be ({type(error).__name__}: {why})") from None


def write_config(config: CausalLMConfig, model_type: str | None = None) -> tuple[Family, ConfigDict]:
    """A model of ours as a family and its config.json.

    Args:
        model_type: None: the first family that can hold it.

    Raises:
        ConfigError: the family, or every family, lacks something of this model.
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
    """Whether a model can leave as a Hugging Face checkpoint: one line, known before it is trained."""
    if not isinstance(config, CausalLMConfig):
        return f"Hugging Face export: not possible with model.name={config.name}"
    family, _, lacking = _closest(config)
    if lacking:
        return f"Hugging Face export: not possible; the nearest family, {family.title}, lacks {', '.join(lacking)}"
    if family.code:
        return "Hugging Face export: with modelling code of its own, loaded with trust_remote_code=True"
    return f"Hugging Face export: as {family.title}"


def _closest(config: CausalLMConfig, model_type: str | None = None) -> tuple[Family, ConfigDict, list[str]]:
    """The first family that lacks nothing of a model, or else the nearest; its config.json; what it lacks."""
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
    # One without words for a whole part is farther than any other.
    return min(found, key=lambda each: (not each[1], len(each[2])))


def _written(family: Family, config: CausalLMConfig) -> tuple[ConfigDict, list[str]]:
    """The config.json of a model in a family, and what of the model it does not say."""
    try:
        said = family.to_theirs(config)
        data: ConfigDict = {"architectures": [family.architecture], "model_type": family.model_type, **said}
        _, again = read_config(
            data | {"bos_token_id": None, "eos_token_id": None}
        )  # defaults may exceed the vocabulary
    except ConfigError as error:
        return {}, [str(error)]
    lost = differences(facts(config), facts(again))
    return data, [f"{name}={ours!r}" for name, (ours, _) in lost.items()]
