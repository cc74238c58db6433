"""Render the measured and planned parts of the pages: everything between `<!-- NAME -->` and `<!-- /NAME -->`.

A part without results is left empty. Rendering twice changes nothing. `--check` writes nothing and exits with 1 if a
page is not up to date.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from foundry_table import foundry_changed, foundry_diff, foundry_gone, foundry_only, foundry_refused
from performance_tables import (
    foundry_parity,
    kernels,
    loader,
    lora_layer,
    lora_model,
    loss_curves,
    memory_peaks,
    optimizer_curves,
    prepare,
    report,
    update,
)
from plan_table import many_ranks, measured, planning, rates

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("performance", "planning", "from-llm-foundry")),
)


def yaml_diff() -> str:
    """The edit that turns the dense model into a mixture of experts; comment lines left out."""
    dense, moe = (
        [line for line in (ROOT / "yamls" / name).read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
        for name in ("dense.yaml", "moe.yaml")
    )
    lines = difflib.unified_diff(dense, moe, "yamls/dense.yaml", "yamls/moe.yaml", n=1, lineterm="")
    return "\n".join(["```diff", *(line for line in lines if not line.startswith("@@")), "```"])


def yamls() -> str:
    """One row for each YAML: its file and its header."""
    rows = []
    for path in sorted((ROOT / "yamls").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda x: x[:1] == "#", lines))
        rows.append(f"| `yamls/{path.name}` | {comment} |")
    return "\n".join(["| | |", "|---|---|", *rows])


def cpu_step() -> str:
    """Our training step and that of `transformers`, on a CPU."""
    result = _result("cpu_step")
    if result is None:
        return ""
    shape, versions, parity = result["config"], result["versions"], result["parity"]
    return f"""\
One training step on a CPU ({result["cpu"]}, {result["threads"]} threads): {result["parameters"] / 1e6:.1f} M
parameters, {shape["experts"]} experts, top {shape["top_k"]}, {shape["rows"]} rows of {shape["sequence"]}
tokens, fp32, AdamW; both in one process, in alternating steps, medians of {result["iterations"]} steps.

| | tokens/s | ratio |
|---|---|---|
| `transformers` {versions["transformers"]}, OlmoeForCausalLM | {_speed(result["transformers"])} | 1.00 |
| this framework | {_speed(result["ours"])} | {result["ratio"]["median"]:.2f} |

From the same weights on the same batches, the two losses differ by at most
{parity["max_difference"]:.0e} nats per token over {parity["steps"]} steps.
Measured by `scripts/bench/cpu_step.py` on torch {versions["torch"]}."""


def conversion() -> str:
    """Conversion of checkpoints, relative to a plain copy of the same files."""
    result = _result("convert")
    if result is None:
        return ""
    rows = [
        f"| `convert.py {way}` | {result['gb_per_second'][way]:.2f} | {result['of_a_copys_bandwidth'][way]:.0%} "
        f"| {result['peak_resident_bytes'][way] / 1e9:.2f} |"
        for way in ("from-hf", "to-hf")
    ]
    return "\n".join(
        [
            f"Conversion of an {result['bytes'] / 1e9:.1f} GB checkpoint in shards of "
            f"{result['largest_shard_bytes'] / 1e9:.0f} GB, medians of {result['repeats']}, start and checksums "
            f"included, by `scripts/bench/convert.py`; a plain copy of the same files on that disk: "
            f"{result['gb_per_second']['copy']:.2f} GB/s.",
            "",
            "| | GB/s | relative to the copy | peak memory, GB |",
            "|---|---|---|---|",
            *rows,
        ]
    )


PROVIDERS = {
    "triton": "**this framework**",
    "grouped_mm": "its fallback, `moe_impl: grouped_mm`",
    "transformers": "`transformers`, grouped_mm",
    "liger": "liger-kernel, fused MoE",
    "scattermoe": "ScatterMoE",
    "sonicmoe": "SonicMoE",
}


def moe_layer() -> str:
    """Our layer and others: speed of forward and backward, and what they keep, with natural routing."""
    result = _result("moe_layer")
    if result is None:
        return ""
    tokens = 16384
    ran = [row for row in result["rows"] if "failed" not in row]
    rows = [row for row in ran if (row["T"], row["routing"]) == (tokens, "natural")]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    of = {(row["provider"], row["shape"]): row for row in rows}

    def line(name: str, cells: Iterable[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def cells(provider: str, key: str) -> list[str]:
        return [f"{of[provider, shape][key]:,.0f}" if (provider, shape) in of else "failed" for shape in shapes]

    ceilings = [f"{of['triton', shape]['dense_tflops']:.0f}" for shape in shapes]
    table = [
        line(name, [*cells(provider, "fwdbwd_tflops"), *cells(provider, "activation_mib")])
        for provider, name in PROVIDERS.items()
        if any(row["provider"] == provider for row in result["rows"])
    ]
    low, high, cases = _ahead(ran)
    return "\n".join(
        [
            f"One MoE layer, router included, forward and backward, on one {result['gpu']}, bf16, {tokens:,} tokens:",
            "TFLOP/s, and MiB kept for the backward. Medians, by `scripts/bench/moe_layer.py` on torch "
            f"{result['torch']}.",
            "",
            line("", [*shapes, *(f"{shape}, MiB" for shape in shapes)]),
            "|---" * (2 * len(shapes) + 1) + "|",
            *table,
            line("two dense products of these sizes", [*ceilings, *("" for _ in shapes)]),
            "",
            f"In the {cases} cases that every implementation could run (these shapes; 4,096, 16,384 and 32,768 tokens;",
            "natural, balanced and Zipf routing), this framework is "
            f"{low:.2f} to {high:.2f} times as fast as the next fastest. The last row is a ceiling, not a mixture.",
        ]
    )


def _ahead(rows: list[dict]) -> tuple[float, float, int]:
    """By how much our layer is faster than the fastest other, at least and at most, and in how many cases.

    SonicMoE, whose tuner takes minutes, is recorded in a few cases and counts in those.
    """
    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        case = cases.setdefault((row["shape"], row["T"], row["routing"]), {})
        case[row["provider"]] = row["fwdbwd_tflops"]
    ratios = [
        speeds["triton"] / max(speed for name, speed in speeds.items() if name not in ("triton", "auto"))
        for speeds in cases.values()
        if speeds.keys() >= PROVIDERS.keys() - {"sonicmoe"}
    ]
    return min(ratios), max(ratios), len(ratios)


def drop_in() -> str:
    """Our experts and its own inside `transformers`."""
    result = _result("drop_in")
    if result is None:
        return ""
    names = {"grouped_mm": "its own experts (`grouped_mm`)", "llmfoundry": "**ours**"}
    rows = [
        f"| {model}, {names[implementation]} | {row['ms']:.1f} | {row['kept_mib']:,.0f} "
        f"| {row['tokens_per_second']:,.0f} | {row['peak_gib']:.1f} |"
        for model, found in result["found"].items()
        for implementation, row in found.items()
    ]
    return "\n".join(
        [
            f"`transformers` {result['transformers']} on one {result['gpu']}, eager, bf16, random weights, by",
            "`scripts/bench/drop_in.py`. Layer: one sparse block, router included, forward and backward, of "
            f"{result['tokens']:,} tokens,",
            f"and what it keeps for the backward. Model: a training step of {result['layers']} layers with embedding, "
            "head and AdamW,",
            f"{result['rows']} rows of {result['sequence']:,} tokens. Medians.",
            "",
            "| | layer, ms | layer keeps, MiB | model, tokens/s | model's peak, GiB |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def train_step() -> str:
    """Whole training steps."""
    result = _result("train_step")
    if result is None:
        return ""
    rows = [
        f"| {name} | {row['devices']} x {row['device']} | {row['tokens_per_second_per_device']:,.0f} "
        f"| {_share(row)} | {_exposed(row)} | {row['peak_gib']:.1f} |"
        for name, row in result["rows"].items()
    ]
    head = "| | on | tokens/s per GPU | MFU | exposed communication | peak, GiB |"
    return "\n".join(
        [
            "Training steps, sequences of 4,096 tokens, by `scripts/bench/train_step.py`; unless named with float32",
            "weights and moments and bf16 compute.",
            "",
            head,
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def _share(row: dict) -> str:
    return "" if row.get("mfu") is None else f"{row['mfu']:.1%}"


def _exposed(row: dict) -> str:
    exposed = row.get("exposed_seconds") if row["devices"] > 1 else None  # not of steps before copies were counted
    return "" if exposed is None else f"{exposed / row['seconds']['median']:.0%} of the step"


def _speed(side: dict) -> str:
    return f"{side['tokens_per_second']['median']:,.0f}"


def _result(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


PARTS: dict[str, Callable[[], str]] = {
    "yaml-diff": yaml_diff,
    "yamls": yamls,
    "cpu-step": cpu_step,
    "convert": conversion,
    "drop-in": drop_in,
    "moe-layer": moe_layer,
    "train-step": train_step,
    "optimizer-curves": optimizer_curves,
    "measured": measured,
    "planning": planning,
    "rates": rates,
    "foundry-changed": foundry_changed,
    "foundry-diff": foundry_diff,
    "foundry-gone": foundry_gone,
    "foundry-only": foundry_only,
    "foundry-parity": foundry_parity,
    "kernels": kernels,
    "loader": loader,
    "lora-layer": lora_layer,
    "lora-model": lora_model,
    "loss-curves": loss_curves,
    "many-ranks": many_ranks,
    "memory": memory_peaks,
    "prepare": prepare,
    "report": report,
    "update": update,
    "foundry-refused": foundry_refused,
}


def render(page: Path) -> str:
    """A page with every marked part written anew.

    Raises:
        ValueError: if a marker names no part, or has no closing marker.
    """
    text = page.read_text(encoding="utf-8")
    opened, closed = re.findall(r"<!-- ([\w-]+) -->", text), re.findall(r"<!-- /([\w-]+) -->", text)
    if opened != closed or not set(opened) <= set(PARTS):
        raise ValueError(f"{page.name}: markers {opened} closed by {closed}; known parts: {sorted(PARTS)}")
    for name in opened:
        body = PARTS[name]()
        block = f"<!-- {name} -->\n{body}\n<!-- /{name} -->" if body else f"<!-- {name} -->\n<!-- /{name} -->"
        start, end = text.index(f"<!-- {name} -->"), text.index(f"<!-- /{name} -->")
        text = text[:start] + block + text[end + len(f"<!-- /{name} -->") :]
    return text


def main() -> int:
    """Render, or with `--check` only compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a page is not up to date")
    arguments = parser.parse_args()
    stale = {page: text for page in PAGES if (text := render(page)) != page.read_text(encoding="utf-8")}
    for page, text in stale.items():
        if arguments.check:
            print(f"{page.relative_to(ROOT)} is stale: run scripts/bench/render_readme.py", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
