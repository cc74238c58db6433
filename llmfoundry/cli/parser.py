"""Argument parsing: `--help` ends with examples, and a mistake prints one line with the nearest option."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from llmfoundry.config import local_path


class Parser(argparse.ArgumentParser):
    """`argparse`, with examples below the options, and short errors."""

    def __init__(self, prog: str, description: str | None = None, examples: Sequence[str] = (),
                 allow_abbrev: bool = True) -> None:  # fmt: skip
        """Make a parser.

        Args:
            prog: the command as a user types it.
            description: what it does.
            examples: whole command lines.
            allow_abbrev: whether options may be abbreviated.
        """
        super().__init__(
            prog,
            description=description,
            epilog="\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=allow_abbrev,
        )

    def add_overrides(self, help: str) -> None:
        """Accept `key=value` words, as `overrides`: a list of strings."""
        self.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)

    def error(self, message: str) -> NoReturn:
        """Print one line, and exit with 2."""
        print(f"error: {message}{self._nearest(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def _nearest(self, message: str) -> str:
        wrong, known = "", [word for word in self._option_string_actions if word.startswith("--")]
        if found := re.search(r"unrecognized arguments: .*?(--[\w.-]+)(=\S+)?", message):
            wrong, value = found[1], found[2]
            if value and any(action.dest == "overrides" for action in self._actions):
                return f" (a setting has no dashes: {wrong[2:].replace('-', '_')}{value})"
        elif found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            wrong, known = found[1], re.findall(r"[\w-]+", found[2])
        close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
        return f" (did you mean {close[0]}?)" if close else ""


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argparse `type`: an integer from `least` to `most`."""
    wanted = f"of at least {least}" if most is None else f"from {least} to {most:,}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"must be an integer {wanted}, found {text!r}")
        return number

    return read


def number(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return an argparse `type`: a finite number from `least` (or above it) to `most`."""
    wanted = f"{'above' if above else 'of at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and least <= found <= most) or (above and found == least):
            raise argparse.ArgumentTypeError(f"must be a number {wanted}, found {text!r}")
        return found

    return read


def local(text: str) -> Path:
    """An argparse `type`: a local path. It expands `~`, because the shell does not in `--out=~/x`."""
    try:
        return Path(local_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def program(name: str, script: str | None = None) -> str:
    """Return the command's name in its own messages: `llmfoundry train`, or `train.py` as a script."""
    return f"llmfoundry {name}" if Path(sys.argv[0]).name == "llmfoundry" else script or f"{name}.py"
