"""The whole life of a run: `build` shows how the parts meet, `Trainer.fit` what happens in which order."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import cast

import torch
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from llmfoundry import hf, runtime
from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState, Json, load_model_only
from llmfoundry.config import ConfigError, dump
from llmfoundry.data.loader import Loader
from llmfoundry.eval.perplexity import evaluate
from llmfoundry.kernels.experts import resolve_backend
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.balance import Balance, summary
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import Mesh, build_mesh
from llmfoundry.train.callback import Callback, Metrics
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.optim import set_learning_rate
from llmfoundry.train.outputs import RunFolder, check_free, read_summary
from llmfoundry.train.schedule import Schedule
from llmfoundry.train.step import StepResult, train_step

log = logging.getLogger(__name__)
_HUGGING_FACE = "hf:"  # before a folder or hub id in `load_path`


@dataclass
class TrainState:
    """How far a run is: all that resuming needs beside tensors. `rows` is the whole state of the loader."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    skipped_steps: int = 0  # updates left out for a gradient that was not finite
    skipped_in_a_row: int = 0


@dataclass
class Trainer:
    """A run, built and ready to `fit`. Callbacks read it; nothing but `fit` changes it."""

    config: RunConfig
    mesh: Mesh
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    loader: Loader
    eval_loader: Loader | None
    model: CausalLM
    optimizer: Optimizer
    schedule: Schedule
    timeline: Timeline
    balance: Balance | None
    checkpointer: Checkpointer
    callbacks: list[Callback]
    folder: RunFolder | None = None  # of rank 0, from `fit` on
    state: TrainState = field(default_factory=TrainState)
    evaluation: Metrics = field(default_factory=dict)  # of the last evaluation
    unevaluated: Metrics = field(default_factory=dict)  # of the last step, if a signal cut its evaluation short
    train_seconds: float = 0.0  # in steps alone, over all processes that the run has had
    signalled: bool = False  # this rank was asked to stop

    def fit(self) -> None:
        """Train until `max_duration`, or until a signal asks to stop."""
        self._load()
        if self._is_complete():
            log.info(
                "%s: already complete at step %d; raise max_duration, or choose another save_folder",
                self.config.save_folder, self.state.step,
            )  # fmt: skip
            return
        try:
            self._fit()
        finally:
            for callback in reversed(self.callbacks):
                callback.close()

    def _fit(self) -> None:
        runtime.on_rank0(self._claim)  # only now that nothing of the user's can be wrong is anything written
        for callback in self.callbacks:
            callback.fit_start(self)
        with self._signals():
            if self.config.eval_first and self.state.step == 0:
                found = self._evaluate()
                if found:
                    self._record({"step": 0, "tokens": 0} | found)
            stopped = False
            while (self.unevaluated or self.state.step < self.timeline.total_steps) and not stopped:
                metrics, self.unevaluated = self.unevaluated or self.take_step(), {}
                if self._due_evaluation():
                    found = self._evaluate()
                    self.unevaluated = {} if found else dict(metrics)
                    metrics |= found
                self._record(metrics)
                stopped = self._stopped()
                done = stopped or self.state.step == self.timeline.total_steps
                if done or self.timeline.due(self.config.save_interval, self.state.step):
                    self._save()
                self.checkpointer.poll()  # a save that failed in its thread is an error here, not at the next one
            self.checkpointer.wait()
            if not self.evaluation and self._evaluates and not stopped:
                self._evaluate()  # a run taken up after its last step
                stopped = self._stopped()
        if self.folder is not None:
            self.folder.write_summary(self._summary())
        if not stopped:
            for callback in reversed(self.callbacks):
                callback.fit_end(self)

    def _record(self, metrics: Metrics) -> None:
        for callback in self.callbacks if not self.unevaluated else ():  # they see it when it is whole
            callback.step_end(self, metrics)
        if self.folder is not None:
            self.folder.write_metrics(metrics)

    def _claim(self) -> None:
        self.folder = RunFolder.claim(Path(self.config.save_folder), dump(self.config), self.config.autoresume)
        # The line of a step whose evaluation is made up for is written anew, as is that before the first step.
        self.folder.open_metrics(self.state.step - bool(self.unevaluated or self.state.step == 0))

    def _is_complete(self) -> bool:
        """Whether there is nothing left to do: the last step is there, and a summary of it with its evaluation."""
        if self.state.step < self.timeline.total_steps or not self.config.autoresume:
            return False
        summary = read_summary(Path(self.config.save_folder))
        evaluated = not self._evaluates or "validation/nats_per_token" in summary
        return evaluated and summary.get("steps") == self.state.step

    def _stopped(self) -> bool:
        """Whether any rank was asked to stop: the same on every rank, for a signal counts from when all look next."""
        return runtime.any_rank(self.signalled)

    def _save(self) -> None:
        if self.folder is not None:
            self.folder.sync()
        self.checkpointer.save(self._checkpoint())

    def take_step(self) -> Metrics:
        """Take the next rows, update the weights, and say what happened."""
        start = time.perf_counter()
        state, rows = self.state, self.config.global_train_batch_size
        batch = self.loader.batch(state.rows, rows, self.mesh.data_rank, self.mesh.data_ranks).to(self.device)
        rate = set_learning_rate(self.optimizer, self.schedule.multiplier(state.step))
        micro = self.config.device_train_microbatch_size
        clipping = self.config.algorithms.gradient_clipping
        result = train_step(
            self.model,
            self.optimizer,
            batch,
            microbatch_rows=len(batch.rows) if micro == "auto" else micro,
            max_grad_norm=clipping.clipping_threshold if clipping else None,
            balance=self.balance,
            noise_seed=self.config.seed,
        )
        state.step += 1
        state.rows += rows
        state.tokens += rows * self.loader.max_seq_len
        self._count_skip(result)
        metrics: Metrics = {
            "step": state.step,
            "tokens": state.tokens,
            "epoch": state.rows // self.loader.rows_per_epoch,
        }
        metrics |= {"loss/train/ce": result.ce.item(), "loss/train/total": result.total.item()}
        metrics |= {"lr": rate, "grad_norm": result.grad_norm.item(), "skipped_steps": state.skipped_steps}
        if result.router is not None and self.balance is not None:
            metrics |= summary(result.router, rows * self.loader.max_seq_len, self.balance)
        seconds = time.perf_counter() - start
        self.train_seconds += seconds
        return metrics | {"time/step_seconds": seconds}

    def _count_skip(self, result: StepResult) -> None:
        state = self.state
        state.skipped_steps += not result.updated
        state.skipped_in_a_row = 0 if result.updated else state.skipped_in_a_row + 1
        if not result.updated:
            log.warning("step %d: the gradient is not finite; the update was skipped", state.step)
        if state.skipped_in_a_row > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step {state.step}; "
                "lower optimizer.lr, or clip gradients; the newest checkpoint is "
                f"{self.checkpointer.latest() or 'not yet written'}"
            )

    @property
    def _evaluates(self) -> bool:
        return self.eval_loader is not None and self.config.eval_interval.value > 0

    def _due_evaluation(self) -> bool:
        last = self.state.step == self.timeline.total_steps
        return self._evaluates and (last or self.timeline.due(self.config.eval_interval, self.state.step))

    def _evaluate(self) -> Metrics:
        """Nothing if a signal cut it short."""
        assert self.eval_loader is not None
        self.model.eval()
        found = evaluate(
            self.model,
            self.eval_loader,
            rows=self.config.device_eval_batch_size,
            device=self.device,
            max_batches=self.config.eval_subset_num_batches,
            rank=self.mesh.data_rank,
            world=self.mesh.data_ranks,
            stopped=self._stopped,
        )
        self.model.train()
        if found is None:  # the older one is not of this step either
            self.evaluation = {}
            return {}
        self.evaluation = {"metrics/eval/LanguageCrossEntropy": found.nats_per_token}
        if found.bits_per_byte is not None:
            self.evaluation["metrics/eval/bits_per_byte"] = found.bits_per_byte
        return dict(self.evaluation)

    def _load(self) -> None:
        """Continue from the newest checkpoint of this folder, or begin from `load_path`, or begin."""
        path = self.checkpointer.latest() if self.config.autoresume else None
        if path is not None:
            self._load_all(path)
            log.info("continuing from %s at step %d", path, self.state.step)
        elif self.config.autoresume and (Path(self.config.save_folder) / "metrics.jsonl").exists():
            log.warning("%s: holds no checkpoint; starting from the first step", self.config.save_folder)
            self._load_first()
        else:
            self._load_first()

    def _load_first(self) -> None:
        """Begin from `load_path`, or from initial weights."""
        if self.config.load_path is None:
            return
        if self.config.load_path.startswith(_HUGGING_FACE):
            hf.load_weights(self.model, self.config.load_path.removeprefix(_HUGGING_FACE))
        elif self.config.load_weights_only:
            load_model_only(self.config.load_path, self.model)
        else:
            self._load_all(Path(self.config.load_path))
            if self.state.step >= self.timeline.total_steps:
                raise ConfigError(
                    f"load_path: {self.config.load_path} is at step {self.state.step}, and max_duration="
                    f"{self.config.max_duration} ends at step {self.timeline.total_steps}; raise it, or begin a new "
                    "run from its weights with load_weights_only=true"
                )

    def _load_all(self, path: Path) -> None:
        """Take up a run: everything, on the condition that its data is still the same."""
        # Looked at before anything is loaded: nothing has changed when it is refused.
        trainer = self.checkpointer.look(path)
        state, data = trainer.get("state"), trainer.get("data")
        if not isinstance(state, dict) or state.keys() != {part.name for part in fields(TrainState)}:
            raise ConfigError(f"{path}: was not saved by a training run; take its weights by load_weights_only=true")
        if data != self.loader.fingerprint:
            raise ConfigError(
                f"{path}: was trained on other data or with another tokenizer (files that have changed count too); "
                "restore them, or begin a new run from its weights with load_path and load_weights_only=true"
            )
        self.checkpointer.load(path, self._checkpoint())
        self.state = TrainState(**cast(dict[str, int], state))
        seconds = trainer.get("seconds")
        self.train_seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
        self.unevaluated = cast(Metrics, trainer.get("unevaluated", {}))
        if self.unevaluated:  # monitors shall find the rate of that step
            set_learning_rate(self.optimizer, self.schedule.multiplier(self.state.step - 1))

    def _checkpoint(self) -> CheckpointState:
        return CheckpointState(
            step=self.state.step,
            model=self.model,
            optimizer=self.optimizer,
            trainer={
                "state": asdict(self.state),
                "data": self.loader.fingerprint,
                "seconds": self.train_seconds,
                "unevaluated": cast(dict[str, Json], self.unevaluated),
            },
            config=dump(self.config),
            tokenizer=self.tokenizer,
        )

    def _summary(self) -> Metrics:
        model = self.config.model
        result: Metrics = {
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "params": model.n_params(),
            "active_params": model.n_active_params(),
            "trainable_params": model.n_trainable_params(),
            "tokens_per_sec": self.state.tokens / self.train_seconds if self.train_seconds else 0.0,
            "seconds": self.train_seconds,
            "peak_memory_bytes": runtime.peak_memory_bytes(self.device),
        }
        names = {"LanguageCrossEntropy": "nats_per_token", "bits_per_byte": "bits_per_byte"}
        return result | {f"validation/{names[k.rsplit('/', 1)[1]]}": v for k, v in self.evaluation.items()}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT finish the step or batch of an evaluation, save and stop; a second one ends at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self.signalled:
                raise KeyboardInterrupt
            log.warning("%s: stopping after this step or batch of an evaluation", signal.Signals(number).name)
            self.signalled = True

        before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def build(config: RunConfig) -> Trainer:
    """YAML in, trainer out. Read this to see how the parts meet.

    Raises:
        ConfigError: a mistake of the user's, found before anything is written to `save_folder`.
    """
    # Alone, only FSDP keeps weights in host memory.
    device = runtime.start(config.dist_timeout, alone_too=config.parallel.cpu_offload)
    runtime.seed_all(config.seed)
    assert isinstance(config.model, CausalLMConfig)
    precision = config.precision_on(device.type)
    check_device(config.model, device, precision)
    mesh = build_mesh(config.parallel, device.type, n_experts(config.model))
    path = Path(config.save_folder)
    runtime.on_rank0(lambda: check_free(path, dump(config), config.autoresume))
    _check_rows(config, mesh)
    callbacks = [part.build() for part in (*config.callbacks.values(), *config.loggers.values())]
    other = [config.eval_loader.dataset] if config.eval_loader is not None else []
    tokenizer = config.tokenizer.build(config.train_loader.dataset, other)
    n_ids = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if n_ids > config.model.vocab_size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {n_ids} ids")
    documents = config.model.attn_config.attn_uses_sequence_id
    loader, eval_loader = (
        part.build(tokenizer, seed=config.seed, max_seq_len=config.max_seq_len, sequence_ids=documents)
        if part
        else None
        for part in (config.train_loader, config.eval_loader)
    )
    assert loader is not None
    for part in (loader, eval_loader):
        if part is not None and part.max_seq_len > config.model.max_seq_len:
            raise ConfigError(
                f"dataset.max_seq_len={part.max_seq_len} exceeds model.max_seq_len={config.model.max_seq_len}"
            )
    timeline = Timeline.of(
        config.max_duration,
        rows_per_step=config.global_train_batch_size,
        tokens_per_row=loader.max_seq_len,
        rows_per_epoch=loader.rows_per_epoch,
    )
    schedule = config.scheduler.build(timeline)
    with torch.device("meta"):  # shapes only: no rank ever holds the whole model
        model = config.model.build()
    assert isinstance(model, CausalLM)
    model = parallelize(model, mesh, config.parallel, precision)
    model = materialize(model, config.parallel, config.seed)  # the same values on every mesh
    return Trainer(
        config=config,
        mesh=mesh,
        device=device,
        tokenizer=tokenizer,
        loader=loader,
        eval_loader=eval_loader,
        model=model,
        optimizer=config.optimizer.build(model),
        schedule=schedule,
        timeline=timeline,
        balance=Balance.of(config.model),
        checkpointer=Checkpointer(
            path / "checkpoints",
            keep=config.save_num_checkpoints_to_keep,
            asynchronous=device.type == "cuda" if config.save_async == "auto" else config.save_async,
        ),
        callbacks=callbacks,
    )


def _check_rows(config: RunConfig, mesh: Mesh) -> None:
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


def check_device(model: CausalLMConfig, device: torch.device, precision: str) -> None:
    """Refuse implementations that were asked for and cannot run here."""
    if model.attn_config.attn_impl == "flex" and device.type != "cuda":
        raise ConfigError(f"model.attn_config.attn_impl=flex needs a CUDA device, found {device.type}; use auto")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    blocks = (model.ffn(layer) for layer in range(model.n_layers))
    for impl, kind in {(b.moe_impl, b.kind(model.d_model)) for b in blocks if isinstance(b, MoEConfig)}:
        try:
            resolve_backend(impl, kind, device, dtype)
        except ValueError as error:
            raise ConfigError(f"model.ffn_config.{error}") from None
