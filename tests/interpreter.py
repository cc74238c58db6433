"""Triton's interpreter, without the half of its time that it spends on patching its own language.

A launch replaces the functions of `triton.language` by interpreted ones. Triton 3.6 does so again, looking through all
members of the module, each time that a kernel calls another jitted function; `tl.sum` and `tl.zeros` are such. Here a
launch does it once for each kind of module that its functions see.
"""

from __future__ import annotations

from collections.abc import Callable

from triton import language as tl
from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    scope = interpreter._LangPatchScope
    patch, restore = interpreter._patch_lang, scope.restore
    seen: set[tuple[bool, bool]] = set()

    def patch_unless_seen(fn: Callable[..., object]) -> object:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        kind = (tl in modules, tl.core in modules)
        if kind in seen:
            return scope()
        seen.add(kind)
        return patch(fn)

    def restore_and_forget(self: object) -> None:  # of launches alone: those of inner calls are not restored
        seen.clear()
        restore(self)

    interpreter._patch_lang, scope.restore = patch_unless_seen, restore_and_forget
