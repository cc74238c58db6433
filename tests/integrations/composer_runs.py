"""Runs under Composer's Trainer, and the same under ours: what test_composer.py compares.

`python composer_runs.py FOLDER WAY` is one process of a run; several find each other by torch's environment variables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llmfoundry.integrations.torchvision_operators  # noqa: F401  before composer

# isort: split
import composer
import torch
from composer.loggers import LoggerDestination
from composer.optim import CosineAnnealingWithWarmupScheduler

import llmfoundry.callbacks  # noqa: F401
from llmfoundry import runtime
from llmfoundry.config import check
from llmfoundry.integrations.composer import ComposerParts, composer_parts
from llmfoundry.train.build import build
from llmfoundry.train.config import RunConfig

STEPS = 8


def run_config(folder: Path, way: str, **more: object) -> RunConfig:
    """A tiny mixture with all that routing can ask of a loop: noise, a bias that moves, both losses, clipping."""
    parallel = {"expert": 2} if way.startswith("presharded") else {}
    data: dict[str, object] = {
        "max_seq_len": 16,
        "model": {
            "name": "causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 320, "max_seq_len": 16,
            "norm_type": "rmsnorm", "no_bias": True, "tie_word_embeddings": not way.startswith("fsdp2"),
            "attn_config": {"rope": True},
            "ffn_config": {
                "ffn_type": "moe", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 16, "moe_num_experts": 4,
                "moe_top_k": 2, "moe_loss_weight": 0.05, "moe_zloss_weight": 0.01, "moe_bias_update_rate": 0.01,
                "moe_jitter_eps": 0.1,
                # with several microbatches, their loop does not know the load of the whole batch
                "moe_lbl_scope": "microbatch" if way in ("microbatches", "masked") else "global_batch",
            },
        },
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "train_loader": loader(folder / "train.jsonl" if way == "masked" else folder / "texts", way),
        "eval_loader": {"dataset": {"name": "text_files", "path": str(folder / "held-out")}},
        "eval_interval": f"{STEPS}ba",
        "eval_subset_num_batches": -1,
        "optimizer": {"name": "decoupled_adamw", "lr": 0.02, "weight_decay": 1.0e-4},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1, "composer_step": True},
        "algorithms": {"gradient_clipping": {"clipping_threshold": 0.5}},
        "max_duration": f"{STEPS}ba",
        "global_train_batch_size": 8,
        "device_train_microbatch_size": 2 if way in ("microbatches", "masked") else "auto",
        "parallel": parallel,
        "save_folder": str(folder / "ours" / way),
        "log_to_console": False,
    }  # fmt: skip
    return check(RunConfig, data | more)


def loader(path: Path, way: str) -> dict[str, object]:
    if way == "masked":  # prompts have no labels, so that ranks and microbatches have different numbers of them
        return {"name": "finetuning", "dataset": {"path": str(path), "cache_dir": str(path.parent / "cache")}}
    return {"dataset": {"name": "text_files", "path": str(path)}}


class Watch(LoggerDestination):
    """Each step's loss and gradient norm."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "grad_norm" in metrics:
            self.norms.append(metrics["grad_norm"])
        if "loss/train/total" in metrics:
            self.losses.append(metrics["loss/train/total"])


def trainer(made: ComposerParts, way: str, folder: Path, watch: Watch, **more: object) -> composer.Trainer:
    parts = made._asdict()
    parts["loggers"] = [watch]
    if way == "their_schedule":
        parts["schedulers"] = CosineAnnealingWithWarmupScheduler("2ba", alpha_f=0.1)
    if way.startswith("fsdp2"):
        more["parallelism_config"] = {"fsdp": {"state_dict_type": "sharded"}}
    saving = {"save_folder": str(folder / "theirs" / way), "save_interval": "4ba", "save_overwrite": True}
    device = {"device": "cpu", "progress_bar": False, "log_to_console": False}
    return composer.Trainer(**parts, **saving, **device, **more)


def run(folder: Path, way: str) -> dict[str, object]:
    """One way under Composer."""
    watch = Watch()
    config = run_config(folder, way)
    sharded = way.startswith("presharded")
    if way.endswith("resumed"):
        first = composer_parts(config, shard=sharded)._replace(max_duration="4ba")
        one = trainer(first, way, folder, watch, run_name="r", autoresume=True)
        one.fit()
        one.close()
    made = composer_parts(config, shard=sharded)
    more = {"run_name": "r", "autoresume": True} if way.endswith("resumed") else {}
    made_trainer = trainer(made, way, folder, watch, **more)
    made_trainer.fit()
    metric = made_trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"].compute()
    made_trainer.close()
    return {"losses": watch.losses, "norms": watch.norms, "eval": float(metric)}


def ours(folder: Path, way: str) -> dict[str, object]:
    """The same by our trainer, in one process; its weights are saved."""
    one_process = {"parallel": {}, "save_folder": str(folder / "ours" / way)}
    made = build(run_config(folder, way, **one_process))
    made.fit()
    lines = [json.loads(line) for line in (folder / "ours" / way / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss/train/total"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "eval": lines[-1]["metrics/eval/LanguageCrossEntropy"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, which = Path(sys.argv[1]), sys.argv[2]
    found = run(where, which)
    if runtime.is_rank0():
        (where / f"{which}.json").write_text(json.dumps(found))
