"""User functions that a YAML names as `package.module:function` or `file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

from llmfoundry.config import ConfigError, import_code


def imported(name: str, key: str) -> Callable:
    """Import a function. Modules are also looked for in the working directory and among the files of `code_paths`.

    Args:
        key: the YAML key that names the function, for messages.

    Raises:
        ConfigError: if the name cannot be imported, or is not a function.
    """
    module_name, _, function = name.partition(":")
    where = f"{key}: {name}"
    if not function:
        raise ConfigError(f"{where}: write package.module:function or file.py:function")
    if module_name.endswith(".py"):
        import_code([module_name])
        module_name = Path(module_name).stem
    module = sys.modules.get(f"llmfoundry_plugin_{module_name}")  # a file from code_paths
    if module is None:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # user code may raise anything
            raise ConfigError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{where}: {module_name} has no function {function}")
    return found


def code_of(name: str, key: str) -> str:
    """Return the file that defines a function, which decides its result.

    Raises:
        ConfigError: if the function is not written in Python, so it has no file.
    """
    try:
        file = inspect.getsourcefile(imported(name, key))
    except TypeError:
        raise ConfigError(f"{key}: {name}: is not a function written in Python; call it from one that is") from None
    return f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ''}"
