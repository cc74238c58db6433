"""LLM Foundry's `model: {name: hf_causal_lm}`: a Hugging Face model by name, as an llmfoundry model.

Its config.json determines the architecture, which becomes the `model` block; its weights, if requested, are loaded by
`load_path: hf:NAME`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from llmfoundry.config import ConfigError
from llmfoundry.integrations.foundry_tree import Note, Tree

_WHERE = "model.pretrained_model_name_or_path"
# Keys that tune how a module is loaded and do not affect results.
GONE = {
    "use_auth_token": "HF_TOKEN is read from the environment",
    "trust_remote_code": "code of a hub repository is never run",
    "use_flash_attention_2": "attention is flash on GPUs",
    "attn_implementation": "attention is flash on GPUs",
    "use_logits": "the loss is always computed from logits",
    "shift_labels": "labels are always shifted",
    "should_save_peft_only": "checkpoints hold what is trained",
    "allow_embedding_resizing": "a larger model.vocab_size adds rows to the embedding",
    "eos_token_id": "", "config_overrides.attn_config.attn_impl": "attention is flash on GPUs",
    "config_overrides.use_cache": "",
}  # fmt: skip
ONLY: dict[str, tuple[object, str]] = {
    "load_in_8bit": (False, "weights are trained in the precision that `precision` says"),
    "pretrained_lora_id_or_path": (None, "merge the adapter into its base first, with peft's merge_and_unload"),
}
_ROPE = "rope_theta", "rope_scaling"
_LENGTHS = ("max_seq_len", "n_positions", "max_position_embeddings", "n_ctx")
_WEIGHTS, _RESIDUAL, _EMBEDDINGS = "attn_config.attn_pdrop", "resid_pdrop", "emb_pdrop"
# Dropout keys of config.json, and the llmfoundry keys for them: for all families, and by family.
_DROPOUT = {"attention_dropout": (_WEIGHTS,)}
_DROPOUT_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "dbrx": {"resid_pdrop": (_RESIDUAL,), "attn_config.attn_pdrop": (_WEIGHTS,)},
    "gpt2": {"resid_pdrop": (_RESIDUAL,), "embd_pdrop": (_EMBEDDINGS,), "attn_pdrop": (_WEIGHTS,)},
    "gpt_neo": {"resid_dropout": (_RESIDUAL,), "embed_dropout": (_EMBEDDINGS,)},
    "mpt": {  # the MPT of transformers uses attn_pdrop for both; LLM Foundry's has resid_pdrop
        "attn_config.attn_pdrop": (_WEIGHTS, _RESIDUAL),
        "resid_pdrop": (_RESIDUAL,),
        "emb_pdrop": (_EMBEDDINGS,),
    },
    "opt": {"dropout": (_RESIDUAL,)},
}
# PEFT keys with the values that match llmfoundry's behavior; fan_in_fan_out only describes storage.
_PEFT_ONLY: dict[str, tuple[object, ...]] = {
    "inference_mode": (False,), "bias": ("none", False), "fan_in_fan_out": (False, True), "init_lora_weights": (True,),
}  # fmt: skip
_OURS = ("ffn_config", "attn_config", "lora", "vocab_size", "init_config")  # llmfoundry keys that are also accepted


def hugging_face_model(data: Tree) -> list[Note]:
    """Replace a block `model: {name: hf_causal_lm, ...}` by llmfoundry's equivalent, in place.

    Returns:
        A note for each change.

    Raises:
        ConfigError: with one line per mistake: the model cannot be found, no family can represent it, or a key requests
            something unsupported.
    """
    block = copy.deepcopy(data["model"])
    assert isinstance(block, dict)
    notes: list[Note] = []
    mistakes = _take_settings(block, notes)
    name = block.pop("pretrained_model_name_or_path", None)
    pretrained = block.pop("pretrained", True)
    overrides = block.pop("config_overrides", None) or {}
    peft = block.pop("peft_config", None) or {}
    beside = {key: block.pop(key) for key in _OURS if key in block}
    block.pop("name")
    mistakes += [f"model.{key}: unknown key of hf_causal_lm" for key in block]
    if not isinstance(name, str):
        mistakes.append(f"{_WHERE}: must name a folder or a model of the hub, found {name!r}")
    if not isinstance(pretrained, bool):
        mistakes.append(f"model.pretrained: must be true or false, found {pretrained!r}")
    for key, value in (("config_overrides", overrides), ("peft_config", peft)):
        if not isinstance(value, Mapping):
            mistakes.append(f"model.{key}: must be a mapping, found {value!r}")
    if pretrained and "ffn_config" in beside:
        mistakes.append(
            "model.ffn_config: these weights are of another block; make a mixture of them first with "
            f"`convert.py upcycle {name} OUT moe_num_experts=8 moe_top_k=2`, and set load_path to it"
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    assert isinstance(name, str) and isinstance(overrides, dict) and isinstance(peft, dict)
    model, allow, said = _our_model(name, overrides, peft)
    notes += said
    data["model"] = _merged(model, beside, whole="ffn_config")
    notes.append(Note("model", f"is that of {name}, written out in config.yaml"))
    if pretrained:
        notes += _weights_of(data, name, allow)
    else:
        why = "training starts from random weights, as model.init_config says"
        notes.append(Note("model.pretrained", why, False))
    return notes


def _take_settings(block: Tree, notes: list[Note]) -> list[str]:
    """Remove keys that do not affect results; returns mistakes."""
    for path, why in GONE.items():
        parent, _, key = path.rpartition(".")
        node: object = block
        for part in parent.split(".") if parent else ():
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and key in node:
            said = "ignored: it does not change results" + (f" ({why})" if why else "")
            notes.append(Note(f"model.{path}", said, node.pop(key)))
    return [
        f"model.{key}: {block.pop(key)!r} is not supported; {why}"
        for key, (allowed, why) in ONLY.items()
        if block.get(key, allowed) != allowed or block.pop(key, None)
    ]


def _our_model(name: str, given: Tree, peft: Tree, as_it_is: bool = False) -> tuple[Tree, list[str], list[Note]]:
    """Return the model block, the keys in which it differs from the checkpoint (for `load_allow`), and notes."""
    from llmfoundry.config import dump
    from llmfoundry.hf.adapters import PartOfMatrix, targets_of
    from llmfoundry.hf.facts import weight_differences
    from llmfoundry.hf.family import read_config
    from llmfoundry.hf.module import TransformersConfig
    from llmfoundry.hf.pretrained import locate, read_settings
    from llmfoundry.moe.layer import MoEConfig

    settings = read_settings(locate(name, settings_only=True))
    where = f"{name}/config.json"
    notes: list[Note] = []
    overrides = copy.deepcopy(given)
    try:
        family, stored = read_config(settings, where, as_it_is)
    except ConfigError as error:  # llmfoundry cannot express a setting
        family, stored = read_config(settings, where, as_it_is=True)
        notes.append(Note("model", str(error)))
    as_it_is = stored.name == "transformers"
    if as_it_is:
        said = f"{name} is trained as the module of transformers ({settings.get('model_type')}): FSDP, checkpoints and "
        notes.append(Note("model", f"{said}adapters as always, without our kernels"))
    attention = overrides.pop("attn_config", None) or {}
    documents = attention.pop("attn_uses_sequence_id", None) if isinstance(attention, dict) else None
    if attention:
        overrides["attn_config"] = attention
    for key in [key for key in overrides if key in _LENGTHS]:
        length = overrides.pop(key)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ConfigError(f"model.config_overrides.{key}: must be a number of tokens, found {length!r}")
        overrides[family.sizes["max_seq_len"]] = length
        notes.append(Note(f"model.config_overrides.{key}", "is now model.max_seq_len", length))
    defaults = _settings_of(str(settings["model_type"]))
    known = settings.keys() | set(family.sizes.values()) | defaults.keys() | set(_ROPE)
    unknown = [key for key in overrides if key not in known] + _unknown_inside(overrides, settings, defaults)
    if unknown:
        raise ConfigError("\n".join(f"model.config_overrides.{key}: {name} has no such setting" for key in unknown))
    if "rope_parameters" in settings:  # the format of `transformers` 5
        _join_rope(overrides)
    _, config = read_config(_merged(settings, overrides), where, as_it_is)
    if documents and as_it_is:
        said = "left out: a module of transformers reads one document in a row, so each example has a row of its own"
        notes.append(Note("model.config_overrides.attn_config.attn_uses_sequence_id", said, documents))
    if documents is not None and not as_it_is:
        attn = config.attn_config.model_copy(update={"attn_uses_sequence_id": documents})
        config = config.model_copy(update={"attn_config": attn})
    model = dump(config)
    assert isinstance(model, dict)
    if not as_it_is:
        notes += _add_dropout(model, name, _merged(settings, overrides))
    if peft:
        try:
            model["lora"], about = _lora(
                peft, lambda wanted: wanted if as_it_is else targets_of(family, config, wanted)
            )
        except PartOfMatrix as error:  # use the module of `transformers`, as PEFT does
            if isinstance(config.ffn_config, MoEConfig):  # the module has no kernels for them
                raise ConfigError(str(error)) from None
            model, allow, about = _our_model(name, given, peft, as_it_is=True)
            return (
                model,
                allow,
                [Note("model.peft_config", f"{str(error).partition(': ')[2]} to train an llmfoundry model"), *about],
            )
        notes += about
        if isinstance(config, TransformersConfig) and config.has_stacked_experts:
            said = "adapts no experts: the module of transformers holds them stacked; linear layers are adapted"
            notes.append(Note("model.peft_config", said))
    allow = [f"model.{key}" for key in weight_differences(stored, config)]
    return model, allow, notes


def _settings_of(kind: str) -> Tree:
    """Return what a config.json of this type may contain, with its defaults."""
    from transformers import CONFIG_MAPPING

    return dict(CONFIG_MAPPING[kind]().to_dict()) if kind in CONFIG_MAPPING else {}


def _unknown_inside(overrides: Tree, settings: Mapping[str, object], defaults: Tree) -> list[str]:
    """Return paths in nested override blocks that neither the config.json nor its type has."""
    unknown = []
    for block, given in overrides.items():
        blocks = [each.get(block) for each in (settings, defaults)]
        known = {key for each in blocks if isinstance(each, Mapping) for key in each}
        if known and isinstance(given, Mapping) and not block.startswith("rope"):
            unknown += [f"{block}.{key}" for key in given if key not in known]
    return unknown


def _join_rope(overrides: Tree) -> None:
    """Move RoPE settings to where `transformers` 5 has them, in place."""
    rope: Tree = {}
    for key in (key for key in _ROPE if key in overrides):
        value = overrides.pop(key)
        if isinstance(value, Mapping):
            rope |= {("rope_type" if word == "type" else word): each for word, each in value.items()}
        elif value is not None:
            rope[key] = value
    if rope:
        own = overrides.get("rope_parameters")
        overrides["rope_parameters"] = rope | (own if isinstance(own, dict) else {})


def _add_dropout(model: Tree, name: str, settings: Tree) -> list[Note]:
    """Apply the dropout in a config.json to a model block, in place; returns notes."""
    from transformers import CONFIG_MAPPING

    kind = str(settings["model_type"])
    theirs: Tree = CONFIG_MAPPING[kind]().to_dict() | settings  # including defaults
    notes = []
    for path, ours in (_DROPOUT_OF.get(kind, {}) | _DROPOUT).items():
        block, _, key = path.rpartition(".")
        inner = theirs.get(block, {}) if block else theirs
        value = inner.get(key) if isinstance(inner, dict) else None
        if not value:
            continue
        targets = [target for target in ours if _put(model, target, value)]
        said = f"is now {', '.join(f'model.{target}' for target in targets)}" if targets else "is not applied here"
        notes.append(Note("model", f"{path}={value} of {name} {said}"))
    return notes


def _put(model: Tree, path: str, value: object) -> bool:
    """Set a key of the model block; returns whether the model has such a key."""
    block, _, key = path.rpartition(".")
    inner = model[block] if block else model
    assert isinstance(inner, dict)
    if key in inner:
        inner[key] = value
    return key in inner


def _lora(peft: Tree, targets: Callable[[str | list[str]], str | list[str]]) -> tuple[Tree, list[Note]]:
    """Convert `peft_config` to `model.lora`."""
    rest = dict(peft)
    kinds = str(rest.pop("peft_type", "LORA")).upper(), str(rest.pop("task_type", "CAUSAL_LM")).upper()
    if kinds != ("LORA", "CAUSAL_LM"):
        raise ConfigError(f"model.peft_config: peft_type {kinds[0]}, task_type {kinds[1]}: only LORA with CAUSAL_LM")
    rest.pop("base_model_name_or_path", None)
    for key, allowed in _PEFT_ONLY.items():
        value = rest.pop(key, None)
        if not any(value is one or (value == one and isinstance(one, str)) for one in (None, *allowed)):
            raise ConfigError(f"model.peft_config.{key}: {value!r} is not supported; leave it out")
    rank, alpha = rest.pop("r", 8), rest.pop("lora_alpha", 8)  # PEFT's defaults
    wanted = rest.pop("target_modules", None)
    if wanted is None:
        raise ConfigError(
            "model.peft_config.target_modules: is missing, and peft would choose by the kind of model; write "
            "all-linear, or names such as [q_proj, v_proj]"
        )
    if not isinstance(wanted, str) and not (isinstance(wanted, list) and all(isinstance(each, str) for each in wanted)):
        raise ConfigError(f"model.peft_config.target_modules: must be names, found {wanted!r}")
    try:
        lora: Tree = {"rank": rank, "alpha": alpha, "target_modules": targets(wanted)}
    except ConfigError as error:
        raise type(error)(f"model.peft_config.{error}") from None
    if dropout := rest.pop("lora_dropout", 0.0):
        lora["dropout"] = dropout
    if rest.pop("use_rslora", False):
        lora["use_rslora"] = True
    rest = {key: value for key, value in rest.items() if value}  # PEFT's defaults
    if rest:
        raise ConfigError(f"model.peft_config.{min(rest)}: is not supported; leave it out")
    return lora, [Note("model.peft_config", f"is now model.lora: {lora}")]


def _weights_of(data: Tree, name: str, allow: list[str]) -> list[Note]:
    """Start from the weights of a Hugging Face checkpoint, unless `load_path` names another one."""
    if data.get("load_path") is not None:
        return [Note("model.pretrained", f"left out, load_path={data['load_path']} brings the weights", True)]
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, dict) and tokenizer.get("name") not in (name, "bpe"):  # bpe: the checkpoint's own
        allow = [*allow, "tokenizer"]  # the YAML names another one
    data |= {"load_path": f"hf:{name}", "load_weights_only": True}
    said = ""
    if allow:
        before = data.get("load_allow")
        data["load_allow"] = [*(before if isinstance(before, list) else []), *allow]
        said = f"; load_allow: {allow}"
    return [Note("model.pretrained", f"is now load_path: hf:{name}, load_weights_only: true{said}", True)]


def _merged(base: Mapping[str, object], over: Mapping[str, object], whole: str = "") -> Tree:
    """Merge nested mappings; `over` takes precedence, and its value of the key `whole` replaces that of `base`."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        is_pair = isinstance(old, Mapping) and isinstance(value, Mapping) and key != whole
        merged[key] = _merged(old, value) if is_pair else value  # type: ignore[arg-type]
    return merged
