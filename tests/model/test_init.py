from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as ShardDim
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmfoundry.config import ConfigError, check
from llmfoundry.dtensor import LocalShard, local_shard
from llmfoundry.model import init
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.init import draw_weight, init_weights
from llmfoundry.model.transformer import CausalLM
from llmfoundry.parallel.recompute import recompute_blocks

SMALL = {
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 301,
    "max_seq_len": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_BLOCK_VALUES", 7 * 48)


def _model(dtype: torch.dtype = torch.float32, seed: int = 0, **keys: object) -> CausalLM:
    with torch.device("meta"):
        model = check(ModelConfig, SMALL | keys).build().to(dtype)
    model.to_empty(device="cpu")
    init_weights(model, seed)
    return model


def _draw(local: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
    with ThreadPoolExecutor(2) as threads:
        draw_weight(LocalShard(local, torch.Size(shape), offsets), 0.5, False, 1, "blocks.0.ffn.w1", threads)
    return local


@pytest.mark.parametrize("shape", [(50, 48), (5, 23, 48), (4, 3, 9, 11)])
def test_a_shard_holds_its_slice_of_the_whole(shape: tuple[int, ...]) -> None:
    whole = _draw(torch.empty(shape), shape, (0,) * len(shape))
    for dim, size in enumerate(shape):
        for start, end in ((0, 1), (1, size), (size // 2, size // 2 + 1), (size, size)):
            offsets = [0] * len(shape)
            offsets[dim] = start
            expected = whole.narrow(dim, start, end - start)
            assert torch.equal(_draw(torch.empty(expected.shape), shape, tuple(offsets)), expected)


def test_every_dtype_gets_the_same_values_rounded_once() -> None:
    single, double, half = _model(), _model(torch.float64), _model(torch.bfloat16)
    for a, b, c in zip(single.parameters(), double.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.double(), b) and torch.equal(a.bfloat16(), c)


def test_same_seed_same_weights_other_seed_others() -> None:
    torch.manual_seed(1)
    a = _model()
    torch.manual_seed(2)
    b, c = _model(), _model(seed=1)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.dim() == 1 or not torch.equal(p, r), name


def test_no_two_parameters_or_blocks_share_values() -> None:
    weights = torch.cat([p.detach().flatten() / p.std() for p in _model().parameters() if p.dim() > 1])
    assert weights.unique().numel() > 0.99 * weights.numel()  # the others are equal by chance, in float32


def test_recompute_and_compile_keep_names_and_values() -> None:
    plain = _model()
    with torch.device("meta"):
        changed = check(ModelConfig, SMALL).build()
    recompute_blocks(changed.blocks, "full", None, in_graph=True)
    for block in changed.blocks:
        block.forward = torch.compile(block.forward)
    changed.to_empty(device="cpu")
    init_weights(changed, 0)
    for (name, p), (other, q) in zip(changed.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q), name


RULES = {
    "kaiming": ({}, lambda fan: (2 / fan) ** 0.5, 0.5),  # residual outputs divided by sqrt(2 L) = 2
    "uniform": ({"name": "kaiming_uniform_"}, lambda fan: (2 / fan) ** 0.5, 0.5),
    "normal": ({"name": "normal_", "init_std": 0.02}, lambda fan: 0.02, 0.5),
    "undivided": (
        {"name": "baseline_", "init_std": 0.02, "init_div_is_residual": False},
        lambda fan: 0.02,
        1.0,
    ),
    "divided by 5": (
        {"name": "baseline_", "init_std": 0.02, "init_div_is_residual": 5.0},
        lambda fan: 0.02,
        0.2,
    ),
    "small": ({"name": "small_init_"}, lambda fan: (2 / (5 * 48)) ** 0.5, 0.5),
}


@pytest.mark.parametrize(("keys", "std", "residual"), RULES.values(), ids=RULES.keys())
def test_spread_is_the_rules(keys: dict[str, object], std: object, residual: float) -> None:
    model = _model(init_config=keys | {"emb_init_std": 0.3})
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)), name
            continue
        expected = 0.3 if name in ("wte.weight", "wpe.weight") else std(p.shape[-1])  # type: ignore[operator]
        if name.endswith(("out_proj.weight", "ffn.w2.weight")):
            expected *= residual
        # Four standard errors of a standard deviation, and of a mean, of that many normal values.
        assert p.std().item() == pytest.approx(expected, rel=4 / (2 * p.numel()) ** 0.5), name
        assert abs(p.mean().item()) < 4 * expected / p.numel() ** 0.5, name
        if keys.get("name") == "kaiming_uniform_" and name.endswith("wqkv.weight"):
            assert p.abs().max() <= 3**0.5 * expected


def _theirs(name: str, p: Tensor, module: nn.Module) -> None:
    """LLM Foundry's rule by torch's own functions, on each head and each of gate and up by itself."""
    rows = {"wqkv.weight": 12, "w1.weight": p.shape[0] // 2}
    size = next((rows[end] for end in rows if name.endswith(end)), p.shape[0])
    for part in p.split(size):
        module.draw(part)  # type: ignore[operator]
    if name.endswith(("out_proj.weight", "w2.weight")):
        p /= 2  # sqrt(2 L)


@pytest.mark.parametrize(
    ("keys", "draw"),
    [
        ({"name": "xavier_normal_", "init_gain": 0.7}, lambda p: nn.init.xavier_normal_(p, 0.7)),
        ({"name": "xavier_uniform_", "init_gain": 1.3}, lambda p: nn.init.xavier_uniform_(p, 1.3)),
        ({"fan_mode": "fan_out"}, lambda p: nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="relu")),
        ({"init_gain": 0.5}, lambda p: nn.init.kaiming_normal_(p, a=0.5, nonlinearity="relu")),
        (
            {"name": "kaiming_uniform_", "init_gain": 0.5, "init_nonlinearity": "leaky_relu"},
            lambda p: nn.init.kaiming_uniform_(p, a=0.5),
        ),
        ({"init_nonlinearity": "linear"}, lambda p: nn.init.kaiming_normal_(p, nonlinearity="linear")),
    ],
)
def test_spread_is_that_of_torchs_functions_on_each_layer(keys: dict[str, object], draw: object) -> None:
    model, rule = _model(init_config=keys, ffn_config={"ffn_type": "mptglu"}), nn.Module()
    rule.draw = draw  # type: ignore[assignment]
    for name, p in model.named_parameters():
        if p.dim() > 1:
            expected = torch.empty_like(p)
            with torch.no_grad():
                _theirs(name, expected, rule)
            # Four standard errors of the difference of two standard deviations.
            assert p.std().item() == pytest.approx(expected.std().item(), rel=4 / p.numel() ** 0.5), name
            if "uniform" in str(keys.get("name")):
                assert p.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.05), name


@pytest.mark.parametrize(
    ("limits", "low", "high"), [(0.4, -0.4, 0.4), ([-0.1, 0.5], -0.1, 0.5), ([0.2, 0.2], 0.2, 0.2)]
)
def test_embeddings_are_uniform_between_limits(limits: object, low: float, high: float) -> None:
    model = _model(init_config={"emb_init_uniform_lim": limits})
    for weight in (model.wte.weight, model.wpe.weight):
        assert low - 1e-6 <= weight.min() <= low + 0.01 and high - 0.01 <= weight.max() <= high + 1e-6
        assert abs(weight.mean().item() - (low + high) / 2) <= 4 * (high - low) / (12 * weight.numel()) ** 0.5 + 1e-6
    assert model.lm_head.weight.std().item() == pytest.approx((2 / 48) ** 0.5, rel=0.05)


def test_default_is_how_torch_draws_new_layers() -> None:
    model = _model(init_config={"name": "default_"})
    for name, p in model.named_parameters():
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(module, nn.Embedding):
            assert p.std().item() == pytest.approx(1.0, rel=0.05), name
        elif isinstance(module, nn.Linear):
            new = nn.Linear(module.in_features, module.out_features)
            assert p.std().item() == pytest.approx(getattr(new, leaf).std().item(), rel=4 / p.numel() ** 0.5), name
            assert p.abs().max() <= module.in_features**-0.5 and p.any()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"name": "xavier_normal_"}, "makes all weights 0; set it"),
        ({"emb_init_uniform_lim": 0.1, "emb_init_std": 0.1}, "exclude each other"),
        ({"emb_init_uniform_lim": [0.1]}, r"must be a limit, or \[low, high\]"),
        ({"emb_init_uniform_lim": -0.1}, r"must be a limit, or \[low, high\]"),
        ({"name": "default_", "emb_init_std": 0.1}, "does not use emb_init_std"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(ModelConfig, SMALL | {"init_config": keys})


class _Routed(nn.Module):
    """What the MoE layer holds, for the initialiser: stacked experts with biases, a router, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.w1 = nn.Parameter(torch.empty(6, 20, 48))
        self.experts.w2 = nn.Parameter(torch.empty(6, 48, 10))
        self.experts.b1 = nn.Parameter(torch.empty(6, 20))
        self.router = nn.Linear(48, 6)
        self.register_buffer("expert_bias", torch.empty(6))


def _routed() -> CausalLM:
    with torch.device("meta"):
        model = check(ModelConfig, SMALL).build()
        for block in model.blocks:
            block.ffn = _Routed()
    return model


def test_stacked_experts_are_initialised_as_matrices() -> None:
    model = _routed()
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(float("nan"))
    init_weights(model, 0)
    ffn = model.blocks[0].ffn
    assert ffn.experts.w1.std().item() == pytest.approx((2 / 48) ** 0.5, rel=0.05)
    assert ffn.experts.w2.std().item() == pytest.approx((2 / 10) ** 0.5 / 2, rel=0.05)
    assert not ffn.experts.b1.any() and not ffn.router.bias.any() and not ffn.expert_bias.any()


@pytest.fixture
def fake_world() -> Iterator[int]:
    yield 4
    if dist.is_initialized():
        dist.destroy_process_group()


def _shard(model: CausalLM, expert: int, dim: int) -> None:
    """Experts over `expert` ranks, then everything by FSDP2, as parallel/ does."""
    mesh = init_device_mesh("cpu", (4 // expert, expert), mesh_dim_names=("efsdp", "ep"))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    for block in model.blocks:
        if expert > 1:
            for name, p in list(block.ffn.experts.named_parameters()):
                local = distribute_tensor(p, mesh["ep"], [ShardDim(0)], src_data_rank=None)
                block.ffn.experts.register_parameter(name, nn.Parameter(local))
            fully_shard(block.ffn.experts, mesh=mesh["efsdp"], shard_placement_fn=lambda p: ShardDim(dim))
        fully_shard(block, mesh=flat)
    fully_shard(model, mesh=flat)


@pytest.mark.parametrize(("expert", "dim"), [(1, 0), (2, 0), (2, 1)])
def test_every_rank_of_fsdp_with_experts_holds_its_slice(fake_world: int, expert: int, dim: int) -> None:
    whole = _routed()
    whole.to_empty(device="cpu")
    init_weights(whole, 0)
    full = dict(whole.named_parameters())
    held = dict.fromkeys(full, 0)
    for rank in range(fake_world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=fake_world)
        model = _routed()
        _shard(model, expert, dim)
        model.to_empty(device="cpu")
        init_weights(model, 0)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor)
            local, _, offsets = local_shard(p)
            expected = full[name]
            for axis, (offset, size) in enumerate(zip(offsets, local.shape, strict=True)):
                expected = expected.narrow(axis, offset, size) if local.numel() else expected[:0]
            assert local.numel() == 0 or torch.equal(local, expected), (rank, name)
            held[name] += local.numel()
        dist.destroy_process_group()
    assert held == {name: p.numel() for name, p in full.items()}  # together the ranks hold each value once
