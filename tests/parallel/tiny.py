"""A tiny run that has everything that could depend on the mesh: what the tests of this room train.

Dense and mixture layers, a shared expert with a gate, biases, jitter, a loss-free bias, a balance loss over the
global batch, a z-loss, clipping, labels that do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import llmfoundry.train.lion  # noqa: F401  registers its optimizer
import llmfoundry.train.muon  # noqa: F401  registers its optimizer
from llmfoundry.config import check
from llmfoundry.data.loader import Batch
from llmfoundry.layers.lora import is_adapter
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.balance import Balance
from llmfoundry.parallel import apply
from llmfoundry.parallel.apply import keep_weights_in, materialize, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from llmfoundry.train.optim import OptimizerConfig
from llmfoundry.train.step import StepResult, train_step

ROWS, LENGTH, VOCAB = 8, 12, 61
SEED = 3


class Case(NamedTuple):
    """One way to train the same thing."""

    name: str
    parallel: dict[str, int | bool | str] = {}  # noqa: RUF012
    n_experts: int = 8
    microbatch: int = ROWS
    tied: bool = False
    n_dense: int = 1  # layers, before two mixtures
    shared_kv: bool = False  # the last layers attend to the keys and values of those before
    accumulation: str = "count"  # how loads of the global batch are known with several microbatches
    optimizer: str = "adamw"
    state: str = "fp32"  # of the optimizer
    half: bool = False  # weights in bfloat16, rounded at random
    split: bool = False  # of those weights, the optimizer keeps the low halves


def model_config(case: Case) -> CausalLMConfig:
    return check(
        CausalLMConfig,
        {
            "d_model": 16, "n_heads": 4, "n_layers": case.n_dense + 2, "vocab_size": VOCAB, "max_seq_len": LENGTH,
            "norm_type": "rmsnorm", "tie_word_embeddings": case.tied,
            "attn_reuse_kv_pattern": [0, -1, -1] if case.shared_kv else None,
            "attn_config": {
                "attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True, "qk_norm": True
            },
            "ffn_config": {
                "ffn_type": "moe", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"},
                "moe_num_experts": case.n_experts, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0,
                "moe_jitter_eps": 0.1, "moe_bias_update_rate": 0.01, "first_k_dense": case.n_dense,
                "shared_expert": True, "shared_expert_gate": True, "moe_loss_weight": 0.05,
                "moe_zloss_weight": 0.01, "moe_lbl_accumulation": case.accumulation,
            },
            "init_config": {"name": "normal_", "init_std": 0.2},
        },
    )  # fmt: skip


def build(case: Case, dtype: torch.dtype, precision: str = "fp32") -> CausalLM:
    """The model of a case, spread over the processes that run."""
    config, parallel = model_config(case), check(ParallelConfig, case.parallel)
    with torch.device("meta"):
        model = config.build().to(dtype)
    if case.half:
        keep_weights_in(torch.bfloat16, model)
    with patch.dict(apply._COMPUTE, fp32=dtype):
        model = parallelize(model, build_mesh(parallel, "cpu", case.n_experts), parallel, precision)
    return materialize(model, parallel, SEED)


def batch(step: int) -> Batch:
    """This rank's rows of the global batch of `step`; every fifth label does not count."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    random = torch.Generator().manual_seed(step)
    start, stride = torch.randint(0, VOCAB, (2, ROWS, 1), generator=random)
    ids = (start + (1 + stride % 3) * torch.arange(LENGTH + 1)) % VOCAB  # something that can be learned
    labels = ids[:, 1:].masked_fill(torch.rand(ROWS, LENGTH, generator=random) < 0.2, -100)
    mine = slice(ROWS * rank // world, ROWS * (rank + 1) // world)
    return Batch(ids[mine, :-1], labels[mine], torch.arange(ROWS * step, ROWS * (step + 1))[mine])


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split; every rank has to ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: CausalLM) -> dict[str, Tensor]:
    """All parameters and buffers, whole."""
    return {name: full(value) for name, value in model.state_dict().items()}


def train_adapters(model: CausalLM, case: Case, steps: int) -> dict[str, Tensor]:
    """Gradients of the first step, which adapters alone have, and the losses."""
    found: dict[str, Tensor] = {}

    def watch(model: CausalLM) -> None:
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == is_adapter(name), name
            if parameter.grad is not None:
                found.setdefault(f"grad/{name}", full(parameter.grad))

    with torch.no_grad():  # B = 0 would leave A without a gradient
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.1)
    results = train(model, case, steps, 1.0, watch=watch)
    found["loss"] = torch.stack([result.total for result in results]).double()
    return found


def train(
    model: CausalLM,
    case: Case,
    steps: int | range,
    max_grad_norm: float | None,
    lr: float = 1e-2,
    optimizer: Optimizer | None = None,
    watch: Callable[[CausalLM], None] | None = None,
) -> list[StepResult]:
    """Train for some steps; `watch` sees the model before each update."""
    optimizer = optimizer or new_optimizer(model, lr, case.optimizer, case.state, case.split)
    if watch is not None:
        optimizer.register_step_pre_hook(lambda *_: watch(model))
    balance = Balance.of(model.config)
    return [
        train_step(model, optimizer, batch(step), microbatch_rows=case.microbatch, max_grad_norm=max_grad_norm,
                   balance=balance, noise_seed=SEED)
        for step in (range(steps) if isinstance(steps, int) else steps)
    ]  # fmt: skip


def new_optimizer(
    model: CausalLM, lr: float, name: str = "adamw", state: str = "fp32", split: bool = False
) -> Optimizer:
    """What these runs are trained with."""
    keys = {"name": name, "lr": lr, "weight_decay": 0.1} | ({} if state == "fp32" else {"state_dtype": state})
    keys |= {"master_weights": "fp32_split"} if split else {}
    return check(OptimizerConfig, keys).build(model)
