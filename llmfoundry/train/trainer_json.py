"""A checkpoint's trainer.json: the state of a run besides tensors and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import NamedTuple, cast

import torch

from llmfoundry.checkpoint.manifest import TRAINER
from llmfoundry.checkpoint.reading import Contents, Json
from llmfoundry.config import ConfigError
from llmfoundry.data.mixture import Mixture
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.train.callback import Callback
from llmfoundry.train.mixing import Joined, to_save
from llmfoundry.train.run import Metrics, Run, TrainState


class Progress(NamedTuple):
    """The progress of the run that saved a checkpoint.

    Attributes:
        clock: seconds by the run's clock, at the end of the second to last step and of the last one.
        seconds: seconds spent in steps.
        unevaluated: metrics of the last step, if a signal interrupted its evaluation.
        router: routing of that step, for monitors.
        callbacks: their states by name.
    """

    state: TrainState
    clock: tuple[float, float]
    seconds: float
    unevaluated: Metrics
    router: RouterStats | None
    callbacks: dict[str, dict[str, Json]]


def written(run: Run, callbacks: Mapping[str, Callback], unevaluated: Metrics, joined: Joined) -> dict[str, Json]:
    """What a checkpoint of a run holds besides tensors and settings; `read_progress` reads it.

    Args:
        callbacks: the callbacks that the YAML names, by name.
        joined: where the run switched to its present mixture.
    """
    clock, order = run.timeline.clock, run.loader.order
    return {
        "state": asdict(run.state),
        "data": run.loader.fingerprint,
        "seconds": run.train_seconds,
        "clock": [clock.before, clock.seconds],
        "unevaluated": cast(dict[str, Json], unevaluated),
        # What monitors read of a step that they have not seen yet.
        "router": [part.tolist() for part in run.router] if unevaluated and run.router else None,
        "callbacks": {name: kept for name, each in callbacks.items() if (kept := each.state_dict())},
        **({"mixture": to_save(order, run.state.rows, joined)} if isinstance(order, Mixture) else {}),
    }


def read_progress(contents: Contents) -> Progress:
    """Read the progress of the run that saved a checkpoint.

    Raises:
        ConfigError: it was not saved by a training run, or holds values that no run saves.
    """
    state, said = train_state(contents), contents.trainer
    with as_saved(contents):
        unevaluated, router, callbacks = said.get("unevaluated") or {}, said.get("router"), said.get("callbacks")
        if not isinstance(unevaluated, dict) or (unevaluated and unevaluated.get("step") != state.step):
            raise ValueError("unevaluated metrics are of another step")
        return Progress(
            state,
            _clock(said),
            _seconds(said),
            cast(Metrics, unevaluated),
            RouterStats(*map(torch.tensor, cast(list[object], router))) if unevaluated and router else None,
            {name: kept for name, kept in callbacks.items() if isinstance(kept, dict)}
            if isinstance(callbacks, dict)
            else {},
        )


def train_state(contents: Contents) -> TrainState:
    """The steps, rows and tokens of the run that saved a checkpoint.

    Raises:
        ConfigError: it was not saved by a training run.
    """
    state = contents.trainer.get("state")
    if not isinstance(state, dict) or not {"step", "rows", "tokens"} <= state.keys():
        raise ConfigError(
            f"{contents.place}: was not saved by a training run; to use its weights, set load_weights_only=true"
        )
    known = {field.name for field in fields(TrainState)}
    return TrainState(**{key: value for key, value in cast(dict[str, int], state).items() if key in known})


def is_trained(contents: Contents) -> bool:
    """Whether a training run saved a checkpoint; otherwise it was converted."""
    return "data" in contents.trainer


@contextmanager
def as_saved(contents: Contents) -> Iterator[None]:
    """Read values of a checkpoint within the block; a value that no run saves becomes a ConfigError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{contents.place}: {TRAINER} contains values that no run saves ({type(error).__name__}: {error})"
        ) from None


def _clock(said: Mapping[str, Json]) -> tuple[float, float]:
    match said.get("clock"):
        case [int() | float() as before, int() | float() as seconds]:
            return float(before), float(seconds)
    trained = _seconds(said)  # a checkpoint of an earlier version has the time of its steps alone
    return trained, trained


def _seconds(said: Mapping[str, Json]) -> float:
    seconds = said.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else 0.0
