"""Runs llmfoundry models under Composer's `Trainer`, for its algorithms, callbacks and loggers.

`composer_parts` turns one YAML into the arguments of a Trainer:

    made = composer_parts(config)
    composer.Trainer(**made._asdict(), save_folder="runs/theirs").fit()

It needs `composer`, which `make setup-composer` installs in a separate environment; docs/composer.md says when to use
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import llmfoundry.integrations.torchvision_operators  # noqa: F401  before composer

# isort: split
import torch
from composer.core import Algorithm, Callback, DataSpec, Evaluator, State
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from llmfoundry import runtime
from llmfoundry.checkpoint.composer_names import is_composer, load_composer
from llmfoundry.checkpoint.finding import file_here
from llmfoundry.checkpoint.reading import HUGGING_FACE, load_model_only, read
from llmfoundry.config import ConfigError, is_theirs
from llmfoundry.data.loader import Loader, LoaderConfig
from llmfoundry.data.mixture import MixtureConfig
from llmfoundry.hf.pretrained import load_weights
from llmfoundry.integrations.composer_model import (
    ComposerCausalLM,
    GlobalNormClipping,
    LLMFoundrySettings,
    RouterBalance,
    check_same,
)
from llmfoundry.integrations.composer_rows import OnePass, TrainingRows, data_spec
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import build_mesh
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.schedule import Schedule


class ComposerParts(NamedTuple):
    """The arguments of `composer.Trainer`, by name. Add your own callbacks beside `LLMFoundrySettings`."""

    model: ComposerCausalLM
    train_dataloader: DataSpec
    eval_dataloader: list[Evaluator]
    optimizers: Optimizer
    schedulers: Callable[[State, float], float]
    algorithms: list[Algorithm]
    callbacks: list[Callback]
    max_duration: str
    eval_interval: str
    device_train_microbatch_size: int
    precision: str
    accumulate_train_batch_on_tokens: bool = True
    step_schedulers_every_batch: bool = True


def composer_parts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, shard: bool = False
) -> ComposerParts:
    """Build the parts of a run for Composer's Trainer.

    Args:
        config: the run.
        tokenizer: None: that of `config.tokenizer`.
        shard: distribute the model with `parallelize`, according to `config.parallel`; otherwise Composer does (DDP, or
            FSDP2 with `parallelism_config` and FSDP_VERSION=2).

    Raises:
        ConfigError: if a setting of the run is not available under Composer.
    """
    model_settings = config.model
    assert isinstance(model_settings, CausalLMConfig)
    model_settings.check_trainable()
    if shard:
        runtime.start(config.dist_timeout)
    dataset = config.train_loader.dataset
    tokenizer = tokenizer or config.tokenizer.build(dataset, [part.dataset for part in config.due_evaluations])
    special = config.tokenizer.special_tokens(tokenizer)
    documents = model_settings.attn_config.attn_uses_sequence_id

    def opened(part: LoaderConfig) -> Loader:
        return part.build(
            tokenizer, seed=config.seed, max_seq_len=config.max_seq_len, sequence_ids=documents, special=special
        )

    rank, world = runtime.rank(), runtime.world_size()
    device_rows, micro = config.global_train_batch_size // world, config.device_train_microbatch_size
    _check(config, model_settings, world)
    loader = opened(config.train_loader)
    timeline = Timeline.of(
        config.max_duration,
        rows_per_step=config.global_train_batch_size,
        tokens_per_row=loader.max_seq_len,
        rows_per_epoch=loader.rows_per_epoch,
    )
    if timeline.limit is not None:
        raise ConfigError(f"max_duration: {config.max_duration} is a time; under Composer give it in ba, ep, sp or tok")
    model = _model(config, model_settings, shard)
    _load(config, model)
    clipping = config.algorithms.gradient_clipping
    evaluators = [_evaluator(opened(part), config, rank, world) for part in config.due_evaluations]
    return ComposerParts(
        model=ComposerCausalLM(model, config.seed),
        train_dataloader=data_spec(TrainingRows(loader, config.global_train_batch_size, rank, world)),
        eval_dataloader=evaluators,
        optimizers=config.optimizer.build(model),
        schedulers=composer_schedule(config.scheduler.model_copy(update={"composer_step": False}).build(timeline)),
        algorithms=[GlobalNormClipping(clipping.clipping_threshold if clipping else None), RouterBalance()],
        callbacks=[LLMFoundrySettings(model_settings)],
        max_duration=f"{timeline.total_steps}ba",
        eval_interval=str(config.eval_interval) if evaluators else "1ep",
        device_train_microbatch_size=device_rows if micro == "auto" else micro,
        # With `shard`, the model computes in bfloat16 by itself; Composer's default on a GPU is float16.
        precision="fp32" if shard else config.precision_on(runtime.device().type),
    )


def _check(config: RunConfig, model: CausalLMConfig, world: int) -> None:
    """Reject settings that would give a different run under Composer."""
    rows, evaluated, micro = (
        config.global_train_batch_size,
        config.device_eval_batch_size,
        config.device_train_microbatch_size,
    )
    if rows % world or evaluated % world:
        raise ConfigError(
            f"global_train_batch_size={rows} and device_eval_batch_size={evaluated} must be multiples of the {world} "
            "ranks under Composer"
        )
    if isinstance(config.train_loader.dataset, MixtureConfig):
        raise ConfigError("train_loader.datasets: mixtures are not read under Composer; name one dataset")
    if config.optimizer.weight_dtype != torch.float32:
        raise ConfigError("optimizer.master_weights: under Composer weights are fp32; leave it out")
    balance = Balance.of(model)
    needs_load = balance is not None and balance.loss_weight > 0 and balance.scope == "global_batch"
    if needs_load and micro != "auto" and micro < rows // world:
        raise ConfigError(
            f"model.ffn_config.moe_lbl_scope=global_batch: with device_train_microbatch_size={micro} of the rank's "
            f"{rows // world} rows, Composer's loop does not know the load of the batch before the first backward; "
            "write moe_lbl_scope: microbatch, or device_train_microbatch_size: auto"
        )


def _evaluator(loader: Loader, config: RunConfig, rank: int, world: int) -> Evaluator:
    rows = config.device_eval_batch_size
    return Evaluator(
        label=loader.label or "eval",
        dataloader=data_spec(OnePass(loader, rows, rank, world)),
        metric_names=["LanguageCrossEntropy"],
        subset_num_batches=config.eval_subset_num_batches,
        device_eval_microbatch_size=rows // world,
    )


def composer_schedule(schedule: Schedule) -> Callable[[State, float], float]:
    """Return a schedule for Composer, which calls it before counting the step, so each factor comes one step late.

    llmfoundry's trainer does the same with `scheduler.composer_step: true`.
    """

    def factor(state: State, ssr: float = 1.0) -> float:
        if ssr != 1.0:
            raise ConfigError("scale_schedule_ratio: our schedules end with max_duration; change that instead")
        return schedule.multiplier(int(state.timestamp.batch))

    return factor


def _model(config: RunConfig, settings: CausalLMConfig, shard: bool) -> CausalLM:
    """Build the model with its initial weights, which are the same however it is sharded."""
    if not shard:
        with torch.device("cpu"):
            model = settings.build()
        assert isinstance(model, CausalLM)
        init_weights(model, config.seed)
        return model.to(runtime.device())
    place = runtime.device()
    mesh = build_mesh(config.parallel, place.type, n_experts(settings))
    with torch.device("meta"):
        model = settings.build()
    assert isinstance(model, CausalLM)
    model = parallelize(model, mesh, config.parallel, config.precision_on(place.type))
    return materialize(model, config.parallel, config.seed)


def _load(config: RunConfig, model: CausalLM) -> None:
    """Load the weights of `load_path`: a checkpoint of llmfoundry, Hugging Face or Composer."""
    path = config.load_path
    if path is None:
        return
    if is_theirs(path):
        load_weights(model, path.removeprefix(HUGGING_FACE), allow=config.load_allow)
        return
    if not config.load_weights_only:
        raise ConfigError(
            f"load_path: {path}: Composer cannot resume a run of this framework, only start from its weights: "
            "load_weights_only=true; to resume a run of Composer, use the load_path of its Trainer"
        )
    if is_composer(path):
        load_composer(file_here(path), model)
        return
    contents = read(path)
    saved = contents.config["model"]
    assert isinstance(saved, dict)
    check_same(str(contents.path), saved, model.config)
    load_model_only(contents, model)
