"""Alarms in words: starving experts, collapsed routers, skipped steps, overfitting."""

from __future__ import annotations

import math

from llmfoundry.report.records import DEAD, Json

PATIENCE = 5  # consecutive samples
CROWDED = 4.0  # multiple of the even share
COLLAPSED = 0.05  # fraction of the maximum entropy
BIASED = 1.0  # scores are between 0 and 1
RESTLESS = 0.5  # fraction of the tokens


def alarms(run: Json) -> list[str]:
    """Find what needs attention; one sentence each.

    Args:
        run: as `records.read_run` returns it.
    """
    return [*_of_curves(run), *_of_experts(run)]


def _of_curves(run: Json) -> list[str]:
    found = []
    last, summary, curves = run["last"], run["summary"], run["curves"]
    assert isinstance(last, dict) and isinstance(summary, dict) and isinstance(curves, dict)
    skipped, steps = last.get("skipped_steps", 0), last.get("step", 0)
    if isinstance(skipped, int) and skipped:
        found.append(
            f"{skipped} of {steps} steps were skipped, because a gradient was not finite; lower optimizer.lr, or clip "
            "gradients."
        )
    validation = curves.get("metrics/eval/LanguageCrossEntropy", {}).get("y", [])
    if len(validation) >= 3 and validation[-1] > 1.02 * min(validation):
        found.append(
            f"The validation loss has risen to {validation[-1]:.3f} from its lowest, {min(validation):.3f}: the model "
            "fits the training text only. Train for fewer epochs, or on more text."
        )
    return found


def _of_experts(run: Json) -> list[str]:
    experts = run["experts"]
    if not isinstance(experts, dict):
        return []
    found = []
    steps, loads, layers = experts["steps"], experts["load"], experts["layers"]
    for layer, load in zip(layers, loads, strict=True):
        recent = [row[-PATIENCE:] for row in load]
        starving = [e for e, row in enumerate(recent) if len(row) == PATIENCE and max(row) < 1000 * DEAD]
        since = steps[-1] - steps[-PATIENCE] if len(steps) >= PATIENCE else 0
        if starving:
            found.append(
                f"Layer {layer}: {_named(starving)} got less than {DEAD:.0%} of an even share for {since} steps; "
                "raise moe_loss_weight, or set moe_bias_update_rate: 0.001."
            )
        crowded = [e for e, row in enumerate(recent) if row and min(row) > 1000 * CROWDED]
        if crowded:
            found.append(
                f"Layer {layer}: {_named(crowded)} got more than {CROWDED:g} times an even share for {since} steps; "
                "the ranks that hold them are slower than the others. Raise moe_loss_weight."
            )
        entropy = [at[layers.index(layer)] for at in experts["entropy"][-PATIENCE:] if at]
        highest = math.log(len(load)) if len(load) > 1 else 0.0
        if len(entropy) == PATIENCE and highest and max(entropy) < COLLAPSED * highest:
            found.append(
                f"Layer {layer}: the router's entropy is {entropy[-1]:.3f} of at most {highest:.2f} nats, so that it "
                "hardly weighs its experts; lower optimizer.lr, or set moe_zloss_weight: 0.001."
            )
        found += [f"Layer {layer}: {text}" for text in _of_router(experts, layers.index(layer))]
    return found


def _of_router(experts: Json, at: int) -> list[str]:
    """Alarms from a layer's bias and its last probes."""
    found = []
    bias, churn = experts["bias"], experts["churn"]
    if isinstance(bias, dict):
        last = [row[-1] for row in bias["values"][at] if row[-1] is not None]
        reach = bias["scale"][at] * (max(last, default=0) - min(last, default=0)) / 1000
        if reach > BIASED:
            found.append(
                f"the bias differs by {reach:.2f} between experts, and scores by less than {BIASED:g}: the bias "
                "alone decides. Lower moe_bias_update_rate."
            )
    assert isinstance(churn, list)
    recent = [layers[at] for layers in churn[-PATIENCE:] if layers is not None]
    if len(recent) == PATIENCE and min(recent) > RESTLESS:
        found.append(
            f"{recent[-1]:.0%} of the tokens have changed an expert since the last evaluation, and no fewer than "
            f"{min(recent):.0%} in the last {PATIENCE}: routing does not settle; lower optimizer.lr or moe_loss_weight."
        )
    return found


def _named(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
    return f"expert{'s' if len(experts) > 1 else ''} {shown}"
