"""The data of a run: its tokenizer, its rows, its tasks, and its length in steps for that data."""

from __future__ import annotations

import logging
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llmfoundry.checkpoint.identity import MIXTURE, is_allowed
from llmfoundry.config import ConfigError
from llmfoundry.data.loader import Loader, LoaderConfig
from llmfoundry.data.mixture import Mixture
from llmfoundry.data.sources import check_apart
from llmfoundry.data.tokenizer import Encoder, SpecialTokens
from llmfoundry.eval.icl import Task
from llmfoundry.eval.icl_questions import Reader
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.train.alike import check_same
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.evaluating import tasks_of
from llmfoundry.train.mixing import Joined, row_ends, take_up
from llmfoundry.train.resume import Start, check_data
from llmfoundry.train.run_tokenizer import settle_tokenizer
from llmfoundry.train.trainer_json import train_state

log = logging.getLogger(__name__)


class RunData(NamedTuple):
    """The data of a run, the same on every rank.

    Attributes:
        config: records the rule for special tokens.
        start: records whether rows are counted from the first.
        eval_loader: the loader without a label.
        eval_loaders: the loaders with labels.
        joined: where the run switched to its present mixture.
    """

    config: RunConfig
    start: Start
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    loader: Loader
    eval_loader: Loader | None
    eval_loaders: list[Loader]
    tasks: list[Task]
    timeline: Timeline
    joined: Joined


def read_data(config: RunConfig, start: Start) -> RunData:
    """Prepare the data of a run; all ranks together.

    Raises:
        ConfigError: if the data cannot be read, does not fit the model, or is not the checkpoint's.
    """
    for part in config.due_evaluations:
        check_apart(config.train_loader.dataset, part.dataset)
    config, tokenizer, special = settle_tokenizer(config, start)
    loader, *evaluated = (
        _build(config, part, tokenizer, special) for part in (config.train_loader, *config.due_evaluations)
    )
    check_same(
        {
            "the tokenizer": Encoder(tokenizer, special).fingerprint(),
            "the data of train_loader": loader.fingerprint,
            **{f"the data of {each.label or 'eval_loader'}": each.fingerprint for each in evaluated},
        }
    )
    start = check_data(start, loader.fingerprint, config.load_allow, isinstance(loader.order, Mixture))
    for each in (loader, *evaluated):
        length = each.max_seq_len // each.order.sequences
        if length > config.model.max_seq_len:
            raise ConfigError(f"dataset.max_seq_len={length} exceeds model.max_seq_len={config.model.max_seq_len}")
    eval_loader = evaluated.pop(0) if evaluated and config.eval_loader is not None else None
    tasks = tasks_of(config, Reader(tokenizer, special))
    timeline = _timeline(config, loader)
    if config.global_train_batch_size > loader.rows_per_epoch:
        log.warning("global_train_batch_size=%d exceeds the %d rows of an epoch, so a step reads rows more than once; "
                    "lower it", config.global_train_batch_size, loader.rows_per_epoch)  # fmt: skip
    joined = _mix(config, loader, timeline, start)
    return RunData(config, start, tokenizer, special, loader, eval_loader, evaluated, tasks, timeline, joined)


def numbered_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, start: Start
) -> Loader:
    """Return the training data of a run, with rows numbered as in the run."""
    loader = _build(config, config.train_loader, tokenizer, special)
    _mix(config, loader, _timeline(config, loader), start)
    return loader


def _build(config: RunConfig, part: LoaderConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> Loader:
    assert isinstance(config.model, CausalLMConfig)
    documents = config.model.attn_config.attn_uses_sequence_id
    return part.build(
        tokenizer, seed=config.seed, max_seq_len=config.max_seq_len, sequence_ids=documents, special=special
    )


def _timeline(config: RunConfig, loader: Loader) -> Timeline:
    return Timeline.of(
        config.max_duration,
        rows_per_step=config.global_train_batch_size,
        tokens_per_row=loader.max_seq_len,
        rows_per_epoch=loader.rows_per_epoch,
    )


def _mix(config: RunConfig, loader: Loader, timeline: Timeline, start: Start) -> Joined:
    """Arrange the mixture of a run, if it reads one."""
    mixture = loader.order
    if not isinstance(mixture, Mixture):
        return Joined()
    contents = None if start.how in ("new", "weights") or start.rows_anew else start.contents
    rows = train_state(contents).rows if contents is not None else 0
    ends = row_ends(mixture.phases, timeline)
    joined = take_up(mixture, ends, contents, rows, is_allowed(MIXTURE, config.load_allow))
    if timeline.limit is None:
        mixture.check(timeline.total_steps * timeline.rows_per_step)
    elif mixture.is_bounded:
        raise ConfigError(
            "train_loader.datasets: tokens, epochs and max_epochs need a run of known length; give max_duration in ba, "
            "ep, sp or tok, or give the datasets only weights"
        )
    log.info("mixture: %s", ", ".join(f"{label} {share}" for label, share in mixture.describe().items()))
    return joined
