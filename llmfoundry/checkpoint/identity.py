"""Compares a run's settings with those of the checkpoint that it starts from.

A setting is part of a run's identity if changing it would change the meaning of the saved state: which text row n is,
what the weights compute, what the optimizer's state belongs to. Such differences are rejected unless `load_allow` names
them. All other settings (learning rate, schedule, duration, callbacks, mesh, ...) may differ, and are listed.

A key that an older checkpoint lacks counts as having its default there. Keys that no longer exist are listed. The
location of the data is not part of the identity; the fingerprint of its tokens is (train/resume.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from llmfoundry.config import Choice, Config, ConfigError, check
from llmfoundry.hf.facts import differences, facts, weight_differences
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.private import disclosed

# Identity beyond the model's function. `load_allow` also accepts names that are compared elsewhere.
ROWS = (
    "seed", "max_seq_len", "train_loader.name", "train_loader.drop_last", "train_loader.dataset.shuffle",
    "train_loader.dataset.shuffle_seed", "train_loader.dataset.shuffle_block_size", "train_loader.dataset.max_seq_len",
)  # fmt: skip
_RESUMED = (*ROWS, "global_train_batch_size", "optimizer.name")
DATA, MIXTURE, TOKENIZER = "data", "mixture", "tokenizer"
# How a run starts and where it writes files: these are not settings of the run itself. What determines the tokens is
# compared by fingerprint.
_UNLISTED = (
    "save_folder", "autoresume", "load_path", "load_weights_only", "load_allow", "tokenizer.add_bos",
    "tokenizer.parse_special_tokens",
)  # fmt: skip

# Model settings that change the shapes of weights.
_SIZES = (
    "d_model", "n_layers", "ffn_config.ffn_hidden_size", "ffn_config.moe_num_experts", "ffn_config.mlp_type",
    "ffn_config.shared_expert_hidden_size",
)  # fmt: skip

Plain = Mapping[str, object]


class Difference(NamedTuple):
    """A setting that differs."""

    key: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


class _Unset:
    """The value of a key that one side lacks."""

    def __repr__(self) -> str:
        return "(not set)"


_UNSET = _Unset()


class Comparison(NamedTuple):
    """How a run differs from the one that saved a checkpoint."""

    identity: list[Difference]
    others: list[Difference]


def compare(
    config: Config, model: CausalLMConfig, before: Plain, *, weights_only: bool, now: Plain | None = None
) -> Comparison:
    """Compare the settings of a run with those of a checkpoint.

    Args:
        config: the run's full config.
        model: its model.
        before: the checkpoint's config.yaml.
        weights_only: whether a new run starts from the weights; then only the model's function is identity.
        now: the run's settings as written, if some are written differently.
    """
    old = _flat(disclosed(filled(config, before), {}))
    new = _flat(disclosed(_dumped(config), {}) if now is None else now)
    identity = _model_differences(model, before, weights_only)
    others = []
    for key in new | old:
        difference = Difference(key, old.get(key, _UNSET), new.get(key, _UNSET))
        if difference.before == difference.now or key.startswith(_UNLISTED):
            continue
        if key in _RESUMED and not weights_only:
            identity.append(difference)
        elif key not in {each.key for each in identity}:
            others.append(difference)
    return Comparison(identity, others)


def check_allowed(comparison: Comparison, allow: Sequence[str], source: str, remedy: str) -> None:
    """Reject differences in identity that are not allowed by name.

    Args:
        comparison: from `compare`.
        allow: keys, or blocks of keys, as in `load_allow`.
        source: the checkpoint, for the message.
        remedy: what else the user can do.

    Raises:
        ConfigError: with one line per difference, and the remedy.
    """
    refused = [each for each in comparison.identity if not is_allowed(each.key, allow)]
    if refused:
        lines = [f"{each.key}: {each.now!r} differs from {each.before!r} of {source}" for each in refused]
        keys = [each.key for each in refused]
        if sizes := [key for key in keys if key.removeprefix("model.") in _SIZES]:
            advice = f"; with another {sizes[0]} the weights do not fit, so load_allow does not help"
        else:
            advice = f"; or accept the change: load_allow=[{','.join(keys)}]"
        raise ConfigError("\n".join([*lines, f"restore the old value{'s' * (len(keys) > 1)}; {remedy}{advice}"]))


def is_allowed(key: str, allow: Iterable[str]) -> bool:
    """Return whether `load_allow` names a key, or a block that contains it."""
    return any(f"{key}.".startswith(f"{each}.") for each in allow)


def check_names(config: Config, model: CausalLMConfig, allow: Sequence[str]) -> None:
    """Reject names in `load_allow` that can never allow anything.

    Raises:
        ConfigError: naming the first of them.
    """
    known = {DATA, MIXTURE, TOKENIZER, *_RESUMED, *_flat(_dumped(config))} | {
        f"model.{name}" for name in _named(facts(model))
    }
    for name in allow:
        if not any(is_allowed(each, [name]) for each in known):
            raise ConfigError(
                f"load_allow: {name}: no such key; write data, mixture, tokenizer, or a key of this file in full"
            )


def filled(config: Config, before: Plain) -> dict[str, object]:
    """Return `before` with today's keys: missing keys get their default, unless a value is required."""
    result = {key: value for key, value in before.items() if key not in type(config).model_fields}
    for name, field in type(config).model_fields.items():
        now = getattr(config, name)
        if name in before:
            old = before[name]
            if isinstance(now, Config) and isinstance(old, dict) and _is_of_kind(now, old):
                old = filled(now, old)
            result[name] = old
        elif not field.is_required() and not field.exclude:
            default = field.get_default(call_default_factory=True)
            result[name] = config.model_copy(update={name: default}).model_dump(mode="json", include={name})[name]
    return result


def _is_of_kind(now: Config, old: Plain) -> bool:
    """Return whether `old` holds settings of the class of `now`."""
    if not isinstance(now, Choice):
        return True
    tag = old.get(now._tag, type(now).model_fields[now._tag].default)
    return isinstance(tag, str) and now._members.get(tag) is type(now)


def _model_differences(model: CausalLMConfig, before: Plain, weights_only: bool) -> list[Difference]:
    old = before.get("model")
    if not isinstance(old, dict):
        return []
    known = _without_unknown(model, filled(model, old)) if _is_of_kind(model, old) else old
    was = check(ModelConfig, known, where="the checkpoint's model")
    assert isinstance(was, CausalLMConfig)
    differing = weight_differences(was, model) if weights_only else differences(facts(was), facts(model))
    found = [Difference(f"model.{key}", *both) for key, both in differing.items()]
    # Adapter training starts from a base without adapters.
    if was.lora != model.lora and not (weights_only and (was.lora is None or model.lora is None)):
        lora = (None if each is None else each.model_dump(mode="json") for each in (was.lora, model.lora))
        found.append(Difference("model.lora", *lora))
    return found


def _without_unknown(config: Config, data: Plain) -> dict[str, object]:
    """Return `data` without keys that no longer exist, as far as its blocks are of today's classes."""
    result: dict[str, object] = {}
    for name, value in data.items():
        if name in type(config).model_fields:
            now = getattr(config, name)
            if isinstance(now, Config) and isinstance(value, dict) and _is_of_kind(now, value):
                value = _without_unknown(now, value)
            result[name] = value
    return result


def _named(keys: Iterable[str]) -> set[str]:
    """Return the names of facts as in `differences`."""
    return {f"ffn_config.{key.partition('].')[2]}" if key.startswith("ffn_config[") else key for key in keys}


def _dumped(config: Config) -> dict[str, object]:
    return config.model_dump(mode="json")


def _flat(tree: object, path: str = "") -> dict[str, object]:
    if isinstance(tree, dict) and tree:
        return {
            k: v for key, part in tree.items() for k, v in _flat(part, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: tree}
