"""Code that settings name: plug-ins, functions on data, loaders that unpickle.

A YAML is written by its user, so the code that it names runs. The config.yaml of a checkpoint is written by the
checkpoint's author, so its code runs only if the user allows it, by `--allow-code` or by an override that names it
again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from llmfoundry.config import ConfigError, import_code
from llmfoundry.settings import leaves

# Keys whose value `package.module:function` is imported.
_FUNCTIONS = "filter", "preprocessing_fn"
# Modules of `datasets` that unpickle files, or run queries and code.
_LOADERS = "pandas", "webdataset", "sql", "generator", "spark"
_LOADED = "hf_name", "dataset_uri"


def run_plugins(data: Mapping[str, object]) -> None:
    """Import the files that `code_paths` names.

    Raises:
        ConfigError: `code_paths` is not a list of files, or a file cannot be imported.
    """
    paths = data.get("code_paths") or []
    if not isinstance(paths, list) or not all(isinstance(item, str) for item in paths):
        raise ConfigError(f"code_paths: must be a list of Python files, found {paths!r}")
    import_code(paths)


def refuse_code(data: Mapping[str, object], where: str, used: Collection[str], given: Collection[str] = ()) -> None:
    """Refuse settings that would run code.

    Args:
        data: the settings.
        where: the file that they come from.
        used: the top-level keys that are used.
        given: dotted paths that the user has set.

    Raises:
        ConfigError: names the first such setting, and its code.
    """
    for path, value in _code_in({key: data[key] for key in used if key in data}):
        if path not in given:
            raise ConfigError(
                f"{where}: {path} names {value!s:.200}, and the code of a checkpoint is not run; read it, then pass "
                "--allow-code"
            )


def _code_in(data: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for path, value in leaves(dict(data)):
        above, _, key = path.rpartition(".")
        if not value:
            continue
        is_loader = key in _LOADED and str(value).removeprefix("hf://") in _LOADERS
        is_function = key in _FUNCTIONS and ":" in str(value)  # else a name that we know
        if path.startswith("code_paths") or is_function or key == "trust_remote_code" or is_loader:
            yield path if not path.startswith("code_paths.") else above, value
