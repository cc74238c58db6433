"""Parameter groups: other learning rates or weight decay for some parameters, and frozen ones, by name patterns.

    optimizer:
      name: adamw
      lr: 3.0e-4
      param_groups: [{param_str_match: "router", lr: 1.0e-4}, {param_str_match: "norm|bias", weight_decay: 0.0}]
      disable_grad: ["wte"]

Patterns are regular expressions that may match anywhere in a name (`blocks.3.ffn.router.weight`). A parameter belongs
to the first group that matches it. Each group follows the schedule from its own learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field
from torch import nn

from llmfoundry.config import Config, ConfigError

SHOWN = 8  # names in a message


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]


class ParamGroup(Config):
    """Settings for the parameters that match; settings that are left out are the optimizer's."""

    param_str_match: Pattern  # a regular expression that is searched in parameter names
    lr: float | None = Field(None, gt=0)  # None: the optimizer's lr
    # None: the optimizer's; if set, it also applies to norms and biases of the group
    weight_decay: float | None = Field(None, ge=0)
    betas: Betas | None = None  # None: the optimizer's
    eps: float | None = Field(None, gt=0)  # None: the optimizer's
    # With name: muon; None: muon for matrices inside blocks, otherwise adamw
    algorithm: Literal["muon", "adamw"] | None = None


class Member(NamedTuple):
    """A trained parameter and its group."""

    number: int  # of its group: 0 for the rest, then those of the YAML from 1
    group: ParamGroup
    name: str
    parameter: nn.Parameter


_REST = ParamGroup(param_str_match="")


def members(model: nn.Module, groups: Sequence[ParamGroup], disable_grad: Sequence[str]) -> Iterator[Member]:
    """The trained parameters with their groups, group 0 first. Parameters that `disable_grad` matches are frozen.

    Raises:
        ConfigError: a pattern matches nothing, or no parameter is left to train.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for number, pattern in enumerate(disable_grad):
        frozen = [name for name in parameters if re.search(pattern, name)]
        if not frozen:
            raise _nothing(f"disable_grad.{number}", pattern, parameters)
        for name in frozen:
            parameters.pop(name).requires_grad_(False)
    if not parameters:
        raise ConfigError("optimizer.disable_grad: matches all parameters, and leaves none to train")
    found = []
    for number, group in enumerate(groups):
        names = [name for name in parameters if re.search(group.param_str_match, name)]
        if not names:
            raise _nothing(f"param_groups.{number}.param_str_match", group.param_str_match, parameters)
        found += [Member(number + 1, group, name, parameters.pop(name)) for name in names]
    yield from (Member(0, _REST, name, each) for name, each in parameters.items())
    yield from found


def _nothing(key: str, pattern: str, left: dict[str, nn.Parameter]) -> ConfigError:
    """The error for a pattern without a match; it names the first parameter of each kind of layer."""
    kinds = {re.sub(r"\d+", "N", name): name for name in reversed(left)}
    names = list(reversed(kinds.values()))
    more = f" and {len(names) - SHOWN} more kinds" if len(names) > SHOWN else ""
    known = ", ".join(names[:SHOWN]) or "none (earlier patterns match all)"
    return ConfigError(f"optimizer.{key}: {pattern!r} matches no parameter that is left; known: {known}{more}")
