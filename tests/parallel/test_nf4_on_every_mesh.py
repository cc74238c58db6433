"""Adapters on a base in NF4, shared by two ranks: the gradients and the curve of the dequantised base in one process.

The base is read from a Hugging Face folder and from a checkpoint of ours, by each rank what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from tiny import Case
from torch import Tensor

import llmfoundry.hf as hf
from llmfoundry.checkpoint.reading import load_model_only
from llmfoundry.cli.convert import convert_main
from llmfoundry.config import check, dump
from llmfoundry.layers import nf4
from llmfoundry.layers.lora import frozen_weights, is_adapter
from llmfoundry.layers.nf4 import dequantize, quantize
from llmfoundry.model.transformer import CausalLM, CausalLMConfig

pytestmark = pytest.mark.dist

STEPS = 4
FULL: dict[str, int | bool | str] = {"recompute": "full"}
CASES = [
    Case("shard 2", FULL, microbatch=2),
    Case("shard 2, host memory", FULL | {"cpu_offload": True}),
    Case("shard 2, expert 2", FULL | {"expert": 2}),
    Case("replicate 2", FULL | {"replicate": 2}),
    Case("shard 2, 3 experts, tied", FULL, n_experts=3, tied=True),
]


def _alone(case: Case) -> Case:
    return Case("alone", FULL, n_experts=case.n_experts, tied=case.tied)


def _config(case: Case, quantize: str | None, whole: Callable[[Case], CausalLMConfig]) -> CausalLMConfig:
    keys = dump(whole(case))
    # 16 x 20 values are five blocks of 64, an odd number.
    keys["ffn_config"] |= {"moe_bias_update_rate": 0.0, "ffn_hidden_size": 20, "shared_expert_hidden_size": 20}
    lora = {"rank": 2, "alpha": 8.0, "target_modules": ["wqkv", "experts.w1"], "quantize": quantize}
    return check(CausalLMConfig, keys | {"lora": None if quantize == "base" else lora})


def _build(case: Case, quantize: str | None, dtype: torch.dtype = torch.float64) -> CausalLM:
    plain = tiny.model_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "model_config", lambda case: _config(case, quantize, plain))
        model = tiny.build(case, dtype)
    for _, frozen in frozen_weights(model):
        frozen.scales = frozen.scales.float()  # as a run has them, whatever the dtype of the parameters
    return model


def _base(case: Case, folder: Path) -> Path:
    """The folder with the base of a case in both forms: `hf` and `ours`."""
    return folder / f"{case.n_experts}-{case.tied}"


def _learn(model: CausalLM, case: Case) -> dict[str, Tensor]:
    """Gradients of the first step, the losses, the adapters after all, and the weights that were in NF4."""
    found = tiny.train_adapters(model, case, STEPS)
    found |= {f"adapter/{name}": tiny.full(value) for name, value in model.named_parameters() if is_adapter(name)}
    return found | {f"frozen/{name}": frozen.whole(torch.float64) for name, frozen in frozen_weights(model)}


def job(folder: Path) -> None:
    """What each process does; the first one writes what they found."""
    nf4._AT_ONCE = 512  # weights are read in several pieces
    rank = torch.distributed.get_rank()
    for number, case in enumerate(CASES):
        model = _build(case, "nf4")
        if number % 2:
            load_model_only(_base(case, folder) / "ours", model)
        else:
            hf.load_weights(model, _base(case, folder) / "hf", allow=["model"])
        held = sum(frozen.codes.numel() for _, frozen in frozen_weights(model))
        found = _learn(model, case) | {"held": torch.tensor(held)}
        if rank == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    for case in CASES:
        if not _base(case, folder).exists():
            base = _build(_alone(case), "base", torch.float32)
            hf.save_pretrained(base, None, _base(case, folder) / "hf")
            assert convert_main(["from-hf", str(_base(case, folder) / "hf"), str(_base(case, folder) / "ours")]) == 0
    run_ranks([2], job, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_shared_base_is_the_dequantised_base(case: Case, spread: Path) -> None:
    packed = dict(frozen_weights(_build(_alone(case), "nf4")))
    reference = _build(_alone(case), None)
    hf.load_weights(reference, _base(case, spread) / "hf", allow=["model"])
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name in packed:
                weight.copy_(dequantize(*quantize(weight.flatten()), torch.float32).view_as(weight))
    true, ours = _learn(reference, _alone(case)), torch.load(spread / f"{case.name}.pt", weights_only=True)
    true |= {f"frozen/{name}": value.detach() for name, value in reference.named_parameters() if name in packed}
    held = ours.pop("held").item()
    n_codes = sum(frozen.codes.numel() for frozen in packed.values())
    ranks = 1 if case.name.startswith("replicate") else 2
    assert n_codes / ranks <= held <= n_codes / ranks + len(packed) * nf4.BLOCK / 2, "at most a block more in each"
    assert true["loss"][-1] < true["loss"][0]
    assert true.keys() == ours.keys() and sum(name.startswith("grad/") for name in true) == 2 * (3 + 2)
    for name, value in true.items():
        # A loss is float32; Adam magnifies what is nearly zero; frozen weights are the same bits.
        tolerance = {"loss": 1e-6, "grad": 1e-12, "adapter": 1e-10, "frozen": 0.0}[name.partition("/")[0]]
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
