"""A run's settings as plain data: read from a YAML file and `key=value` overrides, and written as config.yaml.

One YAML dialect is used for files, overrides and config.yaml (strict_yaml.py). OmegaConf resolves interpolations
(`${a.b}`); the size of their expansion is bounded before anything is expanded.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import select
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from llmfoundry import strict_yaml
from llmfoundry.config import ConfigError, nearest_path
from llmfoundry.private import FromEnvironment, Interpolation, is_secret
from llmfoundry.strict_json import read_plain
from llmfoundry.strict_yaml import MAX_DEPTH, MAX_SIZE

log = logging.getLogger(__name__)

MAX_BYTES = 2**20  # maximum bytes of a YAML file
PIPE_SECONDS = 10.0  # seconds until a pipe with a YAML file must have data
MISSING = "???"  # OmegaConf's marker of a value that must be given
# One backslash before it makes it text; two backslashes stand for one.
_REFERENCE = re.compile(r"(?<!\\)((?:\\\\)*)\$\{\s*(\.*)([A-Za-z_][\w.\[\]-]*)\s*\}")
_ENVIRONMENT = re.compile(r"(?<!\\)\$\{\s*oc\.env:\s*(?P<name>[^,}\s]+)\s*(?P<default>,[^}]*)?\}")
_OVERRIDE = re.compile(r"(?P<key>[^=:~\s][^=:]*?)(?P<kind>:?=)(?P<value>.*)", re.DOTALL)


class Settings(NamedTuple):
    """A YAML file with its overrides.

    Attributes:
        data: plain data, interpolations resolved, without the `variables` block.
        file: the same without the overrides.
        given: dotted paths of the values that overrides set.
        referred: top-level keys that interpolations refer to.
        environment: values that came from the environment, by dotted path.
    """

    data: dict[str, object]
    file: dict[str, object]
    given: frozenset[str]
    referred: frozenset[str]
    environment: dict[str, FromEnvironment]


def load_yaml(path: str | Path, overrides: list[str] | None = None) -> dict[str, object]:
    """Return only the data of `load_settings`."""
    return load_settings(path, overrides).data


def load_settings(path: str | Path, overrides: list[str] | None = None, is_users: bool = True) -> Settings:
    """Read a YAML file, apply overrides, and resolve interpolations.

    Args:
        path: the file. Its `variables` block is for interpolation (`${variables.d_model}`) and is then removed.
        overrides: `a.b=value` (mappings are merged), `a.b:=value` (replaces the old value), `~a.b` (deletes);
            values are YAML.
        is_users: whether the file is the user's own. In another's file, `${oc.env:NAME}` stays text if the variable
            does not exist or is named like a secret.

    Raises:
        ConfigError: if the file or an override is malformed, or an interpolation cannot be resolved.
    """
    parsed = [_parse_override(item) for item in overrides or []]
    loaded = parse(_read(path), str(path))
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else f"a {type(loaded).__name__}"
        raise ConfigError(f"{path}: must hold a mapping, found {found}")
    loaded = _of_job(loaded, path)
    if not is_users:
        loaded = {key: _each_string(value, _keep_private) for key, value in loaded.items()}
    config = OmegaConf.create(loaded)
    for override in parsed:
        _apply(config, override)
    referred = _referred(config)
    borrowed = _borrow_variables(config, referred)
    data = {key: value for key, value in _resolved(config, str(path)).items() if key not in borrowed}
    file = data if not parsed else {key: value for key, value in loaded.items() if key != "variables"}
    given = {path for override in parsed if override.kind != "~" for path, _ in leaves(override.value, override.key)}
    return Settings(data, file, frozenset(given), referred, _from_environment(config, data))


def _read(path: str | Path) -> str:
    """Return the text of a file, which may be a pipe: `train.py <(...)`."""
    try:
        content = _first_bytes(path)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_BYTES:,} bytes, too many for a YAML file of settings")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{nearest_path(Path(path), '*.y*ml')}") from None
    except IsADirectoryError:
        inside = f"; write {Path(path) / 'config.yaml'}" if (Path(path) / "config.yaml").is_file() else ""
        raise ConfigError(f"{path}: is a folder, not a YAML file{inside}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None


def _first_bytes(path: str | Path) -> bytes:
    """Read at most one byte more than a file may have."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # otherwise a pipe without a writer never opens
    with open(handle, "rb") as opened:
        if stat.S_ISFIFO(os.fstat(handle).st_mode) and not select.select([handle], [], [], PIPE_SECONDS)[0]:
            raise ConfigError(f"{path}: is a pipe, and nothing was written to it in {PIPE_SECONDS:.0f} seconds")
        os.set_blocking(handle, True)
        return opened.read(MAX_BYTES + 1)


def _of_job(loaded: dict[str, object], path: str | Path) -> dict[str, object]:
    """Return the settings in a job file of MosaicML's platform (`mcli run -f`), which are under `parameters`."""
    if not {"command", "image"} <= loaded.keys():
        return loaded
    parameters = loaded.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise ConfigError(f"{path}: is a job file without parameters; give the YAML file that its command names")
    log.info("%s: is a job file; only its parameters are read", path)
    return parameters


def _keep_private(text: str) -> str:
    """Escape references to the environment that another's file must not read."""

    def kept(found: re.Match[str]) -> str:
        known = found["default"] is not None or found["name"] in os.environ
        return found[0] if known and not is_secret(found["name"]) else f"\\{found[0]}"

    return _ENVIRONMENT.sub(kept, text)


def _from_environment(config: DictConfig, data: Mapping[str, object]) -> dict[str, FromEnvironment]:
    """Return the values that contain `${oc.env:NAME}`, directly or through another key, with references expanded."""
    raw = OmegaConf.to_container(config, resolve=False)
    if not any("oc.env" in value for _, value in leaves(raw) if isinstance(value, str)):
        return {}

    def written(path: list[str]) -> str:
        node: object = raw
        for place, part in enumerate(path):
            if isinstance(node, str) and (all_of_it := _REFERENCE.fullmatch(node)) and not all_of_it[1]:
                return written([*target(all_of_it, path[:place]), *path[place:]])
            node = node[int(part)] if isinstance(node, list) else node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, str):
            return str(node)
        return _REFERENCE.sub(lambda found: found[1] + written(target(found, path)), node)

    def target(found: re.Match[str], path: list[str]) -> list[str]:
        above = path[: -len(found[2])] if found[2] else []
        return [*above, *_dotted(found[3]).split(".")]

    texts = ((path, value, written(path.split("."))) for path, value in leaves(dict(data)) if isinstance(value, str))
    return {path: FromEnvironment(text, value) for path, value, text in texts if "oc.env" in text}


def _referred(config: DictConfig) -> frozenset[str]:
    """Return the first part of each `${a.b}`."""
    texts = [text for _, text in leaves(OmegaConf.to_container(config, resolve=False)) if isinstance(text, str)]
    return frozenset(
        re.split(r"[.\[]", name)[0] for text in texts for _, dots, name in _REFERENCE.findall(text) if not dots
    )


def _borrow_variables(config: DictConfig, names: Set[str]) -> set[str]:
    """Let `${name}` mean `${variables.name}` if there is no such top-level key; return the names."""
    variables = OmegaConf.select(config, "variables")
    if not OmegaConf.is_dict(variables):
        return set()
    borrowed = {name for name in names if name not in config and name in variables}
    for name in borrowed:
        config[name] = f"${{variables.{name}}}"
    return borrowed


def from_dotlist(items: list[str]) -> dict[str, object]:
    """Convert overrides alone into plain data.

    Raises:
        ConfigError: if an override is malformed.
    """
    config = OmegaConf.create({})
    for item in items:
        _apply(config, _parse_override(item))
    return _resolved(config, "command line")


class _Override(NamedTuple):
    text: str
    key: str
    kind: Literal["=", ":=", "~"]
    value: object = None


def _parse_override(text: str) -> _Override:
    if text.startswith("~") and "=" not in text:
        return _Override(text, _dotted(text[1:]), "~")
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text}: is not an override; expected key=value, key:=value or ~key")
    kind: Literal["=", ":="] = ":=" if match["kind"] == ":=" else "="
    return _Override(text, _dotted(match["key"]), kind, parse(match["value"], text))


def _dotted(key: str) -> str:
    """Normalize `a[0].b` to `a.0.b`."""
    dotted = re.sub(r"\[(\w+)\]", r".\1", key.strip())
    if dotted.count(".") > MAX_DEPTH:
        raise ConfigError(f"{key[:80]}...: is nested too deeply")
    return dotted


def _apply(config: DictConfig, override: _Override) -> None:
    try:
        if override.kind == "~":
            _delete(config, override.key)
        else:
            OmegaConf.update(config, override.key, override.value, merge=override.kind == "=", force_add=True)
    except (TypeError, IndexError, ValueError, OmegaConfBaseException) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{override.text}: does not fit the value that is there: a mapping takes keys (a.b=1), a list takes an "
            "index that it has (a.0=1) or is written whole (a=[1, 2])"
        ) from None


def _delete(config: DictConfig, key: str) -> None:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    try:
        if OmegaConf.is_list(node):
            del node[int(last)]
        else:
            del node[last]
    except (KeyError, ConfigKeyError, TypeError, IndexError, ValueError):
        known = [str(name) for name in node] if OmegaConf.is_dict(node) else []
        close = difflib.get_close_matches(last, known, n=1)
        hint = f" (did you mean ~{parent + '.' if parent else ''}{close[0]}?)" if close else ""
        raise ConfigError(f"~{key}: the file has no such key to delete{hint}") from None


def _resolved(config: DictConfig, where: str) -> dict[str, object]:
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    _check_expansion({str(key): value for key, value in raw.items()}, where)
    try:
        data = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None)
        said = str(error).split("\n")[0]  # the other lines concern OmegaConf's own objects
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{said}") from None
    assert isinstance(data, dict)
    for path, value in leaves(data):
        if value == MISSING:
            raise ConfigError(f"{path}: {MISSING} stands for a value that must be given; write {path}=...")
    data.pop("variables", None)
    return {str(key): value for key, value in data.items()}


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) for each value in plain data that is neither a mapping nor a list."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _check_expansion(root: dict[str, object], where: str) -> None:
    """Refuse interpolations that refer to themselves or expand beyond `MAX_SIZE`."""
    sizes: dict[str, int | None] = {}  # sizes by dotted path; None: it is being measured

    def at(path: str) -> object:
        node: object = root
        for part in path.split(".") if path else ():
            if isinstance(node, dict):
                node = node.get(part)
            elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            else:
                return None
        return node

    def size(path: str) -> int:
        if path in sizes:
            found = sizes[path]
            if found is None:
                raise ConfigError(f"{where}: {path}: its interpolation refers to itself")
            return found
        sizes[path] = None
        node, total = at(path), 1
        if isinstance(node, dict | list):
            for key in node if isinstance(node, dict) else range(len(node)):
                total += size(f"{path}.{key}" if path else str(key))
        elif isinstance(node, str):
            total += len(node) // 64
            for _, dots, name in _REFERENCE.findall(node):
                above = path.split(".")[: -len(dots)] if dots else []
                total += size(".".join([*above, _dotted(name)]))
        if total > MAX_SIZE:
            raise ConfigError(f"{where}: {path}: expands to too many values")
        sizes[path] = total
        return total

    try:
        size("")
    except RecursionError:
        raise ConfigError(f"{where}: its interpolations are nested too deeply") from None


def parse(text: str, where: str) -> object:
    """`strict_yaml.load`, with mistakes raised as ConfigError."""
    try:
        return strict_yaml.load(text, where)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def write_resolved(data: Mapping[str, object]) -> str:
    """Plain data as YAML text that `read_resolved` and `load_yaml` both read back unchanged."""
    return strict_yaml.dump(_each_string(dict(data), _escaped))


def read_resolved(path: str | Path) -> dict[str, object]:
    """Read a config.yaml that a run or a conversion wrote; nothing in it is interpolated.

    Raises:
        ConfigError: if the file is missing or malformed.
    """
    try:
        text = read_plain(Path(path), most=MAX_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    data = parse(text, f"{path}: is malformed")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: is malformed: must hold a mapping, found {type(data).__name__}")
    plain = _each_string(data, _unescaped)
    assert isinstance(plain, dict)
    return plain


def _each_string(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, dict):
        return {key: _each_string(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_string(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _escaped(text: str) -> str:
    """Escape `${`: OmegaConf reads `\\${` as `${`, and halves the backslashes before an interpolation or an escape."""
    if isinstance(text, Interpolation):
        return str(text)
    if "${" not in text:
        return text
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def _unescaped(text: str) -> str:
    """Invert `_escaped`. Files of older versions have `${` without a backslash, which stays."""
    return re.sub(r"(\\+)\$\{", lambda found: "\\" * (len(found[1]) // 2) + "${", text)
