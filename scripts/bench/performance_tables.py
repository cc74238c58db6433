"""The tables that only docs/performance.md has, one function for each file in scripts/bench/results.

`render_readme.py` writes them into the page.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def kernels() -> str:
    """Each kernel of the mixture layer alone."""
    rows = [
        [row["kernel"], row["shape"], f"{row['ms']:.3f}", _number(row["tflops"], ",.0f"),
         _number(row["gb_per_second"], ",.0f"), _number(row["sonic_moe_ms"], ".3f")]
        for row in _read("moe_kernels")["rows"]
    ]  # fmt: skip
    tokens = {row["T"] for row in _read("moe_kernels")["rows"]}
    assert len(tokens) == 1, tokens
    head = ["kernel", "shape", "ms", "TFLOP/s", "GB/s", "SonicMoE, ms"]
    return _lines(f"{tokens.pop():,} tokens, medians. {_on('moe_kernels')}", _table(head, rows))


def report() -> str:
    """What the report adds to a step."""
    found = _read("report")
    seconds, reads = found["report_cpu_seconds"], found["reads"]
    rows = [
        ["entropy of the routers", "every step", f"{1e3 * found['entropy_cpu_seconds_per_step']:.2f}", "0"],
        ["between samples", "every step", f"{1e3 * seconds['none']:.2f}", str(reads["none"])],
        [
            "a sample of all layers",
            f"{found['samples']} per run",
            f"{1e3 * seconds['sample']:.2f}",
            str(reads["sample"]),
        ],
        ["the probe of a text, and the page", "evaluations", f"{1e3 * seconds['probe']:.0f}", str(reads["probe"])],
    ]
    step, share = f"{1e3 * found['step_cpu_seconds']:.0f} ms", f"{found['share_of_step']:.2%}"
    about = (
        f"{found['config']}: {found['layers']} layers, {found['experts']} experts, "
        f"{found['tokens_per_step']:,} tokens per step.\n"
        f"{found['device']}, torch {found['torch']}, CPU time, medians; a step takes {step}.\n"
        f"In a run of {found['run_steps']:,} steps with {found['evaluations']} evaluations, "
        f"everything together takes {share} of a step."
    )
    return _lines(about, _table(["", "when", "ms", "waits for the device"], rows))


def update() -> str:
    """The optimizer's update of a step."""
    result = _read("update")
    rows = [
        [row["provider"], f"{row['ms']:.1f}", f"{row['norm_ms']:.1f}", f"{row['update_gb_per_second']:,.0f}"]
        for row in result["rows"]
    ]
    about = f"{result['config']}: {result['rows'][0]['parameters'] / 1e9:.2f} B parameters, medians. {_on('update')}"
    return _lines(about, _table(["", "norm, clip and update, ms", "of it the norm, ms", "update, GB/s"], rows))


def optimizer_curves() -> str:
    """What optimizers reach in runs of toy size."""
    result = _read("optimizer_curves")
    key = next(name for name in result["rows"][0] if name.startswith("nats_per_token_of_last_"))
    rows = [
        [f"`{row['optimizer']}`", f"{row['lr']:g}", str(row["seed"]), f"{row[key]:.3f}"] for row in result["rows"]
    ]  # fmt: skip
    last = key.removeprefix("nats_per_token_of_last_")
    about = (
        f"{result['steps']} steps of `yamls/moe.yaml` at toy size on Python's standard library, in fp32: the mean loss "
        f"of the last {last}. {_on('optimizer_curves')}"
    )
    return _lines(about, _table(["", "lr", "seed", "nats per token"], rows))


def lora_layer() -> str:
    """The experts of a layer with adapters."""
    rows = [
        [f"`{row['provider']}`", row["shape"], str(row["rank"]), f"{row['fwd_ms']:.2f}", f"{row['fwdbwd_ms']:.2f}",
         f"{row['of_frozen']:.2f}", f"{row['peak_mib']:,.0f}"]
        for row in _read("lora_layer")["rows"]
    ]  # fmt: skip
    head = ["", "shape", "rank", "forward, ms", "forward and backward, ms", "relative to frozen", "peak, MiB"]
    return _lines(f"{_read('lora_layer')['rows'][0]['T']:,} tokens, medians. {_on('lora_layer')}", _table(head, rows))


def lora_model() -> str:
    """A whole fine-tuning step with adapters."""
    found = _read("lora_model")["rows"]
    names = {
        "lora": "**ours**, base in bf16",
        "qlora": "**ours**, base in NF4",
        "peft": "`transformers` with peft, base in bf16",
    }
    rows = [
        [names[name], f"{found[name]['tokens_per_second']:,.0f}", f"{found[name]['peak_gib']:.1f}",
         f"{found[name]['trained_parameters'] / 1e6:.0f} M"]
        for name in names
    ]  # fmt: skip
    run = found["lora"]
    about = (
        f"Qwen3-30B-A3B, {run['layers']} layers, rank {run['rank']} on attention and experts, {run['rows']} row of "
        f"{run['sequence']:,} tokens, activations recomputed; medians of {run['steps']} steps. {_on('lora_model')}"
    )
    return _lines(about, _table(["", "tokens/s", "peak, GiB", "trained parameters"], rows))


def loss_curves() -> str:
    """How far apart runs with different backends are."""
    result = _read("loss_curves")
    rows = [
        [f"`moe_impl: {name}`", *(f"{row[key]:.3f}" for key in ("mean", "largest", "of_the_last_tenths_means"))]
        for name, row in result["from_reference"].items()
        if name != "reference"
    ]
    steps = len(result["curves"]["reference"])
    about = (
        f"{steps} steps of a model of {result['parameters'] / 1e9:.2f} B parameters in bf16, {result['global_rows']} "
        f"rows of {result['sequence']:,} tokens. Differences from `moe_impl: reference`, nats per token. "
        f"{_on('loss_curves')}"
    )
    head = ["", "mean", "largest of a step", "between the means of the last tenth"]
    return _lines(about, _table(head, rows))


def memory_peaks() -> str:
    """Peaks of memory that the planner is held against."""
    rows = [
        [row["model"], _settings(row["parallel"]), str(row["microbatches"]), f"{row['peak_bytes'] / 2**30:.2f}"]
        for row in _read("memory")["rows"]
    ]
    return _lines(_on("memory"), _table(["model", "`parallel`", "microbatches", "peak, GiB"], rows))


def loader() -> str:
    """The loader with one source and with many."""
    result = _read("loader")
    config, ms = result["config"], result["processor_ms_per_batch"]
    tokens = config["rows_per_batch"] * config["max_seq_len"]
    rows = [
        [f"{sources} source{'s' * (sources != '1')}", f"{tokens / each / 1e3:.0f}", f"{each:.2f}"]
        for sources, each in ms.items()
    ]
    about = (
        f"{config['batches']} batches of {config['rows_per_batch']} rows of {config['max_seq_len']:,} tokens, in one "
        f"thread, at a load average of {result['load_average']}. "
        f"By the clock, 50 sources give {result['times_what_is_needed']:.0f} times what eight GPUs with "
        f"{result['needed_by_8_gpus'] / 8:,.0f} tokens/s each need; they take {result['cost_of_50_sources']:.1%} more "
        f"processor time than one. {_on('loader')}"
    )
    return _lines(about, _table(["", "million tokens per processor second", "processor time per batch, ms"], rows))


def prepare() -> str:
    """Tokenising texts into shards."""
    result = _read("prepare")
    config = result["config"]
    names = {
        "datasets.map": f"`datasets` {result['versions']['datasets']}, `map` with the same tokenizer, one process",
        "1 process": "`llmfoundry prepare --workers 1`",
        "2 processes": "`llmfoundry prepare --workers 2`",
        "2 apart": "two of `llmfoundry prepare --workers 1` at the same time, each on half of the documents",
    }
    rows = [
        [names[way], f"{result['seconds'][way]:.1f}", f"{result['processor_seconds'][way]:.1f}",
         f"{rate / 1e6:.2f}"]
        for way, rate in result["tokens_per_processor_second"].items()
    ]  # fmt: skip
    about = (
        f"{config['documents']:,} documents, {config['bytes'] / 1e6:.0f} MB, {config['tokens'] / 1e6:.1f} million "
        f"tokens of a vocabulary of {config['vocab_size']:,}; medians of {config['repeats']} on a machine with "
        f"{config['cores']} cores and a load average of {result['load_average'][0]}. "
        f"{_on('prepare')}"
    )
    head = ["", "seconds", "processor seconds", "million tokens per processor second"]
    return _lines(about, _table(head, rows)) + "\n\n" + _scaling()


def _scaling() -> str:
    """What a second process gains, beside what the machine can gain from one."""
    result = _read("prepare_scaling")
    ours, limit = (result[f"two_{name}_to_one_by_processor_time"] for name in ("processes", "apart"))
    return (
        f"With a core for each and {result['config']['bytes'] / 1e6:.0f} MB of the same corpus, two workers are {ours} "
        f"times as fast as one, by processor time. Two runs of one worker that share nothing, each on half of the "
        f"documents, are {limit} times as fast, which is the limit of the machine. Medians of "
        f"{result['config']['repeats']} at load averages of {min(result['load_average']):.0f} to "
        f"{max(result['load_average']):.0f}. {_on('prepare_scaling')}"
    )


def foundry_parity() -> str:
    """LLM Foundry's own models beside ours."""
    result = _read("foundry_parity")
    theirs = result["theirs"]
    rows = [
        [row["model"], f"{row['largest difference of logits']:.1e}",
         f"{row['largest difference of the loss in ten steps']:.1e}"]
        for row in result["models"]
    ]  # fmt: skip
    about = (
        f"LLM Foundry {theirs['llm-foundry']} with `transformers` {theirs['transformers']}, {result['dtype']}; ten "
        f"steps of {result['optimizer']['name']} from the same weights. {_on('foundry_parity')}"
    )
    head = ["model", "largest difference of logits", "largest difference of the loss in ten steps, nats per token"]
    return _lines(about, _table(head, rows))


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _on(name: str) -> str:
    """What a file was measured on, and with what."""
    result = _read(name)
    rows = result.get("rows", [])
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    machine = result if "torch" in result else rows[0]
    device = machine.get("gpu") or machine.get("device") or "a CPU"
    shas = {row["git_sha"] for row in [result, *rows] if "git_sha" in row}
    versions = [f"{key} {machine[key]}" for key in ("driver", "torch", "triton") if key in machine]
    commits = " and ".join(f"`{sha[:10]}`" for sha in sorted(shas))
    return f"On {device}, {', '.join(versions)}, commit {commits}."


def _settings(parallel: dict) -> str:
    return ", ".join(f"{key}: {str(value).lower()}" for key, value in parallel.items())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _lines(about: str, table: list[str]) -> str:
    return "\n".join([about, "", *table])
