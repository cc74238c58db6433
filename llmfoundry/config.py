"""Strict, typed configuration: OmegaConf reads and merges, pydantic checks.

The config is the registry. A choice between implementations is a family of `Choice` classes told apart by a tag
(`name`, or `ffn_type` inside `ffn_config`); a concrete config stands in the file of the module that it builds and
has `build()`. Subclassing registers it, so a plug-in is a Python file named in the YAML's `code_paths`.

Every mistake of a user's becomes one line of a `ConfigError`: the dotted path, what was found, what to write instead.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic.functional_validators import WrapValidator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

C = TypeVar("C", bound="Config")
_KIND = re.compile(r"int|float|bool|str|literal\[.*\]|list\[.*\]")  # what pydantic adds to the path of a union


class ConfigError(ValueError):
    """A mistake of the user's: shown as it is, without a traceback, with exit code 2."""


class Config(BaseModel):
    """A frozen block of settings. Unknown keys and wrong types are errors, never repaired."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # a nan passes no comparison, so it would slip by every bound that is written as one
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = {str(key): _nearest(str(key), cls.model_fields) for key in data if key not in cls.model_fields}
            if unknown:
                raise PydanticCustomError("unknown_keys", "unknown keys", {"unknown": unknown})
        return data


class Choice(Config):
    """A family of configs, told apart by a tag.

    The root names the tag and declares it as a field, whose default (if any) is the choice made when the tag is left
    out; each concrete config lists the spellings that it answers to, the first being its own::

        class FFNConfig(Choice, tag="ffn_type"):
            ffn_type: str = "mptmlp"

        class MoEConfig(FFNConfig, names=("mb_dmoe", "torch_dmoe")):
            moe_num_experts: int
            def build(self, ...) -> MoE: ...

    A field typed with the root accepts a mapping (the tag picks the class) or an instance of any member.
    """

    _tag: ClassVar[str]
    _names: ClassVar[tuple[str, ...]] = ()
    _members: ClassVar[dict[str, type[Choice]]]

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()  # pydantic hands `tag` and `names` to the hook below, once the class is whole

    @classmethod
    def __pydantic_init_subclass__(cls, tag: str | None = None, names: tuple[str, ...] = (), **_: Any) -> None:
        if tag is not None:
            cls._tag, cls._members = tag, {}
        cls._names = names
        for name in names:
            taken = cls._members.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise TypeError(f"{cls._tag}: {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
            cls._members[name] = cls

    @model_validator(mode="before")
    @classmethod
    def _fill_tag(cls, data: Any) -> Any:
        if isinstance(data, dict) and cls._names:
            return {cls._tag: cls._names[0]} | data
        return data

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        is_root = "Choice" in globals() and Choice in cls.__bases__
        return _root_schema(cls) if is_root else handler(source)


def _root_schema(root: type[Choice]) -> CoreSchema:
    """The schema of a family's root: pick the member by its tag, then check as that member."""

    def pick(value: Any) -> Choice:
        if isinstance(value, root) and type(value) is not root:
            return value
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping with {root._tag!r}, found {value!r}")
        default = root.model_fields[root._tag].default
        tag = value.get(root._tag, default if isinstance(default, str) else None)
        member = root._members.get(tag) if isinstance(tag, str) else None
        if member is None:
            found = f"unknown {root._tag} {tag!r}" if tag is not None else f"{root._tag!r} is missing"
            hint = _nearest(str(tag), root._members) or f"; known: {', '.join(sorted(root._members))}"
            raise ValueError(f"{found}{hint}")
        try:
            return member.model_validate({root._tag: tag} | value)
        except ValidationError as error:
            raise PydanticCustomError("inside_choice", "invalid", {"lines": list(_lines(error))}) from None

    dump = core_schema.plain_serializer_function_ser_schema(lambda value: value.model_dump(mode="json"))
    return core_schema.no_info_plain_validator_function(pick, serialization=dump)


def keyed(root: type[Choice]) -> Any:
    """The type of a mapping `{tag: {other keys}}`, as LLM Foundry writes callbacks and loggers.

    Each key becomes the tag of its own body; a body may be left empty (`lr_monitor:`).
    """

    def spread(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping of {root._tag} to settings, found {value!r}")
        for key, body in value.items():
            if not isinstance(body, dict | Choice | None):
                raise ValueError(f"{key}: must be a mapping of settings, found {body!r}")
        return check({key: {root._tag: key} | (body or {}) if not isinstance(body, Choice) else body
                      for key, body in value.items()})  # fmt: skip

    return Annotated[dict[str, root], WrapValidator(spread)]  # type: ignore[valid-type]


def _nearest(word: str, known: Any) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _lines(error: ValidationError) -> Iterator[tuple[str, str]]:
    """(dotted path, message) of every mistake that pydantic found, nested choices included."""
    kinds: dict[str, tuple[object, list[str]]] = {}  # of a value that may be of several: it, and what each asks for
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        context = item.get("ctx", {})
        if item["type"] == "unknown_keys":
            for key, hint in context["unknown"].items():
                yield _join(path, key), f"unknown key{hint}"
        elif item["type"] == "inside_choice":
            for below, message in context["lines"]:
                yield _join(path, below), message
        elif item["type"] == "missing":
            yield path, "is missing"
        elif item["type"] == "value_error":
            yield path, str(context["error"])
        else:
            field, _, kind = path.rpartition(".")
            several = _KIND.fullmatch(kind) is not None
            kinds.setdefault(field if several else path, (item["input"], []))[1].append(item["msg"])
    for path, (found, messages) in kinds.items():
        first, *others = (f"{message[0].lower()}{message[1:]}" for message in messages)
        yield path, " or ".join([first, *(o.removeprefix("input should be ") for o in others)]) + f", found {found!r}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def check(cls: type[C], data: dict[str, Any], where: str = "") -> C:
    """Build a config from plain data.

    Args:
        cls: a `Config`, or the root of a family.
        data: what `load_yaml` returned, or a part of it.
        where: dotted path of `data` in the file, put before every message.

    Raises:
        ConfigError: a line for every mistake.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{_join(where, path)}: {message}".removeprefix(": ")
                                    for path, message in _lines(error))) from None  # fmt: skip


def dump(config: Config) -> dict[str, Any]:
    """The config as plain data: `check(type(config), dump(config)) == config`."""
    return config.model_dump(mode="json")


def load_yaml(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a YAML file, merge `key=value` overrides over it, and resolve its interpolations.

    Args:
        path: the file. Its `variables` block serves interpolation (`${variables.d_model}`) and is then dropped.
        overrides: dot-list entries, e.g. `model.n_layers=2`; the value is YAML.

    Raises:
        ConfigError: the file is missing or no YAML, an override has no `=`, an interpolation leads nowhere.
    """
    _check_overrides(overrides or [])
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: must hold a mapping, found a list")
        merged = loaded
        for item in overrides or []:
            merged = _put_over(merged, item)
        data = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    assert isinstance(data, dict)
    data.pop("variables", None)
    return {str(key): value for key, value in data.items()}


class _Loader(yaml.SafeLoader):
    """YAML without tags that build objects; `1e-5` is a number, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
    )


def write_resolved(data: Mapping[str, Any]) -> str:
    """Plain data as YAML text that `read_resolved` gives back unchanged."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False)


def read_resolved(path: str | Path) -> dict[str, Any]:
    """Read a config.yaml that a run or a conversion wrote: literally, without interpolation.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is malformed: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is malformed: must hold a mapping, found {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def from_dotlist(items: list[str]) -> dict[str, Any]:
    """`key=value` entries as plain data; the values are YAML.

    Raises:
        ConfigError: one has no `=`, or is no YAML.
    """
    _check_overrides(items)
    try:
        merged = OmegaConf.create({})
        for item in items:
            merged = _put_over(merged, item)
        data = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _put_over(loaded: DictConfig, item: str) -> DictConfig:
    """Merge one override over what was loaded."""
    try:
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist([item]))
    except (TypeError, IndexError):  # how OmegaConf meets a list over a mapping, and a key of brackets
        raise ConfigError(
            f"{item}: does not fit what stands there: a mapping takes keys (a.b=1), a list is written whole (a=[1, 2])"
        ) from None
    assert isinstance(merged, DictConfig)
    return merged


def _check_overrides(items: list[str]) -> None:
    for item in items:
        if "=" not in item:
            raise ConfigError(f"{item}: is no override; write key=value")


def import_code(paths: list[str]) -> None:
    """Import plug-in files, whose `Choice` subclasses register themselves.

    Args:
        paths: Python files, as listed in the YAML's `code_paths`. They run with the user's rights.

    Raises:
        ConfigError: there is no such file, or it cannot be imported: its line, and why.
    """
    for path in paths:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"code_paths: {path}: no such file")
        if file.suffix != ".py":
            raise ConfigError(f"code_paths: {path}: is no Python file; its name must end in .py")
        name = f"llmfoundry_plugin_{file.stem}"  # a plug-in named json.py leaves the real json alone
        known = sys.modules.get(name)
        if known is not None and known.__file__ == str(file.resolve()):
            continue
        if known is not None:
            raise ConfigError(f"code_paths: {path}: {known.__file__} has that name too; rename one")
        _import(name, path)


def _import(name: str, path: str) -> None:
    spec = importlib.util.spec_from_file_location(name, Path(path).resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        # A SyntaxError has the line itself; else it is the last one of the plug-in that ran.
        ran = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == spec.origin else (ran or [1])[-1]
        why = " ".join(str(error).split())
        raise ConfigError(f"code_paths: {path}:{line}: {type(error).__name__}: {why}") from error
