"""Keep secrets out of what a run writes: secret settings, passwords in URLs, values from the environment.

Settings are passed through `disclosed` before they go to config.yaml, checkpoints, loggers and pages. A value written
as `${oc.env:NAME}` stays written so. Values of keys that are named like a secret are left out, and so is the part of a
URL before the `@`. Printed messages are passed through `cleaned`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

HIDDEN = "(hidden)"
_WORDS = re.compile(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]*")
_SECRET = {"token", "key", "apikey", "secret", "secrets", "password", "passwd", "pwd", "passphrase", "credential",
           "credentials"}  # fmt: skip
_NO_SECRET = {"text_key"}  # keys of ours that end so
_SPECIAL = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "special", "image", "video", "audio", "end", "start"}
# Under such a key too: nothing, what looks like a token of a vocabulary, and what names a variable of the environment.
_TOLD = re.compile(r"[<\[|].*[>\]|]|\W*|\$\{oc\.env:[^,}]*\}", re.DOTALL)
_USER = re.compile(r"(?<=://)[^/\s'\"]+@")  # up to the last @: a password may hold one
# What follows the `?` of a signed URL: `X-Amz-Signature=...`, `sv=...&sig=...`, `access_token=...`.
_SIGNED = re.compile(
    r"(://[^\s'\"?]*\?)(?=[^\s'\"]*(?:token|secret|sig|signature|password|key|credential)=)[^\s'\"]*", re.IGNORECASE
)
_FEW = 6  # characters of a value that may stand anywhere by chance
_ASSIGNED = re.compile(r"([A-Za-z_][\w.\[\]-]*)(:?=)(\"[^\"]*\"|'[^']*'|[^\s;,]+)")
_ITEM = re.compile(r"(['\"])(\w+)\1(: ?)(\"[^\"]*\"|'[^']*')")
_FOUND = re.compile(r"^((?:error: )?(?P<path>[\w.]+): .*found ).*$", re.MULTILINE)


class Interpolation(str):
    """A value as it was written, with `${oc.env:NAME}` in it; config.yaml has it without an escape."""


class FromEnvironment(NamedTuple):
    """A value of a YAML that came from the environment: as written, and resolved."""

    written: str
    value: str


def is_secret(key: str) -> bool:
    """Whether a key is named like a secret: `hub_token`, `api_key`, `password`."""
    words = [word.lower() for word in _WORDS.findall(key)]
    if not words or key in _NO_SECRET or words[-1] not in _SECRET:
        return False
    return not (words[-1] == "token" and len(words) > 1 and words[-2] in _SPECIAL)


def disclosed(data: Mapping[str, object], environment: Mapping[str, FromEnvironment]) -> dict[str, object]:
    """Settings without their secrets.

    Args:
        data: plain data.
        environment: values that came from the environment, by dotted path.
    """
    # A key that was translated, or a name made of another value, has it under another path.
    moved = {each.value: each.written for each in environment.values() if len(each.value) >= _FEW}

    def shown(value: object, path: str) -> object:
        if isinstance(value, dict):
            return {key: shown(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [shown(item, f"{path}.{number}" if path else str(number)) for number, item in enumerate(value)]
        return _shown(value, path) if isinstance(value, str) else value

    def _shown(text: str, path: str) -> str:
        if path.startswith("model."):  # its weights mean nothing without these, wherever they are opened
            return without_user(text)
        if path in environment:
            return Interpolation(environment[path].written)
        for value, written in moved.items():
            if value in text:
                return Interpolation(text.replace(value, written))
        if is_secret(path.rpartition(".")[2]) and not _TOLD.fullmatch(text):
            return HIDDEN
        return without_user(text)

    return {key: shown(value, key) for key, value in data.items()}


def cleaned(text: str) -> str:
    """A message without secrets: values of keys that are named like secrets, and users in URLs."""

    def assigned(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}{HIDDEN}" if _named_secret(found[1]) else found[0]

    def item(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}{found[1]}{found[3]}{HIDDEN}" if _named_secret(found[2]) else found[0]

    def said(found: re.Match[str]) -> str:
        return f"{found[1]}{HIDDEN}" if _named_secret(found["path"]) else found[0]

    return without_user(_FOUND.sub(said, _ITEM.sub(item, _ASSIGNED.sub(assigned, text))))


def _named_secret(path: str) -> bool:
    return path != "key" and is_secret(path.rpartition(".")[2])  # `key=value` is how an override is explained


def without_user(text: str) -> str:
    """A text whose URLs have no user, password or signature."""
    return _SIGNED.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text)) if "://" in text else text
