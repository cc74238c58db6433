"""Translates LLM Foundry's legacy keys, with a note for each change.

Keys with an unchanged meaning need no translation. Keys that were renamed, moved or dropped are handled here. Each
change is reported as a note, and anything that would change results and has no equivalent is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from decimal import Decimal

from llmfoundry.config import ConfigError
from llmfoundry.integrations.foundry_fsdp import fsdp, mixed_precision
from llmfoundry.integrations.foundry_keys import (
    DURATIONS,
    EMPTY,
    GONE,
    INSTEAD,
    ONLY,
    REFUSED,
    REFUSED_VALUES,
    RENAMED_VALUES,
    TASKS,
    VARIABLES,
)
from llmfoundry.integrations.foundry_paths import load_path, made_up_name, temporary_folder, without_placeholders
from llmfoundry.integrations.foundry_tree import Note, Tree, copied, look, present, put, take
from llmfoundry.integrations.hf_causal_lm import hugging_face_model
from llmfoundry.model import foundry_words


class Untranslated(ConfigError):
    """Legacy keys request something that llmfoundry does not support; the message has one line per key.

    Attributes:
        rest: the translated file without them, so that its other mistakes can be reported too.
    """

    def __init__(self, mistakes: Sequence[str], rest: Tree) -> None:
        super().__init__("\n".join(mistakes))
        self.rest = rest


def translate(data: Tree, variables: Set[str] = frozenset()) -> tuple[Tree, list[Note]]:
    """Translate a YAML with LLM Foundry v0.22's keys to llmfoundry's.

    Args:
        data: what `load_yaml` returned; not modified.
        variables: top-level keys that are not settings and that the file refers to with `${...}`.

    Returns:
        The translated YAML, and a note for each change.

    Raises:
        Untranslated: if keys request something that llmfoundry does not support.
    """
    theirs = is_theirs(data)
    data = copied(data)
    notes: list[Note] = []
    mistakes: list[str] = []
    for path in (path for key in EMPTY for path in present(data, key) if look(data, path)[0] is None):
        take(data, path)
    for path in sorted({*VARIABLES, *(variables if theirs else ())} & data.keys()):
        notes.append(Note(path, "kept as a variable only", take(data, path)))
    _one_by_one(data, notes, mistakes)
    notes += _rope_default(data)
    for path, apply in _MOVED.items():
        for place in present(data, path):
            value = take(data, place)
            try:
                notes += [_note(place, new, value) for new in apply(data, value)]
            except ConfigError as error:
                mistakes.append(str(error))
    if theirs:  # in a file that is not LLM Foundry's, a missing save_folder is a mistake
        fills = (
            made_up_name, without_placeholders, temporary_folder, _defaults, _data_defaults, _tokens, _packed,
            _head_norms,
        )  # fmt: skip
        for fill in fills:
            try:
                notes += fill(data)
            except ConfigError as error:
                mistakes.append(str(error))
    if mistakes:
        raise Untranslated(mistakes, data)
    return data, notes


def _note(path: str, said: str, value: object) -> Note:
    if isinstance(said, Note):  # about another key
        return said
    return Note(path, said if said.startswith("left out") else f"is now {said}", value)


def _one_by_one(data: Tree, notes: list[Note], mistakes: list[str]) -> None:
    """Handle the keys that need no code (foundry_keys.py), in place."""
    for path, allowed in ONLY.items():
        for place in present(data, path):
            value = take(data, place)
            if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                notes.append(Note(place, "left out, it is what this framework does", value))
            else:
                instead = INSTEAD.get(path, f"remove it, or write {_shown(allowed[0])}")
                mistakes.append(f"{place}: {value!r} is not supported; {instead}")
    for path, why in REFUSED.items():
        for place in present(data, path):
            take(data, place)
            mistakes.append(f"{place}: {why}")
    for path, reasons in REFUSED_VALUES.items():
        value = look(data, path)[0]
        if isinstance(value, str) and value in reasons:
            take(data, path)
            if path == "optimizer.name":  # so that its other keys are not reported as belonging to another optimizer
                data["optimizer"] = {"name": "decoupled_adamw", "lr": 1.0}
            mistakes.append(f"{path}: {value} is not supported; {reasons[value]}")
    for path, why in GONE.items():
        for place in present(data, path):
            said = "ignored: it does not change results" + (f" ({why})" if why else "")
            notes.append(Note(place, said, take(data, place)))
    for path, values in RENAMED_VALUES.items():
        value, there = look(data, path)
        if there and isinstance(value, str) and value in values:
            put(data, path, values[value])
            notes.append(Note(path, f"{value} is now {values[value]}"))
    for path in DURATIONS:
        value, there = look(data, path)
        if path.startswith("scheduler.") and not isinstance(value, str):
            continue  # a number has no meaning in LLM Foundry either
        if there and (new := _duration(value)) is not None:
            notes.append(Note(path, f"is now {put(data, path, new)}", value))


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def is_theirs(data: Tree) -> bool:
    """Return whether a file is LLM Foundry's, rather than an llmfoundry file with some of its keys."""
    model = data.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return "fsdp_config" in data or name in ("mpt_causal_lm", "hf_causal_lm", *OTHER_MODELS)


def _defaults(data: Tree) -> list[Note]:
    """Fill in top-level keys that a file omits with LLM Foundry's defaults."""
    wanted: Tree = {"save_interval": "1000ba"}
    if data.get("eval_loader"):
        wanted["eval_subset_num_batches"] = -1
    if data.get("eval_loader") or data.get("icl_tasks"):
        rows = data.get("device_train_microbatch_size", "auto")
        wanted["device_eval_batch_size"] = 1 if rows == "auto" else rows
    if data.get("icl_tasks") and "max_seq_len" in data:
        wanted["icl_seq_len"] = data["max_seq_len"]
    missing = {key: value for key, value in wanted.items() if key not in data}
    data |= missing
    return [Note(key, f"is missing; now {value}, as LLM Foundry has it") for key, value in missing.items()]


def _data_defaults(data: Tree) -> list[Note]:
    """Fill in dataset keys with LLM Foundry's defaults: only the last turn is learned, and nothing is shuffled."""
    notes = []
    for loader in ("train_loader", "eval_loader"):
        for place in present(data, f"{loader}.dataset"):
            dataset, kind = look(data, place)[0], look(data, f"{place.removesuffix('.dataset')}.name")[0]
            if not isinstance(dataset, dict):
                continue
            said: Tree = {"shuffle": False} if loader == "train_loader" else {}
            if kind == "finetuning":
                said |= {"target_responses": "last", "turn_by_turn": True}
                notes += _task(dataset, place)
            for key in (key for key in said if key not in dataset):
                notes.append(Note(f"{place}.{key}", f"is missing; now {said[key]}, as LLM Foundry has it"))
                dataset[key] = said[key]
    return notes


def _task(dataset: Tree, place: str) -> list[Note]:
    """Set the preprocessing_fn that LLM Foundry implies by the names of some datasets."""
    name = dataset.get("hf_name")
    if dataset.get("preprocessing_fn") is not None or name not in TASKS:
        return []
    dataset["preprocessing_fn"] = name
    return [Note(f"{place}.preprocessing_fn", f"is missing; now {name}, whose rows LLM Foundry knows")]


def _packed(data: Tree) -> list[Note]:
    """Mask examples in the same row from each other, which is what packing means here."""
    ratio = look(data, "train_loader.dataset.packing_ratio")[0]
    if ratio is None or look(data, "model.attn_config.attn_uses_sequence_id")[0] is True:
        return []
    if look(data, "model.name")[0] == "transformers":
        why = "left out; each example has a row of its own, for the module of transformers keeps no documents apart"
        return [Note("train_loader.dataset.packing_ratio", why, ratio)]
    said = put(data, "model.attn_config.attn_uses_sequence_id", True)
    said = f"is now {said}; examples that share a row are kept apart"
    return [Note("train_loader.dataset.packing_ratio", said, ratio)]


def _tokens(data: Tree) -> list[Note]:
    """Note that LLM Foundry does not count padding tokens in durations of `finetuning` data."""
    if look(data, "train_loader.name")[0] != "finetuning":
        return []
    said = "counts all tokens of rows, including padding; LLM Foundry counts only those of examples"
    return [Note(path, said, value) for path in DURATIONS if str(value := look(data, path)[0]).endswith("tok")]


def _head_norms(data: Tree) -> list[Note]:
    """Set the norm of queries and keys that LLM Foundry uses."""
    model = data.get("model")
    said = foundry_words.layer_norm(model) if isinstance(model, dict) else []
    return [Note("model.attn_config.qk_ln", f"sets {each}, as it does there", True) for each in said]


_NUMBER_AND_UNIT = re.compile(r"\s*\+?([\d._]+(?:e[-+]?\d{1,2})?)\s*(iter|sec|ep|ba|sp|tok|dur)", re.IGNORECASE)
_PLAIN = re.compile(r"\d+(\.\d+)?(e\+?\d{1,2})?")
_UNITS = {"iter": "ba", "sec": "s"}


def _duration(value: object) -> str | None:
    """Convert Composer's other spellings of a duration; None if it needs no change or cannot be read.

    A number counts epochs, `iter` are steps here, `90sec` are 90s and `1h30m` or `1h0m30s` become seconds; units may
    be capitals, and `5e-2dur` is 0.05dur. Numbers are what Python's float() reads: `10_000ba`, `.5dur`, `10 ba`.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"{value}ep"
    if not isinstance(value, str):
        return None
    if match := _NUMBER_AND_UNIT.fullmatch(value):
        number, unit = match[1].lower(), match[2].lower()
        try:
            float(number)
        except ValueError:
            return None
        exact = number if _PLAIN.fullmatch(number) else format(Decimal(number), "f")
        said = f"{exact}{_UNITS.get(unit, unit)}"
        return said if said != value else None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value)
    if match is None or sum(part is not None for part in match.groups()) < 2 and not value.endswith("m"):
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return f"{hours * 3600 + minutes * 60 + seconds}s"


_API = "models behind an API are not evaluated here; lm-eval evaluates them"
_EMBEDDING = "embedding models are not trained here; choose a causal model"
OTHER_MODELS = {
    "hf_t5": "encoder-decoder models are not trained here; choose a causal model",
    "contrastive_lm": _EMBEDDING, "finetune_embedding_model": _EMBEDDING,
    "openai_causal_lm": _API, "openai_chat": _API, "fmapi_causal_lm": _API, "fmapi_chat": _API,
}  # fmt: skip
# Replaces a model that is not available, so that mistakes in the rest of the file are found too.
_STAND_IN: Tree = {
    "name": "causal_lm", "d_model": 2, "n_heads": 1, "n_layers": 1, "vocab_size": 2**31, "max_seq_len": 2**31,
}  # fmt: skip


def _model(data: Tree, value: object) -> Sequence[str]:
    """Translate `model.name`: Hugging Face models, and models that are not supported."""
    if isinstance(value, str) and value in OTHER_MODELS:
        put(data, "model", dict(_STAND_IN))
        raise ConfigError(f"model.name: {value}: {OTHER_MODELS[value]}")
    put(data, "model.name", value)
    if value != "hf_causal_lm":
        return []
    try:
        return hugging_face_model(data)
    except ConfigError:
        put(data, "model", dict(_STAND_IN))
        raise


def _compile(data: Tree, value: object) -> list[str]:
    if value is None:
        return ["left out; parallel.compile: auto, the default, compiles blocks on GPUs"]
    if value != {}:
        raise ConfigError(f"compile_config: {value!r} is not supported; write parallel: {{compile: true}}")
    return [put(data, "parallel.compile", True)]


def _renamed(path: str) -> Callable[[Tree, object], list[str]]:
    return lambda data, value: [put(data, path, value)]


def _loss_group(data: Tree, value: object) -> list[str]:
    if value == "global_group":
        return [put(data, "model.ffn_config.moe_lbl_scope", "global_batch")]
    if value in (None, "none", "expert_group"):
        return ["left out; moe_lbl_scope says over which tokens the load is counted"]
    raise ConfigError(f"model.ffn_config.lbl_process_group: unknown {value!r}; write global_group, or leave it out")


def _moe_world_size(data: Tree, value: object) -> list[str]:
    return [put(data, "parallel.expert", value)]


def _capacity(data: Tree, value: object) -> list[str]:
    """Translate the capacity factor. MegaBlocks' dMoE ignores it and drops nothing; its MoE (`mb_moe`) applies it."""
    if value and look(data, "model.ffn_config.ffn_type")[0] != "mb_moe":
        return ["left out: a dropless mixture has no capacity (mb_moe has)"]
    put(data, "model.ffn_config.moe_capacity_factor", value)
    return []


def _off_at_zero(path: str) -> Callable[[Tree, object], list[str]]:
    """Return a translation of a key for which 0 means the same as leaving it out."""

    def moved(data: Tree, value: object) -> list[str]:
        if isinstance(value, (int, float)) and value == 0:
            return ["left out: 0 is off"]
        put(data, path, value)
        return []

    return moved


def _same_as(path: str, key: str) -> Callable[[Tree, object], list[str]]:
    """Return a translation of a key that repeats one of the model's."""

    def moved(data: Tree, value: object) -> list[str]:
        found = look(data, f"model.{key}")[0]
        if value not in (None, found):
            raise ConfigError(f"{path}: {value!r} is not model.{key}={found!r}; leave it out")
        return [f"left out, model.{key} sets it"]

    return moved


def _rope_hf(data: Tree, value: object) -> list[str]:
    if not isinstance(value, dict):
        raise ConfigError(f"model.attn_config.rope_hf_config: must be a mapping, found {value!r}")
    kind = value.get("type", "no_scaling")
    if kind == "no_scaling":
        return ["no scaling"]
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(
            f"model.attn_config.rope_hf_config.type: {kind!r} is not supported; known: linear, llama3, yarn"
        )
    return [put(data, "model.attn_config.rope_scaling", value)]


def _rope_default(data: Tree) -> list[Note]:
    """Drop `rope_hf_config` if `rope_impl` is missing: LLM Foundry's default, dail, does not read it."""
    attention = look(data, "model.attn_config")[0]
    if look(data, "model.name")[0] != "mpt_causal_lm" or not isinstance(attention, dict) or "rope_impl" in attention:
        return []
    if attention.pop("rope_hf_config", None) is None:
        return []
    said = "left out: rope_impl is missing, and dail, LLM Foundry's default, does not read it; rope_impl: hf does"
    return [Note("model.attn_config.rope_hf_config", said)]


def _learned_pos_emb(data: Tree, value: object) -> list[str]:
    """Translate `learned_pos_emb`: true by default, but LLM Foundry turns it off if attention encodes positions."""
    own = [key for key in ("rope", "alibi") if look(data, f"model.attn_config.{key}")[0]]
    if value and own:
        return [f"off, as in LLM Foundry where attn_config.{own[0]} is on"]
    put(data, "model.learned_pos_emb", value)  # unchanged, so there is nothing to report
    return []


def _wandb_name(data: Tree, value: object) -> list[str]:
    """Translate W&B's `name`, which names the run; here `name` is the logger's type, as in config.yaml."""
    if value == "wandb":
        put(data, "loggers.wandb.name", value)
        return []
    return [put(data, "loggers.wandb.run_name", value)]


def _eval_workers(data: Tree, value: object) -> list[str]:
    return ["0, evaluation reads as it goes"] if value else []


def _of_model(apply: Callable[[Tree, object], list[str]]) -> Callable[[Tree, object], list[str]]:
    """Return a translation that is applied to the block `model`."""

    def moved(data: Tree, value: object) -> list[str]:
        model = data["model"]
        assert isinstance(model, dict)
        return apply(model, value)

    return moved


_MOVED: dict[str, Callable[[Tree, object], Sequence[str]]] = {
    "model.ffn_config.moe_world_size": _moe_world_size,
    "model.ffn_config.moe_capacity_factor": _capacity,
    **{
        path: _off_at_zero(path)
        for path in ("model.ffn_config.moe_jitter_eps", "model.ffn_config.moe_normalize_expert_weights")
    },
    "model.attn_config.rope_impl": _of_model(foundry_words.rope_impl),  # before those that it may remove
    "model.attn_config.rope_dail_config": _of_model(foundry_words.rope_dail),
    "model.attn_config.rope_hf_config": _rope_hf,
    "model.learned_pos_emb": _learned_pos_emb,
    "model.block_overrides": _of_model(foundry_words.block_overrides),
    "model.head_dim": _of_model(foundry_words.head_dim),
    "model.attn_config.qk_gn": _of_model(foundry_words.group_norm),
    "model.attn_config.attn_temperature_tuning": _of_model(foundry_words.temperature),
    "model.attn_config.kv_dim": _of_model(foundry_words.kv_dim),
    "model.attn_config.clip_qkv": _off_at_zero("model.attn_config.clip_qkv"),
    "eval_loader.num_workers": _eval_workers,
    "loggers.wandb.name": _wandb_name,
    "model.name": _model,
    "load_path": load_path,
    "model.attention_bias": _renamed("model.attn_config.bias"),
    "model.ffn_config.lbl_process_group": _loss_group,
    "model.ffn_config.hidden_size": _same_as("model.ffn_config.hidden_size", "d_model"),
    "model.ffn_config.num_layers": _same_as("model.ffn_config.num_layers", "n_layers"),
    "compile_config": _compile,
    "fsdp_config.mixed_precision": mixed_precision,
    "fsdp_config": fsdp,
}
