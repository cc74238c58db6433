"""The JSON schema (draft 7) of a run's YAML, from the config classes: for editors, and for the check before torch.

A concrete config is a definition of its own. A family's root is a definition that picks the member by its tag. In
place of any value an interpolation (`${variables.d_model}`) may stand. What is accepted beside the fields is marked:
`x-alias` another word for a field, `x-short` a shorthand, otherwise `deprecated`; `x-synonyms` serve hints. From the
schema without what is marked, `llmfoundry/cli/quick_check.py` makes the classes again.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from comments import comment_of, summary_of
from pydantic import BeforeValidator, PlainValidator, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import llmfoundry.callbacks  # noqa: F401  registers all monitors and loggers
from llmfoundry.config import Choice, Config, _configs_in, _members_of
from llmfoundry.data.loader import LoaderConfig
from llmfoundry.data.mds_rows import TUNING, Folders, MDSConfig, Stream
from llmfoundry.data.mixture import MixtureConfig, Part
from llmfoundry.eval.icl_tasks import TaskConfig
from llmfoundry.integrations.foundry_keys import GONE, ONLY
from llmfoundry.integrations.foundry_yaml import _MOVED
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import _TIME_STRING, Duration, _of_epochs

Schema = dict[str, Any]
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_BOUNDS = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum",
    "min_length": "minItems", "max_length": "maxItems",
}  # fmt: skip
# Where the translation puts the values of LLM Foundry's keys that became another key.
_BECOMES = {
    "model.attention_bias": "model.attn_config.bias",
    "model.attn_config.rope_hf_config": "model.attn_config.rope_scaling",
    "model.ffn_config.moe_world_size": "parallel.expert",
    "model.ffn_config.lbl_process_group": "model.ffn_config.moe_lbl_scope",
    "compile_config": "parallel.compile",
    "fsdp_config": "parallel",
}
INTERPOLATION = {"$ref": "#/definitions/interpolation"}


def schema() -> Schema:
    """The schema of a whole run."""
    found: dict[str, Schema] = {
        "interpolation": {"type": "string", "pattern": r"\$\{"},
        "Duration": {
            "description": "A number of steps (ba), epochs (ep), tokens (tok), rows (sp), or a share of the run (dur).",
            "type": "string",
            "pattern": rf"^\s*{_TIME_STRING.pattern}\s*$",
        },
    }
    waiting: list[type[Config]] = [RunConfig]
    seen: dict[str, type[Config]] = {}
    while waiting:
        cls = waiting.pop()
        if cls.__name__ in found:
            assert seen[cls.__name__] is cls, f"{cls} and {seen[cls.__name__]} have one name"
            continue
        seen[cls.__name__] = cls
        members = _members_of(cls)
        found[cls.__name__] = _block(cls) if members == [cls] else _family(cls, members)
        waiting += [member for member in members if member is not cls]
        if members == [cls]:
            waiting += [part for info in cls.model_fields.values() for part in _configs_in(info.annotation)]
    _shorthands(found)
    _foreign_words(found)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A run of llmfoundry",
        "allOf": [{"$ref": "#/definitions/RunConfig"}],
        "definitions": dict(sorted(found.items())),
    }


def _block(cls: type[Config]) -> Schema:
    properties: Schema = {}
    for key, info in cls.model_fields.items():
        if issubclass(cls, Choice) and key == cls._tag:
            names = [{"enum": _names_of(cls)}, INTERPOLATION]
            properties[key] = {"description": comment_of(cls, key), "anyOf": names}
        else:
            properties[key] = _field(cls, key, info)
    required = [key for key, info in cls.model_fields.items() if info.is_required() and not _is_tag(cls, key)]
    block: Schema = {"description": summary_of(cls), "type": "object", "additionalProperties": False}
    for alias, own in cls.ALIASES.items():
        properties[alias] = {**properties[own], "description": f"The same as {own}.", "deprecated": True,
                             "x-alias": own}  # fmt: skip
    block["properties"] = properties
    others = {own: alias for alias, own in cls.ALIASES.items()}
    if plain := [key for key in required if key not in others]:
        block["required"] = plain
    if either := [key for key in required if key in others]:
        block["allOf"] = [{"anyOf": [{"required": [key]}, {"required": [others[key]]}]} for key in either]
    return block


def _family(root: type[Choice], members: Iterable[type[Choice]]) -> Schema:
    """A root: which member's definition holds, by the tag."""
    tag, default = root._tag, root.model_fields[root._tag].default
    by_name = {name: member for member in members for name in _names_of(member)}
    rules: list[Schema] = [
        {"if": {"required": [tag], "properties": {tag: {"enum": _names_of(member)}}},
         "then": {"$ref": f"#/definitions/{member.__name__}"}}
        for member in dict.fromkeys(by_name.values())
    ]  # fmt: skip
    family: Schema = {"description": summary_of(root), "type": "object"}
    family["properties"] = {
        tag: {"description": comment_of(root, tag), "anyOf": [{"enum": list(by_name)}, INTERPOLATION]}
    }
    if default is PydanticUndefined:
        family["required"] = [tag]
    else:
        family["properties"][tag]["default"] = default
        rules.append({"if": {"not": {"required": [tag]}},
                      "then": {"$ref": f"#/definitions/{by_name[default].__name__}"}})  # fmt: skip
    return family | {"allOf": rules}


def _names_of(member: type[Choice]) -> list[str]:
    """The tags that pick this class: the family's own table says it, for a subclass may have taken some over."""
    return [name for name, cls in member._members.items() if cls is member]


def _is_tag(cls: type[Config], key: str) -> bool:
    return issubclass(cls, Choice) and key == cls._tag


def _field(cls: type[Config], key: str, info: FieldInfo) -> Schema:
    said: Schema = {"description": comment} if (comment := comment_of(cls, key)) else {}
    if not info.is_required():
        said["default"] = _written(info.get_default(call_default_factory=True))
    if key in ("callbacks", "loggers") and cls is RunConfig:
        return said | {"anyOf": [_keyed(_configs_in(info.annotation)[0]), INTERPOLATION]}
    kinds = _kinds(info.annotation, info.metadata)
    if {"type": "string"} not in kinds and {} not in kinds:
        kinds = [*kinds, INTERPOLATION]
    return said | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _written(value: object) -> object:
    """A default as the YAML would have it."""
    if isinstance(value, Config):
        return value.model_dump(mode="json", exclude_defaults=True) | (
            {value._tag: getattr(value, value._tag)} if isinstance(value, Choice) else {}
        )
    return str(value) if isinstance(value, Duration) else value


def _keyed(root: type[Choice]) -> Schema:
    """A mapping `{tag: {other keys}}`, whose bodies may be empty."""
    bodies = {
        name: {"description": summary_of(cls),
               "anyOf": [{"$ref": f"#/definitions/{cls.__name__}"}, {"type": "null"}, INTERPOLATION]}
        for name, cls in root._members.items()
    }  # fmt: skip
    return {"type": "object", "additionalProperties": False, "properties": bodies, "x-family": root.__name__}


def _kinds(annotation: Any, metadata: Iterable[object] = ()) -> list[Schema]:
    """What a value may be, one schema each, in the order of the annotation."""
    bounds = {word: getattr(each, name) for each in metadata for name, word in _BOUNDS.items() if hasattr(each, name)}
    changes = [each.func for each in metadata if isinstance(each, BeforeValidator | PlainValidator | WrapValidator)]
    assert set(changes) <= {_of_epochs}, f"say here what {changes} accept"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        first, *rest = parts
        inner = [part for each in rest for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return _kinds(first, [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return [kind for part in parts for kind in _kinds(part, metadata)]
    if origin is Literal:
        return [{"enum": list(parts)}]
    if origin is list:
        return [{"type": "array", "items": _one(parts[0])} | _only(bounds, "Items")]
    if origin is dict:
        return [{"type": "object", "additionalProperties": _one(parts[1])}]
    if annotation in _PLAIN:
        is_number = annotation in (int, float)
        return [{"type": _PLAIN[annotation]} | (_only(bounds, "imum") if is_number else {})]
    if annotation is Duration:
        return [{"$ref": "#/definitions/Duration"}, *([{"type": "integer", "minimum": 0}] if changes else [])]
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [{"$ref": f"#/definitions/{annotation.__name__}"}]
    assert annotation is object, f"no schema for {annotation}"
    return [{}]


def _one(annotation: Any) -> Schema:
    kinds = _kinds(annotation)
    if {"type": "string"} not in kinds and {} not in kinds:
        kinds = [*kinds, INTERPOLATION]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _only(bounds: dict[str, object], ending: str) -> Schema:
    return {word: value for word, value in bounds.items() if word.endswith(ending)}


def _shorthands(found: dict[str, Schema]) -> None:
    """What validators of single classes accept beside the fields."""
    run = found["RunConfig"]["properties"]
    run["variables"] = {"description": "Values that interpolations name: ${variables.NAME}.", "type": "object",
                        "x-short": True}  # fmt: skip
    loaders = {"type": "array", "items": {"$ref": f"#/definitions/{LoaderConfig.__name__}"}, "x-short": True}
    run["eval_loader"]["anyOf"].append(loaders)
    found["RunConfig"]["x-synonyms"] = RunConfig.SYNONYMS
    for key in ("icl_tasks", "eval_gauntlet"):
        run[key]["anyOf"] = [*run[key]["anyOf"][:-1], {"type": ["string", "null"], "x-short": True}]
        run[f"{key}_str"] = {"description": f"A file that has {key}.", "type": ["string", "null"], "deprecated": True}
    mixture = found[MixtureConfig.__name__]["properties"]
    for member in _members_of(LoaderConfig):
        loader = found[member.__name__]
        for key in ("datasets", "mixture", "temperature"):
            loader["properties"][key] = mixture[key] | {"x-short": f"dataset.{key}"}
        loader.pop("required")
        loader["allOf"] = [{"anyOf": [{"required": ["dataset"]}, {"required": ["datasets"]}]}]
        # A dataset without a name is of the loader's kind, or of MDS folders.
        names = {"FinetuningLoaderConfig": "ChatsConfig", "PreferencesLoaderConfig": "PreferencesConfig"}
        is_named = {"type": "object", "required": ["name"]}
        has_folders = {"anyOf": [{"required": [key]} for key in ("local", "remote", "streams")]}
        folders = {"if": has_folders, "then": {"$ref": f"#/definitions/{MDSConfig.__name__}"}, "else": is_named}
        unnamed = {"$ref": f"#/definitions/{names[member.__name__]}"} if member.__name__ in names else folders
        kinds = loader["properties"]["dataset"]["anyOf"]
        kinds[0] = {"if": is_named, "then": kinds[0], "else": unnamed}
    for cls in [Stream, *(c for c in _members_of(_root_of(Folders)) if issubclass(c, Folders))]:
        for key in TUNING:
            found[cls.__name__]["properties"][key] = {"description": "Tunes how shards are fetched: no effect here.",
                                                      "deprecated": True}  # fmt: skip
    part = found[Part.__name__]  # the dataset's keys may stand beside its own
    part["additionalProperties"] = True
    part.pop("required")
    for member in _members_of(TaskConfig):
        keys = found[member.__name__]["properties"]
        keys["prelimiter"] = {"description": "The same as question_prelimiter.", "type": "string", "deprecated": True}


def _root_of(cls: type[Choice]) -> type[Choice]:
    return next(parent for parent in cls.__mro__ if Choice in parent.__bases__)


def _foreign_words(found: dict[str, Schema]) -> None:
    """LLM Foundry's keys, where they are accepted: editors strike them out and say what becomes of them."""
    for path in (*GONE, *ONLY, *_MOVED):
        *parents, key = path.split(".")
        if path in GONE:
            said = "left out here" + (f": {GONE[path]}" if GONE[path] else "")
        elif path in ONLY:
            said = "accepted at the value that is done here"
        else:
            said = f"now {_BECOMES[path]}" if path in _BECOMES else "translated"
        word = {"description": f"LLM Foundry's: {said}.", "deprecated": True}
        for block in _blocks_at(found, [{"$ref": "#/definitions/RunConfig"}], parents):
            block.setdefault(key, word)


def _blocks_at(found: dict[str, Schema], nodes: list[Schema], path: list[str]) -> list[Schema]:
    """The properties of each block that may stand at a path."""
    blocks = []
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if "$ref" in node:
            waiting.append(found[node["$ref"].rpartition("/")[2]])
        elif node.get("additionalProperties") is False:
            blocks.append(node["properties"])
        waiting += [*node.get("anyOf", []), *(rule["then"] for rule in node.get("allOf", []) if "then" in rule)]
        waiting += [node[word] for word in ("then", "else") if word in node]
    if not path:
        return blocks
    below = [block[path[0]] for block in blocks if path[0] in block]
    return _blocks_at(found, below, path[1:]) if below else []
