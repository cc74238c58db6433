"""Compiled blocks train as plain ones do: in one process, split, with experts divided, and recomputed."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from tiny import Case
from torch import Tensor
from torch._dynamo.utils import counters

from llmfoundry.config import check, dump
from llmfoundry.model.transformer import Cache, CausalLMConfig
from llmfoundry.moe.layer import MoE

NO_COMPILER = not any(map(shutil.which, ("g++", "clang++")))
pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(NO_COMPILER, reason="compiling for a CPU needs a C++ compiler"),
]
STEPS = 3
PLAIN = Case("plain", n_dense=0)
RECOMPUTE = ("none", "full", "selective")
# A C++ compiler takes a second for each kernel. So there is one kind of block, and four rows at once, which each of two
# ranks has: graphs that are the same are compiled once, and found by the ranks in the compiler's cache.
ALONE = [Case(f"alone, {how}", {"compile": True, "recompute": how}, microbatch=4, n_dense=0) for how in RECOMPUTE]
SPREAD = [
    Case("shard 2, full", {"compile": True, "recompute": "full"}, n_dense=0),
    *(
        Case(f"shard 2, expert 2, {how}", {"compile": True, "expert": 2, "recompute": how}, n_dense=0)
        for how in RECOMPUTE[1:]
    ),
]

# Of a test that another one stands beside, which has them: each is some seconds of the C++ compiler.
NO_EXTRAS = {"qk_norm": False, "rope": False}


def learn(case: Case, steps: int = STEPS, precision: str = "fp32") -> dict[str, Tensor]:
    """Losses, gradient norms and the last weights, which are float32."""
    model = tiny.build(case, torch.float32, precision)
    results = tiny.train(model, case, steps, 1.0)
    curve = {name: torch.stack([getattr(step, name) for step in results]).double() for name in ("total", "grad_norm")}
    return curve | tiny.weights(model)


def job(folder: Path) -> None:
    for case in SPREAD:
        found = learn(case)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No code compiled by another test, and none left to others."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def true() -> dict[str, Tensor]:
    return learn(PLAIN)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    run_ranks([2], job, folder)
    return folder


def assert_same(found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, value in true.items():
        # float32; fused code rounds otherwise, and Adam divides what is nearly zero by its own size.
        tolerance = 1e-5 if name in ("total", "grad_norm") else 2e-3
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", ALONE, ids=[case.name for case in ALONE])
def test_a_compiled_model_learns_the_same(case: Case, true: dict[str, Tensor]) -> None:
    assert_same(learn(case), true)


@pytest.mark.parametrize("case", SPREAD, ids=[case.name for case in SPREAD])
def test_a_compiled_model_learns_the_same_when_spread(case: Case, spread: Path, true: dict[str, Tensor]) -> None:
    assert_same(torch.load(spread / f"{case.name}.pt", weights_only=True), true)


def without_code(monkeypatch: pytest.MonkeyPatch, backend: str = "aot_eager") -> None:
    """A backend that generates no code, but traces and plans the same graphs, in a tenth of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_block_with_the_triton_kernels_is_one_graph(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if recompute == "none":  # the code of the other's graphs shows that the kernels stand in it
        without_code(monkeypatch)
    whole = tiny.model_config

    def with_experts(impl: str) -> None:
        keys = dump(whole(PLAIN)) | {"no_bias": True}
        keys["attn_config"] |= NO_EXTRAS
        keys["ffn_config"] |= {"moe_impl": impl, "bias": False, "shared_expert": False, "shared_expert_gate": False,
                               "moe_jitter_eps": None, "moe_zloss_weight": 0.0}  # fmt: skip
        monkeypatch.setattr(tiny, "model_config", lambda case: check(CausalLMConfig, keys))

    with_experts("grouped_mm")
    true = learn(PLAIN, steps=1)
    with_experts("triton")
    case = Case("triton", {"compile": True, "recompute": recompute}, n_dense=0)
    assert_same(learn(case, steps=1), true)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def with_keys(monkeypatch: pytest.MonkeyPatch, **keys: object) -> None:
    """Make `tiny` build another model; keys of `ffn_config` are added to its own."""
    whole = dump(tiny.model_config(PLAIN))
    keys["ffn_config"] = whole["ffn_config"] | keys.get("ffn_config", {})
    monkeypatch.setattr(tiny, "model_config", lambda case: check(CausalLMConfig, whole | keys))
    without_code(monkeypatch, "eager")  # what is tested is which graphs there are


ALIBI = {"attn_config": {"attn_type": "multihead_attention", "alibi": True, "sliding_window_size": 3}}
MANY_KINDS = [
    # With a smaller last microbatch and loads of the global batch, these two once went past the limit unseen.
    ({"attn_window_pattern": [4, -1, -1], "ffn_config": {"first_k_dense": 1}}, ((8, 12), (2, 7))),
    ({"attn_window_pattern": [4, -1, -1], "ffn_config": {"moe_layer_freq": 2}}, ((8, 12), (2, 7))),
    # Sizes of 1 and equal sizes, as tasks have them, are graphs of their own: with these there are nine of a kind.
    (ALIBI, ((8, 12), (2, 7), (1, 7), (1, 12), (5, 5), (3, 1), (1, 1))),
]


@pytest.mark.parametrize(("keys", "shapes"), MANY_KINDS, ids=str)
def test_models_of_many_kinds_of_blocks_stay_compiled(
    keys: dict[str, object], shapes: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting forwards, a smaller last microbatch, evaluation of other shapes: each needs graphs of each kind."""
    with_keys(monkeypatch, **keys)
    case = Case("many", {"compile": True}, microbatch=3)
    model = tiny.build(case, torch.float32)
    tiny.train(model, case, 1, 1.0)
    model.eval()
    with torch.no_grad():
        batch = tiny.batch(0)
        for rows, length in shapes:
            model(batch.tokens[:rows, :length], batch.labels[:rows, :length])
    assert counters["frames"]["ok"] > 0 and not counters["recompile_limit"]


def test_layers_with_jitter_share_one_graph_and_another_for_batches_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    ffn = {"moe_impl": "triton", "bias": False, "first_k_dense": 0, "shared_expert": False, "shared_expert_gate": False}
    with_keys(monkeypatch, n_layers=3, no_bias=True, ffn_config=ffn)
    model, batch = tiny.build(Case("jitter", {"compile": True}), torch.float32), tiny.batch(0)
    with torch.no_grad():
        for n, (rows, length) in enumerate(((2, 12), (3, 11), (4, 10)), 1):
            model(batch.tokens[:rows, :length], keys=batch.rows[:rows], last_only=True)
            assert counters["stats"]["unique_graphs"] == min(n, 2) and not counters["graph_break"]


def test_passing_the_limit_of_graphs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_keys(monkeypatch)
    model, batch = tiny.build(Case("limit", {"compile": True}), torch.float32), tiny.batch(0)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        model(batch.tokens, keys=batch.rows)
        with pytest.raises(RuntimeError, match="parallel.compile: torch needs more graphs"):
            model.eval()(batch.tokens[:3])


def test_generation_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has another length at every token."""
    with_keys(monkeypatch)
    model, batch = tiny.build(Case("generation", {"compile": True}), torch.float32).eval(), tiny.batch(0)
    cache = Cache(len(model.blocks))
    with torch.no_grad():
        plain = model(batch.tokens[:1]).logits[:, -1]
        counters.clear()
        model(batch.tokens[:1, :-2], cache=cache)
        for at in (-2, -1):
            token = batch.tokens[:1, at : at + 1 or None]
            logits = model(token, cache=cache).logits[:, -1]
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2, "of the shared expert alone"


def test_layers_of_one_kind_share_their_constants() -> None:
    """torch.compile guards the kind of a layer's experts by identity: another object is another graph."""
    model = tiny.model_config(PLAIN).build()
    kinds = [block.ffn.experts.kind for block in model.blocks if isinstance(block.ffn, MoE)]
    assert len(kinds) > 1 and all(kind is kinds[0] for kind in kinds)


@pytest.mark.parametrize(("recompute", "dense"), [*((each, True) for each in RECOMPUTE), ("selective", False)], ids=str)
def test_a_process_alone_casts_weights_for_compiled_blocks(
    recompute: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (recompute, dense) != ("selective", True):  # whose code stands for all: casts are around the graph
        without_code(monkeypatch)
    keys = dump(tiny.model_config(Case("three layers")))
    keys["attn_config"] |= NO_EXTRAS
    if dense:
        keys["ffn_config"] = {"ffn_type": "mptglu", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}}
    monkeypatch.setattr(tiny, "model_config", lambda case: check(CausalLMConfig, keys))
    true, found = (learn(case, 2, "amp_bf16") for case in (PLAIN, Case("c", {"compile": True, "recompute": recompute})))
    # bf16 has eight bits, and fused code rounds where plain code does not; Adam's first step makes much of that.
    torch.testing.assert_close(found["total"], true["total"], rtol=5e-3, atol=0)
    torch.testing.assert_close(found["grad_norm"][0], true["grad_norm"][0], rtol=5e-3, atol=0)
