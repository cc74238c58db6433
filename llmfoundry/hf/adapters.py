"""Maps between PEFT module names and llmfoundry's.

One llmfoundry linear layer may hold several Hugging Face layers (e.g. `wqkv`), or be only a part of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmfoundry.config import ConfigError
from llmfoundry.hf.family import Family
from llmfoundry.hf.pieces import Copy
from llmfoundry.hf.pretrained import pieces_of
from llmfoundry.model.adapters import Names, PeftPart
from llmfoundry.model.transformer import CausalLMConfig


class PartOfMatrix(ConfigError):
    """`target_modules` selects only some of the Hugging Face layers that llmfoundry fuses into one matrix."""


def peft_names(family: Family, config: CausalLMConfig) -> Names:
    """Return a function from an llmfoundry weight name to its PEFT modules and rows, for `save_peft` and `load_peft`.

    Args:
        family: the architecture of the Hugging Face model.
        config: the llmfoundry config, without adapters.

    Raises:
        ConfigError: when the returned function is called for a weight that the Hugging Face model stores transposed,
            which PEFT cannot adapt.
    """
    copies = _copies(family, config)

    def names(name: str) -> list[PeftPart]:
        found = []
        for copy in copies[name if name in copies else f"{name}.weight"]:
            rows = copy.target.axes[-2]  # the rows correspond one to one
            if [axis.dim for axis in copy.source.axes] != sorted(axis.dim for axis in copy.source.axes):
                raise ConfigError(f"{family.model_type}: {name} is stored transposed there; peft cannot adapt it so")
            size = copy.sizes[len(copy.sizes) - 2]
            found.append(PeftPart(copy.source.name.removesuffix(".weight"), slice(rows.start, rows.start + size)))
        return found

    return names


def _copies(family: Family, config: CausalLMConfig) -> dict[str, list[Copy]]:
    """Return the copies that fill each llmfoundry tensor, with the tensor names of the live Hugging Face model."""
    return pieces_of(family, config, "stacked" if "stacked" in family.layouts else family.layouts[0]).reading()


def targets_of(family: Family, config: CausalLMConfig, wanted: str | Sequence[str]) -> str | list[str]:
    """Return the llmfoundry linear layers that PEFT's `target_modules` selects.

    Args:
        family: the architecture of the Hugging Face model.
        config: the llmfoundry config, without adapters.
        wanted: `all-linear`, a regular expression that must match whole module names, or a list of name suffixes, e.g.
            [q_proj, k_proj, v_proj].

    Returns:
        The value for `model.lora.target_modules`.

    Raises:
        ConfigError: if nothing matches.
        PartOfMatrix: if only a part of an llmfoundry layer matches.
    """
    if wanted == "all-linear":
        return wanted
    if isinstance(wanted, str):
        try:
            re.compile(wanted)
        except re.error as error:
            raise ConfigError(f"target_modules: {wanted!r} is not a valid pattern: {error}") from None
    found: list[str] = []
    names: set[str] = set()
    for name, copies in _copies(family, config).items():
        if not name.startswith("blocks.") or len(copies[0].target.axes) < 2:  # PEFT does not adapt vectors
            continue
        theirs = sorted({copy.source.name.removesuffix(".weight") for copy in copies})
        names |= set(theirs)
        matched = [each for each in theirs if _matches(each, wanted)]
        ours = name.removesuffix(".weight").split(".", 2)[2]
        if matched and matched != theirs:
            missing = sorted({each.rpartition(".")[2] for each in theirs} - {m.rpartition(".")[2] for m in matched})
            raise PartOfMatrix(
                f"target_modules: {matched[0].rpartition('.')[2]} is a part of one matrix here ({ours}); "
                f"name {', '.join(missing)} too"
            )
        if matched and ours not in found:
            found.append(ours)
    known = {name.rpartition(".")[2] for name in names}
    if not found and isinstance(wanted, str):
        raise ConfigError(
            f"target_modules: {wanted!r} matches no whole name, such as {min(names)}; name modules by their ends in a "
            f"list, [{wanted}]; known: {', '.join(sorted(known))}"
        )
    if not found:
        raise ConfigError(f"target_modules: nothing is called {wanted!r}; known: {', '.join(sorted(known))}")
    return found


def _matches(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)
