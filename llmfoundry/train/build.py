"""`build` shows how the parts of a run meet: YAML in, trainer out."""

from __future__ import annotations

import logging
import os
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from llmfoundry import runtime
from llmfoundry.checkpoint.checkpointer import Checkpointer
from llmfoundry.checkpoint.identity import MIXTURE, is_allowed
from llmfoundry.checkpoint.store import RunStore
from llmfoundry.config import ConfigError, is_url
from llmfoundry.data.loader import Loader
from llmfoundry.data.mixture import Mixture
from llmfoundry.data.sources import check_apart
from llmfoundry.data.tokenizer import Encoder, SpecialTokens
from llmfoundry.eval.icl_questions import Reader
from llmfoundry.kernels.experts import resolve_backend
from llmfoundry.layers.lora import wider_than_weight
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.balance import Balance
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.apply import keep_weights_in, materialize, parallelize
from llmfoundry.parallel.expert import mixtures, n_experts
from llmfoundry.parallel.fsdp import can_leave
from llmfoundry.parallel.mesh import Mesh, ParallelConfig, build_mesh
from llmfoundry.train.adamw import AdamW
from llmfoundry.train.agreement import check_same, check_same_config
from llmfoundry.train.callback import Callback
from llmfoundry.train.clock import Countdown, find_limit
from llmfoundry.train.config import CallbackConfig, Precision, RunConfig
from llmfoundry.train.duration import Duration, Timeline, seconds_of
from llmfoundry.train.evaluating import tasks_of
from llmfoundry.train.lion import DecoupledLionW
from llmfoundry.train.microbatch import Microbatches
from llmfoundry.train.mixing import Joined, row_ends, take_up
from llmfoundry.train.outputs import check_free
from llmfoundry.train.planned import settle
from llmfoundry.train.resume import Start, check_data, find_start, generation_for, settle_tokenizer, train_state
from llmfoundry.train.saving import Saver
from llmfoundry.train.schedule import Schedule
from llmfoundry.train.stored import begin_from_store
from llmfoundry.train.trainer import Trainer
from llmfoundry.train.watchdog import LOOSE, Watchdog, limits

log = logging.getLogger(__name__)


def build(config: RunConfig) -> Trainer:
    """The trainer of a run, with every part in place.

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
    config.model.check_trainable()
    precision = config.precision_on(device.type)
    check_device(config.model, device, precision)
    check_memory(config.model, device, config.optimizer_on(device.type).weight_dtype)
    mesh = build_mesh(config.parallel, device.type, n_experts(config.model))
    path, store = config.folder, None
    if is_url(config.save_folder):
        store = RunStore(config.save_folder, path, config.save_num_checkpoints_to_keep)
        runtime.on_rank0(partial(begin_from_store, store, config.autoresume))
    runtime.on_rank0(lambda: check_free(path, config.autoresume))
    microbatches = _microbatches(config, mesh)
    callbacks = _callbacks(config)
    checkpointer = Checkpointer(
        path / "checkpoints",
        keep=config.save_num_checkpoints_to_keep,
        asynchronous=bool(store or device.type == "cuda") if config.save_async == "auto" else config.save_async,
        timeout=seconds_of(config.hang_timeout) or LOOSE,
        store=store,
    )
    watchdog.phase("looking for checkpoints")
    start = find_start(config, checkpointer)
    watchdog.phase("getting the tokenizer and the data")
    for part in config.due_evaluations:
        check_apart(config.train_loader.dataset, part.dataset)
    config, tokenizer, special = settle_tokenizer(config, start)
    assert isinstance(config.model, CausalLMConfig)
    loader, *eval_loaders = _loaders(config, tokenizer, special)
    start = check_data(start, loader.fingerprint, config.load_allow, isinstance(loader.order, Mixture))
    for each in (loader, *eval_loaders):
        length = each.max_seq_len // each.order.sequences
        if length > config.model.max_seq_len:
            raise ConfigError(f"dataset.max_seq_len={length} exceeds model.max_seq_len={config.model.max_seq_len}")
    eval_loader = eval_loaders.pop(0) if eval_loaders and config.eval_loader is not None else None
    tasks = tasks_of(config, Reader(tokenizer, special))
    timeline = Timeline.of(
        config.max_duration,
        rows_per_step=config.global_train_batch_size,
        tokens_per_row=loader.max_seq_len,
        rows_per_epoch=loader.rows_per_epoch,
    )
    if config.global_train_batch_size > loader.rows_per_epoch:
        log.warning("global_train_batch_size=%d exceeds the %d rows of an epoch, so a step reads rows more than once; "
                    "lower it", config.global_train_batch_size, loader.rows_per_epoch)  # fmt: skip
    joined = _mix(config, loader, timeline, start)
    schedule = config.scheduler.build(timeline)
    _warn_of_no_rate(schedule, timeline, config.scheduler.t_warmup)
    watchdog.phase("building the model")
    loaded = bool(start.hugging_face or start.composer or start.contents) and not config.load_allow
    parallel = settle(config, mesh, device)
    model = _build_model(config, mesh, precision, loaded, parallel)
    _warn_of_adapters(config.model, model, start)
    _say_how_tokens_travel(model, config.parallel, parallel)
    microbatches.can_retry = can_leave(model)
    reference = None
    if config.loss.pairs and config.model.lora is None:
        reference = _build_model(config, mesh, precision, True, parallel).requires_grad_(False).eval()
    return Trainer(
        config=config,
        mesh=mesh,
        device=device,
        tokenizer=tokenizer,
        special=special,
        loader=loader,
        eval_loader=eval_loader,
        eval_loaders=eval_loaders,
        tasks=tasks,
        model=model,
        optimizer=_build_optimizer(config, model),
        schedule=schedule,
        timeline=timeline,
        balance=Balance.of(config.model),
        start=start,
        microbatches=microbatches,
        saver=Saver(checkpointer, config.save_failures_allowed),
        watchdog=watchdog,
        countdown=Countdown(find_limit(seconds_of(config.time_limit))),
        generation=generation_for(start, tokenizer),
        callbacks=list(callbacks.values()),
        named=callbacks,
        joined=joined,
        objective=config.loss.build(reference),
        reference=reference,
    )


def _warn_of_no_rate(schedule: Schedule, timeline: Timeline, warmup: Duration) -> None:
    """Say so where every step has learning rate 0: the first step of a warm-up does, and may be the only one."""
    first = range(min(timeline.total_steps, 3))
    if timeline.limit is None and not any(schedule.multiplier(step) for step in first):
        log.warning("scheduler: the learning rate is 0 in every step of this run, so it trains nothing; the first step "
                    "of a warm-up has 0 (t_warmup=%s): raise max_duration, or write scheduler.t_warmup=0ba",
                    warmup)  # fmt: skip


def _say_how_tokens_travel(model: CausalLM, asked: ParallelConfig, parallel: ParallelConfig) -> None:
    """What `exchange_tokens: auto` has become."""
    if parallel.expert > 1 and asked.exchange_tokens == "auto":
        why = " (ranks have different numbers of rows)" if parallel.exchange_tokens != "auto" else ""
        ways = {
            True: "gathered by the ranks that divide the experts",
            False: f"sent to the ranks of their experts{why}",
        }
        gathered = any(mixture.gathers for mixture in mixtures(model))
        log.info("parallel.exchange_tokens: auto: tokens are %s", ways[gathered])


def _warn_of_adapters(config: CausalLMConfig, model: CausalLM, start: Start) -> None:
    """Say what is legal of adapters, and seldom meant."""
    if config.lora is None or start.how in ("continue", "resume"):
        return
    if start.how == "new":
        log.warning("model.lora: adapters would train on frozen random weights; set load_path to a base model")
    if (wide := wider_than_weight(model)) is not None:
        sides = wide.b.shape[-2], wide.a.shape[-1]
        log.warning("model.lora.rank=%d exceeds a side of %s (%d x %d), so a lower rank would have the same capacity",
                    config.lora.rank, wide.name, *sides)  # fmt: skip


def _loaders(config: RunConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> list[Loader]:
    """Of training, then of each evaluation; the same on every rank."""
    assert isinstance(config.model, CausalLMConfig)
    documents = config.model.attn_config.attn_uses_sequence_id
    loader, *evaluated = (
        part.build(tokenizer, seed=config.seed, max_seq_len=config.max_seq_len, sequence_ids=documents, special=special)
        for part in (config.train_loader, *config.due_evaluations)
    )
    check_same(
        {
            "the tokenizer": Encoder(tokenizer, special).fingerprint(),
            "the data of train_loader": loader.fingerprint,
            **{f"the data of {each.label or 'eval_loader'}": each.fingerprint for each in evaluated},
        }
    )
    return [loader, *evaluated]


def _build_model(
    config: RunConfig, mesh: Mesh, precision: Precision, loaded: bool, parallel: ParallelConfig
) -> CausalLM:
    with torch.device("meta"):  # shapes only: no rank ever holds the whole model
        model = config.model.build()
    assert isinstance(model, CausalLM)
    keep_weights_in(config.optimizer_on(runtime.device().type).weight_dtype, model)
    model = parallelize(model, mesh, parallel, precision)
    return materialize(model, parallel, config.seed, loaded=loaded)  # the same values on every mesh


def _build_optimizer(config: RunConfig, model: CausalLM) -> torch.optim.Optimizer:
    optimizer = config.optimizer_on(runtime.device().type).build(model)
    if isinstance(optimizer, AdamW | DecoupledLionW):  # what they round at random differs from run to run
        optimizer.noise_seed = config.seed
    return optimizer


def numbered_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, start: Start
) -> Loader:
    """The training data of a run, whose rows have the numbers that they have in it."""
    assert isinstance(config.model, CausalLMConfig)
    loader = config.train_loader.build(
        tokenizer,
        seed=config.seed,
        max_seq_len=config.max_seq_len,
        sequence_ids=config.model.attn_config.attn_uses_sequence_id,
        special=special,
    )
    timeline = Timeline.of(
        config.max_duration,
        rows_per_step=config.global_train_batch_size,
        tokens_per_row=loader.max_seq_len,
        rows_per_epoch=loader.rows_per_epoch,
    )
    _mix(config, loader, timeline, start)
    return loader


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
            "ep, sp or tok, or give the datasets weights alone"
        )
    log.info("mixture: %s", ", ".join(f"{label} {share}" for label, share in mixture.describe().items()))
    return joined


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


def _microbatches(config: RunConfig, mesh: Mesh) -> Microbatches:
    """Refuse a global batch that would give ranks different numbers of microbatches: they must meet in each."""
    rows, ranks, micro = config.global_train_batch_size, mesh.data_ranks, config.device_train_microbatch_size
    if rows < ranks:
        raise ConfigError(
            f"global_train_batch_size={rows} leaves some of {ranks} ranks without a row; write {ranks} or more"
        )
    least, most = rows // ranks, -(-rows // ranks)
    if micro != "auto" and -(-least // micro) != -(-most // micro):
        raise ConfigError(
            f"global_train_batch_size={rows} over {ranks} ranks is {least} or {most} rows each, which "
            f"device_train_microbatch_size={micro} cuts into different numbers of microbatches; make it a multiple of "
            f"{ranks}, or the microbatch larger"
        )
    return Microbatches(micro, least, most)


def training_bytes(model: CausalLMConfig, weight: torch.dtype = torch.float32) -> int:
    """Bytes of the weights that are trained, and of their float32 gradients: what every optimizer needs."""
    return (weight.itemsize + 4) * model.n_trainable_params()


def machine_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(model: CausalLMConfig, device: torch.device, weight: torch.dtype = torch.float32) -> None:
    """Refuse a model that is too large for main memory, before the system kills the process."""
    needed, there = training_bytes(model, weight), machine_memory()
    if device.type == "cpu" and runtime.world_size() == 1 and needed > there:
        raise ConfigError(
            f"the model needs at least {needed / 2**30:.1f} GiB to train without a GPU, and this machine has "
            f"{there / 2**30:.1f} GiB; use GPUs (llmfoundry plan YAML says how many), or a smaller model"
        )


def check_device(model: CausalLMConfig, device: torch.device, precision: str) -> None:
    """Refuse implementations that were asked for and cannot run here."""
    if model.attn_config.attn_impl == "flex" and device.type != "cuda":
        raise ConfigError(f"model.attn_config.attn_impl=flex needs a CUDA device, found {device.type}; use auto")
    if precision == "amp_fp8" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ConfigError(
            "precision: amp_fp8 needs a GPU of compute capability 9.0 (Hopper) or later, found "
            f"{torch.cuda.get_device_name(device)}; write precision=amp_bf16"
        )
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    blocks = (model.ffn(layer) for layer in range(model.n_layers))
    drops = model.lora is not None and model.lora.dropout > 0 and model.adapts_experts
    for impl, kind in {(b.moe_impl, b.kind(model.d_model)) for b in blocks if isinstance(b, MoEConfig)}:
        try:
            resolve_backend(impl, kind._replace(dropout=drops), device, dtype)
        except ValueError as error:
            raise ConfigError(f"model.ffn_config.{error}") from None
