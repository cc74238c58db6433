"""Hugging Face weights into a model split over ranks, each reading its part, and out of it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmfoundry.config import ConfigError, check
from llmfoundry.hf import from_pretrained, load_weights, save_pretrained
from llmfoundry.hf.pretrained import Checkpoint, open_checkpoint
from llmfoundry.model.transformer import CausalLM
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from tests.full_disk import full_disk

pytestmark = pytest.mark.dist
LAYOUTS = {"shard 2": {}, "expert 2": {"expert": 2}, "replicate 2": {"replicate": 2}}
# Three experts do not divide among two ranks: FSDP then cuts through each.
N_EXPERTS = {"shard 2": 3, "expert 2": 4, "replicate 2": 4}


def theirs(n_experts: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=61, hidden_size=16, intermediate_size=32, moe_intermediate_size=24, head_dim=8,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_experts=n_experts, num_experts_per_tok=2,
        mlp_only_layers=[0], max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def spread(checkpoint: Checkpoint, parallel: ParallelConfig, n_experts: int) -> CausalLM:
    with torch.device("meta"):
        model = checkpoint.config.build()
    model = parallelize(model, build_mesh(parallel, "cpu", n_experts), parallel, "fp32")
    return materialize(model, parallel, seed=0)


def job(folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        source = folder / f"theirs {name}"
        model = spread(open_checkpoint(source), check(ParallelConfig, layout), N_EXPERTS[name])
        load_weights(model, source)
        whole = tiny.weights(model)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{name}.pt")
        fails(model, folder / f"full {name}")
        save_pretrained(model, None, folder / f"again {name}")
        dist.barrier()


def fails(model: CausalLM, folder: Path) -> None:
    """Rank 0, which writes, fails; the other does not wait for it in a collective."""
    full = full_disk(20_000) if dist.get_rank() == 0 else nullcontext()
    with full, pytest.raises(ConfigError, match="cannot be written: File too large"):
        save_pretrained(model, None, folder)
    assert not list(folder.parent.glob(f"{folder.name}*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pretrained")
    for name in LAYOUTS:
        theirs(N_EXPERTS[name]).save_pretrained(folder / f"theirs {name}")
    run_ranks([2], job, folder)
    yield folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_arrives(name: str, folder: Path) -> None:
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    true = from_pretrained(folder / f"theirs {name}").model.state_dict()
    assert found.keys() == true.keys()
    assert all(torch.equal(found[key], true[key]) for key in true)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_leaves(name: str, folder: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder / f"again {name}").state_dict()
    true = AutoModelForCausalLM.from_pretrained(folder / f"theirs {name}").state_dict()
    assert again.keys() == true.keys() and all(torch.equal(again[key], true[key]) for key in true)
