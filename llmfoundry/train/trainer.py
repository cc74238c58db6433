"""The life of a run: `Trainer.fit` shows what happens in which order. `train/build.py` makes a trainer."""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple, cast

import torch
from torch.profiler import record_function

from llmfoundry import hf, runtime
from llmfoundry.checkpoint.checkpointer import CheckpointState
from llmfoundry.checkpoint.composer_names import load_composer
from llmfoundry.checkpoint.reading import HUGGING_FACE, Contents, Json, load_model_only, read
from llmfoundry.config import ConfigError
from llmfoundry.data.loader import Batch
from llmfoundry.data.mixture import Mixture
from llmfoundry.eval.icl import PREFIX
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe.balance import named, summary
from llmfoundry.train.callback import Callback
from llmfoundry.train.evaluating import evaluate_by_tasks, evaluate_texts
from llmfoundry.train.loss import Loss
from llmfoundry.train.mixing import Joined, to_save
from llmfoundry.train.optim import set_learning_rate
from llmfoundry.train.outputs import RunFolder, check_shared, read_summary
from llmfoundry.train.resume import (
    Start,
    command_to_continue,
    train_state,
)
from llmfoundry.train.run import EVALUATED, STEP, Metrics, Run, Table, is_evaluated
from llmfoundry.train.saving import Saver
from llmfoundry.train.step import CROSS_ENTROPY, train_step

log = logging.getLogger(__name__)

# By Kubernetes and Slurm; Ctrl-C; by `sbatch --signal`; by a terminal that closes.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAME_REQUEST = 1.0  # seconds


class Ahead(NamedTuple):
    """The rows of the next step."""

    start_row: int
    batch: Batch


@dataclass(kw_only=True)
class Trainer(Run):
    """A run, built and ready to `fit`."""

    start: Start
    saver: Saver
    callbacks: list[Callback]
    named: dict[str, Callback] = field(default_factory=dict)  # those that the YAML asked for
    joined: Joined = Joined()  # of a mixture
    objective: Loss = CROSS_ENTROPY
    reference: CausalLM | None = None  # a frozen model beside the one that is trained, where the loss needs it
    folder: RunFolder | None = None  # of rank 0, from `fit` on
    ahead: Ahead | None = None
    unevaluated: Metrics = field(default_factory=dict)  # of the last step, if a signal cut its evaluation short

    def fit(self) -> None:
        """Train until `max_duration`, or until a signal asks to stop."""
        self._load()
        if self._is_complete():
            log.info(
                "%s: already complete at step %d; raise max_duration, or choose another save_folder",
                self.config.save_folder, self.state.step,
            )  # fmt: skip
            runtime.on_rank0(self._take_folder)
            self._close()
            return
        try:
            self._fit()
        finally:
            self._close()

    def _close(self) -> None:
        for callback in reversed(self.callbacks):
            callback.close()
        if self.folder is not None:
            self.folder.close()

    def _fit(self) -> None:
        # Only now that nothing of the user's can be wrong is anything written.
        runtime.on_rank0(self._take_folder)
        check_shared(Path(self.config.save_folder))
        runtime.on_rank0(self._open_outputs)
        for callback in self.callbacks:
            callback.fit_start(self)
        with self._signals():
            if self.config.eval_first and self.state.step == 0:
                found = self._evaluate()
                if found:
                    self._record({"step": 0, "tokens": 0} | found)
            stopped = False
            while (self.unevaluated or self.state.step < self.timeline.total_steps) and not stopped:
                metrics, self.unevaluated = self.unevaluated or self._step(), {}
                if self._due_evaluation():
                    found = self._evaluate()
                    self.unevaluated = {} if found else dict(metrics)
                    metrics |= found
                self._record(metrics)
                if self.state.step == self.timeline.total_steps and not is_evaluated(metrics):
                    self.evaluation = {}  # a callback ended the run: what there is, is of an earlier step
                stopped = self._stopped()
                done = stopped or self.state.step == self.timeline.total_steps
                if done:
                    self.saver.save_last(self._checkpoint(), self._sync)
                elif self.timeline.due(self.config.save_interval, self.state.step):
                    self.saver.save(self._checkpoint(), self._sync)
            if not self.evaluation and self._evaluates and not stopped:
                self._evaluate()  # a run taken up after its last step
                stopped = self._stopped()
        if self.folder is not None:
            self.folder.write_summary(self._summary())
        if stopped:
            log.info(
                "stopped at step %d; saved to %s; to continue: %s",
                self.state.step, self.saver.checkpointer.newest_saved, command_to_continue(),
            )  # fmt: skip
            return
        for callback in reversed(self.callbacks):
            callback.fit_end(self)

    def _record(self, metrics: Metrics) -> None:
        for callback in self.callbacks if not self.unevaluated else ():  # they see it when it is whole
            callback.step_end(self, metrics)
        if self.folder is not None:
            self.folder.write_metrics(metrics)

    def log_table(self, table: Table) -> None:
        for callback in self.callbacks:
            callback.table(self, table)

    def _take_folder(self) -> None:
        self.folder = RunFolder.claim(Path(self.config.save_folder))
        self.saver.checkpointer.tidy()

    def _open_outputs(self) -> None:
        assert self.folder is not None
        contents, changes = self.start.contents, self.start.changes
        self.folder.begin(self.config.disclosed(), contents.config if contents and changes else None, self.state.step)
        # The line of a step whose evaluation is made up for is written anew, as is that before the first step.
        self.folder.open_metrics(self.state.step - bool(self.unevaluated or self.state.step == 0))

    def _is_complete(self) -> bool:
        """Whether there is nothing left to do: the last step is there, and a summary of it with its evaluation."""
        if self.state.step < self.timeline.total_steps or not self.config.autoresume:
            return False
        summary = read_summary(Path(self.config.save_folder))
        evaluated = not self._evaluates or any(key.startswith(("validation/", PREFIX)) for key in summary)
        return evaluated and summary.get("steps") == self.state.step

    def _stopped(self) -> bool:
        """Whether any rank was asked to stop: the same on every rank, for a signal counts from when all look next."""
        return runtime.any_rank(self.signalled)

    def _sync(self) -> None:
        if self.folder is not None:
            self.folder.sync()

    def _step(self) -> Metrics:
        with record_function(STEP):  # where a step begins and ends, for profiles
            return self.take_step()

    def take_step(self) -> Metrics:
        """Take the next rows, update the weights, and say what happened."""
        start = time.perf_counter()
        state, rows = self.state, self.config.global_train_batch_size
        batch = self._batch(state.rows)
        rate = set_learning_rate(self.optimizer, self.schedule.multiplier(state.step))
        clipping = self.config.algorithms.gradient_clipping
        result = self.microbatches.run(
            lambda micro, together: train_step(
                self.model,
                self.optimizer,
                batch,
                microbatch_rows=micro,
                max_grad_norm=clipping.clipping_threshold if clipping else None,
                balance=self.balance,
                noise_seed=self.config.seed,
                step=state.step,
                n_sources=len(self.loader.labels),
                objective=self.objective,
                together=together,
            )
        )
        state.step += 1
        state.rows += rows
        state.tokens += rows * self.loader.max_seq_len
        self.router = result.router
        names, sizes = self.objective.metrics, (4, result.metrics.numel(), result.sources.numel())
        parts = [torch.stack([result.updated, result.ce, result.total, result.grad_norm.to(result.ce.device)])]
        parts += [result.metrics, result.sources.flatten()]
        if result.router is not None and self.balance is not None:
            parts.append(summary(result.router, rows * self.loader.max_seq_len, self.balance))
        found = torch.cat([part.double() for part in parts])
        self._read_ahead(state.rows)
        read = iter(found.tolist())  # all at once: the host waits for the device here
        (updated, ce, total, grad_norm), of_loss, sources = (list(itertools.islice(read, size)) for size in sizes)
        self._count_skip(bool(updated))
        metrics: Metrics = {
            "step": state.step,
            "tokens": state.tokens,
            "epoch": state.rows // self.loader.rows_per_epoch,
        }
        metrics |= {"loss/train/ce": ce, "loss/train/total": total}
        metrics |= dict(zip(names, of_loss, strict=True))
        metrics |= self._by_source(sources)
        metrics |= {"lr": rate, "grad_norm": grad_norm, "skipped_steps": state.skipped_steps}
        if result.router is not None and self.balance is not None:
            metrics |= named(list(read))
        seconds = time.perf_counter() - start
        self.train_seconds += seconds
        return metrics | {"time/step_seconds": seconds}

    def _batch(self, start_row: int) -> Batch:
        """This rank's rows of a step, on the device; those that were read ahead, if it is them."""
        ahead, self.ahead = self.ahead, None
        return ahead.batch if ahead is not None and ahead.start_row == start_row else self._read(start_row)

    def _read(self, start_row: int) -> Batch:
        rows = self.config.global_train_batch_size
        return self.loader.batch(start_row, rows, self.mesh.data_rank, self.mesh.data_ranks).to(self.device)

    def _read_ahead(self, start_row: int) -> None:
        """Read the rows of the next step while the device works on this one. If they are bad, that step says so."""
        if self.state.step < self.timeline.total_steps:
            with suppress(Exception):
                self.ahead = Ahead(start_row, self._read(start_row))

    def _by_source(self, sums: list[float]) -> Metrics:
        """Of a mixture: the loss of each source that was in the batch, and the tokens of it so far."""
        found: Metrics = {}
        if isinstance(self.loader.order, Mixture):
            labels = self.loader.labels
            for label, nats, n in zip(labels, sums[: len(labels)], sums[len(labels) :], strict=True):
                if n:
                    found[f"loss/train/{label}"] = nats / n
            for label, rows in self.loader.order.taken(self.state.rows).items():
                found[f"tokens/{label}"] = rows * self.loader.max_seq_len
        return found

    def _count_skip(self, updated: bool) -> None:
        state = self.state
        state.skipped_steps += not updated
        state.skipped_in_a_row = 0 if updated else state.skipped_in_a_row + 1
        if not updated:
            log.warning("step %d: the gradient is not finite; the update was skipped", state.step)
        if state.skipped_in_a_row > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step {state.step}; "
                "lower optimizer.lr, or clip gradients; the newest checkpoint is "
                f"{self.saver.checkpointer.newest_saved or 'not yet written'}"
            )

    @property
    def _evaluates(self) -> bool:
        return bool(self.config.evaluations or self.tasks) and self.config.eval_interval.value > 0

    def _due_evaluation(self) -> bool:
        last = self.state.step == self.timeline.total_steps
        return self._evaluates and (last or self.timeline.due(self.config.eval_interval, self.state.step))

    def _evaluate(self) -> Metrics:
        """Nothing if a signal cut it short."""
        self.evaluation = {}  # the older one is not of this step
        self.model.eval()
        texts = evaluate_texts(self, self._stopped)
        tasks = evaluate_by_tasks(self, self._stopped) if texts is not None else None
        self.model.train()
        if texts is not None and tasks is not None:
            self.evaluation = texts | tasks
        return dict(self.evaluation)

    def _load(self) -> None:
        """Load what `find_start` has found."""
        start, contents = self.start, self.start.contents
        if start.base is not None:
            log.info("checkpoints hold the adapters alone; keep %s, or set save_frozen_weights=true", start.base.path)
        if self.reference is not None:
            self._load_reference(self.reference)
        if start.hugging_face is not None:
            hf.load_weights(self.model, start.hugging_face, allow=self.config.load_allow)
        elif start.composer is not None:
            load_composer(start.composer, self.model)
        elif contents is not None and start.how == "weights":
            load_model_only(contents, self.model)
        elif contents is not None:
            self._load_all(contents)
            changes = "".join(f"\n  {change}" for change in start.changes)
            log.info("continuing from %s at step %d%s", contents.path, self.state.step,
                     f", with other settings:{changes}" if changes else "")  # fmt: skip

    def _load_reference(self, model: CausalLM) -> None:
        path = self.config.load_path
        assert path is not None  # the config has seen to it
        if path.startswith(HUGGING_FACE):
            hf.load_weights(model, path.removeprefix(HUGGING_FACE), allow=self.config.load_allow)
        else:
            load_model_only(read(path, "model"), model)

    def _load_all(self, contents: Contents) -> None:
        """Take up a run: weights, optimizer, and how far it was."""
        state = train_state(contents)  # looked at first: nothing has changed when it is refused
        if self.start.how == "continue" and state.step >= self.timeline.total_steps:
            raise ConfigError(
                f"load_path: {self.config.load_path} is at step {state.step}, and max_duration="
                f"{self.config.max_duration} ends at step {self.timeline.total_steps}; raise it, or begin a new "
                "run from its weights with load_weights_only=true"
            )
        trainer = self.saver.checkpointer.load(contents, self._checkpoint())
        self.state = state
        if self.start.rows_anew:
            log.warning("rows are counted anew: the next step takes the first rows of the data")
            state.rows = 0
        seconds = trainer.get("seconds")
        self.train_seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
        self.unevaluated = cast(Metrics, trainer.get("unevaluated", {}))
        states = trainer.get("callbacks")
        for name, callback in self.named.items():
            kept = states.get(name) if isinstance(states, dict) else None
            if isinstance(kept, dict):
                callback.load_state_dict(kept)
        if self.unevaluated:  # monitors read the rate and the routing of that step
            router = cast(list[object] | None, trainer.get("router"))
            self.router = RouterStats(*(torch.tensor(part, device=self.device) for part in router)) if router else None
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
                # What monitors read of a step that they have not seen yet.
                "router": [part.tolist() for part in self.router] if self.unevaluated and self.router else None,
                "callbacks": {name: kept for name, each in self.named.items() if (kept := each.state_dict())},
                **self._mixture(),
            },
            config=self.config.disclosed(),
            tokenizer=self.tokenizer,
            generation=self.generation,
            base=self.start.base,
        )

    def _mixture(self) -> dict[str, Json]:
        order = self.loader.order
        return {"mixture": to_save(order, self.state.rows, self.joined)} if isinstance(order, Mixture) else {}

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
        for key, value in self.evaluation.items():
            label, _, name = key.removeprefix(EVALUATED).rpartition("/")
            is_text = key.startswith(EVALUATED)
            result["/".join(filter(None, ("validation", label, names[name]))) if is_text else key] = value
        return result

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """A signal finishes the step or evaluation batch, saves and stops; a second one ends at once.

        Launchers often send one twice: to the process group and to each rank. So a second one within a second counts as
        the first.
        """
        first = 0.0

        def request(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if self.signalled:
                if time.monotonic() - first < SAME_REQUEST:
                    return
                raise KeyboardInterrupt
            first = time.monotonic()
            log.warning(
                "%s: finishing this step, then saving to %s (send it again to quit at once)",
                "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name, self.config.save_folder,
            )  # fmt: skip
            self.signalled = True

        before = {number: signal.signal(number, request) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
