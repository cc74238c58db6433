"""Peak memory of training steps on one GPU: what the allocator counts, of models of many kinds.

    python scripts/bench/memory.py [--models experts dense ...]

Writes scripts/bench/results/memory.json, of which models that are not named keep their rows.
tests/planning/test_memory.py holds the simulation against it.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
from pathlib import Path

import torch

from llmfoundry.config import check
from llmfoundry.data.loader import Batch
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from llmfoundry.planning.job import Job
from llmfoundry.train.optim import AdamWConfig
from llmfoundry.train.step import train_step

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results" / "memory.json"
MICRO_ROWS, SEQ_LEN = 4, 4096

ATTENTION = {"attn_type": "grouped_query_attention", "kv_n_heads": 8, "rope": True}
MOE = {
    "ffn_type": "moe", "ffn_hidden_size": 1024, "moe_num_experts": 32, "moe_top_k": 4,
    "ffn_act_fn": {"name": "silu"},
}  # fmt: skip
LATENT = {
    "attn_type": "multihead_latent_attention", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "rope": True,
}  # fmt: skip
BASE = {
    "name": "causal_lm", "d_model": 2048, "n_heads": 16, "n_layers": 6, "vocab_size": 50304, "max_seq_len": SEQ_LEN,
    "norm_type": "rmsnorm", "no_bias": True, "tie_word_embeddings": False, "attn_config": ATTENTION, "ffn_config": MOE,
}  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "experts": {},
    "experts with biases, grouped_mm": {"ffn_config": MOE | {"bias": True, "moe_impl": "grouped_mm"}},
    "experts with a clamp, grouped_mm": {"ffn_config": MOE | {"ffn_act_limit": 7.0, "moe_impl": "grouped_mm"}},
    "adapters": {"lora": {"rank": 16, "alpha": 32}},
    "windows": {"attn_window_pattern": [1023, -1]},
    "sinks": {"attn_config": ATTENTION | {"sinks": True}},
    "latent attention": {"attn_config": LATENT},
    "dense": {"ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 8192}},
    "MPT": {
        "ffn_config": {"ffn_type": "mptmlp"}, "attn_config": {"alibi": True}, "norm_type": "layernorm",
        "no_bias": False, "tie_word_embeddings": True,
    },
    "a dense block, then experts": {
        "ffn_config": MOE | {"first_k_dense": 1, "dense_ffn_hidden_size": 8192, "shared_expert": True}
    },
}  # fmt: skip
# Model, keys of `parallel`, microbatches.
CASES: list[tuple[str, dict[str, object], int]] = [
    *((name, {}, 1) for name in MODELS),
    *((name, {"recompute": "full"}, 2) for name in ("experts", "experts with biases, grouped_mm", "dense", "adapters")),
    *((name, {"recompute": "selective"}, 1) for name in ("experts", "experts with biases, grouped_mm", "dense")),
    *(
        (name, {"compile": False}, 2)
        for name in ("experts", "experts with biases, grouped_mm", "dense", "latent attention")
    ),
    ("experts", {"sum_gradients_in": "bf16"}, 2),
]


def job_of(name: str, parallel: dict[str, object], microbatches: int) -> Job:
    """One of the cases."""
    model = check(ModelConfig, BASE | MODELS[name])
    assert isinstance(model, CausalLMConfig)
    optimizer = AdamWConfig(name="adamw", lr=1.0e-3)
    rows = MICRO_ROWS * microbatches
    return Job(model, ParallelConfig.model_validate(parallel), optimizer, "amp_bf16", rows, MICRO_ROWS, SEQ_LEN)


def peak(job: Job) -> int:
    """Bytes that are allocated at the highest moment of a second step."""
    torch._dynamo.reset()
    gc.collect()
    with torch.device("meta"):
        model = job.model.build()
    mesh = build_mesh(job.parallel, "cuda", 0)
    model = materialize(parallelize(model, mesh, job.parallel, job.precision), job.parallel, seed=17)
    optimizer = job.optimizer.build(model)
    tokens = torch.randint(job.model.vocab_size, (job.global_rows, job.seq_len), device="cuda")
    batch = Batch(tokens, tokens.roll(-1, 1), torch.arange(job.global_rows, device="cuda"))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        train_step(
            model, optimizer, batch, microbatch_rows=MICRO_ROWS, max_grad_norm=1.0, balance=Balance.of(job.model)
        )
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    named = parser.parse_args().models
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    results = json.loads(RESULTS.read_text())
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if set(named) != set(MODELS) and any(results[key] != value for key, value in facts.items()):
        raise SystemExit(
            f"{RESULTS} is of {results['device']}, torch {results['torch']}, not of {facts}; name all models"
        )
    kept = {(row["model"], str(row["parallel"])): row for row in results.pop("rows")}
    rows = []
    for name, parallel, microbatches in CASES:
        if name in named:
            row = {"model": name, "parallel": parallel, "microbatches": microbatches}
            row |= {
                "peak_bytes": peak(job_of(name, parallel, microbatches)),
                "git_sha": git.stdout.strip() or "unknown",
            }
            print(json.dumps(row), flush=True)
        else:
            row = kept[name, str(parallel)]
        rows.append(row)
    RESULTS.write_text(json.dumps(results | facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
