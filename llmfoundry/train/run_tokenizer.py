"""The tokenizer of a run and its rule for special tokens: the checkpoint's, if the run starts from one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmfoundry.checkpoint.identity import TOKENIZER, is_allowed
from llmfoundry.checkpoint.reading import Contents
from llmfoundry.config import ConfigError
from llmfoundry.data.tokenizer import SpecialTokens, TokenizerConfig
from llmfoundry.hf.pretrained import locate
from llmfoundry.hf.tokenizer import TOKENIZER_FILES, tokenizer_of
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.private import disclosed
from llmfoundry.train.config import RunConfig
from llmfoundry.train.resume import Start
from llmfoundry.train.trainer_json import is_trained

log = logging.getLogger(__name__)

_RULE = ("add_bos", "parse_special_tokens")  # of TokenizerConfig: how texts are read, not which tokenizer it is


def settle_tokenizer(config: RunConfig, start: Start) -> tuple[RunConfig, PreTrainedTokenizerBase, SpecialTokens]:
    """Determine the tokenizer of the run and the rule for special tokens, which the returned config records.

    Raises:
        ConfigError: the tokenizer differs from the checkpoint's and `load_allow` does not name it, or the model's
            vocabulary is too small.
    """
    tokenizer = _chosen(config, start)
    n_ids = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    assert isinstance(config.model, CausalLMConfig)
    if n_ids > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {n_ids} ids; write "
            f"model.vocab_size={n_ids} or more (weights that are loaded get rows that are the mean of the others)"
        )
    special = with_rule_of(config.tokenizer, start.contents).special_tokens(tokenizer)
    settled = {"add_bos": special.bos is not None, "parse_special_tokens": special.parse}
    config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update=settled)})
    _forget_secrets(config, tokenizer)
    return config, tokenizer, special


def _chosen(config: RunConfig, start: Start) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, if the run starts from a checkpoint."""
    wanted, dataset = config.tokenizer, config.train_loader.dataset
    others = [part.dataset for part in config.due_evaluations]
    folder = _tokenizer_of(start)
    if folder is None or is_allowed(TOKENIZER, config.load_allow):
        return wanted.build(dataset, others)
    own = wanted.model_copy(update={"name": str(folder), "vocab_size": None}).build(dataset, others)
    before = disclosed(start.contents.config, {}).get("tokenizer") if start.contents is not None else None
    if wanted.name == "bpe":
        size = before.get("vocab_size") if isinstance(before, dict) and before.get("name") == "bpe" else None
        if wanted.vocab_size not in (None, size, len(own)):
            raise _another_tokenizer(f"bpe of {wanted.vocab_size} entries", folder, own)
        log.info("tokenizer: using the checkpoint's own, of %d entries; no BPE is trained", len(own))
        return own
    if start.how == "weights" and isinstance(before, dict) and _same_tokenizer(config, before):
        return own
    asked = wanted.build(dataset, others)
    if asked.get_vocab() != own.get_vocab() or asked.eos_token_id != own.eos_token_id:
        raise _another_tokenizer(f"{wanted.name} of {len(asked)} entries", folder, own)
    return asked


def _forget_secrets(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Remove secrets from what `save_pretrained` would write."""
    said = config.disclosed()["tokenizer"]
    assert isinstance(said, dict)
    for key, value in config.tokenizer.kwargs.items():
        if said["kwargs"][key] != value:
            tokenizer.init_kwargs.pop(key, None)


def with_rule_of(wanted: TokenizerConfig, contents: Contents | None) -> TokenizerConfig:
    """Settings of a tokenizer; a rule for special tokens that they leave open is the checkpoint's.

    A run that was saved before there was such a rule had no BOS token and parsed no special tokens. A converted
    checkpoint that was not trained here leaves it to its tokenizer.
    """
    if contents is None:
        return wanted
    before = contents.config.get("tokenizer")
    older = False if is_trained(contents) else None
    update: dict[str, bool | None] = {}
    for key in _RULE:
        if getattr(wanted, key) is None:
            said = before.get(key) if isinstance(before, dict) else None
            update[key] = said if isinstance(said, bool) else older
    return wanted.model_copy(update=update)


def _same_tokenizer(config: RunConfig, before: Mapping[str, object]) -> bool:
    now = config.disclosed()["tokenizer"]
    assert isinstance(now, dict)
    return _without_rule(now) == _without_rule(before)


def _without_rule(tokenizer: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in tokenizer.items() if key not in _RULE}


def _another_tokenizer(asked: str, folder: Path, own: PreTrainedTokenizerBase) -> ConfigError:
    return ConfigError(
        f"tokenizer: {asked} is not the tokenizer of the weights, which is {folder} of {len(own)} entries; "
        f"write tokenizer.name={folder}, or take another one on purpose: load_allow=[tokenizer]"
    )


def _tokenizer_of(start: Start) -> Path | None:
    """The folder of the tokenizer that belongs to the run's checkpoint."""
    if start.contents is not None:
        return start.contents.tokenizer
    if start.hugging_face is None or start.hugging_face.endswith(".gguf"):
        return None
    folder = locate(start.hugging_face)
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def generation_for(start: Start, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The generation_config.json of the run's checkpoint, unless its ids mean other tokens now."""
    folder = _tokenizer_of(start)
    if start.generation is None or folder is None:
        return start.generation
    before, now = tokenizer_of(folder), tokenizer.get_vocab()
    assert before is not None
    same = all(now.get(token) == number for token, number in before.get_vocab().items())
    return start.generation if same else None
