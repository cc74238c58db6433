"""Time the LoRA fine-tuning of Qwen3-30B-A3B on one GPU: ours, with a base in bf16 or NF4, and transformers with peft.

    python scripts/bench/lora_model.py lora qlora peft --data FOLDER_OF_TEXT

Adapters are on attention and on all experts. Weights are random, tokens are those of the data (peft's random), and
activations are recomputed. Each provider runs in a process of its own and adds its row to
scripts/bench/results/lora_model.json: tokens/s (median of the steps) and the peak of memory, or that it ran out of it.
bitsandbytes quantises `nn.Linear` alone, so transformers' stacked experts have no counterpart of `qlora`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from moe_layer import machine, milliseconds

from llmfoundry.cli.command import read_run_config
from llmfoundry.dtensor import LocalShard
from llmfoundry.layers.lora import frozen_weights
from llmfoundry.model import init
from llmfoundry.train.build import build

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "scripts" / "bench" / "results" / "lora_model.json"
ALPHA = 16.0
Row = dict[str, object]


def _draw(shard: LocalShard, std: float, *_: object) -> None:
    """On the device: the numbers of real runs are the same on every mesh, and take minutes here."""
    shard.local.normal_(0, std)


def ours(quantize: str | None, args: argparse.Namespace) -> tuple[list[float], int]:
    """Milliseconds of each step of a run of yamls/qwen3-30b-a3b.yaml, and parameters that are trained."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"model.lora.rank={args.rank}", f"model.lora.alpha={ALPHA}", f"model.n_layers={args.layers}",
            f"variables.data={args.data}", "variables.tokenizer=bpe", "tokenizer.vocab_size=8192",
            "parallel.recompute=full", "parallel.expert=1", f"global_train_batch_size={args.rows}",
            f"device_train_microbatch_size={args.rows}", f"max_seq_len={args.sequence}", f"save_folder={folder}/run",
            *([f"model.lora.quantize={quantize}", "load_path=hf:none"] if quantize else []),
        ]  # fmt: skip
        config = read_run_config(str(ROOT / "yamls" / "qwen3-30b-a3b.yaml"), overrides)
        if quantize:  # no base is read: the values in 4 bits are drawn below
            config = config.model_copy(update={"load_path": None})
        with patch.object(init, "draw_weight", _draw):
            trainer = build(config)
        for _, weight in frozen_weights(trainer.model):
            weight.codes.random_(0, 256)
            weight.scales.fill_(0.04)
        n = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        times = [1e3 * float(str(trainer.take_step()["time/step_seconds"])) for _ in range(args.warmup + args.steps)]
        return times[args.warmup :], n


def theirs(args: argparse.Namespace) -> tuple[list[float], int]:
    """The same by transformers and peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=args.layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
        vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    adapters = LoraConfig(
        r=args.rank, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = get_peft_model(base, adapters)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(0, config.vocab_size, (args.rows, args.sequence), device="cuda")

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return milliseconds(step, args.warmup, args.steps), sum(parameter.numel() for parameter in trained)


def measure(provider: str, args: argparse.Namespace) -> Row:
    row: Row = machine() | {
        "layers": args.layers, "rank": args.rank, "rows": args.rows, "sequence": args.sequence, "steps": args.steps,
    }  # fmt: skip
    try:
        times, n = theirs(args) if provider == "peft" else ours("nf4" if provider == "qlora" else None, args)
    except torch.OutOfMemoryError as error:
        return row | {"out_of_memory": str(error).split(". ")[0]}
    median = statistics.median(times)
    return row | {
        "trained_parameters": n,
        "ms": median,
        "tokens_per_second": args.rows * args.sequence / median * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("providers", nargs="+", choices=["lora", "qlora", "peft"])
    parser.add_argument("--data", required=True, help="a folder of text")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if len(args.providers) > 1:
        for provider in args.providers:
            others = [each for each in sys.argv[1:] if each not in args.providers]
            subprocess.run([sys.executable, __file__, provider, *others], check=True)
        return
    (provider,) = args.providers
    row = measure(provider, args)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    args.out.write_text(json.dumps({"rows": rows | {provider: row}}, indent=1) + "\n")
    print(provider, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
