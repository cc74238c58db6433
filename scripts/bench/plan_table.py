"""The planning table of docs/planning.md: what `llmfoundry.planning` says of two large models on many GPUs.

`render_readme.py` writes it into the page, and checks that it is what the code says. Run by itself, it prints it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from llmfoundry.callbacks import console  # noqa: F401  registers the callbacks that the YAMLs name
from llmfoundry.cli.command import read_run_config
from llmfoundry.planning import hardware
from llmfoundry.planning.hardware import GIB
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import Memory
from llmfoundry.planning.memory import memory
from llmfoundry.planning.plan import Plan, plan
from llmfoundry.planning.settle import shortest

ROOT = Path(__file__).resolve().parents[2]
TRAIN_STEP = ROOT / "scripts" / "bench" / "results" / "train_step.json"
SEQ_LEN = 4096  # tokens


MANY_RANKS = ROOT / "scripts" / "bench" / "results" / "many_ranks.json"
# Of scripts/bench/many_ranks.py: what it is called on the page, its key, and how it is written.
_COSTS = [
    ("replicate x shard", "mesh", "{}"),
    ("**connections of a rank**, at most", "sockets", "{:,}"),
    ("messages one after another, until all agree at the end of a step", "hops", "{:,}"),
    ("save: to decide what a rank writes, s", "plan_seconds", "{:.2f}"),
    ("what a rank tells rank 0, bytes", "told_bytes", "{:,}"),
    ("the most that a rank stages and writes, of an even share", "staged_share", "{:.2f}"),
    ("**tensors.json**, bytes", "index_bytes", "{:,}"),
    ("made by rank 0, s", "index_seconds", "{:.2f}"),
    ("read and checked by each rank, s", "read_seconds", "{:.2f}"),
    ("MANIFEST.json, bytes", "manifest_bytes", "{:,}"),
    ("read and checked by each rank, s", "manifest_seconds", "{:.2f}"),
    ("files that a rank reads of a checkpoint of the same mesh", "files", "{:,}"),
    ("of one of twice as many ranks", "files_on_half", "{:,}"),
    ("to find what to read, s", "find_seconds", "{:.2f}"),
]


class Setting(NamedTuple):
    """What was chosen for one model on a number of GPUs."""

    model: str
    gpus: int
    global_rows: int
    replicate: int
    expert: int
    recompute: str
    micro_rows: int
    reduce_once_a_step: bool = True


# Chosen by hand from the tables of `--dry-run`: the fastest that fits, with a copy of the model on 128 GPUs at most.
SETTINGS = [
    Setting("DBRX-132B", 64, 1024, 1, 4, "selective", 2, reduce_once_a_step=False),
    Setting("DBRX-132B", 512, 2048, 4, 4, "selective", 4),
    Setting("DBRX-132B", 4096, 8192, 32, 8, "selective", 2),
    Setting("Qwen3-235B-A22B", 64, 1024, 1, 4, "full", 2, reduce_once_a_step=False),
    Setting("Qwen3-235B-A22B", 512, 2048, 4, 4, "full", 4),
    Setting("Qwen3-235B-A22B", 4096, 8192, 32, 4, "full", 2),
]
# Qwen3-235B-A22B is Qwen3-30B-A3B with these sizes (Qwen team 2025, arXiv:2505.09388).
QWEN3_235B = [
    "model.d_model=4096", "model.n_heads=64", "model.n_layers=94", "model.ffn_config.ffn_hidden_size=1536",
]  # fmt: skip
MODELS = {"DBRX-132B": ("dbrx-132b", []), "Qwen3-235B-A22B": ("qwen3-30b-a3b", QWEN3_235B)}


def job_of(setting: Setting) -> Job:
    """The run of a setting."""
    yaml, sizes = MODELS[setting.model]
    overrides = [
        *sizes,
        f"max_seq_len={SEQ_LEN}",
        f"global_train_batch_size={setting.global_rows}",
        f"device_train_microbatch_size={setting.micro_rows}",
        f"parallel.replicate={setting.replicate}",
        f"parallel.expert={setting.expert}",
        f"parallel.recompute={setting.recompute}",
        f"parallel.reduce_once_a_step={str(setting.reduce_once_a_step).lower()}",
    ]
    return Job.of(read_run_config(str(ROOT / "yamls" / f"{yaml}.yaml"), overrides))


def many_ranks() -> str:
    """The table of what a process has to do for a run of many ranks."""
    rows = json.loads(MANY_RANKS.read_text())["rows"]
    lines = ["| ranks: | " + " | ".join(f"{row['ranks']:,}" for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for title, key, form in _COSTS:
        lines.append(f"| {title} | " + " | ".join(form.format(row[key]) for row in rows) + " |")
    return "\n".join(lines)


def planned(job: Job, setting: Setting) -> tuple[Plan, Memory]:
    """The plan of a setting.

    Raises:
        ValueError: it does not fit.
    """
    degrees = job.degrees(setting.gpus)
    held = memory(job, degrees)
    if held.total > hardware.GPU_MEMORY - hardware.RESERVE:
        raise ValueError(f"{setting} needs {held.total / GIB:.1f} GiB per GPU; choose another")
    return plan(job, degrees), held


def planning() -> str:
    """The table: a column for each setting."""
    jobs = [job_of(setting) for setting in SETTINGS]
    found = [planned(job, setting) for job, setting in zip(jobs, SETTINGS, strict=True)]
    plans = [(setting, of_setting) for setting, (of_setting, _) in zip(SETTINGS, found, strict=True)]
    lines = {
        "parameters, active": [
            f"{job.model.n_params() / 1e9:.1f} B, {job.model.n_active_params() / 1e9:.1f} B" for job in jobs
        ],
        "global batch, tokens": [f"{s.global_rows * SEQ_LEN / 1e6:.1f} M" for s, _ in plans],
        "replicate x shard": [f"{p.degrees.replicate} x {p.degrees.shard}" for _, p in plans],
        "expert": [str(p.degrees.expert) for _, p in plans],
        "recompute": [s.recompute for s, _ in plans],
        "microbatches of rows": [f"{p.work.microbatches} of {s.micro_rows}" for s, p in plans],
        "reduce_once_a_step": [str(s.reduce_once_a_step).lower() for s, _ in plans],
        "**step, s**": [f"**{p.time.total:.1f}**" for _, p in plans],
        "compute, s": [f"{p.time.compute:.1f}" for _, p in plans],
        "weights and gradients on links, s": [f"{p.time.communication:.1f}" for _, p in plans],
        "exchange of tokens, s": [f"{p.time.exchange:.1f}" for _, p in plans],
        "update, s": [f"{p.time.update:.2f}" for _, p in plans],
        "exposed communication": [f"{p.time.exposed:.1f} s, {p.time.exposed / p.time.total:.0%}" for _, p in plans],
        "**tokens/s per GPU**": [f"**{p.tokens_per_second:,.0f}**" for _, p in plans],
        "**MFU**": [f"**{p.mfu:.0%}**" for _, p in plans],
        "**memory, GiB**": [f"**{held.total / GIB:.1f}**" for _, held in found],
    }
    for kind in Memory._fields:
        lines[kind] = [f"{getattr(held, kind) / GIB:.1f}" for _, held in found]
    head = " | ".join(f"{s.model}, {s.gpus}" for s, _ in plans)
    body = [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()]
    return "\n".join([f"| GPUs: | {head} |", "|---" * (len(plans) + 1) + "|", *body])


def rates() -> str:
    """The constants behind it."""
    dense, attention = hardware.DENSE_FLOPS, hardware.ATTENTION_FLOPS
    copy, sharded, block = hardware.COPY_BYTES, hardware.SHARDED_COPY_BYTES, hardware.BLOCK_BYTES
    shapes = {"Qwen3-30B-A3B": (2048, 768), "OLMoE": (2048, 1024), "Mixtral": (4096, 14336), "DBRX": (6144, 10752)}
    experts = ", ".join(f"{name} {hardware.experts_flops(*shape) / 1e12:.0f}" for name, shape in shapes.items())
    links = {"all_gather": hardware.ALL_GATHER, "reduce_scatter": hardware.REDUCE_SCATTER}
    links |= {"all_to_all": hardware.ALL_TO_ALL, "all_reduce": hardware.ALL_REDUCE}
    return "\n".join(
        [
            "| | | from |",
            "|---|---|---|",
            f"| dense products | {dense / 1e12:.0f} TFLOP/s | measured, cuBLAS |",
            f"| experts | {experts} TFLOP/s; others between, by D x F | measured, our kernels, 16,384 tokens |",
            f"| attention | {attention / 1e12:.0f} TFLOP/s | measured, cuDNN, in a training step |",
            f"| memory | {copy / 1e12:.2f} TB/s | measured, copy |",
            f"| FSDP's copies, AdamW of a share | {sharded / 1e12:.2f} TB/s | measured, in a profile |",
            f"| norms, rotary embedding, residuals | {block} bytes x tokens x layers x d_model | the same |",
            f"| loss | {hardware.LOSS_BYTES} bytes x tokens x vocabulary | the same |",
            f"| NVLink | {', '.join(f'{k} {v / 1e9:.0f}' for k, v in links.items())} GB/s | measured, two GPUs, NCCL |",
            f"| network | {hardware.NETWORK / 1e9:.0f} GB/s per GPU | assumed: 400 Gb/s per GPU at 80 % |",
            f"| memory kept free | {hardware.RESERVE / GIB:.0f} of {hardware.GPU_MEMORY / GIB:.0f} GiB | assumed |",
        ]
    )


def measured() -> str:
    """The plan beside the training steps that were measured.

    A step's time is planned now. The peak was planned for the code that was measured (train_step.py): other code holds
    more or less. Plans of 2026-11-28 were made again when the simulation was mended.
    """
    if not TRAIN_STEP.exists():
        return ""
    lines = []
    for name, row in json.loads(TRAIN_STEP.read_text(encoding="utf-8"))["rows"].items():
        job, gpus = Job.of(read_run_config(str(ROOT / row["yaml"]), row["overrides"])), row["devices"]
        degrees = job.degrees(gpus)
        found, planned_peak = plan(shortest(job, degrees), degrees), row["plan"]["in_all_gib"]
        speed, peak = row["tokens_per_second_per_device"], row["peak_gib"]
        lines.append(
            f"| {name} | {gpus} | {speed:,.0f} | {found.tokens_per_second:,.0f} "
            f"| {found.tokens_per_second / speed - 1:+.0%} "
            f"| {peak:.1f} | {planned_peak:.1f} | {planned_peak / peak - 1:+.1%} |"
        )
    head = "| | GPUs | tokens/s per GPU | planned | off by | peak, GiB | planned | off by |"
    return "\n".join([head, "|---" * 8 + "|", *lines])


if __name__ == "__main__":
    print(rates(), measured(), planning(), sep="\n\n")
