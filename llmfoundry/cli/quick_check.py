"""Check a run's YAML before torch is imported: keys, types, bounds and choices.

The config classes are in the modules that they build, so importing them imports torch, which takes seconds. This module
builds equivalent classes from `schema.json`: the same keys, types, bounds and choices, without the rules that compare
values. `config.py` checks with them and words the mistakes, so each line is one that the full check has too. Whatever
this check is not sure of, it accepts, so it may find less; the full check always follows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ModelWrapValidatorHandler, ValidatorFunctionWrapHandler, create_model, model_validator
from pydantic.functional_validators import WrapValidator

from llmfoundry.config import Choice, Config, ConfigError, check, keyed
from llmfoundry.integrations.foundry_yaml import Untranslated, translate
from llmfoundry.settings import load_settings
from llmfoundry.train.duration import Duration, Interval

SCHEMA = Path(__file__).resolve().parents[1] / "schema.json"
Node = dict[str, Any]  # a part of the schema
_RUN_NAME = "{run_name}"
_PLAIN = {"integer": int, "number": float, "string": str, "boolean": bool, "null": None, "object": dict, "array": list}
_BOUNDS = {
    "minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le", "exclusiveMaximum": "lt",
    "minItems": "min_length", "maxItems": "max_length",
}  # fmt: skip


def quick_mistakes(path: str, overrides: list[str], is_users: bool = True) -> list[str]:
    """Return the mistakes that the full check of a run's YAML is sure to report too; it may report more.

    Args:
        path: the YAML file.
        overrides: as for `load_settings`.
        is_users: as for `load_settings`.

    Raises:
        ConfigError: if the file cannot be read; the full check reports the same.
    """
    settings = load_settings(path, overrides, is_users)
    data = settings.data
    schema = _schema()
    words = {part.rpartition(".")[2] for part in settings.given} | {"~" for item in overrides if item[:1] == "~"}
    if data.get("code_paths") or words & (schema.tags | {"~"}):
        return []  # plug-ins add choices; an override that replaces a choice drops the old one's keys
    model = data.get("model")
    if isinstance(model, dict) and str(model.get("name")).startswith("hf_"):
        return []  # the translation reads the model's own files
    try:
        data, _ = translate(data, settings.referred - schema.run.model_fields.keys())
    except Untranslated as error:
        return [*str(error).split("\n"), *mistakes_in(error.rest)]
    return mistakes_in(data)


def mistakes_in(data: dict[str, object]) -> list[str]:
    """Return the same for data in the project's keys."""
    if _RUN_NAME in str(data.get("save_folder")) and data.get("run_name") is None:
        return []  # reported separately
    try:
        check(_schema().run, data)
    except ConfigError as error:  # values that contain the run name are shown with it filled in
        return [line for line in str(error).split("\n") if _RUN_NAME not in line]
    return []


class _Schema(NamedTuple):
    """What is built from `schema.json`: the type of a run, and the words that select classes."""

    run: type[Config]
    tags: frozenset[str]


@cache
def _schema() -> _Schema:
    blocks = json.loads(SCHEMA.read_text(encoding="utf-8"))["definitions"]
    tags = frozenset(tag for block in blocks.values() if _rules(block) for tag in block["properties"])
    return _Schema(_Classes(blocks).of("RunConfig"), tags)


class _Classes:
    """Config classes built from the definitions of a schema, each when it is first needed."""

    def __init__(self, blocks: Node) -> None:
        self.blocks = blocks
        self.made: dict[str, type[Config]] = {}

    def of(self, name: str) -> type[Config]:
        """Return the class of a block, or the base of a family."""
        if name in self.made:
            return self.made[name]
        block = self.blocks[name]
        rules = _rules(block)
        if not rules:
            self.made[name] = self._make(name, block, Config, {})
            return self.made[name]
        ((tag, said),) = block["properties"].items()
        choice: dict[str, Any] = {tag: (str, said.get("default", ...))}
        root = create_model(name, __base__=Choice, __cls_kwargs__={"tag": tag}, **choice)
        self.made[name] = root  # before its members, because a mixture contains datasets
        for rule in rules:
            member, names = _name(rule["then"]), tuple(rule["if"]["properties"][tag]["enum"])
            self.made[member] = self._make(member, self.blocks[member], root, {"names": names})
        return root

    def _make(self, name: str, block: Node, base: type[Config], how: dict[str, object]) -> type[Config]:
        keys, required = block["properties"], block.get("required", [])
        others = {key: said["x-alias"] for key, said in keys.items() if "x-alias" in said}
        foreign = {key for key, said in keys.items() if said.get("deprecated") or said.get("x-short")} - others.keys()
        fields: dict[str, Any] = {}
        for key, said in keys.items():
            if key not in foreign | others.keys() | base.model_fields.keys():
                needed = key in required
                fields[key] = (self._type(said), Field() if needed else Field(None, validate_default=False))
        accept = _accepting(lambda data: bool(block["additionalProperties"] or foreign & data.keys()))
        made = create_model(name, __base__=base, __cls_kwargs__=how, __validators__={"accept": accept}, **fields)
        made.ALIASES, made.SYNONYMS = others, block.get("x-synonyms", {})
        return made

    def _type(self, said: Node) -> Any:
        """Return the type of a field with such a schema in its class."""
        kinds = [kind for kind in said.get("anyOf", [said]) if _name(kind) != "interpolation"]
        short = tuple(_PLAIN[word] for kind in kinds if kind.get("x-short") for word in _words(kind))
        found = [self._kind(kind) for kind in kinds if not kind.get("x-short")]
        if Duration in found and len(found) > 1 and {"type": "integer", "minimum": 0} in kinds:
            found[found.index(Duration) : found.index(Duration) + 2] = [Interval]
        wanted = reduce(or_, found)
        if not short:
            return wanted
        return Annotated[wanted, _unless(lambda value: value is None if None in short and value is None
                                         else isinstance(value, tuple(kind for kind in short if kind)))]  # fmt: skip

    def _kind(self, kind: Node) -> Any:
        if "if" in kind:  # a value that does not meet the condition may be a shorthand
            return Annotated[self._kind(kind["then"]), _unless(lambda value: not _meets(value, kind["if"]))]
        if "x-family" in kind:
            root = self.of(kind["x-family"])
            assert issubclass(root, Choice)
            return keyed(root)
        if name := _name(kind):
            return Duration if name == "Duration" else self.of(name)
        if "enum" in kind:
            return Literal[tuple(kind["enum"])]
        bounds = {word: kind[key] for key, word in _BOUNDS.items() if key in kind}
        if "items" in kind:
            plain: Any = list[self._type(kind["items"])]  # type: ignore[misc]
        elif isinstance(kind.get("additionalProperties"), dict):
            plain = dict[str, self._type(kind["additionalProperties"])]  # type: ignore[misc]
        else:
            plain = _PLAIN[kind["type"]] if kind else object
        return Annotated[plain, Field(**bounds)] if bounds else plain


def _name(kind: Node) -> str:
    return str(kind.get("$ref", "")).rpartition("/")[2]


def _words(kind: Node) -> list[str]:
    return [kind["type"]] if isinstance(kind["type"], str) else kind["type"]


def _rules(block: Node) -> list[Node]:
    return [rule for rule in block.get("allOf", []) if "properties" in rule.get("if", {})]


def _meets(value: object, condition: Node) -> bool:
    return isinstance(value, dict) and value.keys() >= set(condition["required"])


def _unless(is_other: Callable[[object], bool]) -> WrapValidator:
    """Accept some values unchecked."""

    def checked(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        return None if is_other(value) else check(value)

    return WrapValidator(checked)


def _accepting(is_unsure: Callable[[dict[str, object]], bool]) -> Any:
    """Accept some blocks unchecked."""

    def checked(cls: type[Config], data: Any, check: ModelWrapValidatorHandler[Config]) -> Config:
        return cls.model_construct() if isinstance(data, dict) and is_unsure(data) else check(data)

    return model_validator(mode="wrap")(classmethod(checked))  # type: ignore[arg-type]
