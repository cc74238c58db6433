"""The schema that editors check YAMLs by agrees with the config classes, on what is right and on what is wrong."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

import llmfoundry.callbacks  # noqa: F401  registers those that the YAMLs name
from llmfoundry.config import Config, _configs_in, _members_of, check, dump
from llmfoundry.settings import load_yaml
from llmfoundry.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "llmfoundry" / "schema.json").read_text(encoding="utf-8"))
BLOCKS = [f"#/definitions/{name}" for name, block in SCHEMA["definitions"].items() if "properties" in block]
YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
each_yaml = pytest.mark.parametrize("path", YAMLS, ids=[path.stem for path in YAMLS])
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
         "object": dict}  # fmt: skip
BOUNDS = {
    "minimum": lambda value, bound: value >= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
SAYS_NOTHING = {
    "description",
    "default",
    "deprecated",
    "x-short",
    "x-alias",
    "x-family",
    "x-synonyms",
    "$schema",
    "title",
    "definitions",
}


def fits(value: object, node: dict) -> bool:
    """Whether a value fits a schema of draft 7: the words that ours uses, and no others."""
    said = {word: meaning for word, meaning in node.items() if word not in SAYS_NOTHING}
    return all(_fits(value, word, meaning, node) for word, meaning in said.items())


def _fits(value: object, word: str, meaning: object, node: dict) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if word == "$ref":
        return fits(value, SCHEMA["definitions"][meaning.rpartition("/")[2]])
    if word == "type":
        kinds = [meaning] if isinstance(meaning, str) else meaning
        return any(isinstance(value, TYPES[kind]) and (kind == "boolean" or value is not True and value is not False)
                   for kind in kinds)  # fmt: skip
    if word == "enum":
        return any(value == each and type(value) is type(each) for each in meaning)
    if word == "pattern":
        return not isinstance(value, str) or re.search(meaning, value) is not None
    if word in BOUNDS:
        return not is_number or BOUNDS[word](value, meaning)
    if word in ("minItems", "maxItems"):
        return not isinstance(value, list) or (len(value) >= meaning if word == "minItems" else len(value) <= meaning)
    if word == "items":
        return not isinstance(value, list) or all(fits(item, meaning) for item in value)
    if word == "required":
        return not isinstance(value, dict) or all(key in value for key in meaning)
    if word == "properties":
        return not isinstance(value, dict) or all(fits(value[key], meaning[key]) for key in meaning.keys() & value)
    if word == "additionalProperties":
        others = [item for key, item in value.items() if key not in node.get("properties", {})] if value else []
        return all(meaning if isinstance(meaning, bool) else fits(item, meaning) for item in others)
    if word == "anyOf":
        return any(fits(value, each) for each in meaning)
    if word == "allOf":
        return all(fits(value, each) for each in meaning)
    if word == "not":
        return not fits(value, meaning)
    if word == "if":
        then = "then" if fits(value, meaning) else "else"
        return fits(value, node.get(then, {}))
    assert word in ("then", "else"), f"the schema uses {word}, which this test does not know"
    return True


@each_yaml
def test_a_shipped_yaml_fits_and_names_the_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert fits(yaml.safe_load(text), SCHEMA), "interpolations as they are written"
    assert fits(load_yaml(path), SCHEMA), "interpolations resolved"
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, flags=re.M)
    assert (path.parent / named).resolve() == ROOT / "llmfoundry" / "schema.json"


def test_the_schema_knows_what_accepts_more_than_the_fields_say() -> None:
    """A validator that sees data before the fields do may accept what they would not: `_shorthands` must know it."""
    found = set()
    waiting: list[type[Config]] = [RunConfig]
    seen = set(waiting)
    while waiting:
        cls = waiting.pop()
        checks = cls.__pydantic_decorators__
        both = {**checks.model_validators, **checks.field_validators}
        found |= {name for name, each in both.items() if each.info.mode != "after"}
        below = [
            *_members_of(cls),
            *(part for info in cls.model_fields.values() for part in _configs_in(info.annotation)),
        ]
        waiting += [part for part in below if part not in seen]
        seen.update(below)
    assert found == {
        "_name_unknown_keys", "_fill_tag",  # of all classes
        "_several_evaluations", "_name_run",  # of a run
        "_written_out",  # of loaders, and of parts of a mixture
        "_tuning",  # of MDS
        "_older_words",  # of tasks
        "_defaults_of_kind", "_sizes",  # of MegaBlocks and modules of transformers: they fill in defaults
    }, "tell scripts/reference/json_schema.py what the new ones accept"  # fmt: skip


def test_every_key_says_what_it_means() -> None:
    silent = [
        f"{name}.{key}"
        for name, block in SCHEMA["definitions"].items()
        for key, said in block.get("properties", {}).items()
        if not said.get("description") and not any(f"{other}'" in str(said) for other in BLOCKS)
    ]
    assert not silent, "write a comment beside these fields, then run scripts/reference/render.py"


def test_every_key_has_a_row_in_the_reference() -> None:
    rows = re.findall(r"^\| `(?:\S+\.)?(\w+)` \|", (ROOT / "docs" / "reference.md").read_text(), flags=re.M)
    keys = {
        key
        for block in SCHEMA["definitions"].values()
        for key, said in block.get("properties", {}).items()
        if not said.get("deprecated")
    }
    assert keys == set(rows)


@each_yaml
def test_a_config_with_all_defaults_written_out_fits(path: Path) -> None:
    assert fits(dump(check(RunConfig, load_yaml(path))), SCHEMA)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("seeed", 1),
        ("seed", "one"),
        ("seed", True),
        ("seed", -1),
        ("max_duration", "10xx"),
        ("max_duration", 10),
        ("model.d_modle", 64),
        ("model.d_model", None),
        ("model.d_model", "64"),
        ("model.no_bias", 1),
        ("model.norm_type", "batchnorm"),
        ("model.attn_config.rope_theta", 0.0),
        ("model.attn_config.rope_scaling", {"type": "linear"}),
        ("model.attn_config.rope_scaling", {"type": "lineal", "factor": 2.0}),
        ("model.attn_config.kv_lora_rank", 8),
        ("model.ffn_config.ffn_type", "moee"),
        ("model.ffn_config.moe_num_experts", 0),
        ("model.lora", {"rank": 4}),
        ("tokenizer", "bpe"),
        ("train_loader.dataset.split", "test"),
        ("train_loader.dataset", {"split": "train"}),
        ("optimizer.betas", [0.9]),
        ("optimizer.betas", [0.9, 1.0]),
        ("parallel.compile", "yes"),
        ("callbacks.lr_monitor", {"speed": 1}),
        ("callbacks.lr_moniter", None),
        ("eval_loaders", {}),
        ("icl_tasks", [{"icl_task_type": "schema", "label": "a"}]),
    ],
)
def test_a_mistake_is_found_by_schema_and_classes(at: str, value: object) -> None:
    data = copy.deepcopy(load_yaml(ROOT / "yamls" / "moe.yaml"))
    node = data
    *parents, key = at.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[key] = value
    assert not fits(data, SCHEMA)
    with pytest.raises(ValueError, match=re.escape(parents[0] if parents else key)):
        check(RunConfig, data)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("model.lora", {"r": 4, "lora_alpha": 8}),
        ("eval_loader", [{"label": "a", "dataset": {"name": "python_stdlib", "split": "validation"}}]),
        ("callbacks.lr_monitor", None),
        ("train_loader", {"datasets": [{"name": "synthetic", "weight": 1}, {"name": "python_stdlib", "weight": 2}]}),
        ("train_loader", {"name": "finetuning", "dataset": {"path": "chats", "split": "train"}}),
        ("train_loader", {"dataset": {"local": "mds", "shuffle_algo": "py1e", "split": "train"}}),
        ("callbacks", {"generate_callback": {"prompts": ["a"], "interval": 1}}),
    ],
)
def test_a_shorthand_is_right_by_schema_and_classes(at: str, value: object) -> None:
    data = copy.deepcopy(load_yaml(ROOT / "yamls" / "moe.yaml"))
    *parents, key = at.split(".")
    (data[parents[0]] if parents else data)[key] = value
    assert fits(data, SCHEMA)
    check(RunConfig, data)
