"""The planning table of docs/planning.md: what `llmfoundry.parallel.plan` foretells of two large models on many GPUs.

`render_readme.py` writes it into the page, and checks that it is what the code says. Run by itself, it prints it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from llmfoundry.cli.command import read_config
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.parallel import hardware
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.hardware import GIB
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, plan_mesh
from llmfoundry.parallel.plan import Plan, Work, plan

ROOT = Path(__file__).resolve().parents[2]
TRAIN_STEP = ROOT / "scripts" / "bench" / "results" / "train_step.json"
SEQ_LEN = 4096  # tokens


class Setting(NamedTuple):
    """What was chosen for one model on so many GPUs."""

    model: str
    gpus: int
    global_rows: int
    replicate: int
    expert: int
    recompute: str
    micro_rows: int
    reduce_once_a_step: bool = True


# By hand, from the tables of `--dry-run`: the fastest that fits, with a copy of the model on 128 GPUs at most.
SETTINGS = [
    Setting("DBRX-132B", 64, 1024, 1, 4, "selective", 2, reduce_once_a_step=False),
    Setting("DBRX-132B", 512, 2048, 4, 4, "selective", 4),
    Setting("DBRX-132B", 4096, 8192, 32, 8, "selective", 2),
    Setting("Qwen3-235B-A22B", 64, 1024, 1, 4, "full", 2, reduce_once_a_step=False),
    Setting("Qwen3-235B-A22B", 512, 2048, 4, 4, "full", 4),
    Setting("Qwen3-235B-A22B", 4096, 8192, 32, 4, "full", 2),
]
# Qwen3-235B-A22B has the shape of its small sister, but for these (Qwen team 2025, arXiv:2505.09388).
QWEN3_235B = [
    "model.d_model=4096", "model.n_heads=64", "model.n_layers=94", "model.ffn_config.ffn_hidden_size=1536",
]  # fmt: skip


def models() -> dict[str, CausalLMConfig]:
    """Those of the table, by name."""
    found = {
        "DBRX-132B": read_config(str(ROOT / "yamls" / "dbrx-132b.yaml"), []).model,
        "Qwen3-235B-A22B": read_config(str(ROOT / "yamls" / "qwen3-30b-a3b.yaml"), QWEN3_235B).model,
    }
    return {name: model for name, model in found.items() if isinstance(model, CausalLMConfig)}


def planned(setting: Setting, model: CausalLMConfig) -> Plan:
    """The plan of a setting.

    Raises:
        ValueError: it does not fit.
    """
    parallel = ParallelConfig.model_validate(
        {"recompute": setting.recompute, "reduce_once_a_step": setting.reduce_once_a_step}
    )
    degrees = Degrees(setting.replicate, setting.gpus // setting.replicate, setting.expert)
    work = Work(setting.global_rows // setting.gpus, setting.micro_rows, SEQ_LEN)
    found = plan(model, parallel, degrees, work)
    if not found.fits(hardware.GPU_MEMORY):
        raise ValueError(f"{setting} needs {found.memory.total / GIB:.1f} GiB a GPU; choose another")
    return found


def planning() -> str:
    """The table: a column for each setting."""
    sizes = models()
    plans = [(setting, planned(setting, sizes[setting.model])) for setting in SETTINGS]
    lines = {
        "parameters, active": [
            f"{sizes[s.model].n_params() / 1e9:.1f} B, {sizes[s.model].n_active_params() / 1e9:.1f} B" for s, _ in plans
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
        "**tokens/s a GPU**": [f"**{p.tokens_per_second:,.0f}**" for _, p in plans],
        "**MFU**": [f"**{p.mfu:.0%}**" for _, p in plans],
        "**memory, GiB**": [f"**{p.memory.total / GIB:.1f}**" for _, p in plans],
    }
    for kind in plans[0][1].memory._fields:
        lines[kind] = [f"{getattr(p.memory, kind) / GIB:.1f}" for _, p in plans]
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
            f"| network | {hardware.NETWORK / 1e9:.0f} GB/s a GPU | assumed: 400 Gb/s a GPU at 80 % |",
            f"| memory kept free | {hardware.RESERVE / GIB:.0f} of {hardware.GPU_MEMORY / GIB:.0f} GiB | assumed |",
        ]
    )


def measured() -> str:
    """The plan beside the training steps that were measured."""
    if not TRAIN_STEP.exists():
        return ""
    lines = []
    for name, row in json.loads(TRAIN_STEP.read_text(encoding="utf-8"))["rows"].items():
        config = read_config(str(ROOT / row["yaml"]), row["overrides"])
        assert isinstance(config.model, CausalLMConfig)
        gpus, rows = row["devices"], row["global_rows"] // row["devices"]
        degrees = plan_mesh(config.parallel, gpus, n_experts(config.model))
        found = plan(config.model, config.parallel, degrees, Work(rows, row["microbatch_rows"], row["sequence"]))
        speed, peak, planned_peak = row["tokens_per_second_per_device"], row["peak_gib"], found.memory.total / GIB
        lines.append(
            f"| {name} | {gpus} | {speed:,.0f} | {found.tokens_per_second:,.0f} "
            f"| {found.tokens_per_second / speed - 1:+.0%} "
            f"| {peak:.1f} | {planned_peak:.1f} | {planned_peak / peak - 1:+.1%} |"
        )
    head = "| | GPUs | tokens/s a GPU | planned | off by | peak, GiB | planned | off by |"
    return "\n".join([head, "|---" * 8 + "|", *lines])


if __name__ == "__main__":
    print(rates(), measured(), planning(), sep="\n\n")
