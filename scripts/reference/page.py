"""docs/reference.md, from the JSON schema: each block of the YAML once, where it first stands."""

from __future__ import annotations

import json
from typing import Any

Schema = dict[str, Any]

# The top level, in the order in which data flows.
SECTIONS = {
    "The run": ["run_name", "metadata", "code_paths", "seed", "variables"],
    "Data": ["max_seq_len", "tokenizer", "train_loader"],
    "Model": ["model"],
    "Loss and optimization": [
        "loss", "optimizer", "scheduler", "algorithms", "max_duration", "global_train_batch_size",
        "device_train_microbatch_size", "max_skipped_steps", "max_skipped_share", "time_limit",
    ],
    "Evaluation": [
        "eval_loader", "eval_loaders", "eval_interval", "eval_first", "eval_subset_num_batches",
        "device_eval_batch_size", "icl_tasks", "eval_gauntlet", "icl_seq_len", "icl_subset_num_batches",
    ],
    "Precision and parallelism": ["precision", "parallel", "dist_timeout", "step_timeout", "hang_timeout"],
    "Checkpoints": [
        "save_folder", "save_interval", "save_num_checkpoints_to_keep", "keep_every", "save_async",
        "save_failures_allowed", "save_frozen_weights", "autoresume", "load_path", "load_weights_only", "load_allow",
    ],
    "Callbacks, loggers and console": [
        "callbacks", "loggers", "progress_bar", "log_to_console", "console_log_interval",
    ],
}  # fmt: skip
HEAD = """\
# Every key of a run's YAML

Written by `scripts/reference/render.py` from the config classes and the comments beside their fields. The same script
writes `llmfoundry/schema.json`: an editor with a YAML language server completes keys, shows their meaning and marks
mistakes in a file that has this line (the path is relative to the file):

    # yaml-language-server: $schema=../llmfoundry/schema.json

By the same schema, `train.py` and `prepare_data.py` answer wrong keys, types and choices at once; rules that compare
values are checked after that, and their mistakes follow.

The schema does not know the names of plug-ins (`code_paths`). A block of several kinds has a table of the keys that
all kinds share, then one for each kind. In place of any value an interpolation (`${variables.d_model}`) may stand.
Durations are written `10ba` (steps), `1ep` (epochs), `5e9tok` (tokens), `100sp` (rows), `0.1dur` (share of the run), or
`2h`, `30min`, `90s` by the clock."""


class Page:
    """The lines of the page; knows which blocks it has described, and under which heading."""

    def __init__(self, schema: Schema) -> None:
        self.blocks: dict[str, Schema] = schema["definitions"]
        self.where: dict[str, str] = {}  # the path at which a block is described
        self.lines = [HEAD]

    def text(self) -> str:
        """The whole page.

        Raises:
            ValueError: a key of the top level is in no section.
        """
        keys = self.blocks["RunConfig"]["properties"]
        known = [key for names in SECTIONS.values() for key in names]
        if homeless := [key for key, said in keys.items() if key not in known and not said.get("deprecated")]:
            raise ValueError(f"put {', '.join(homeless)} into a section of scripts/reference/page.py")
        required = self.blocks["RunConfig"]["required"]
        for title, names in SECTIONS.items():
            self.lines += ["", f"## {title}"]
            self._keys({key: keys[key] for key in names}, required, "")
        self.lines += ["", "## Other words at the top level", "", _foreign(keys)]
        return "\n".join(self.lines) + "\n"

    def _keys(self, keys: Schema, required: list[str], path: str) -> None:
        """A table, then the blocks that begin in it."""
        below = []
        for key, said in keys.items():
            for name, place in self._named(said, f"{path}{key}"):
                if name not in self.where:
                    self.where[name] = place
                    below.append((name, place))
        rows = [self._row(path, key, said, required) for key, said in keys.items() if not _is_extra(key, said)]
        if rows:
            self.lines += ["", "| key | type | default | meaning |", "|---|---|---|---|", *rows]
        if path and (foreign := _foreign(keys)):
            self.lines += ["", foreign]
        for name, place in below:
            self._block(name, place)

    def _row(self, path: str, key: str, said: Schema, required: list[str]) -> str:
        default = "**required**" if key in required else _default(said)
        return f"| `{path}{key}` | {self._type(said)} | {default} | {self._meaning(said)} |"

    def _block(self, name: str, path: str) -> None:
        block = self.blocks[name]
        self.lines += ["", f"### `{path}`", "", _sentence(block["description"])]
        members = self._members(block)
        if not members:
            is_keyed = path.startswith(("callbacks.", "loggers."))  # there the name is the key above
            keys = {key: said for key, said in block["properties"].items() if key != "name" or not is_keyed}
            self._keys(keys, _required(block), f"{path}.")
            return
        ((tag, said),) = block["properties"].items()
        all_keys = [self.blocks[member]["properties"] for member in members]
        shared = {
            key: value
            for key, value in all_keys[0].items()
            if len(members) > 1 and key != tag and all(_alike(keys.get(key), value) for keys in all_keys)
        }
        required = [*_required(block), *_required(self.blocks[next(iter(members))])]
        self._keys({tag: said} | shared, required, f"{path}.")
        earlier: dict[str, Schema] = {}
        for member, names in members.items():
            own = {
                key: value
                for key, value in self.blocks[member]["properties"].items()
                if key != tag and key not in shared
            }
            self.lines += ["", f"**`{tag}: {'` or `'.join(names)}`.** {_sentence(self.blocks[member]['description'])}"]
            twin = next((name for name, keys in earlier.items() if own and keys.keys() == own.keys()), None)
            earlier[names[0]] = own
            if twin is not None:
                own = {key: value for key, value in own.items() if not _alike(value, earlier[twin][key])}
                self.lines[-1] += f" Keys as of `{tag}: {twin}`" + (", but:" if own else ".")
            self._keys(own, _required(self.blocks[member]), f"{path}.")

    def _members(self, block: Schema) -> dict[str, list[str]]:
        return {
            _name(rule["then"]): next(iter(rule["if"]["properties"].values()))["enum"]
            for rule in block.get("allOf", [])
            if "then" in rule and "properties" in rule["if"]
        }

    def _meaning(self, said: Schema) -> str:
        """The comment of a key; of a block without one, what the block says."""
        name = next((found for kind in said.get("anyOf", [said]) if (found := _name(kind)) in self.where), "")
        return _cell(said.get("description") or (_sentence(self.blocks[name]["description"]) if name else ""))

    def _named(self, said: Schema, path: str) -> list[tuple[str, str]]:
        """The blocks that a value may be, and the path of each."""
        found = []
        for kind in said.get("anyOf", [said]):
            kind = kind.get("then", kind)
            if kind.get("type") == "array":
                found += self._named(kind["items"], f"{path}[]")
            elif isinstance(kind.get("additionalProperties"), dict):
                found += self._named(kind["additionalProperties"], f"{path}.NAME")
            elif "properties" in kind:  # callbacks and loggers: named in the table of their family
                found += [
                    pair for key, body in kind["properties"].items() for pair in self._named(body, f"{path}.{key}")
                ]
            elif (name := _name(kind)) and "properties" in self.blocks[name]:
                found.append((name, path))
        return found

    def _type(self, said: Schema) -> str:
        kinds = [self._kind(kind) for kind in said.get("anyOf", [said])]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind))

    def _kind(self, kind: Schema) -> str:
        kind = kind.get("then", kind)
        if name := _name(kind):
            if name == "interpolation":
                return ""
            return f"block `{self.where[name]}`" if name in self.where else "duration"
        if "enum" in kind:
            return ", ".join(f"`{_yaml(each)}`" for each in kind["enum"])
        if kind.get("type") == "array":
            return f"list of {self._type(kind['items'])}"
        if isinstance(kind.get("additionalProperties"), dict):
            return f"mapping to {self._type(kind['additionalProperties'])}"
        signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        bounds = ", ".join(f"{sign} {_bound(kind[word])}" for word, sign in signs.items() if word in kind)
        words = kind.get("type", "anything")
        names = {"object": "mapping", "integer": "whole number", "string": "text", "boolean": "true or false"}
        said = " or ".join(names.get(word, word) for word in ([words] if isinstance(words, str) else words))
        return f"{said} {bounds}".strip()


def _name(node: Schema) -> str:
    return str(node.get("$ref", "")).rpartition("/")[2]


def _is_extra(key: str, said: Schema) -> bool:
    """Whether a key is another word or a shorthand; `variables` has no field, but a meaning of its own."""
    return "deprecated" in said or ("x-short" in said and key != "variables")


def _alike(one: Schema | None, other: Schema) -> bool:
    """Whether two keys have the same row: what a shorthand stands for may differ."""
    return one is not None and _without_else(one) == _without_else(other)


def _without_else(said: Schema) -> Schema:
    kinds = [{word: part for word, part in kind.items() if word != "else"} for kind in said.get("anyOf", [])]
    return said | {"anyOf": kinds}


def _required(block: Schema) -> list[str]:
    """Keys that must be given, if not by another word."""
    either = [rule["anyOf"][0]["required"][0] for rule in block.get("allOf", []) if "anyOf" in rule]
    return [*block.get("required", []), *either]


def _foreign(keys: Schema) -> str:
    """The other words that a block accepts, by what becomes of them."""
    words: dict[str, list[str]] = {}
    for key, said in keys.items():
        if said.get("deprecated"):
            words.setdefault(said["description"].rstrip("."), []).append(f"`{key}`")
    said = (f"{', '.join(names)} ({_small(why)})" for why, names in words.items())
    return f"Also accepted: {_cell('; '.join(said))}." if words else ""


def _default(said: Schema) -> str:
    return f"`{_cell(_yaml(said['default']))}`" if "default" in said else ""


def _yaml(value: object) -> str:
    """A value on one line of YAML; text is quoted where it would not be seen."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return value if isinstance(value, str) and value.strip() and value == value.strip() else json.dumps(value)


def _small(text: str) -> str:
    """With a small first letter, unless the first word is an abbreviation."""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _bound(value: float) -> str:
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value >= 2**32 else f"{value:g}"


def _sentence(text: str) -> str:
    return _cell(text[:1].upper() + text[1:])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
