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
from llmfoundry.config import ConfigError, dump
from llmfoundry.data.loader import Loader
from llmfoundry.eval.perplexity import evaluate
from llmfoundry.model.config import CausalLMConfig
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe.balance import Balance, summary
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.mesh import Mesh, build_mesh
from llmfoundry.train.callback import Callback, Metrics
from llmfoundry.train.checkpoint import Checkpointer, CheckpointState
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.optim import set_learning_rate
from llmfoundry.train.outputs import RunFolder, check_free
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
    train_seconds: float = 0.0  # of this process, in steps alone
    train_tokens: int = 0
    stop_requested: bool = False

    def fit(self) -> Metrics:
        """Train until `max_duration`, or until a signal asks to stop; returns what summary.json holds."""
        self._load()
        if runtime.is_rank0():  # only now that nothing of the user's can be wrong is anything written
            path = Path(self.config.save_folder)
            self.folder = RunFolder.claim(path, dump(self.config), self.config.autoresume)
            self.folder.open_metrics(self.state.step)
        runtime.barrier()
        for callback in self.callbacks:
            callback.fit_start(self)
        if self.config.eval_first and self.state.step == 0:
            self._evaluate()
        with self._signals():
            while self.state.step < self.timeline.total_steps and not self.stop_requested:
                metrics = self.take_step()
                self.stop_requested = runtime.any_rank(self.stop_requested)
                if self._due_evaluation():
                    metrics |= self._evaluate()
                for callback in self.callbacks:
                    callback.step_end(self, metrics)
                if self.folder is not None:
                    self.folder.write_metrics(metrics)
                done = self.stop_requested or self.state.step == self.timeline.total_steps
                if done or self.timeline.due(self.config.save_interval, self.state.step):
                    self.checkpointer.save(self._checkpoint())
                self.checkpointer.poll()  # a save that failed in its thread is an error here, not at the next one
            self.checkpointer.wait()
        if not self.evaluation and self._evaluates and not self.stop_requested:
            self._evaluate()  # a run taken up after its last step
        result = self._summary()
        if self.folder is not None:
            self.folder.write_summary(result)
        for callback in reversed(self.callbacks):
            callback.fit_end(self)
        return result

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
        self.train_tokens += rows * self.loader.max_seq_len
        return metrics | {
            "throughput/tokens_per_sec": rows * self.loader.max_seq_len / seconds,
            "time/step_seconds": seconds,
        }

    def _count_skip(self, result: StepResult) -> None:
        state = self.state
        state.skipped_steps += not result.updated
        state.skipped_in_a_row = 0 if result.updated else state.skipped_in_a_row + 1
        if not result.updated:
            log.warning("step %d: the gradient is not finite; the update was skipped", state.step)
        if state.skipped_in_a_row > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step {state.step}; "
                f"the newest checkpoint is {self.checkpointer.latest()}"
            )

    @property
    def _evaluates(self) -> bool:
        return self.eval_loader is not None and self.config.eval_interval.value > 0

    def _due_evaluation(self) -> bool:
        # Not when asked to stop: who asks may not wait that long, and resuming evaluates where the whole run does.
        last = self.state.step == self.timeline.total_steps
        return self._evaluates and (last or self.timeline.due(self.config.eval_interval, self.state.step))

    def _evaluate(self) -> Metrics:
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
        )
        self.model.train()
        self.evaluation = {"metrics/eval/LanguageCrossEntropy": found.nats_per_token}
        if found.bits_per_byte is not None:
            self.evaluation["metrics/eval/bits_per_byte"] = found.bits_per_byte
        return dict(self.evaluation)

    def _load(self) -> None:
        """Continue from the newest checkpoint of this folder, or begin from `load_path`, or begin."""
        path = self.checkpointer.latest() if self.config.autoresume else None
        if path is not None:
            self.state = self._load_all(path)
            log.info("continuing from %s at step %d", path, self.state.step)
        elif self.config.load_path is not None and self.config.load_path.startswith(_HUGGING_FACE):
            hf.load_weights(self.model, self.config.load_path.removeprefix(_HUGGING_FACE))
        elif self.config.load_path is not None and self.config.load_weights_only:
            self.checkpointer.load_model(Path(self.config.load_path), self.model)
        elif self.config.load_path is not None:
            self.state = self._load_all(Path(self.config.load_path))

    def _load_all(self, path: Path) -> TrainState:
        state = self.checkpointer.load(path, self._checkpoint()).get("state")
        if not isinstance(state, dict) or state.keys() != {part.name for part in fields(TrainState)}:
            raise ConfigError(f"{path}: was not saved by a training run; take its weights by load_weights_only=true")
        return TrainState(**cast(dict[str, int], state))

    def _checkpoint(self) -> CheckpointState:
        return CheckpointState(
            step=self.state.step,
            model=self.model,
            optimizer=self.optimizer,
            trainer={
                "state": asdict(self.state),
                "schedule": {"multiplier": self.schedule.multiplier(self.state.step)},
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
            "tokens_per_sec": self.train_tokens / self.train_seconds if self.train_seconds else 0.0,
            "seconds": self.train_seconds,
            "peak_memory_bytes": runtime.peak_memory_bytes(self.device),
        }
        names = {"LanguageCrossEntropy": "nats_per_token", "bits_per_byte": "bits_per_byte"}
        return result | {f"validation/{names[k.rsplit('/', 1)[1]]}": v for k, v in self.evaluation.items()}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT finish the step, save and stop; a second one ends at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            log.warning("%s: stopping after this step", signal.Signals(number).name)
            self.stop_requested = True

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
    device = runtime.start(config.dist_timeout)
    runtime.seed_all(config.seed)
    assert isinstance(config.model, CausalLMConfig)
    precision = config.precision_on(device.type)
    mesh = build_mesh(config.parallel, device.type, _n_experts(config.model))
    path = Path(config.save_folder)
    if runtime.is_rank0():
        check_free(path, dump(config), config.autoresume)
    if config.global_train_batch_size < mesh.data_ranks:
        raise ConfigError(
            f"global_train_batch_size={config.global_train_batch_size} leaves some of {mesh.data_ranks} ranks without "
            f"a row; write {mesh.data_ranks} or more"
        )
    tokenizer = config.tokenizer.build(config.train_loader.dataset)
    if len(tokenizer) > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {len(tokenizer)} entries"
        )
    documents = config.model.attn_config.attn_uses_sequence_id
    loader, eval_loader = (
        part.build(tokenizer, seed=config.seed, max_seq_len=config.max_seq_len, sequence_ids=documents)
        if part
        else None
        for part in (config.train_loader, config.eval_loader)
    )
    assert loader is not None
    timeline = Timeline.of(
        config.max_duration,
        rows_per_step=config.global_train_batch_size,
        tokens_per_row=loader.max_seq_len,
        rows_per_epoch=loader.rows_per_epoch,
    )
    schedule = config.scheduler.build(timeline)
    with torch.device("meta"):  # shapes only: no rank ever holds the whole model
        model = config.model.build()
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
        callbacks=[part.build() for part in (*config.callbacks.values(), *config.loggers.values())],
    )


def _n_experts(model: CausalLMConfig) -> int:
    """Experts of each mixture layer; 0 for a dense model."""
    blocks = (model.ffn(layer) for layer in range(model.n_layers))
    return next((block.moe_num_experts for block in blocks if isinstance(block, MoEConfig)), 0)
