"""Copies of functions for torch.compile, so that each has its own recompile limit.

torch.compile caches graphs per code object, and gives up after eight of them: it then runs the function eagerly, or
fails. A function that is compiled for several kinds of inputs needs a copy for each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def with_own_code(function: Callable[P, R], name: str) -> Callable[P, R]:
    """Return the same function with its own code object, under this name."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
