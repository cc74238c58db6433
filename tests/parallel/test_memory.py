"""The plan's memory against the peak of the real training step, simulated on fake tensors (`peak.py`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

pytest.importorskip("triton")  # peak.py looks into the Triton kernels' wrappers
from peak import simulate

from llmfoundry.cli.command import read_config
from llmfoundry.config import check
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.parallel import memory as plan
from llmfoundry.parallel.memory import Memory, memory
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, plan_mesh

ROOT = Path(__file__).resolve().parents[2]
YAMLS = {"olmoe": "olmoe-1b-7b", "mixtral": "mixtral-8x7b", "qwen3": "qwen3-30b-a3b"}
DENSE = {
    "llama": {
        "name": "causal_lm", "d_model": 4096, "n_heads": 32, "vocab_size": 128256, "max_seq_len": 4096,
        "norm_type": "rmsnorm", "no_bias": True, "tie_word_embeddings": False,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 8, "rope": True},
        "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 14336},
    },
    "latent": {
        "name": "causal_lm", "d_model": 2048, "n_heads": 16, "vocab_size": 102400, "max_seq_len": 4096,
        "norm_type": "rmsnorm", "no_bias": True, "tie_word_embeddings": False,
        "attn_config": {
            "attn_type": "multihead_latent_attention", "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope": True,
        },
        "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 10944},
    },
    "gpt": {"name": "causal_lm", "d_model": 1024, "n_heads": 16, "vocab_size": 50368, "max_seq_len": 2048},
}  # fmt: skip
# Promised are 10 %. The cases hold at 6, so that a term that is left out shows.
TOLERANCE = 0.06


class Case(NamedTuple):
    """One run, and the terms without which its plan would be wrong."""

    model: str
    n_layers: int
    gpus: int
    parallel: dict[str, object]
    rows: int  # of a microbatch
    terms: str = ""
    microbatches: int = 1


CASES = [
    Case("olmoe", 8, 1, {"compile": False}, 4, "weights optimizer"),
    Case("olmoe", 4, 1, {}, 2, "gradients"),
    Case("olmoe", 4, 1, {"recompute": "full"}, 16, "inputs"),
    Case("olmoe", 3, 1, {}, 2, microbatches=2),
    Case("olmoe", 8, 2, {"compile": False}, 4, "activations"),
    Case("olmoe", 4, 2, {"expert": 2, "compile": False}, 4),
    Case("olmoe", 2, 8, {"recompute": "full"}, 16, "inputs"),
    Case("olmoe", 3, 2, {"compile": False}, 1, "earlier", microbatches=2),
    Case("olmoe", 3, 2, {"reduce_once_a_step": False, "compile": False}, 1, "earlier", microbatches=2),
    Case("mixtral", 2, 8, {"recompute": "full"}, 2, "gathered pending"),
    Case("mixtral", 2, 64, {"expert": 8, "replicate": 8, "compile": False}, 1),
    Case("mixtral", 3, 64, {"reshard_after_forward": False, "compile": False}, 1, "forward"),
    Case("qwen3", 2, 8, {"recompute": "selective"}, 4, "pending"),
    Case("qwen3", 3, 64, {"expert": 8, "compile": False}, 4, "exchange attention feed_forward"),
    Case("qwen3", 2, 8, {"expert": 8, "recompute": "full"}, 8, "exchange"),
    Case("llama", 2, 8, {}, 2, "loss temporaries"),
    Case("llama", 2, 8, {"recompute": "selective", "compile": False}, 2, "loss"),
    Case("llama", 2, 64, {"recompute": "full"}, 2, "loss"),
    Case("llama", 2, 64, {"recompute": "full"}, 16, "feed_forward"),
    Case("llama", 2, 64, {"recompute": "selective"}, 16),
    Case("llama", 1, 1, {}, 1),
    Case("llama", 1, 2, {"replicate": 2}, 1, "summing embedding"),
    Case("gpt", 4, 1, {}, 8, "logits attention feed_forward"),
    Case("latent", 2, 8, {}, 8, "attention feed_forward"),
    Case("latent", 2, 8, {"compile": False}, 8, "attention"),
    Case("latent", 2, 8, {"recompute": "full"}, 16, "attention"),
    Case("latent", 2, 8, {"recompute": "selective"}, 8),
]


def model_of(case: Case) -> CausalLMConfig:
    if case.model in DENSE:
        model = check(ModelConfig, DENSE[case.model] | {"n_layers": case.n_layers})
    else:
        yaml = ROOT / "yamls" / f"{YAMLS[case.model]}.yaml"
        model = read_config(str(yaml), [f"model.n_layers={case.n_layers}"]).model
    assert isinstance(model, CausalLMConfig)
    return model


def foretold(case: Case, model: CausalLMConfig, microbatches: int) -> Memory:
    parallel = ParallelConfig.model_validate(case.parallel)
    degrees = plan_mesh(parallel, case.gpus, getattr(model.ffn_config, "moe_num_experts", 0))
    return memory(model, parallel, degrees, case.rows * model.max_seq_len, 2, microbatches)


def _without(owner: object, name: str, **zeros: object) -> AbstractContextManager[object]:
    """`owner.name` with some fields of its result at zero; without fields, a moment that is not looked at."""
    real: Callable[..., tuple] = getattr(owner, name)
    if zeros:
        return patch.object(owner, name, lambda *args: real(*args)._replace(**zeros))
    return patch.object(owner, name, lambda self: Memory(*[0.0] * 6))


def _no_exchange() -> AbstractContextManager[object]:
    real = plan._mixture
    return patch.object(
        plan, "_mixture", lambda ffn, d, degrees, *rest: real(ffn, d, Degrees(1, degrees.shard, 1), *rest)
    )


TERMS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "attention": lambda: _without(plan, "_attention", kept=0),
    "feed_forward": lambda: _without(plan, "_feed_forward", kept=0.0),
    "inputs": lambda: _without(plan, "_block", inputs=0.0),
    "exchange": _no_exchange,
    "pending": lambda: patch.object(plan._Walk, "_pending", lambda self, params: 0.0),
    "summing": lambda: patch.object(plan._Walk, "_summing", lambda self, params, ranks: 0.0),
    "logits": lambda: patch.dict(plan.CHUNK_LOGITS, cuda=2**16),
    "loss": lambda: patch.object(plan._Walk, "_loss", lambda self: iter(())),
    "forward": lambda: _without(plan._Walk, "_forward"),
    "embedding": lambda: _without(plan._Walk, "_embedding"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.gpus}-{case.parallel}")
def test_memory_is_that_of_the_step(case: Case) -> None:
    model = model_of(case)
    parallel = ParallelConfig.model_validate({"compile": True} | case.parallel)
    peak = simulate(
        model, parallel, world=case.gpus, rows=case.rows * case.microbatches, micro_rows=case.rows,
        seq_len=model.max_seq_len,
    ).bytes  # fmt: skip
    held = foretold(case, model, case.microbatches)
    assert held.total == pytest.approx(peak, rel=TOLERANCE), held
    for term in case.terms.split():
        if term in Memory._fields:
            less = held._replace(**{term: 0.0})
        elif term == "earlier":
            less = foretold(case, model, 1)
        else:
            with TERMS[term]():
                less = foretold(case, model, case.microbatches)
        assert less.total != pytest.approx(peak, rel=TOLERANCE), f"nobody would miss {term}"


def test_every_term_is_missed_somewhere() -> None:
    assert {term for case in CASES for term in case.terms.split()} == {*Memory._fields, *TERMS, "earlier"}


def test_offloaded_shares_are_not_on_the_gpu() -> None:
    case = Case("olmoe", 2, 8, {"cpu_offload": True}, 1)
    held = foretold(case, model_of(case), 1)
    assert held.weights == held.optimizer == 0 < held.gathered
    assert held.total < foretold(case._replace(parallel={}), model_of(case), 1).total
