"""The life of a run: `Trainer.fit` shows what happens in which order. `train/build.py` makes a trainer."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch.profiler import record_function

from llmfoundry import hf, runtime
from llmfoundry.checkpoint.checkpointer import CheckpointState
from llmfoundry.checkpoint.composer_names import load_composer
from llmfoundry.checkpoint.folder import Kept
from llmfoundry.checkpoint.manifest import TRAINER
from llmfoundry.checkpoint.reading import HUGGING_FACE, Contents, Json, load_model_only, read
from llmfoundry.config import ConfigError, ResourceError, RunError, is_theirs
from llmfoundry.data.loader import Batch
from llmfoundry.data.mixture import Mixture
from llmfoundry.eval.icl import PREFIX
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe.balance import named, summary
from llmfoundry.numbers import Numbers
from llmfoundry.parallel.fsdp import reduces_once
from llmfoundry.stopping import on_signal
from llmfoundry.train.agreeing import AgreeingRun
from llmfoundry.train.bad_numbers import NOT_FINITE, SPIKE, bad_rows, check_weights, hopeless, record
from llmfoundry.train.callback import Callback
from llmfoundry.train.evaluating import evaluate_by_tasks, evaluate_texts
from llmfoundry.train.loss import Loss
from llmfoundry.train.mixing import Joined, to_save
from llmfoundry.train.optim import set_learning_rate
from llmfoundry.train.out_of_memory import Held, first_of, held, message
from llmfoundry.train.outputs import SKIPPED, RunFolder, Summary, check_shared, hosts_without, read_summary
from llmfoundry.train.resume import (
    Start,
    clock_state,
    command_to_continue,
    train_state,
)
from llmfoundry.train.run import EVALUATED, STEP, Metrics, Table, is_evaluated
from llmfoundry.train.step import CROSS_ENTROPY, StepResult, train_step
from llmfoundry.train.stored import upload_outputs

log = logging.getLogger(__name__)


class Ahead(NamedTuple):
    """The rows of the next step."""

    start_row: int
    batch: Batch


@dataclass(kw_only=True)
class Trainer(AgreeingRun):
    """A run, built and ready to `fit`."""

    start: Start
    callbacks: list[Callback]
    named: dict[str, Callback] = field(default_factory=dict)  # those that the YAML asked for
    joined: Joined = Joined()  # of a mixture
    objective: Loss = CROSS_ENTROPY
    reference: CausalLM | None = None  # a frozen model beside the one that is trained, where the loss needs it
    folder: RunFolder | None = None  # of rank 0, from `fit` on
    ahead: Ahead | None = None
    reading: Numbers | None = None  # of the step that is being taken
    late: float = 0.0  # seconds that reading ahead may have kept the device waiting in the last step
    unevaluated: Metrics = field(default_factory=dict)  # of the last step, if a signal cut its evaluation short
    owed: bool = False  # a save was due while the run was in doubt

    def fit(self) -> None:
        """Train until `max_duration`, or until a signal asks to stop."""
        try:
            self._fit()
        except RuntimeError as error:  # also DistError
            if (named := self.watchdog.named(f"step {self.state.step + 1}", error)) is None:
                raise
            raise named from error
        finally:
            self._close()

    def _fit(self) -> None:
        self.watchdog.phase("loading")
        self._load()
        if self._is_complete():
            log.info(
                "%s: already complete at step %d; raise max_duration, or choose another save_folder",
                self.config.save_folder, self.state.step,
            )  # fmt: skip
            runtime.on_rank0(self._take_folder)
            runtime.on_rank0(self._upload_outputs)
            return
        self.watchdog.beat("before the first step")
        self._train()

    def _close(self) -> None:
        self.watchdog.close()
        if self.froze:
            gc.unfreeze()
        for callback in reversed(self.callbacks):
            try:
                callback.close()
            except Exception as error:  # the others are to be closed too, and a failure of the run to be seen
                log.error("%s could not be closed: %s: %s", type(callback).__name__, type(error).__name__, error)
        if self.folder is not None:
            self.folder.close()

    def _train(self) -> None:
        # Only now that nothing of the user's can be wrong is anything written.
        runtime.on_rank0(self._take_folder)
        checkpointer = self.saver.checkpointer
        if checkpointer.store is None:
            check_shared(self.config.folder)
        else:
            checkpointer.folder.shared = not any(hosts_without(self.config.folder))
        runtime.on_rank0(self._open_outputs)
        checkpointer.catch_up()
        for callback in self.callbacks:
            callback.fit_start(self)
        self.timeline.clock.start()
        with on_signal(self.on_signal):
            if self.config.eval_first and self.state.step == 0:
                found = self._evaluate()
                if found:
                    self._record({"step": 0, "tokens": 0} | found)
                self.stopping = False  # who asked is asked again after the first step, which there is to save
            prepared = False
            while (self.unevaluated or self.state.step < self.timeline.total_steps) and not self.stopping:
                metrics, self.unevaluated = self.unevaluated or self._step() | self.saver.stall(), {}
                if self._due_evaluation():
                    found = self._evaluate()
                    self.unevaluated = {} if found else dict(metrics)
                    metrics |= found
                self._record(metrics)
                self.timeline.clock.tick(self.agree())
                self.warmed_up()
                if self.timeline.is_over and not self.stopping:
                    self.finish(f"max_duration={self.config.max_duration} has passed")
                if self.state.step == self.timeline.total_steps and not is_evaluated(metrics):
                    self.evaluation = {}  # a callback or the clock ended the run: what there is, is of an earlier step
                if not prepared and not self.stopping and self.state.step < self.timeline.total_steps:
                    checkpointer.prepare(self._checkpoint())
                    prepared = True
                if not self.way_back:
                    self._save()
                elif not self.stopping:  # else the next start comes here again, from the same checkpoint
                    self._roll_back()
                self.countdown.step_begins()
            if not self.evaluation and self._evaluates and not self.stopping:
                self._evaluate()  # a run taken up after its last step
                self.agree()
        self.watchdog.beat("waiting for the last checkpoint")
        self.saver.finish()
        if self.folder is not None:
            self.folder.write_summary(self._summary())
        if self.stopping:
            log.info(
                "stopped at step %d; saved to %s; to continue: %s",
                self.state.step, self.saver.checkpointer.newest_saved, command_to_continue(),
            )  # fmt: skip
        else:
            for callback in reversed(self.callbacks):
                callback.fit_end(self)
        runtime.on_rank0(self._upload_outputs)

    def _save(self) -> None:
        """Save what is due; while a run is in doubt, only what it ends with.

        Raises:
            RunError: a weight is not finite, or too many steps were skipped.
        """
        state = self.state
        found = hopeless(self) if state.skipped_in_a_row or state.step == self.timeline.total_steps else None
        last = found is not None or self.stopping or state.step == self.timeline.total_steps
        self.owed |= self._due_save()
        in_doubt = self.doubtful or state.skipped_in_a_row > 0
        if not last and (in_doubt or not self.owed):
            return
        self.watchdog.beat(f"saving step {state.step}")
        if not last:
            self.saver.save(self._checkpoint(), self._sync)
        elif found is None or found.save:
            self.saver.save_last(self._checkpoint(), self._sync)
        self.owed = False
        if found is not None:
            newest = self.saver.checkpointer.newest_saved
            raise RunError(f"step {state.step}: {found.why}; the newest checkpoint is {newest or 'not yet written'}")

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint, and on behind the rows that were read since.

        Raises:
            RunError: there is no checkpoint.
        """
        why, self.way_back = self.way_back, ""
        self.saver.settle()
        contents = self.saver.checkpointer.newest()
        if contents is None:
            raise RunError(f"step {self.state.step}: {why}; there is no checkpoint to go back to: set save_interval")
        step, rows, clock = self.state.step, self.state.rows, self.timeline.clock
        before, seconds, total = clock.before, clock.seconds, self.timeline.total_steps
        self.doubtful, self.loss_limit, self.owed = False, math.inf, False
        self._load_all(contents)
        clock.set(before, seconds)  # time goes on
        clock.start()
        self.timeline = replace(self.timeline, total_steps=total)
        first, self.state.rows = self.state.rows, rows
        log.warning("step %d: %s; going back to %s and continuing after row %d", step, why, contents.path, rows - 1)
        self._open_metrics()
        if self.folder is not None:
            self.folder.write_skipped(record(self.state.step, f"step {step}: {why}", first, rows, []))

    def _record(self, metrics: Metrics) -> None:
        for callback in self.callbacks if not self.unevaluated else ():  # they see it when it is whole
            self.watchdog.phase(f"{type(callback).__name__}, after step {self.state.step}")
            callback.step_end(self, metrics)
        if self.folder is not None:
            self.folder.write_metrics(metrics)

    def log_table(self, table: Table) -> None:
        for callback in self.callbacks:
            callback.table(self, table)

    def _take_folder(self) -> None:
        checkpointer = self.saver.checkpointer
        self.folder = RunFolder.claim(self.config.folder)
        place = checkpointer.store.url if checkpointer.store is not None else str(self.config.folder)
        checkpointer.check_owner = self.folder.take(place).check
        checkpointer.tidy()

    def _upload_outputs(self) -> None:
        if self.saver.checkpointer.store is not None:
            upload_outputs(self.saver.checkpointer.store)

    def _open_outputs(self) -> None:
        assert self.folder is not None
        contents, changes = self.start.contents, self.start.changes
        self.folder.begin(self.config.disclosed(), contents.config if contents and changes else None, self.state.step)
        self._open_metrics()
        if self.saver.checkpointer.store is not None:
            self.saver.checkpointer.store.push()  # from now on, the store is in use; a mistake in its name shows here

    def _open_metrics(self) -> None:
        # The line of a step whose evaluation is made up for is written anew, as is that before the first step.
        step = self.state.step
        if self.folder is not None:
            self.folder.open_metrics(step - bool(self.unevaluated or step == 0), skips=step)

    def _is_complete(self) -> bool:
        """Whether there is nothing left to do: the last step is there, and a summary of it with its evaluation."""
        if self.state.step < self.timeline.total_steps or not self.config.autoresume:
            return False
        summary = read_summary(self.config.folder)
        evaluated = not self._evaluates or any(key.startswith(("validation/", PREFIX)) for key in summary)
        return evaluated and summary.get("steps") == self.state.step

    def _sync(self) -> None:
        if self.folder is not None:
            self.folder.sync()

    def _step(self) -> Metrics:
        with record_function(STEP):  # where a step begins and ends, for profiles
            return self.take_step()

    def take_step(self) -> Metrics:
        """Take the next rows, update the weights, and say what happened."""
        start = time.perf_counter()
        self.watchdog.beat(f"step {self.state.step + 1}", in_step=self.warm)
        state, rows = self.state, self.config.global_train_batch_size
        batch = self._batch(state.rows)
        self.begin_seconds = time.perf_counter() - (self.agreed or start) + self.late
        rate = set_learning_rate(self.optimizer, self.schedule.multiplier(self.timeline.position(state.step)))
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
                max_loss=self.loss_limit,
                before_update=self._begin_to_read,
            ),
            self._out_of_memory,
        )
        state.step += 1
        state.rows += rows
        state.tokens += rows * self.loader.max_seq_len
        self.router = result.router
        names, sizes = self.objective.metrics, (4, result.metrics.numel(), result.sources.numel())
        self.late = self._read_ahead(state.rows)
        self.watchdog.read(self.warm)
        assert self.reading is not None
        read = iter(self.reading.read())  # all at once: the host waits for the device here, but not for the update
        self.watchdog.beat(f"the end of step {state.step}")
        (updated, ce, total, grad_norm), of_loss, sources = (list(itertools.islice(read, size)) for size in sizes)
        self._count_skip(bool(updated), batch, math.isfinite(grad_norm))
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

    def _begin_to_read(self, result: StepResult) -> None:
        parts = [torch.stack([result.updated, result.ce, result.total, result.grad_norm.to(result.ce.device)])]
        parts += [result.metrics, result.sources.flatten()]
        if result.router is not None and self.balance is not None:
            tokens = self.config.global_train_batch_size * self.loader.max_seq_len
            parts.append(summary(result.router, tokens, self.balance))
        self.reading = Numbers(torch.cat([part.double() for part in parts]))

    def _out_of_memory(self, rows: int, there: Held | None, why: str) -> str:
        there = there or held(self.model, self.optimizer, self.device)
        once = reduces_once(self.model)
        return message(self.config, self.mesh, self.device, rows, once=once, there=there, why=why)

    def _batch(self, start_row: int) -> Batch:
        """This rank's rows of a step, on the device; those that were read ahead, if it is them."""
        ahead, self.ahead = self.ahead, None
        return ahead.batch if ahead is not None and ahead.start_row == start_row else self._read(start_row)

    def _read(self, start_row: int) -> Batch:
        rows = self.config.global_train_batch_size
        return self.loader.batch(start_row, rows, self.mesh.data_rank, self.mesh.data_ranks).to(self.device)

    def _read_ahead(self, start_row: int) -> float:
        """Read the rows of the next step while the device works on this one. If they are bad, that step reports it.

        Returns:
            How many seconds it took, if the device was done with this step by then: it may have waited.
        """
        if self.state.step >= self.timeline.total_steps:
            return 0.0
        begun, done = time.perf_counter(), torch.cuda.Event() if self.device.type == "cuda" else None
        if done is not None:
            done.record()
        with suppress(Exception):
            self.ahead = Ahead(start_row, self._read(start_row))
        return time.perf_counter() - begun if done is None or done.query() else 0.0

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

    def _count_skip(self, updated: bool, batch: Batch, finite: bool) -> None:
        """Take note of a step that changed nothing, and of its rows.

        Raises:
            RunError: a weight is not finite.
        """
        state = self.state
        state.skipped_steps += not updated
        state.skipped_in_a_row = 0 if updated else state.skipped_in_a_row + 1
        if updated:
            return
        bad = []
        if not finite:
            check_weights(self)
            bad = bad_rows(self, batch, self.objective)
        why, first = NOT_FINITE if not finite else SPIKE, state.rows - self.config.global_train_batch_size
        log.warning("step %d: %s; the update was skipped; its rows are in %s", state.step, why, SKIPPED)
        if self.folder is not None:
            self.folder.write_skipped(record(state.step, why, first, state.rows, bad))

    @property
    def _evaluates(self) -> bool:
        return bool(self.config.evaluations or self.tasks) and self.config.eval_interval.value > 0

    def _due_save(self) -> bool:
        intervals = (self.config.save_interval, self.config.keep_every)
        return any(self.timeline.due(interval, self.state.step) for interval in intervals)

    def _kept(self) -> Kept:
        if self.timeline.due(self.config.keep_every, self.state.step):
            return "for good"
        return "for now" if self.doubtful or self.state.skipped_in_a_row else "newest"

    def _due_evaluation(self) -> bool:
        last = self.state.step == self.timeline.total_steps
        return self._evaluates and (last or self.timeline.due(self.config.eval_interval, self.state.step))

    def _evaluate(self) -> Metrics:
        """Nothing if a signal cut it short."""
        self.evaluation = {}  # the older one is not of this step
        self.watchdog.beat(f"an evaluation after step {self.state.step}")
        self.model.eval()
        try:
            texts = evaluate_texts(self, self.stopped)
            tasks = evaluate_by_tasks(self, self.stopped) if texts is not None else None
        except torch.OutOfMemoryError as error:
            rows = self.config.device_eval_batch_size
            raise ResourceError(
                f"out of memory in an evaluation; a smaller device_eval_batch_size than {rows} needs less "
                f"({first_of(str(error))})"
            ) from None
        self.model.train()
        if texts is not None and tasks is not None:
            self.evaluation = texts | tasks
        return dict(self.evaluation)

    def _load(self) -> None:
        """Load what `find_start` has found."""
        start, contents = self.start, self.start.contents
        if start.base is not None:
            log.info("checkpoints contain only the adapters; keep %s, or set save_frozen_weights=true", start.base.path)
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
            log.info("continuing from %s at step %d%s", contents.place, self.state.step,
                     f", with other settings:{changes}" if changes else "")  # fmt: skip

    def _load_reference(self, model: CausalLM) -> None:
        path = self.config.load_path
        assert path is not None  # the config has seen to it
        if is_theirs(path):
            hf.load_weights(model, path.removeprefix(HUGGING_FACE), allow=self.config.load_allow)
        else:
            load_model_only(read(path, "model"), model)

    def _load_all(self, contents: Contents) -> None:
        """Take up a run: weights, optimizer, and how far it was."""
        state = train_state(contents)  # looked at first: nothing has changed when it is refused
        self.timeline.clock.set(*clock_state(contents))
        if self.timeline.is_over:
            self.timeline = replace(self.timeline, total_steps=state.step)
        if self.start.how == "continue" and state.step >= self.timeline.total_steps:
            raise ConfigError(
                f"load_path: {self.config.load_path} is at step {state.step}, and max_duration="
                f"{self.config.max_duration} ends at step {self.timeline.total_steps}; raise it, or begin a new "
                "run from its weights with load_weights_only=true"
            )
        trainer = self.saver.checkpointer.load(contents, self._checkpoint())
        self.state = state
        if self.start.rows_anew and contents.path == cast(Contents, self.start.contents).path:
            log.warning("the row counter restarts: the next step reads the first rows of the data")
            state.rows = 0
        try:
            self._load_beside(trainer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{contents.place}: {TRAINER} contains values that no run saves ({type(error).__name__}: {error})"
            ) from None

    def _load_beside(self, trainer: Mapping[str, Json]) -> None:
        """Take up what a trainer keeps beside its state."""
        seconds = trainer.get("seconds")
        self.train_seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
        unevaluated = trainer.get("unevaluated") or {}
        if not isinstance(unevaluated, dict) or (unevaluated and unevaluated.get("step") != self.state.step):
            raise ValueError("unevaluated metrics are of another step")
        self.unevaluated = cast(Metrics, unevaluated)
        states = trainer.get("callbacks")
        for name, callback in self.named.items():
            kept = states.get(name) if isinstance(states, dict) else None
            if isinstance(kept, dict):
                callback.load_state_dict(kept)
        if self.unevaluated:  # monitors read the rate and the routing of that step
            router = cast(list[object] | None, trainer.get("router"))
            self.router = RouterStats(*(torch.tensor(part, device=self.device) for part in router)) if router else None
            set_learning_rate(self.optimizer, self.schedule.multiplier(self.timeline.position_before(self.state.step)))

    def _checkpoint(self) -> CheckpointState:
        return CheckpointState(
            step=self.state.step,
            model=self.model,
            optimizer=self.optimizer,
            trainer={
                "state": asdict(self.state),
                "data": self.loader.fingerprint,
                "seconds": self.train_seconds,
                "clock": [self.timeline.clock.before, self.timeline.clock.seconds],
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
            kept=self._kept(),
        )

    def _mixture(self) -> dict[str, Json]:
        order = self.loader.order
        return {"mixture": to_save(order, self.state.rows, self.joined)} if isinstance(order, Mixture) else {}

    def _summary(self) -> Summary:
        model = self.config.model
        result: Summary = {
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "params": model.n_params(),
            "active_params": model.n_active_params(),
            "trainable_params": model.n_trainable_params(),
            "tokens_per_sec": self.state.tokens / self.train_seconds if self.train_seconds else 0.0,
            "seconds": self.train_seconds,
            "ended": self.why or f"max_duration={self.config.max_duration}",
            "stopped": self.stopping,
            "peak_memory_bytes": runtime.peak_memory_bytes(self.device),
        }
        names = {"LanguageCrossEntropy": "nats_per_token", "bits_per_byte": "bits_per_byte"}
        for key, value in self.evaluation.items():
            label, _, name = key.removeprefix(EVALUATED).rpartition("/")
            is_text = key.startswith(EVALUATED)
            result["/".join(filter(None, ("validation", label, names[name]))) if is_text else key] = value
        return result
