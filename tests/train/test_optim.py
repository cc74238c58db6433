import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import llmfoundry.train.lion  # noqa: F401  registers its optimizer
import llmfoundry.train.muon  # noqa: F401  registers its optimizer
from llmfoundry.config import Config, ConfigError, check
from llmfoundry.dtensor import local_part
from llmfoundry.parallel.apply import keep_weights_in
from llmfoundry.train.adamw import DecoupledAdamW, moment
from llmfoundry.train.optim import (
    OptimizerConfig,
    clip_by_global_norm,
    clipping,
    decays,
    set_learning_rate,
    update,
)
from tests import forks
from tests.reads import CountsReads


class Block(Config):
    optimizer: OptimizerConfig


class Tiny(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.norm_1 = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.w1 = nn.Parameter(torch.randn(3, 8, 4))
        self.b1 = nn.Parameter(torch.randn(3, 8))

    def with_gradients(self, seed: int = 3) -> "Tiny":
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return self


def build(model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return check(Block, {"optimizer": settings}).optimizer.build(model)


def test_weight_decay_is_for_matrices_only() -> None:
    decayed = {name for name, p in Tiny().named_parameters() if decays(name, p)}
    assert decayed == {"wte.weight", "linear.weight", "w1"}
    assert not decays("wte.weight", torch.zeros(7, 4), embeddings=False)
    assert not decays("blocks.0.attn.q_norm.weight", torch.zeros(2, 4))
    assert not decays("blocks.0.ffn.experts.b2", torch.zeros(3, 4))


def test_decoupled_adamw_decays_by_the_share_of_the_initial_learning_rate() -> None:
    model, lr, decay = Tiny(), 1.0e-3, 0.25
    with torch.no_grad():
        before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # no gradient: only the decay moves weights
    optimizer = build(model, name="decoupled_adamw", lr=lr, weight_decay=decay)
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * decay if decays(name, parameter) else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


def test_adamw_decays_by_the_learning_rate() -> None:
    model = Tiny()
    before = model.linear.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build(model, name="adamw", lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(model.linear.weight.detach(), before * (1 - 0.1 * 0.5))


def test_adamw_equals_the_textbook_formula() -> None:
    model = Tiny().double()
    lr, (b1, b2), eps, decay = 1.0e-2, (0.9, 0.95), 1.0e-8, 0.1
    weight = model.linear.weight.detach().clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    optimizer = build(model, name="adamw", lr=lr, weight_decay=decay)
    for t in range(1, 6):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64)
        g = model.linear.weight.grad
        assert g is not None
        optimizer.step()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        weight = weight * (1 - lr * decay) - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    torch.testing.assert_close(model.linear.weight.detach(), weight, rtol=1e-12, atol=1e-14)


def test_the_learning_rate_is_always_a_share_of_the_initial_one() -> None:
    optimizer = build(Tiny(), name="adamw", lr=0.1)
    set_learning_rate(optimizer, 0.0)
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.05)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


@pytest.mark.parametrize(
    "settings, message",
    [({"name": "adamw", "lr": 0.0}, "optimizer.lr"),
     ({"name": "adamw", "lr": 1.0, "betas": [0.9]}, "optimizer.betas"),
     ({"name": "adamw", "lr": 1.0, "betas": [0.9, 1.0]}, "optimizer.betas.1"),
     ({"name": "adamw", "lr": 1.0, "momentum": 0.9}, "optimizer.momentum: unknown key"),
     ({"name": "adam_w", "lr": 1.0}, "did you mean 'adamw'")],
)  # fmt: skip
def test_a_bad_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Tiny(), **settings)


@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
def test_clipping_equals_torchs(max_norm: float) -> None:
    ours = Tiny().with_gradients()
    theirs = copy.deepcopy(ours).with_gradients()
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(clip_by_global_norm(ours.parameters(), max_norm), expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_a_limit_the_norm_is_measured_and_nothing_changes() -> None:
    model = Tiny().with_gradients()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = clip_by_global_norm(model.parameters(), None)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in before]).norm())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None)


def test_the_norm_of_a_gradient_that_is_not_finite_is_not_finite() -> None:
    model = Tiny().with_gradients()
    assert model.b1.grad is not None
    model.b1.grad[0, 0] = float("nan")
    assert not clip_by_global_norm(model.parameters(), 1.0).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [4096, 5000, 70_001])
def test_half_precision_gradients_are_summed_in_float32(dtype: torch.dtype, n: int) -> None:
    parameter = nn.Parameter(torch.zeros(n, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    norm = clip_by_global_norm([parameter, nn.Parameter(torch.zeros(1))], None)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, torch.tensor(float(n)).sqrt())
    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    torch.testing.assert_close(clip_by_global_norm([parameter, other], None), torch.tensor(n + 1.0).sqrt())


def test_half_precision_gradients_are_clipped_to_the_limit() -> None:
    parameter = nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    clip_by_global_norm([parameter], 1.0)
    assert parameter.grad.dtype == torch.bfloat16
    assert parameter.grad.double().norm().item() == pytest.approx(1.0, rel=2**-8)  # bf16 has 8 bits


def test_the_norm_of_large_float32_gradients_is_exact_to_the_last_digits() -> None:
    """Summed in float32 in the few lanes of a CPU, it would be 5e-6 off, and clipping with it."""
    parameter = nn.Parameter(torch.zeros(4096, 128))
    parameter.grad = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)) / 100
    norm = clip_by_global_norm([parameter], None)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(parameter.grad.double().norm().item(), rel=1e-7)


def _nothing_after_a_nan_on_one_rank(rank: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def kept() -> list[torch.Tensor]:
        state = [value for memory in optimizer.state.values() for value in memory.values()]
        return [local_part(each).detach().clone() for each in (*model.parameters(), *state)]

    before, grad = kept(), model.get_parameter("w1").grad
    assert grad is not None
    if rank == 1:
        local_part(grad).view(-1)[0] = float("nan")
    with CountsReads() as reads:  # no rank's host waits for the flag
        clip = clipping(model.parameters(), 0.1)
        update(optimizer, clip)
    assert clip.skip == 1 and reads.found == []
    assert all(torch.equal(a, b) for a, b in zip(before, kept(), strict=True))


def _same_update_on_two_ranks(rank: int, store: str, name: str, state: str | None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for half in (False, True):
        _same_update(rank, name, state, half)
    dist.destroy_process_group()


def _same_update(rank: int, name: str, state: str | None, half: bool) -> None:
    torch.manual_seed(5)
    plain = Tiny()
    if half:  # weights in bfloat16, and gradients in float32
        keep_weights_in(torch.bfloat16, plain)
        for parameter in plain.parameters():
            parameter.grad_dtype = torch.float32
    plain.with_gradients()
    dense = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    sparse = init_device_mesh("cpu", (1, 2), mesh_dim_names=("expert_shard", "expert"))
    layout = {
        "wte.weight": (dense, [Shard(0)]),  # 7 rows on 2 ranks: uneven
        "norm_1.weight": (hybrid, [Replicate(), Shard(0)]),
        "linear.weight": (dense, [Replicate()]),
        "w1": (sparse, [Shard(0), Shard(0)]),
        "b1": (sparse, [Shard(1), Shard(0)]),
    }
    spread = copy.deepcopy(plain)
    for key, parameter in plain.named_parameters():
        if key in layout:
            module, _, attribute = key.rpartition(".")
            split = nn.Parameter(distribute_tensor(parameter.detach().clone(), *layout[key]))
            split.grad_dtype = torch.float32
            assert parameter.grad is not None
            split.grad = distribute_tensor(parameter.grad.clone(), *layout[key])
            setattr(spread.get_submodule(module), attribute, split)
        else:
            spread.get_parameter(key).grad_dtype = torch.float32
            spread.get_parameter(key).grad = None if parameter.grad is None else parameter.grad.clone()
    expected = clip_by_global_norm(Tiny().with_gradients().parameters(), 0.1)
    clip = clipping(spread.parameters(), 0.1)
    torch.testing.assert_close(clip.norm, expected)
    settings: dict[str, object] = {"name": name, "lr": 0.1} | ({"state_dtype": state} if state else {})
    optimizers = [build(model, **settings) for model in (plain, spread)]
    for _ in range(3):  # the same divisor for both: norms differ in the last bit
        for optimizer in optimizers:
            grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            update(optimizer, clip)
            for parameter, grad in zip(
                (p for group in optimizer.param_groups for p in group["params"]), grads, strict=True
            ):
                parameter.grad = grad  # torch's kernel has scaled it
    for key, parameter in spread.named_parameters():
        full, exact = parameter.full_tensor() if key in layout else parameter, 0 if state or half else None
        torch.testing.assert_close(full, plain.get_parameter(key), rtol=exact, atol=exact)
        assert parameter.dtype == (torch.bfloat16 if half else torch.float32)
    _nothing_after_a_nan_on_one_rank(rank, spread, optimizers[1])


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "state"),
    [("adamw", "fp32"), ("adamw", "bf16"), ("adamw", "int8"), ("decoupled_lionw", "fp32"), ("decoupled_lionw", "bf16"),
     ("muon", "fp32"), ("muon", "bf16")],
)  # fmt: skip
def test_clipping_and_update_over_mixed_meshes_equal_one_process(tmp_path: Path, name: str, state: str) -> None:
    forks.in_processes(_same_update_on_two_ranks, (str(tmp_path / "store"), name, state), 2)


STATES = [("adamw", "fp32"), ("adamw", "int8"), ("decoupled_lionw", "fp32"), ("decoupled_lionw", "bf16"),
          ("muon", "bf16")]  # fmt: skip


@pytest.mark.parametrize("after", STATES, ids="-".join)
@pytest.mark.parametrize("before", STATES, ids="-".join)
def test_the_state_of_another_optimizer_is_taken_over_or_replaced(
    before: tuple[str, str], after: tuple[str, str]
) -> None:
    """After `load_allow: [optimizer.name]`: where a moment is missing, all begin anew, and so does the count."""
    model, steps = Tiny(), 3
    first = build(model, name=before[0], state_dtype=before[1], lr=0.01)
    for seed in range(steps):
        model.with_gradients(seed)
        first.step()
    fresh = copy.deepcopy(model)
    had = [{key: moment(state, key).float().clone() for key in state if not key.endswith("_scale")}
           for state in map(first.state.__getitem__, model.parameters())]  # fmt: skip
    optimizers = [build(each, name=after[0], state_dtype=after[1], lr=0.01) for each in (model, fresh)]
    optimizers[0].state.update(first.state)
    for each, optimizer in zip((model, fresh), optimizers, strict=True):
        for parameter in each.parameters():  # gradients of zero leave a part of each moment
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for parameter, new, old in zip(model.parameters(), fresh.parameters(), had, strict=True):
        state, expected = optimizers[0].state[parameter], optimizers[1].state[new]
        assert {key: value.dtype for key, value in state.items()} == {k: v.dtype for k, v in expected.items()}
        names = [key for key in expected if key != "step" and not key.endswith("_scale")]
        if not all(name in old for name in names):
            assert all(torch.equal(state[key], value) for key, value in expected.items())
            assert torch.equal(parameter, new)
            continue
        assert state["step"] == steps + 1
        for name in names:
            share = {"momentum_buffer": 0.95, "exp_avg_sq": 0.95, "exp_avg": 0.99 if "lion" in after[0] else 0.9}[name]
            found, most = moment(state, name).float(), float(old[name].abs().max())
            # Codes of 8 bits are 1.6 % of the largest apart, or a thirtieth of it for second moments, rounded twice.
            torch.testing.assert_close(found, share * old[name], rtol=2**-6, atol=most / 31)
            assert found.abs().max() > most / 2


def test_scale_and_flag_are_read_by_the_optimizer_or_by_the_host() -> None:
    """Ours reads them on the device; for one that cannot, gradients are scaled before."""
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.5),
        lambda p: DecoupledAdamW([{"params": p}], 0.5, (0.9, 0.9), 1e-8),
    ):
        model, other = Tiny().with_gradients(), Tiny()
        other.load_state_dict(model.state_dict())
        other.with_gradients()
        before = copy.deepcopy(model.state_dict())
        one, two = (make(list(each.parameters())) for each in (model, other))
        clip = clipping(model.parameters(), 0.25)
        assert clip.divisor > 1
        update(one, clip._replace(skip=torch.ones(())))
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        update(one, clip)
        clip_by_global_norm(other.parameters(), 0.25)
        two.step()
        assert not hasattr(one, "grad_scale")
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)
