"""Time the mixtures of `transformers` with its own experts and with ours (`llmfoundry.drop_in`), in one process.

Each row has two parts. The layer: one sparse block of the real model, router included, forward and backward, and what
it keeps for the backward. The model: a few whole layers with embedding and head, one training step (forward, loss,
backward, fused AdamW), in tokens/s, with the peak memory. All in bfloat16, at the published sizes, random weights.

    python scripts/bench/drop_in.py --out scripts/bench/results/drop_in.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import transformers
from moe_layer import machine, milliseconds
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import llmfoundry.drop_in

THEIRS, OURS = "grouped_mm", llmfoundry.drop_in.NAME
Row = dict[str, object]


def configs(layers: int) -> dict[str, tuple[PreTrainedConfig, type[torch.nn.Module]]]:
    """The published sizes, with fewer layers."""
    qwen = Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
        vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip
    olmoe = OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=50304, max_position_embeddings=4096,
    )  # fmt: skip
    return {"qwen3-30b-a3b": (qwen, Qwen3MoeSparseMoeBlock), "olmoe-1b-7b": (olmoe, OlmoeSparseMoeBlock)}


def layer(config: PreTrainedConfig, block: type[torch.nn.Module], implementation: str, tokens: int) -> Row:
    """One sparse block, forward and backward, in milliseconds (medians) and MiB kept between the two."""
    torch.manual_seed(0)
    config._experts_implementation = implementation
    module = block(config).to("cuda", torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, tokens, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves, dy = [x, *module.parameters()], torch.randn_like(x)

    def forward() -> torch.Tensor:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, dy)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    del y
    times = milliseconds(both, 3, 20)
    return {"ms": statistics.median(times), "kept_mib": kept / 2**20}


def model(config: PreTrainedConfig, implementation: str, rows: int, sequence: int, steps: int) -> Row:
    """Steps of training of a whole model: tokens/s (median) and the peak of memory in GiB."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation=implementation)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, config.vocab_size, (rows, sequence), device="cuda")

    def step() -> None:
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = milliseconds(step, 3, steps)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"tokens_per_second": rows * sequence / statistics.median(times) * 1e3, "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="of the layer")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--rows", type=int, default=4, help="of the model's step")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/drop_in.json"))
    args = parser.parse_args()
    result: Row = {**machine(), "transformers": transformers.__version__, "tokens": args.tokens,
                   "layers": args.layers, "rows": args.rows, "sequence": args.sequence}  # fmt: skip
    found: dict[str, dict[str, Row]] = {}
    for name, (config, block) in configs(args.layers).items():
        for implementation in (THEIRS, OURS):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            row = layer(config, block, implementation, args.tokens)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            row |= model(config, implementation, args.rows, args.sequence, steps=10)
            found.setdefault(name, {})[implementation] = row
            print(name, implementation, json.dumps(row), flush=True)
            args.out.write_text(json.dumps(result | {"found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
