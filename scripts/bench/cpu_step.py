"""One training step on a CPU: this framework beside `transformers`' OLMoE, same shape, same weights, same batches.

First parity: 20 steps of each from the same weights on the same batches; the losses must agree to 1e-4 nats per token.
The learning rate warms up over these steps, as in every recipe: without, Adam's first updates are the gradients' signs,
which turn the rounding of a gradient near zero into a difference of full size (7e-4 nats after 20 steps).
Then speed: alternating steps in one process, medians. A step is forward, loss, backward, clipping by global norm and
fused AdamW, in fp32, without auxiliary losses (the two define them differently). `transformers` runs the faster of its
expert implementations that fit into memory. Writes scripts/bench/results/cpu_step.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from llmfoundry.config import check
from llmfoundry.data.loader import LoaderConfig
from llmfoundry.data.tokenizer import TokenizerConfig
from llmfoundry.layers.attention import GroupedQueryConfig
from llmfoundry.layers.ffn import Activation
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.settings import load_yaml
from llmfoundry.train.optim import clip_by_global_norm

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "d_model": 256,
    "n_heads": 4,
    "n_layers": 6,
    "ffn_hidden_size": 512,
    "experts": 8,
    "top_k": 2,
    "vocab_size": 4096,
    "rows": 16,
    "sequence": 256,
    "lr": 1.0e-3,
}
TOLERANCE = 1.0e-4  # nats per token; 2e-6 is seen, about the rounding of a float32 loss of 8 nats
# Expert implementations of `transformers`; its third, batched_mm, gathers the weights of every routed token:
# 12 GiB a layer at this shape.
THEIR_IMPLEMENTATIONS = ("eager", "grouped_mm")

Step = Callable[[Tensor, float], float]  # (batch, learning rate) -> loss in nats per token


def their_model(implementation: str, seed: int) -> OlmoeForCausalLM:
    """OLMoE of `SHAPE`, drawn from `seed`."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        hidden_size=SHAPE["d_model"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        num_key_value_heads=SHAPE["n_heads"],
        num_experts=SHAPE["experts"],
        num_experts_per_tok=SHAPE["top_k"],
        vocab_size=SHAPE["vocab_size"],
        max_position_embeddings=SHAPE["sequence"],
        eos_token_id=0,
        pad_token_id=None,
    )
    return OlmoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=implementation)


def our_model(theirs: OlmoeForCausalLM) -> CausalLM:
    """The same architecture here, with the weights of `theirs`."""
    config = CausalLMConfig(
        d_model=SHAPE["d_model"],
        n_heads=SHAPE["n_heads"],
        n_layers=SHAPE["n_layers"],
        vocab_size=SHAPE["vocab_size"],
        max_seq_len=SHAPE["sequence"],
        norm_type="rmsnorm",
        no_bias=True,
        tie_word_embeddings=False,
        attn_config=GroupedQueryConfig(rope=True, qk_ln=True),
        ffn_config=MoEConfig(
            ffn_act_fn=Activation(name="silu"),
            ffn_hidden_size=SHAPE["ffn_hidden_size"],
            moe_num_experts=SHAPE["experts"],
            moe_top_k=SHAPE["top_k"],
        ),
    )
    model = CausalLM(config)
    model.load_state_dict(_our_names(theirs.state_dict()), strict=True)
    return model


def _our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names; queries, keys and values in one matrix."""
    ours = {
        "wte.weight": theirs["model.embed_tokens.weight"],
        "norm_f.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for i in range(SHAPE["n_layers"]):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        qkv = [theirs[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        ours |= {
            f"{block}.norm_1.weight": theirs[f"{layer}.input_layernorm.weight"],
            f"{block}.attn.wqkv.weight": torch.cat(qkv),
            f"{block}.attn.q_norm.weight": theirs[f"{layer}.self_attn.q_norm.weight"],
            f"{block}.attn.k_norm.weight": theirs[f"{layer}.self_attn.k_norm.weight"],
            f"{block}.attn.out_proj.weight": theirs[f"{layer}.self_attn.o_proj.weight"],
            f"{block}.norm_2.weight": theirs[f"{layer}.post_attention_layernorm.weight"],
            f"{block}.ffn.router.weight": theirs[f"{layer}.mlp.gate.weight"],
            f"{block}.ffn.experts.w1": theirs[f"{layer}.mlp.experts.gate_up_proj"],
            f"{block}.ffn.experts.w2": theirs[f"{layer}.mlp.experts.down_proj"],
        }
    return ours


def their_step(model: OlmoeForCausalLM) -> Step:
    """A step as a user of `transformers` writes it."""
    optimizer = _optimizer(model)

    def step(batch: Tensor, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens, labels = batch[:, :-1], batch[:, 1:]
        output = model(input_ids=tokens, labels=labels, shift_labels=labels.contiguous(), use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return output.loss.item()

    return step


def our_step(model: CausalLM) -> Step:
    """The same step in this framework's parts."""
    optimizer = _optimizer(model)

    def step(batch: Tensor, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens, labels = batch[:, :-1], batch[:, 1:].contiguous()
        output = model(tokens, labels)
        loss = output.loss_sum / labels.numel()
        loss.backward()
        clip_by_global_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # No weight decay: the two would exempt different parameters.
    return torch.optim.AdamW(model.parameters(), lr=SHAPE["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def batches(count: int) -> list[Tensor]:
    """The first batches that yamls/moe.yaml would train on: Python source in tokens.

    Returns:
        `count` tensors (rows, sequence + 1) int64.
    """
    data = load_yaml(ROOT / "yamls" / "moe.yaml", [f"tokenizer.vocab_size={SHAPE['vocab_size']}"])
    source = check(LoaderConfig, data["train_loader"])
    tokenizer = check(TokenizerConfig, data["tokenizer"]).build(source.dataset)
    loader = source.build(tokenizer, seed=17, max_seq_len=SHAPE["sequence"])
    found = [loader.batch(i * SHAPE["rows"], SHAPE["rows"]) for i in range(count)]
    return [torch.cat([batch.tokens[:, :1], batch.labels], dim=1) for batch in found]


def parity(steps: int) -> dict[str, float | int | list[float]]:
    """Train both from the same weights on the same batches."""
    theirs = their_model("eager", seed=0)
    ours = our_model(theirs)
    rows = batches(steps)
    rates = [SHAPE["lr"] * (i + 1) / steps for i in range(steps)]
    their_losses, our_losses = (
        [step(batch, lr) for batch, lr in zip(rows, rates, strict=True)]
        for step in (their_step(theirs), our_step(ours))
    )
    difference = max(abs(a - b) for a, b in zip(their_losses, our_losses, strict=True))
    return {
        "steps": steps,
        "max_difference": difference,
        "tolerance": TOLERANCE,
        "ours": our_losses,
        "transformers": their_losses,
    }


def seconds(steps: dict[str, Step], warmup: int, iterations: int) -> dict[str, list[float]]:
    """Seconds of each step; the candidates take turns, so that a slow moment of the machine hits all."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i, batch in enumerate(batches(warmup + iterations)):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch, SHAPE["lr"])
            if i >= warmup:
                taken[name].append(time.perf_counter() - start)
    return taken


def summary(taken: list[float]) -> dict[str, dict[str, float]]:
    """Median and quartiles in seconds per step, and the median in tokens per second."""
    low, median, high = statistics.quantiles(taken, n=4)
    spread = {"median": median, "quartile_1": low, "quartile_3": high}
    tokens = SHAPE["rows"] * SHAPE["sequence"]
    return {"seconds": spread, "tokens_per_second": {"median": tokens / median}}


def main() -> int:
    """Measure, write, and fail if the losses part or we are slower."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before the clock starts")
    parser.add_argument("--iterations", type=int, default=15, help="steps of each that are timed")
    parser.add_argument("--parity-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "bench" / "results" / "cpu_step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    same = parity(arguments.parity_steps)
    print(f"parity: {same['max_difference']:.1e} nats per token over {same['steps']} steps", flush=True)

    models = {name: their_model(name, seed=0) for name in THEIR_IMPLEMENTATIONS}
    mine = our_model(models["eager"])
    steps = {"ours": our_step(mine), **{name: their_step(model) for name, model in models.items()}}
    taken = seconds(steps, arguments.warmup, arguments.iterations)
    fastest = min(THEIR_IMPLEMENTATIONS, key=lambda name: statistics.median(taken[name]))
    ratios = [theirs / ours for theirs, ours in zip(taken[fastest], taken["ours"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    result = {
        "git_sha": _git_sha(),
        "cpu": _cpu_name(),
        "threads": arguments.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "config": SHAPE,
        "parameters": sum(p.numel() for p in mine.parameters()),
        "warmup": arguments.warmup,
        "iterations": arguments.iterations,
        "ours": summary(taken["ours"]),
        "transformers": {"experts_implementation": fastest, **summary(taken[fastest])},
        "transformers_others": {name: summary(taken[name]) for name in models if name != fastest},
        "ratio": {"median": ratio, "quartile_1": low, "quartile_3": high},
        "parity": same,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, times in taken.items():
        print(f"{name}: {summary(times)['tokens_per_second']['median']:,.0f} tokens/s")
    print(f"ratio to the faster of theirs: {ratio:.2f} (quartiles {low:.2f} to {high:.2f})")
    if same["max_difference"] > TOLERANCE:
        print(f"FAILED: losses part by more than {TOLERANCE}", file=sys.stderr)
        return 1
    return 0


def _git_sha() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
