"""`llmfoundry.drop_in`: our experts in the mixtures of `transformers`, held to its own eager experts."""

from __future__ import annotations

import ast
import importlib
import logging
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from llmfoundry import drop_in

SIZES = {
    **{name: 16 for name in ("hidden_size", "moe_hidden_size")},
    **{name: 24 for name in ("intermediate_size", "moe_intermediate_size")},
    **{name: 4 for name in ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")},
    **{"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2"},
    **{"swiglu_limit": 1.5, "swiglu_alpha": 1.702, "moe_latent_size": None, "post_norm_eps": 1e-5},
    **{"mlp_gate_softcap": 30.0, "mlp_up_softcap": 30.0},
}
# A norm behind each expert, or a unit with soft caps: these run through transformers' own grouped_mm.
NOT_OURS = {"MuseSparkExperts", "Inkling2Experts", "Inkling2LoopExperts"}


def _decorated() -> list[tuple[str, str]]:
    """(module, class) of every class in the source of `transformers` that bears the decorator, whatever its name."""
    found = []
    root = Path(transformers.__path__[0])
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        # modular_*.py are what modeling_*.py are generated from; nothing imports them.
        if "@use_experts_implementation" not in text or file.name.startswith("modular_"):
            continue
        module = ".".join(["transformers", *file.relative_to(root).with_suffix("").parts])
        for item in ast.walk(ast.parse(text)):
            if isinstance(item, ast.ClassDef) and any(_is_the_decorator(d) for d in item.decorator_list):
                found.append((module, item.name))
    return found


def _is_the_decorator(node: ast.expr) -> bool:
    """`@use_experts_implementation`, with or without arguments, by itself or as an attribute."""
    called = node.func if isinstance(node, ast.Call) else node
    return ast.unparse(called).split(".")[-1] == "use_experts_implementation"


@cache
def _families() -> list[type[nn.Module]]:
    """Every experts class of the installed `transformers` that takes an implementation."""
    return [getattr(importlib.import_module(module), name) for module, name in _decorated()]


def _outputs(experts: nn.Module, config: SimpleNamespace, implementation: str) -> list[Tensor]:
    """Output and gradients: of the input, of the routing weights, and of each parameter."""
    config._experts_implementation = implementation
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, 16, generator=draw, requires_grad=True)
    weights = torch.rand(9, 2, generator=draw, requires_grad=True)
    chosen = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(9)])
    y = experts(x, chosen, weights)
    dy = torch.randn(9, 16, generator=draw)
    return [y, *torch.autograd.grad(y, [x, weights, *experts.parameters()], dy)]


def test_every_family_gives_the_outputs_and_gradients_of_its_eager_experts() -> None:
    marks = sum(
        text.count("\n@use_experts_implementation")
        for file in Path(transformers.__path__[0]).glob("models/*/modeling_*.py")
        for text in [file.read_text(encoding="utf-8")]
    )
    assert len(_families()) >= marks > 40, "the scan lost some"
    for family in _families():
        torch.manual_seed(0)
        config = SimpleNamespace(**SIZES, _experts_implementation="eager")
        experts = family(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.5)  # far enough to reach the clamps of 1.5
        theirs, ours = (_outputs(experts, config, name) for name in ("eager", drop_in.NAME))
        for a, b in zip(theirs, ours, strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max(), family.__name__
        assert (drop_in.kind_of(experts) is None) == (family.__name__ in NOT_OURS), family.__name__


def test_a_module_that_was_pickled_runs_where_its_kind_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that loads a whole model."""
    config = SimpleNamespace(**SIZES, _experts_implementation="eager")
    module = _families()[0](config)
    for parameter in module.parameters():  # its memory is not initialised
        nn.init.normal_(parameter, std=0.5)
    expected = _outputs(module, config, drop_in.NAME)
    monkeypatch.setattr(drop_in, "_KINDS", {})
    assert all(torch.equal(a, b) for a, b in zip(expected, _outputs(module, config, drop_in.NAME), strict=True))


@pytest.mark.parametrize("backend", ["reference", "grouped_mm", "triton"])  # triton: in its interpreter
def test_a_backend_can_be_named(backend: str) -> None:
    experts = _families()[0]
    config = SimpleNamespace(**SIZES, _experts_implementation="eager")
    module = experts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for a, b in zip(*(_outputs(module, config, name) for name in ("eager", f"llmfoundry_{backend}")), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_what_runs_elsewhere_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    family = next(f for f in _families() if f.__name__ in NOT_OURS)
    config = SimpleNamespace(**SIZES, _experts_implementation="eager")
    drop_in._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _outputs(family(config), config, drop_in.NAME)
    assert caplog.text.count(family.__name__) == 1 and "grouped_mm" in caplog.text


SMALL = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "num_experts_per_tok": 2},
}
MODELS = {
    "qwen3_moe": Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4),
    "olmoe": OlmoeConfig(**SMALL, num_experts=4),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "gpt_oss": GptOssConfig(**SMALL, num_local_experts=4),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_from_pretrained_takes_it_by_name(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[name], experts_implementation="eager").save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (2, 16))
    found = []
    for implementation in ("eager", drop_in.NAME):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_its_dtype() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["qwen3_moe"], experts_implementation=drop_in.NAME)
    experts, seen = model.model.layers[0].mlp.experts, []
    run = drop_in.experts_ffn
    drop_in.experts_ffn = lambda x, *args, **kwargs: (seen.append(x.dtype), run(x, *args, **kwargs))[1]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(torch.randn(4, 32), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5))
    finally:
        drop_in.experts_ffn = run
    assert seen == [torch.bfloat16] and y.dtype == torch.float32


def test_a_model_that_was_prepared_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["qwen3_moe"], experts_implementation="llmfoundry_reference")
    drop_in.prepare(model)
    kinds = {drop_in.kind_of(layer.mlp.experts) for layer in model.model.layers}
    assert len(kinds) == 1 and None not in kinds
    # On a GPU the Triton kernels are one operator; here the name of the backend must come without a graph break.
    experts = model.model.layers[0].mlp.experts
    name = drop_in._recognised(experts)
    traced = torch.compile(lambda x: x * len(drop_in._backend("auto", name, x.device, x.dtype)), fullgraph=True)
    assert traced(torch.ones(1)).item() == len("grouped_mm")
