"""Strict, typed configuration, validated by pydantic; `settings.py` reads the YAML.

The configs are the registry. A choice between implementations is a family of `Choice` classes selected by a tag
(`name`, or `ffn_type` inside `ffn_config`). A concrete config is defined in the file of the module that it builds and
has `build()`. Subclassing registers it, so a plug-in is a Python file named in the YAML's `code_paths`.

Every mistake becomes one line of a `ConfigError`: the dotted path, what was found, and what to write instead.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic.functional_validators import WrapValidator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

C = TypeVar("C", bound="Config")
MAX_LEVELS = 6  # of a dotted path that a hint may name
# What pydantic adds to the path of a union; a name with brackets is not a key of the user's.
_KIND = re.compile(r"int|float|bool|str|constrained-\w+|(literal|list|dict|function-\w+)\[.*\]")


class ConfigError(ValueError):
    """A mistake of the user's: shown without a traceback, with exit code 2."""


class RunError(RuntimeError):
    """An error that ends a run and is not a bug: shown without a traceback, with exit code 1."""


class ResourceError(RunError):
    """The machine is too small for the run."""


class Config(BaseModel):
    """A frozen block of settings. Unknown keys and wrong types are errors and are never repaired."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # a nan passes no comparison, so it would slip by every bound that is written as one
    )

    # other frameworks' names of keys, with the dotted path of the key: for hints
    SYNONYMS: ClassVar[dict[str, str]] = {}
    ALIASES: ClassVar[dict[str, str]] = {}  # other accepted names for keys of this block

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls, data: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Report unknown keys together with all other mistakes."""
        if isinstance(data, dict):
            data = cls._in_own_words(data)
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if not unknown:
            return check(data)
        mistakes = [_Mistake(str(key), "unknown key", cls) for key in unknown]
        try:
            check({key: value for key, value in data.items() if key not in unknown})
        except ValidationError as error:
            mistakes += _mistakes(error)
        raise PydanticCustomError("several", "several mistakes", {"mistakes": mistakes})

    @classmethod
    def _in_own_words(cls, data: dict[str, object]) -> dict[str, object]:
        for alias, own in cls.ALIASES.items():
            if alias in data and own in data:
                raise ValueError(f"{alias} and {own} are the same; keep one")
        return {cls.ALIASES.get(key, key): value for key, value in data.items()}

    @classmethod
    def keys(cls, data: Mapping[str, object]) -> Set[str]:
        """The keys of the class that `data` selects."""
        return cls.model_fields.keys()


class Choice(Config):
    """A family of configs, selected by a tag.

    The base class names the tag and declares it as a field, whose default (if any) applies when the tag is left out.
    Each concrete config lists its names; the first is the canonical one::

        class FFNConfig(Choice, tag="ffn_type"):
            ffn_type: str = "mptmlp"

        class MoEConfig(FFNConfig, names=("moe", "torch_dmoe")):
            moe_num_experts: int
            def build(self, ...) -> MoE: ...

    A field typed with the base class accepts a mapping (the tag selects the class) or an instance of any member.
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
    def keys(cls, data: Mapping[str, object]) -> Set[str]:
        member = cls if cls._names else cls.member(data)
        return member.model_fields.keys() if member is not None else frozenset()

    @classmethod
    def member(cls, data: Mapping[str, object]) -> type[Choice] | None:
        """The class that the tag in `data`, or its default, selects."""
        default = cls.model_fields[cls._tag].default
        tag = data.get(cls._tag, default if isinstance(default, str) else None)
        return cls._members.get(tag) if isinstance(tag, str) else None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        is_root = "Choice" in globals() and Choice in cls.__bases__
        return _root_schema(cls) if is_root else handler(source)


def _root_schema(root: type[Choice]) -> CoreSchema:
    """The schema of a family's base class: select the member by its tag, then validate as that member."""

    def pick(value: Any) -> Choice:
        if isinstance(value, root) and type(value) is not root:
            return value
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping with {root._tag!r}, found {value!r}")
        member, tag = root.member(value), value.get(root._tag)
        if member is None:
            found = f"unknown {root._tag} {tag!r}" if tag is not None else f"{root._tag!r} is missing"
            hint = _nearest(str(tag), root._members) or f"; known: {', '.join(sorted(root._members))}"
            raise ValueError(f"{found}{hint}")
        try:
            return member.model_validate({root._tag: root.model_fields[root._tag].default} | value)
        except ValidationError as error:
            raise several(_mistakes(error)) from None

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
    """` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def nearest_path(path: Path, pattern: str) -> str:
    """` (did you mean PATH?)` for the path that is probably meant, among those beside it that match a pattern."""
    names = [beside.name for beside in path.parent.glob(pattern)]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


class _Mistake(NamedTuple):
    path: str
    message: str
    unknown_in: type[Config] | None = None  # of an unknown key: the class that does not have it


def _mistakes(error: ValidationError) -> Iterator[_Mistake]:
    """All mistakes that pydantic found, including those in nested choices."""
    kinds: dict[str, tuple[object, list[str]]] = {}  # of a value that may be of several: it, and what each asks for
    for item in error.errors():
        *above, last = (str(part) for part in item["loc"]) if item["loc"] else ("",)
        path = ".".join([*(part for part in above if "[" not in part or not _KIND.fullmatch(part)), last])
        context = item.get("ctx", {})
        if item["type"] == "several":
            for below in context["mistakes"]:
                yield below._replace(path=_join(path, below.path))
        elif item["type"] == "missing":
            yield _Mistake(path, "is missing")
        elif item["type"] == "value_error":
            yield _Mistake(path, str(context["error"]))
        else:
            field, _, kind = path.rpartition(".")
            several = _KIND.fullmatch(kind) is not None
            kinds.setdefault(field if several else path, (item["input"], []))[1].append(_plain(item["msg"]))
    for path, (found, messages) in kinds.items():
        first, *others = (f"{message[0].lower()}{message[1:]}" for message in messages)
        wanted = " or ".join([first, *(o.removeprefix("input should be ") for o in others)])
        yield _Mistake(path, f"{wanted}, found {found!r}{_why(found, wanted)}")


def several(mistakes: Iterable[_Mistake]) -> PydanticCustomError:
    """The exception for a validator that has found several mistakes."""
    return PydanticCustomError("several", "several mistakes", {"mistakes": list(mistakes)})


def lifted(error: ValidationError, key: str, cls: type[Config]) -> PydanticCustomError:
    """Move mistakes below a key that a shorthand left out to the paths that the user wrote.

    Args:
        key: the key under which a validator of `cls` has put the user's keys.
    """
    found = []
    for path, message, owner in _mistakes(error):
        is_ours = owner is not None and difflib.get_close_matches(path.rpartition(".")[2], cls.model_fields, 1, 0.8)
        found.append(_Mistake(path.removeprefix(key).removeprefix("."), message, cls if is_ours else owner))
    return several(found)


def _plain(message: str) -> str:
    """A pydantic message in YAML terms."""
    message = re.sub(r"a valid dictionary( or instance of \w+)?|an instance of \w+", "a mapping", message)
    return message.replace(" after validation", "").replace("a valid list", "a list")


def _why(found: object, wanted: str) -> str:
    """How YAML parsed a word that was probably meant otherwise."""
    if found is None:
        return " (an empty value in YAML; write one, or remove the key)"
    if "valid string" not in wanted or not isinstance(found, bool | int | float):
        return ""
    word = "yes, no, on and off without quotes are true and false" if isinstance(found, bool) else "it is a number"
    return f" ({word} in YAML; quote text)"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def check(cls: type[C], data: Mapping[str, object], where: str = "") -> C:
    """Build a config from plain data.

    Args:
        cls: a `Config`, or the base class of a family.
        data: what `load_yaml` returned, or a part of it.
        where: dotted path of `data` in the file, prefixed to every message.

    Raises:
        ConfigError: one line per mistake.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = []
        for mistake in _mistakes(error):
            hint = _hint(cls, mistake) if mistake.unknown_in is not None else ""
            lines.append(f"{_join(where, mistake.path)}: {mistake.message}{hint}".removeprefix(": "))
        raise ConfigError("\n".join(lines)) from None


def _hint(root: type[Config], mistake: _Mistake) -> str:
    """Where an unknown key belongs: a similar key beside it, another choice, or another place in the file."""
    owner, key = mistake.unknown_in, mistake.path.rpartition(".")[2]
    assert owner is not None
    if close := difflib.get_close_matches(key, owner.model_fields, n=1, cutoff=0.8):
        return f" (did you mean {close[0]!r}?)"
    if issubclass(owner, Choice):
        having = [name for name, member in owner._members.items() if key in member.model_fields]
        if having:
            return f" (a key of {', '.join(sorted(having))}: set {owner._tag})"
    places = _places(root)
    if key in places:
        return f" (did you mean {' or '.join(places[key][:2])}?)"
    if hint := _nearest(key, owner.model_fields):
        return hint
    close = difflib.get_close_matches(key, places, n=1, cutoff=0.8)
    return f" (did you mean {' or '.join(places[close[0]][:2])}?)" if close else ""


def _places(root: type[Config]) -> dict[str, list[str]]:
    """The dotted paths of every key below a config, by their last word; shorter paths first.

    They include `SYNONYMS` of the base class: other frameworks' names for some keys.
    """
    found: dict[str, list[str]] = {}
    queue: list[tuple[str, type[Config]]] = [("", root)]
    while queue:
        path, cls = queue.pop(0)
        for member in _members_of(cls):
            for key, info in member.model_fields.items():
                below = _join(path, key)
                if below not in found.setdefault(key, []):
                    found[key].append(below)
                for part in _configs_in(info.annotation):
                    if below.count(".") < MAX_LEVELS:
                        queue.append((below, part))
    return found | {word: [path] for word, path in root.SYNONYMS.items()}


def _members_of(cls: type[Config]) -> list[type[Config]]:
    if issubclass(cls, Choice) and not cls._names:
        return list(dict.fromkeys(cls._members.values()))
    return [cls]


def _configs_in(annotation: Any) -> list[type[Config]]:
    """The config classes in a field's type: for `list[X] | None`, X."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for part in get_args(annotation) for found in _configs_in(part)]


def drop_replaced(
    root: type[Config], data: Mapping[str, object], file: Mapping[str, object], given: Set[str]
) -> tuple[dict[str, object], list[str]]:
    """Remove the keys of a choice that an override has replaced by another.

    With `model.ffn_config.ffn_type=mptglu` on a file with a mixture, the mixture's keys are removed, unless they are
    overrides too.

    Args:
        root: the type of the whole file.
        data: the file with overrides; not changed.
        file: the file without them.
        given: dotted paths that overrides set.

    Returns:
        The data, and a line for each block that lost keys.
    """
    result, notes = copy.deepcopy(dict(data)), []
    for parent in sorted({path.rpartition(".")[0] for path in given} - {""}):
        cls, block, before = _at(root, result, file, parent.split("."))
        if cls is None or not isinstance(block, dict) or not isinstance(before, dict):
            continue
        now = cls.keys(block)
        if not now:  # an unknown choice, which is reported as that
            continue
        foreign = [key for key in block if key in cls.keys(before) - now and f"{parent}.{key}" not in given]
        for key in foreign:
            del block[key]
        if foreign:
            notes.append(f"{parent}: left out {', '.join(foreign)}, which the new choice does not have")
    return result, notes


def _at(
    cls: type[Config] | None, data: object, file: object, parts: list[str]
) -> tuple[type[Config] | None, object, object]:
    """The type of the block at a path, the block, and the file's value there."""
    for part in parts:
        if cls is None or not isinstance(data, dict) or part not in data:
            return None, None, None
        member = cls.member(data) if issubclass(cls, Choice) and not cls._names else cls
        info = member.model_fields.get(part) if member is not None else None
        below = _configs_in(info.annotation) if info is not None else []
        cls = below[0] if below else None
        data, file = data[part], file.get(part) if isinstance(file, dict) else None
    return cls, data, file


def dump(config: Config) -> dict[str, Any]:
    """The config as plain data: `check(type(config), dump(config)) == config`."""
    return config.model_dump(mode="json")


def reason(error: Exception) -> str:
    """Why a file cannot be read or written, without the path and the error number."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def is_url(path: str) -> bool:
    """Whether a path names a store or another machine: `s3://bucket/folder`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path) is not None and not is_theirs(path)  # hf:/folder is not a URL


def is_theirs(path: str) -> bool:
    """Whether a path names Hugging Face weights: `hf:` and a folder or hub id. `hf://` is a store like others."""
    return path.startswith("hf:") and not path.startswith("hf://")


# What a name of a file or folder may hold; `Run.filled` puts the values in.
PLACEHOLDERS = ("run_name", "rank", "local_rank", "world_size", "epoch", "batch", "token", "sample")


def local_path(path: str, placeholders: tuple[str, ...] = ()) -> str:
    """The path with `~` expanded.

    Args:
        placeholders: placeholders that are filled in later, besides `{run_name}`, which is filled in already.

    Raises:
        ValueError: it is a URL, or has an unknown placeholder.
    """
    if is_url(path) or "://" in path:
        raise ValueError(
            f"{path} is a URL, and only paths of this machine can be used; copy it to or from a folder here"
        )
    expanded = os.path.expanduser(check_placeholders(path, placeholders))
    if expanded.startswith("~") and expanded.partition("/")[0] != "~" and not os.path.exists(expanded):
        raise ValueError(f"{path}: there is no user {expanded.partition('/')[0][1:]}; write ./{path} for a folder here")
    return expanded


def check_placeholders(path: str, placeholders: tuple[str, ...] = ()) -> str:
    """Return the path unchanged; raises ValueError if it has an unknown placeholder."""
    for found in re.findall(r"\{(\w*)\}", path):
        if found not in placeholders:
            known = ", ".join(f"{{{name}}}" for name in placeholders or ("run_name",))
            raise ValueError(f"{path} has the placeholder {{{found}}}, which is not known here; known: {known}")
    return path


LocalPath = Annotated[str, AfterValidator(local_path)]  # of a file or folder; `~` is the home directory
PathPattern = Annotated[str, AfterValidator(partial(local_path, placeholders=PLACEHOLDERS))]  # it may differ by step


def import_code(paths: list[str]) -> None:
    """Import plug-in files, whose `Choice` subclasses register themselves.

    Args:
        paths: Python files, as listed in the YAML's `code_paths`. They run with the user's rights.

    Raises:
        ConfigError: a file does not exist or cannot be imported; the message gives the line and the reason.
    """
    for path in paths:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"code_paths: {path}: no such file")
        if file.suffix != ".py":
            raise ConfigError(f"code_paths: {path}: is not a Python file; its name must end in .py")
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
        if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in ("composer", "llmfoundry"):
            why += "; rewrite LLM Foundry plug-ins: a class registers by its base class (docs/callbacks.md)"
        raise ConfigError(f"code_paths: {path}:{line}: {type(error).__name__}: {why}") from error
