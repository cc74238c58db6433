"""MPT by LLM Foundry's own code beside ours: the folders that it saves, read here; logits; ten steps of AdamW.

    python scripts/bench/foundry_parity.py --foundry-python /an/environment/bin/python

That environment has llm-foundry 0.22 and Composer. Both packages are called llmfoundry, so each runs in a process of
its own, and files pass between them. Their attention is `torch`, all is float32 on a CPU. Their package's __init__
files import every integration; they are passed over, and the modules of MPT run as they are.
Writes scripts/bench/results/foundry_parity.json; exits with 1 if a difference exceeds 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
STEPS, ROWS, LENGTH, VOCAB = 10, 4, 48, 211
OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}

GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
ROPE = {"rope": True, "rope_impl": "hf"}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
MIXTURE = {"ffn_type": "torch_dmoe", "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": None,
           "moe_normalize_expert_weights": 1, "uniform_expert_assignment": False}  # fmt: skip
# About: settings of theirs at the top, in attn_config and in ffn_config.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "learned positions, biases": ({}, {}, {}),
    "ALiBi, no biases": ({"no_bias": True}, {"alibi": True, "clip_qkv": 0.9}, {}),
    "grouped heads, rope, gated, rmsnorm, untied": (
        {"no_bias": True, "norm_type": "rmsnorm", "norm_eps": 1e-6, "tie_word_embeddings": False}, GQA | ROPE,
        {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}},
    ),
    "one key head, llama3 rope, qk_ln": (
        {}, {"attn_type": "multiquery_attention", "qk_ln": True, "rope_hf_config": LLAMA3} | ROPE, {},
    ),
    "window, qk_gn, three matrices, soft caps": (
        {"final_logit_softcapping": 20.0},
        GQA | {"alibi": True, "sliding_window_size": 7, "qk_gn": True, "fused_qkv": False,
               "attn_logit_softcapping": 15.0},
        {},
    ),
    "norms and attention in one module": ({"fuse_norm_attn_norm": True}, GQA | ROPE, {}),
    "layers that reuse keys, with windows": (
        {"block_overrides": {"order": [{"name": "default"}, {"name": "reuse"}, {"name": "near"}], "overrides": {
            "reuse": {"attn_config": {"reuse_kv_layer_idx": -1}}, "near": {"attn_config": {"sliding_window_size": 6}}}},
         "logit_scale": "inv_sqrt_d_model"},
        ROPE, {},
    ),
    "torch_dmoe, two matrices": ({}, GQA | ROPE, MIXTURE | {"mlp_type": "mlp"}),
    "torch_dmoe, gated": ({"no_bias": True}, {"alibi": True}, MIXTURE | {"mlp_type": "glu", "ffn_hidden_size": 96}),
}  # fmt: skip


def batches() -> Tensor:
    """Ten times the same batch, (STEPS, ROWS, LENGTH + 1) ids, so that the loss falls at once."""
    rows = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return rows.expand(STEPS, -1, -1)


def curve(model: torch.nn.Module, tokens: Tensor) -> list[float]:
    """The loss of each step, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses = []
    for batch in tokens:
        loss = F.cross_entropy(logits_of(model, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """(B, S, V), by either package."""
    logits = model(tokens).logits
    assert isinstance(logits, Tensor)
    return logits


def their_modules() -> tuple[Any, Any]:
    """MPTConfig and MPTForCausalLM of the installed llm-foundry, without what its __init__ files import."""
    library = torch.library.Library("torchvision", "DEF")  # torchvision may be built for CUDA; nobody calls these
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    spec = importlib.util.find_spec("llmfoundry")
    assert spec is not None and spec.submodule_search_locations
    root = spec.submodule_search_locations[0]
    for name in ("llmfoundry", "llmfoundry.utils", "llmfoundry.models", "llmfoundry.models.utils"):
        package = types.ModuleType(name)
        package.__path__ = ["/".join([root, *name.split(".")[1:]])]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package
    configuration = importlib.import_module("llmfoundry.models.mpt.configuration_mpt")
    modeling = importlib.import_module("llmfoundry.models.mpt.modeling_mpt")
    modeling._keep = library
    return configuration.MPTConfig, modeling.MPTForCausalLM


def run_theirs(folder: Path) -> None:
    """Their process: make each model, save it as they do, and write what it computes."""
    make_config, make_model = their_modules()
    found, logits, tokens = {}, {}, batches()
    for n, (top, attention, ffn) in enumerate(CASES.values()):
        torch.manual_seed(n)
        config = make_config(
            d_model=64, n_heads=4, n_layers=3, vocab_size=VOCAB, max_seq_len=64,
            attn_config={"attn_impl": "torch"} | attention, ffn_config={"ffn_type": "mptmlp"} | ffn,
            init_config={"name": "kaiming_normal_"}, **top,
        )  # fmt: skip
        model = make_model(config)
        with torch.no_grad():  # theirs begin at 0 or 1, where a bias left out would not show
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.save_pretrained(folder / str(n))
        with torch.no_grad():
            logits[str(n)] = logits_of(model.eval(), tokens[0, :, :-1]).clone()
        found[str(n)] = curve(model.train(), tokens)
    save_file(logits, folder / "logits.safetensors")
    versions = {name: importlib.metadata.version(name) for name in ("llm-foundry", "transformers", "torch")}
    (folder / "curves.json").write_text(json.dumps({"curves": found, "versions": versions}))


def compare(folder: Path) -> list[dict[str, object]]:
    """Ours: read the folders that they saved."""
    from llmfoundry.hf.pretrained import from_pretrained, open_checkpoint

    logits, curves = (
        load_file(folder / "logits.safetensors"),
        json.loads((folder / "curves.json").read_text())["curves"],
    )
    rows: list[dict[str, object]] = []
    tokens = batches()
    for n, about in enumerate(CASES):
        model = from_pretrained(folder / str(n)).model
        with torch.no_grad():
            apart = (logits_of(model, tokens[0, :, :-1]) - logits[str(n)]).abs().max().item()
        ours, theirs = curve(model.train(), tokens), curves[str(n)]
        rows.append(
            {
                "model": about,
                "read as": open_checkpoint(folder / str(n)).family.model_type,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "largest difference of logits": apart,
                "standard deviation of logits": logits[str(n)].std().item(),
                "largest difference of the loss in ten steps": max(
                    abs(a - b) for a, b in zip(ours, theirs, strict=True)
                ),
                "loss of theirs": [round(value, 6) for value in theirs],
                "loss of ours": [round(value, 6) for value in ours],
            }
        )
    return rows


def main() -> int:
    """Run both sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--foundry-python", type=Path, help="python of an environment with llm-foundry 0.22")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs is not None:
        run_theirs(args.theirs)
        return 0
    if args.foundry_python is None:
        parser.error("--foundry-python is missing")
    with tempfile.TemporaryDirectory() as work:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        theirs = [str(args.foundry_python), str(Path(__file__).resolve()), "--theirs", work]
        subprocess.run(theirs, env=clean, cwd=work, check=True)
        rows = compare(Path(work))
        versions = json.loads((Path(work) / "curves.json").read_text())["versions"]
    sha = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "git_sha": sha,
        "machine": platform.platform(),
        "torch": torch.__version__,
        "theirs": versions,
        "dtype": "float32",
        "tolerance": TOLERANCE,
        "batch": [ROWS, LENGTH],
        "optimizer": {"name": "AdamW", **OPTIMIZER},
        "models": rows,
    }
    out = ROOT / "scripts" / "bench" / "results" / "foundry_parity.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    failed = False
    for row in rows:
        worst = max(float(str(value)) for key, value in row.items() if key.startswith("largest"))
        failed = failed or worst > TOLERANCE
        print(f"{row['model']:52} {'over' if worst > TOLERANCE else 'within'} {TOLERANCE}: {worst:.1e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
