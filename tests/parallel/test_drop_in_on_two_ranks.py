"""`llmfoundry.drop_in` under the expert parallelism of `transformers`: gradients are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

from llmfoundry import drop_in
from tests.parallel.ranks import run_ranks

pytestmark = pytest.mark.dist

CONFIG = Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, dtype="float32",
)  # fmt: skip
TOKENS = torch.arange(2 * 16).view(2, 16) * 7 % 64


def _gradients(model: torch.nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model(input_ids=tokens).logits.float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _check(folder: str, sizes: dict[str, int]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    expected = _gradients(whole, TOKENS)
    config = DistributedConfig(**sizes, ep_size=2, ep_implementation=drop_in.NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=drop_in.NAME, distributed_config=config)
    split_batch = sizes.get("fsdp_size", 1) > 1  # FSDP averages over ranks, each with a row of its own
    rows = TOKENS[dist.get_rank()].unsqueeze(0) if split_batch else TOKENS
    found = _gradients(model, rows)
    assert expected.keys() == found.keys()
    for name, grad in found.items():
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2}], ids=["shared batch", "own rows"])
def test_our_exchange_gives_the_gradients_of_one_process(tmp_path: Path, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    run_ranks([2], _check, str(tmp_path), sizes)
