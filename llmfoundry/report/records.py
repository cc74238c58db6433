"""Read a run's files for the report: curves, the experts' loads over time, and the last probe.

`metrics.jsonl` has a line per step, `experts.jsonl` a line per sample of the loads, and `experts.json` the last probe;
the `report` callback writes the last two. Long runs are thinned so that the page stays small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from llmfoundry.config import ConfigError
from llmfoundry.private import disclosed
from llmfoundry.settings import leaves, read_resolved
from llmfoundry.strict_json import parse_json, read_lines, read_mapping, whole_number

EXPERTS, PROBE = "experts.jsonl", "experts.json"
CURVE_POINTS = 1500
HEAT_CELLS = 150_000  # for all layers together, loads and biases
PROBE_POINTS = 300
DEAD = 0.01  # of the even share; experts below it count as dead

# The panels: (title, unit of y, metrics).
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "nats per token", ("loss/train/ce", "metrics/eval/LanguageCrossEntropy")),
    ("Learning rate", "", ("lr",)),
    ("Gradient norm", "", ("grad_norm",)),
    ("Speed", "tokens/s", ("throughput/tokens_per_sec",)),
    ("MFU", "", ("throughput/device/mfu",)),
    ("Memory", "GB", ("memory/peak_allocated_mem", "memory/peak_reserved_mem")),
    ("Step time", "s", ("time/step_seconds",)),
    ("Balance loss", "1 = even load", ("moe/load_balance_loss",)),
    ("Load", "times the even share", ("moe/max_load", "moe/min_load")),
    ("Router entropy", "nats per token", ("moe/router_entropy",)),
)
Json = dict[str, object]


def read_run(folder: Path, newest: Json | None = None) -> Json:
    """Read what the page needs of one run.

    Args:
        newest: a line that metrics.jsonl does not have yet.

    Raises:
        ConfigError: if the folder has no metrics.jsonl, or one of its lines is not JSON.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder}: holds no metrics.jsonl; name the save_folder of a run")
    metrics = [*_lines(folder / "metrics.jsonl"), *([newest] if newest is not None else [])]
    experts = _lines(folder / EXPERTS) if (folder / EXPERTS).is_file() else []
    probe = _value(folder / PROBE) if (folder / PROBE).is_file() else None
    summary = _value(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    return {
        "name": folder.name,
        "summary": summary,
        "last": {key: value for key, value in (metrics[-1] if metrics else {}).items() if not isinstance(value, list)},
        "curves": curves(metrics),
        "experts": heat(experts),
        "probe": probe,
    }


def _lines(path: Path) -> list[Json]:
    found: list[Json] = []
    try:
        for line in read_lines(path):
            value = parse_json(line)
            whole_number(value["step"] if isinstance(value, dict) else None)
            found.append(cast(Json, value))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: line {len(found) + 1} is not JSON of a step: {error}") from None
    return found


def _value(path: Path) -> Json:
    try:
        return cast(Json, read_mapping(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not JSON of a run: {error}") from None


def curves(metrics: list[Json]) -> dict[str, dict[str, list[float | None]]]:
    """Steps and values of each metric that a panel shows, thinned to means of equal ranges of steps."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for _, _, names in PANELS:
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if _number(line.get(name))]
            if points:
                x, y = zip(*_thinned(points, CURVE_POINTS), strict=True)
                found[name] = {"x": list(x), "y": list(y)}
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(points: list[tuple[object, object]], most: int) -> Iterable[tuple[float, float]]:
    size = -(-len(points) // most)
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [float(str(y)) for _, y in part]
        yield float(str(part[-1][0])), float(f"{sum(values) / len(values):.5g}")


def heat(samples: list[Json]) -> Json | None:
    """Loads over time by layer, expert and range of steps, in thousandths of an even share, with their labels."""
    samples = [sample for sample in samples if isinstance(sample.get("load"), list)]
    if not samples:
        return None
    loads = [sample["load"] for sample in samples]
    n_layers, n_experts = len(loads[-1]), len(loads[-1][0])  # type: ignore[index, arg-type]
    biased = "bias" in samples[-1]
    stretches = min(len(samples), max(10, HEAT_CELLS // (n_layers * n_experts * (1 + biased))))
    edges = [round(i * len(samples) / stretches) for i in range(stretches + 1)]
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    by_layer = [
        [
            [round(1000 * n_experts * sum(loads[i][layer][e] for i in range(a, b)) / (b - a)) for a, b in spans]  # type: ignore[index]
            for e in range(n_experts)
        ]
        for layer in range(n_layers)
    ]
    probes = [sample for sample in samples if "confidence" in sample]
    probes = probes[:: max(1, -(-len(probes) // PROBE_POINTS))]
    return {
        "steps": [samples[b - 1]["step"] for _, b in spans],
        "load": by_layer,
        "entropy": [samples[b - 1].get("entropy") for _, b in spans],
        "bias": _biases([samples[b - 1].get("bias") for _, b in spans], n_layers, n_experts) if biased else None,
        "probe_steps": [sample["step"] for sample in probes],
        "confidence": [sample["confidence"] for sample in probes],
        "churn": [sample.get("churn") for sample in probes],
        "layers": samples[-1].get("layers", list(range(n_layers))),
    }


def _biases(samples: list[object], n_layers: int, n_experts: int) -> Json:
    """Router biases by layer, expert and range of steps, in thousandths of the layer's largest (`scale`) or null."""
    scale, values = [], []
    for layer in range(n_layers):
        rows = [[None if at is None else at[layer][e] for at in samples] for e in range(n_experts)]  # type: ignore[index]
        largest = max((abs(value) for row in rows for value in row if value is not None), default=0.0) or 1.0
        scale.append(largest)
        values.append([[None if value is None else round(1000 * value / largest) for value in row] for row in rows])
    return {"scale": scale, "values": values}


def differing_settings(folders: Sequence[Path]) -> list[list[str]]:
    """Return the keys whose values differ between runs, each with its value in every run (empty: not set)."""
    if len(folders) < 2:
        return []
    files = [folder / "config.yaml" for folder in folders]
    runs = [dict(leaves(disclosed(read_resolved(file), {}))) if file.is_file() else {} for file in files]
    keys = dict.fromkeys(key for run in runs for key in run)
    rows = [[key, *(str(run[key]) if key in run else "" for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
