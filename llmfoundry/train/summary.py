"""summary.json: the results of a run, written at its end and read by a start that may find nothing left to do."""

from __future__ import annotations

from pathlib import Path

from llmfoundry import runtime
from llmfoundry.checkpoint.identity import Plain
from llmfoundry.eval.icl import PREFIX
from llmfoundry.strict_json import read_mapping
from llmfoundry.train.evaluating import evaluates
from llmfoundry.train.run import EVALUATED, Run

Summary = dict[str, float | int | bool | str | list[float]]

_VALIDATION = "validation"
_NAMES = {"LanguageCrossEntropy": "nats_per_token", "bits_per_byte": "bits_per_byte"}  # of metrics on texts


def summary_of(run: Run, stopped: bool) -> Summary:
    """The results of a run.

    Args:
        stopped: whether it was asked to stop before its end.
    """
    model = run.config.model
    result: Summary = {
        "steps": run.state.step,
        "tokens": run.state.tokens,
        "params": model.n_params(),
        "active_params": model.n_active_params(),
        "trainable_params": model.n_trainable_params(),
        "tokens_per_sec": run.state.tokens / run.train_seconds if run.train_seconds else 0.0,
        "seconds": run.train_seconds,
        "ended": run.why or f"max_duration={run.config.max_duration}",
        "stopped": stopped,
        "peak_memory_bytes": runtime.peak_memory_bytes(run.device),
    }
    for key, value in run.evaluation.items():
        label, _, name = key.removeprefix(EVALUATED).rpartition("/")
        is_text = key.startswith(EVALUATED)
        result["/".join(filter(None, (_VALIDATION, label, _NAMES[name]))) if is_text else key] = value
    return result


def is_complete(run: Run) -> bool:
    """Whether nothing is left to do: the last step is done, and its summary includes the evaluation."""
    if run.state.step < run.timeline.total_steps or not run.config.autoresume:
        return False
    summary = _read(run.config.folder)
    evaluated = not evaluates(run) or any(key.startswith((f"{_VALIDATION}/", PREFIX)) for key in summary)
    return evaluated and summary.get("steps") == run.state.step


def _read(folder: Path) -> Plain:
    """The summary; empty if it is missing or malformed."""
    try:
        return read_mapping(folder / "summary.json")
    except (OSError, ValueError):
        return {}
