"""The training loop: `Trainer.fit` shows what happens in which order. `train/build.py` builds a trainer."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace
from typing import cast

import torch.distributed as dist
from torch.profiler import record_function

from llmfoundry import runtime
from llmfoundry.checkpoint.checkpointer import CheckpointState
from llmfoundry.checkpoint.folder import Kept
from llmfoundry.checkpoint.reading import Contents
from llmfoundry.config import ConfigError, RunError
from llmfoundry.data.loader import Batch
from llmfoundry.model.transformer import CausalLM
from llmfoundry.parallel.fsdp import reduces_once
from llmfoundry.stopping import on_signal
from llmfoundry.train.agreeing import AgreeingRun
from llmfoundry.train.bad_numbers import hopeless, note_update, record
from llmfoundry.train.callback import Callback
from llmfoundry.train.duration import seconds_of
from llmfoundry.train.evaluating import evaluated, evaluates
from llmfoundry.train.feed import Feed
from llmfoundry.train.loss import Loss
from llmfoundry.train.mixing import Joined
from llmfoundry.train.optim import set_learning_rate
from llmfoundry.train.out_of_memory import Held, held, message
from llmfoundry.train.outputs import RunFolder, check_shared, hosts_without
from llmfoundry.train.resume import Start, command_to_continue, load_reference, load_weights
from llmfoundry.train.run import STEP, Metrics, Table, is_evaluated
from llmfoundry.train.step import CROSS_ENTROPY, train_step
from llmfoundry.train.step_metrics import Reading, step_metrics
from llmfoundry.train.stored import upload_outputs
from llmfoundry.train.summary import is_complete, summary_of
from llmfoundry.train.trainer_json import as_saved, read_progress, written

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer(AgreeingRun):
    """A run, built and ready to `fit`."""

    start: Start
    feed: Feed
    callbacks: list[Callback]
    named: dict[str, Callback] = field(default_factory=dict)  # the callbacks in the YAML
    joined: Joined = Joined()  # position at which the run switched to its mixture
    objective: Loss = CROSS_ENTROPY
    reference: CausalLM | None = None  # a frozen model beside the trained one, if the loss needs it
    folder: RunFolder | None = None  # on rank 0, once `fit` has begun
    late: float = 0.0  # seconds that reading ahead may have kept the device waiting in the last step
    unevaluated: Metrics = field(default_factory=dict)  # metrics of the last step, if a signal stopped its evaluation
    owed: bool = False  # a save was due while the run was in doubt, and was postponed
    warm: bool = False  # this process has taken a step

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
        # Nothing is written before all mistakes of the user's have been found.
        if is_complete(self):
            log.info(
                "%s: already complete at step %d; raise max_duration, or choose another save_folder",
                self.config.save_folder, self.state.step,
            )  # fmt: skip
            runtime.on_rank0(self._take_folder)
            runtime.on_rank0(self._upload_outputs)
            return
        self.watchdog.beat("before the first step")
        self._begin()
        with on_signal(self.on_signal):
            self._evaluate_first()
            while (self.unevaluated or self.state.step < self.timeline.total_steps) and not self.stopping:
                self._advance()
            if not self.evaluation and evaluates(self) and not self.stopping:
                self._evaluate()  # a run resumed after its last step
                self.agree()
        self._end()

    def _close(self) -> None:
        self.watchdog.close()
        self.garbage.close()
        for callback in reversed(self.callbacks):
            try:
                callback.close()
            except Exception as error:  # the others are to be closed too, and a failure of the run to be seen
                log.error("%s could not be closed: %s: %s", type(callback).__name__, type(error).__name__, error)
        if self.folder is not None:
            self.folder.close()

    # The stages of `fit`.

    def _load(self) -> None:
        """Load what `find_start` has found."""
        start = self.start
        if start.base is not None:
            log.info("checkpoints contain only the adapters; keep %s, or set save_frozen_weights=true", start.base.path)
        if self.reference is not None:
            assert self.config.load_path is not None  # the config ensures it
            load_reference(self.config.load_path, self.reference, self.config.load_allow)
        if start.contents is None or start.how == "weights":
            load_weights(start, self.model, self.config.load_allow)
            return
        self._take_up(start.contents)
        changes = "".join(f"\n  {change}" for change in start.changes)
        log.info("continuing from %s at step %d%s", start.contents.place, self.state.step,
                 f", with other settings:{changes}" if changes else "")  # fmt: skip

    def _begin(self) -> None:
        """Take the folder, open its files, and call the callbacks' `fit_start`."""
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

    def _evaluate_first(self) -> None:
        if not self.config.eval_first or self.state.step > 0:
            return
        found = self._evaluate()
        if found:
            self._record({"step": 0, "tokens": 0} | found)
        self.stopping = False  # the request is handled after the first step, which can be saved

    def _advance(self) -> None:
        """Take a step, or catch up on the evaluation of the last one; then do whatever is due after it."""
        is_step = not self.unevaluated
        metrics, self.unevaluated = self.unevaluated or self._step() | self.saver.stall(), {}
        if self._due_evaluation():
            found = self._evaluate()
            self.unevaluated = {} if found else dict(metrics)
            metrics |= found
        self._record(metrics)
        self.timeline.clock.tick(self.agree())
        if self.timeline.is_over and not self.stopping:
            self.finish(f"max_duration={self.config.max_duration} has passed")
        ends = self.state.step == self.timeline.total_steps
        if ends and not is_evaluated(metrics):
            self.evaluation = {}  # a callback or the clock ended the run: the last evaluation is of an earlier step
        if is_step and not self.warm:
            self._warmed_up()
            if not self.stopping and not ends:
                self.saver.checkpointer.prepare(self._checkpoint())
        self.garbage.collect()
        if not self.way_back:
            self._save()
        elif not self.stopping:  # otherwise the next start would get here again, from the same checkpoint
            self._roll_back()
        self.countdown.step_begins()

    def _end(self) -> None:
        """Wait until everything is saved, and log how the run ended."""
        self.watchdog.beat("waiting for the last checkpoint")
        self.saver.finish()
        if self.folder is not None:
            self.folder.write_summary(summary_of(self, self.stopping))
        if self.stopping:
            log.info(
                "stopped at step %d; saved to %s; to continue: %s",
                self.state.step, self.saver.checkpointer.newest_saved, command_to_continue(),
            )  # fmt: skip
        else:
            for callback in reversed(self.callbacks):
                callback.fit_end(self)
        runtime.on_rank0(self._upload_outputs)

    # One step.

    def _step(self) -> Metrics:
        with record_function(STEP):  # marks a step in profiles
            return self.take_step()

    def take_step(self) -> Metrics:
        """Take the next rows, update the weights, and return the step's metrics."""
        start, state, config = time.perf_counter(), self.state, self.config
        self.watchdog.beat(f"step {state.step + 1}", in_step=self.warm)
        batch = self.feed.take(state.rows)
        self.begin_seconds = time.perf_counter() - (self.agreed or start) + self.late
        rate = set_learning_rate(self.optimizer, self.schedule.multiplier(self.timeline.position(state.step)))
        reading = Reading()
        self._update(batch, reading)
        state.step += 1
        state.rows += config.global_train_batch_size
        state.tokens += config.global_train_batch_size * self.loader.max_seq_len
        self.late = self.feed.read_ahead(state.rows) if state.step < self.timeline.total_steps else 0.0
        self.watchdog.read(self.warm)
        numbers = reading.end()
        self.router = numbers.router
        self.watchdog.beat(f"the end of step {state.step}")
        skip = note_update(self, batch, self.objective, numbers.updated, math.isfinite(numbers.grad_norm))
        if skip is not None and self.folder is not None:
            self.folder.write_skipped(skip)
        metrics = step_metrics(self, numbers, self.objective.metrics, rate)
        seconds = time.perf_counter() - start
        self.train_seconds += seconds
        return metrics | {"time/step_seconds": seconds}

    def _update(self, batch: Batch, reading: Reading) -> None:
        """Run `train_step` with as many rows at once as fit."""
        clipping = self.config.algorithms.gradient_clipping
        self.microbatches.run(
            lambda micro, together: train_step(
                self.model,
                self.optimizer,
                batch,
                microbatch_rows=micro,
                max_grad_norm=clipping.clipping_threshold if clipping else None,
                balance=self.balance,
                noise_seed=self.config.seed,
                step=self.state.step,
                n_sources=len(self.loader.labels),
                objective=self.objective,
                together=together,
                max_loss=self.loss_limit,
                before_update=reading.begin,
            ),
            self._out_of_memory,
        )

    def _out_of_memory(self, rows: int, there: Held | None, why: str) -> str:
        there = there or held(self.model, self.optimizer, self.device)
        once = reduces_once(self.model)
        return message(self.config, self.mesh, self.device, rows, once=once, there=there, why=why)

    def _warmed_up(self) -> None:
        """Tighten limits after the first step, which compiles and connects; no later step takes that long."""
        seconds = seconds_of(self.config.step_timeout)
        if seconds is not None and dist.is_initialized():
            runtime.set_timeout(seconds)
        self.garbage.freeze()
        self.warm = True

    # Evaluations and metrics.

    def _due_evaluation(self) -> bool:
        last = self.state.step == self.timeline.total_steps
        return evaluates(self) and (last or self.timeline.due(self.config.eval_interval, self.state.step))

    def _evaluate(self) -> Metrics:
        """Return the metrics of an evaluation; empty if a signal interrupted it."""
        self.evaluation = {}  # the older evaluation does not belong to this step
        self.watchdog.beat(f"an evaluation after step {self.state.step}")
        self.evaluation = evaluated(self, self.stopped)
        return dict(self.evaluation)

    def _record(self, metrics: Metrics) -> None:
        for callback in self.callbacks if not self.unevaluated else ():  # callbacks see it when it is complete
            self.watchdog.phase(f"{type(callback).__name__}, after step {self.state.step}")
            callback.step_end(self, metrics)
        if self.folder is not None:
            self.folder.write_metrics(metrics)

    def log_table(self, table: Table) -> None:
        for callback in self.callbacks:
            callback.table(self, table)

    # Checkpoints.

    def _save(self) -> None:
        """Save what is due; while a run is in doubt, only its last step.

        Raises:
            RunError: if a weight is not finite, or too many steps were skipped.
        """
        state, timeline, config = self.state, self.timeline, self.config
        found = hopeless(self) if state.skipped_in_a_row or state.step == timeline.total_steps else None
        last = found is not None or self.stopping or state.step == timeline.total_steps
        self.owed |= any(timeline.due(each, state.step) for each in (config.save_interval, config.keep_every))
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

    def _checkpoint(self) -> CheckpointState:
        kept: Kept = "for now" if self.doubtful or self.state.skipped_in_a_row else "newest"
        return CheckpointState(
            step=self.state.step,
            model=self.model,
            optimizer=self.optimizer,
            trainer=written(self, self.named, self.unevaluated, self.joined),
            config=self.config.disclosed(),
            tokenizer=self.tokenizer,
            generation=self.generation,
            base=self.start.base,
            kept="for good" if self.timeline.due(self.config.keep_every, self.state.step) else kept,
        )

    def _take_up(self, contents: Contents) -> None:
        """Continue a run from a checkpoint: weights, optimizer, and progress."""
        progress = read_progress(contents)  # first, so that nothing has changed if it is refused
        state = progress.state
        self.timeline.clock.set(*progress.clock)
        if self.timeline.is_over:
            self.timeline = replace(self.timeline, total_steps=state.step)
        if self.start.how == "continue" and state.step >= self.timeline.total_steps:
            raise ConfigError(
                f"load_path: {self.config.load_path} is at step {state.step}, and max_duration="
                f"{self.config.max_duration} ends at step {self.timeline.total_steps}; raise it, or start a new "
                "run from its weights with load_weights_only=true"
            )
        self.saver.checkpointer.load(contents, self._checkpoint())
        self.state, self.train_seconds, self.unevaluated = state, progress.seconds, progress.unevaluated
        if self.start.rows_anew and contents.path == cast(Contents, self.start.contents).path:
            log.warning("the row counter restarts: the next step reads the first rows of the data")
            state.rows = 0
        with as_saved(contents):
            for name, callback in self.named.items():
                if name in progress.callbacks:
                    callback.load_state_dict(progress.callbacks[name])
        if self.unevaluated:  # monitors read that step's learning rate and routing
            self.router = progress.router
            set_learning_rate(self.optimizer, self.schedule.multiplier(self.timeline.position_before(state.step)))

    def _roll_back(self) -> None:
        """Return to the newest checkpoint, and continue after the rows that were read since.

        Raises:
            RunError: if there is no checkpoint.
        """
        why, self.way_back = self.way_back, ""
        self.saver.settle()
        contents = self.saver.checkpointer.newest()
        if contents is None:
            raise RunError(f"step {self.state.step}: {why}; there is no checkpoint to go back to: set save_interval")
        step, rows, clock = self.state.step, self.state.rows, self.timeline.clock
        before, seconds, total = clock.before, clock.seconds, self.timeline.total_steps
        self.doubtful, self.loss_limit, self.owed = False, math.inf, False
        self._take_up(contents)
        clock.set(before, seconds)  # time is not set back
        clock.start()
        self.timeline = replace(self.timeline, total_steps=total)
        first, self.state.rows = self.state.rows, rows
        log.warning("step %d: %s; going back to %s and continuing after row %d", step, why, contents.path, rows - 1)
        self._open_metrics()
        if self.folder is not None:
            self.folder.write_skipped(record(self.state.step, f"step {step}: {why}", first, rows, []))

    # The run's folder, on rank 0.

    def _take_folder(self) -> None:
        checkpointer = self.saver.checkpointer
        self.folder = RunFolder.claim(self.config.folder)
        place = checkpointer.store.url if checkpointer.store is not None else str(self.config.folder)
        checkpointer.check_owner = self.folder.take(place).check
        checkpointer.tidy()

    def _open_outputs(self) -> None:
        assert self.folder is not None
        contents, changes = self.start.contents, self.start.changes
        self.folder.begin(self.config.disclosed(), contents.config if contents and changes else None, self.state.step)
        self._open_metrics()
        if self.saver.checkpointer.store is not None:
            self.saver.checkpointer.store.push()  # the store is used from here on, so a mistake in its name shows here

    def _open_metrics(self) -> None:
        # The line of a step whose evaluation is made up for is written anew, as is that before the first step.
        step = self.state.step
        if self.folder is not None:
            self.folder.open_metrics(step - bool(self.unevaluated or step == 0), skips=step)

    def _sync(self) -> None:
        if self.folder is not None:
            self.folder.sync()

    def _upload_outputs(self) -> None:
        if self.saver.checkpointer.store is not None:
            upload_outputs(self.saver.checkpointer.store)
