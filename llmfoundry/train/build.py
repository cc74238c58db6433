"""Build a trainer from a config: `build` shows how the parts of a run fit together."""

from __future__ import annotations

import logging
from functools import partial

import torch

from llmfoundry import runtime
from llmfoundry.checkpoint.checkpointer import Checkpointer
from llmfoundry.checkpoint.store import RunStore
from llmfoundry.config import ConfigError, is_url
from llmfoundry.layers.lora import wider_than_weight
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel.apply import keep_weights_in, materialize, parallelize
from llmfoundry.parallel.expert import mixtures, n_experts
from llmfoundry.parallel.fsdp import can_leave
from llmfoundry.parallel.mesh import Mesh, ParallelConfig, build_mesh
from llmfoundry.train.adamw import AdamW
from llmfoundry.train.alike import check_same_config
from llmfoundry.train.callback import Callback
from llmfoundry.train.clock import Countdown, find_limit
from llmfoundry.train.config import CallbackConfig, Precision, RunConfig
from llmfoundry.train.duration import seconds_of
from llmfoundry.train.feed import Feed
from llmfoundry.train.lion import DecoupledLionW
from llmfoundry.train.machine import check_device, check_memory
from llmfoundry.train.microbatch import Microbatches
from llmfoundry.train.outputs import check_free
from llmfoundry.train.planned import settle
from llmfoundry.train.resume import Start, find_start
from llmfoundry.train.run_data import read_data
from llmfoundry.train.run_tokenizer import generation_for
from llmfoundry.train.saving import Saver
from llmfoundry.train.schedule import warn_of_no_rate
from llmfoundry.train.stored import begin_from_store
from llmfoundry.train.trainer import Trainer
from llmfoundry.train.watchdog import LOOSE, Watchdog, limits

log = logging.getLogger(__name__)


def build(config: RunConfig) -> Trainer:
    """Build the trainer of a run, with all of its parts.

    Raises:
        ConfigError: a mistake of the user's, found before anything is written to `save_folder`.
    """
    # In a single process, only FSDP can keep weights in host memory.
    device = runtime.start(config.dist_timeout, group_of_one=config.parallel.cpu_offload)
    collective = seconds_of(config.step_timeout) or config.dist_timeout
    watchdog = Watchdog(config.folder, limits(seconds_of(config.hang_timeout), collective))
    watchdog.start()
    try:
        return _build(config, device, watchdog)
    except BaseException as error:
        named = watchdog.named("before the first step", error) if isinstance(error, RuntimeError) else None
        watchdog.close()
        if named is not None:
            raise named from error
        raise


def _build(config: RunConfig, device: torch.device, watchdog: Watchdog) -> Trainer:
    watchdog.phase("comparing settings")
    check_same_config(config)
    runtime.seed_all(config.seed)
    assert isinstance(config.model, CausalLMConfig)
    precision = _check_model(config, config.model, device)
    mesh = build_mesh(config.parallel, device.type, n_experts(config.model))
    store = _check_folder(config)
    microbatches = Microbatches(config.device_train_microbatch_size, config.global_train_batch_size, mesh.data_ranks)
    callbacks = _callbacks(config)
    checkpointer = _checkpointer(config, store, device)

    watchdog.phase("looking for checkpoints")
    start = find_start(config, checkpointer)

    watchdog.phase("getting the tokenizer and the data")
    data = read_data(config, start)
    config, start = data.config, data.start
    schedule = config.scheduler.build(data.timeline)
    warn_of_no_rate(schedule, data.timeline, config.scheduler.t_warmup)

    watchdog.phase("building the model")
    parallel = settle(config, mesh, device)
    new_model = partial(_model, config, mesh, precision, parallel)
    model = new_model(loaded=bool(start.hugging_face or start.composer or start.contents) and not config.load_allow)
    _warn_of_adapters(model, start)
    _say_how_tokens_travel(model, config.parallel, parallel)
    microbatches.can_retry = can_leave(model)
    reference = None
    if config.loss.pairs and model.config.lora is None:
        reference = new_model(loaded=True).requires_grad_(False).eval()

    return Trainer(
        config=config,
        mesh=mesh,
        device=device,
        tokenizer=data.tokenizer,
        special=data.special,
        loader=data.loader,
        eval_loader=data.eval_loader,
        eval_loaders=data.eval_loaders,
        tasks=data.tasks,
        model=model,
        optimizer=_optimizer(config, model),
        schedule=schedule,
        timeline=data.timeline,
        balance=Balance.of(model.config),
        start=start,
        feed=Feed(data.loader, config.global_train_batch_size, mesh, device),
        microbatches=microbatches,
        saver=Saver(checkpointer, config.save_failures_allowed),
        watchdog=watchdog,
        countdown=Countdown(find_limit(seconds_of(config.time_limit))),
        generation=generation_for(start, data.tokenizer),
        callbacks=list(callbacks.values()),
        named=callbacks,
        joined=data.joined,
        objective=config.loss.build(reference),
        reference=reference,
    )


def _check_model(config: RunConfig, model: CausalLMConfig, device: torch.device) -> Precision:
    """Refuse a model that this machine cannot train; returns the precision to compute in."""
    model.check_trainable()
    precision = config.precision_on(device.type)
    check_device(model, device, precision)
    check_memory(model, device, config.optimizer_on(device.type).weight_dtype)
    return precision


def _check_folder(config: RunConfig) -> RunStore | None:
    """Refuse a `save_folder` that cannot be used; returns its store, if it is in one."""
    path, store = config.folder, None
    if is_url(config.save_folder):
        store = RunStore(config.save_folder, path, config.save_num_checkpoints_to_keep)
        runtime.on_rank0(partial(begin_from_store, store, config.autoresume))
    runtime.on_rank0(lambda: check_free(path, config.autoresume))
    return store


def _callbacks(config: RunConfig) -> dict[str, Callback]:
    found = {}
    parts = {f"callbacks.{name}": part for name, part in config.callbacks.items()}
    for name, part in (parts | {f"loggers.{name}": part for name, part in config.loggers.items()}).items():
        built = part.build()
        if not isinstance(built, Callback):  # a plug-in's mistake
            raise ConfigError(f"{name}: build() must return a Callback, found {type(built).__name__}")
        if isinstance(part, CallbackConfig):
            part.check_run(config)
        found[name] = built
    return found


def _checkpointer(config: RunConfig, store: RunStore | None, device: torch.device) -> Checkpointer:
    return Checkpointer(
        config.folder / "checkpoints",
        keep=config.save_num_checkpoints_to_keep,
        asynchronous=bool(store or device.type == "cuda") if config.save_async == "auto" else config.save_async,
        timeout=seconds_of(config.hang_timeout) or LOOSE,
        store=store,
    )


def _model(config: RunConfig, mesh: Mesh, precision: Precision, parallel: ParallelConfig, *, loaded: bool) -> CausalLM:
    with torch.device("meta"):  # shapes only: no rank ever holds the whole model
        model = config.model.build()
    assert isinstance(model, CausalLM)
    keep_weights_in(config.optimizer_on(runtime.device().type).weight_dtype, model)
    model = parallelize(model, mesh, parallel, precision)
    return materialize(model, parallel, config.seed, loaded=loaded)  # the same values on every mesh


def _optimizer(config: RunConfig, model: CausalLM) -> torch.optim.Optimizer:
    optimizer = config.optimizer_on(runtime.device().type).build(model)
    if isinstance(optimizer, AdamW | DecoupledLionW):  # what they round at random differs from run to run
        optimizer.noise_seed = config.seed
    return optimizer


def _warn_of_adapters(model: CausalLM, start: Start) -> None:
    """Warn of adapter settings that are legal but rarely intended."""
    lora = model.config.lora
    if lora is None or start.how in ("continue", "resume"):
        return
    if start.how == "new":
        log.warning("model.lora: adapters would train on frozen random weights; set load_path to a base model")
    if (wide := wider_than_weight(model)) is not None:
        sides = wide.b.shape[-2], wide.a.shape[-1]
        log.warning("model.lora.rank=%d exceeds a side of %s (%d x %d), so a lower rank would have the same capacity",
                    lora.rank, wide.name, *sides)  # fmt: skip


def _say_how_tokens_travel(model: CausalLM, asked: ParallelConfig, parallel: ParallelConfig) -> None:
    """Log what `exchange_tokens: auto` was resolved to."""
    if parallel.expert > 1 and asked.exchange_tokens == "auto":
        why = " (ranks have different numbers of rows)" if parallel.exchange_tokens != "auto" else ""
        ways = {
            True: "gathered by the ranks that divide the experts",
            False: f"sent to the ranks of their experts{why}",
        }
        gathered = any(mixture.gathers for mixture in mixtures(model))
        log.info("parallel.exchange_tokens: auto: tokens are %s", ways[gathered])
