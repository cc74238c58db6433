"""Simulated memory: against peaks measured on a GPU, against full-size models, against sums done by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmfoundry.callbacks import console  # noqa: F401  registers the callbacks that the YAMLs name
from llmfoundry.cli.command import read_run_config
from llmfoundry.parallel.apply import keep_weights_in, parallelize
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import Degrees, build_mesh
from llmfoundry.planning import simulation
from llmfoundry.planning.fusion import FusedGraph, backend
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import ACTIVATIONS, WEIGHTS, Ledger, Moment
from llmfoundry.planning.memory import memory
from llmfoundry.planning.simulation import simulate

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts" / "bench"))
from memory import RESULTS, job_of  # noqa: E402  scripts/bench/memory.py, which measured them
from record_steps import ROWS as STEPS  # noqa: E402, I001
from record_steps import Row as StepRow  # noqa: E402

# Of the rows, those that no other one is like.
ALIKE = ("windows", "experts with a clamp, grouped_mm")
MEASURED = [row for row in json.loads(RESULTS.read_text())["rows"] if row["model"] not in ALIKE]


@pytest.fixture(autouse=True)
def _no_graphs_are_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def of_yaml(name: str, *overrides: str) -> Job:
    return Job.of(read_run_config(str(ROOT / "yamls" / f"{name}.yaml"), list(overrides)))


@pytest.mark.skipif(not simulation.HAS_TRITON, reason="the peaks are those of the Triton kernels")
@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']} {row['parallel']}")
def test_simulated_memory_is_that_measured_on_a_gpu(row: dict) -> None:
    """One H100. 6 % is the bar; the farthest of these is 1.7 % off."""
    job = job_of(row["model"], row["parallel"], row["microbatches"])
    assert memory(job, Degrees(1, 1, 1)).total == pytest.approx(row["peak_bytes"], rel=0.02)


def test_a_base_in_nf4_is_planned_with_its_bits() -> None:
    lora = ("model.lora.rank=16", "model.lora.alpha=32.0", "parallel.recompute=full", "load_path=hf:some/model",
            "parallel.expert=1", "parallel.compile=false", "global_train_batch_size=1")  # fmt: skip
    plain, packed = (
        simulate(of_yaml("qwen3-30b-a3b", "model.n_layers=2", *lora, *more), Degrees(1, 1, 1)).highest
        for more in ((), ("model.lora.quantize=nf4",))
    )
    attention, experts = 2048 * 128 * (2 * 32 + 2 * 4), 128 * 3 * 2048 * 768
    saved = 2 * (attention + experts) * (2 - 4.5 / 8)  # from bfloat16, of two layers
    assert plain.weights - packed.weights == pytest.approx(saved, rel=1e-3)


ROWS = ("global_train_batch_size=64", "device_train_microbatch_size=1")
LONG = [
    ("olmoe-1b-7b", 1, ("model.n_layers=7", "parallel.recompute=full", "global_train_batch_size=1")),
    ("olmoe-1b-7b", 8, ("model.n_layers=8", "parallel.prefetch=2", "parallel.compile=false")),
    ("olmoe-1b-7b", 8, ("model.n_layers=8", "model.ffn_config.first_k_dense=1", "model.ffn_config.moe_layer_freq=2")),
    ("qwen3-30b-a3b", 32, ("model.n_layers=6", "parallel.expert=4", "parallel.replicate=2")),
    # The highest instant of a moment is another one with few layers than with many.
    ("qwen3-30b-a3b", 8, ("model.n_layers=12", "parallel.recompute=full", "parallel.compile=false")),
]


@pytest.mark.parametrize(("name", "gpus", "overrides"), LONG, ids=str)
def test_few_layers_tell_what_all_of_them_hold(name: str, gpus: int, overrides: tuple[str, ...]) -> None:
    job = of_yaml(name, *ROWS, *overrides)
    degrees = job.degrees(gpus)
    found, whole = memory(job, degrees), simulate(job, degrees).highest
    assert found.total == pytest.approx(whole.total, rel=1e-3)
    for kind, size in found._asdict().items():
        assert size == pytest.approx(getattr(whole, kind), rel=0.01, abs=0.002 * whole.total), kind


BUILT = [
    ("olmoe-1b-7b", 8, ("parallel.expert=8",)),
    ("dbrx-132b", 256, ("parallel.replicate=4", "parallel.expert=16")),
    ("mixtral-8x7b", 64, ("model.lora={rank: 8, alpha: 16}", "model.ffn_config.moe_bias_update_rate=0")),
]


@pytest.mark.parametrize(("name", "gpus", "overrides"), BUILT, ids=str)
def test_each_gpu_holds_its_share(name: str, gpus: int, overrides: tuple[str, ...]) -> None:
    """Of the model at full size, built and spread: its weights, and two float32 moments of what is trained.

    The optimizer also holds the low halves of weights that it keeps so.
    """
    one_row = ("device_train_microbatch_size=1", f"global_train_batch_size={gpus}")
    job = of_yaml(name, *one_row, "parallel.compile=false", *overrides)
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with torch.device("meta"):
            model = job.model.build()
        keep_weights_in(job.optimizer.weight_dtype, model)
        parallelize(model, build_mesh(job.parallel, "cpu", n_experts(job.model)), job.parallel, "amp_bf16")
    finally:
        dist.destroy_process_group()
    held = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    weights = sum(part.numel() * part.element_size() for part in held.values())
    trained = sum(part.numel() for name, part in held.items() if model.get_parameter(name).requires_grad)
    found = memory(job, job.degrees(gpus))
    assert found.weights == pytest.approx(weights, rel=1e-6)
    state = (8 + 2 * job.optimizer.halves) * trained
    assert found.optimizer == pytest.approx(state, rel=1e-6, abs=1e6), "and a counter for each parameter"
    assert job.optimizer.halves == (job.model.lora is None)


def test_graphs_are_traced_once_for_all_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []
    first = FusedGraph.__init__
    monkeypatch.setattr(FusedGraph, "__init__", lambda self, graph: (traced.append(graph), first(self, graph))[1])
    job, counts = of_yaml("olmoe-1b-7b", "global_train_batch_size=4", "device_train_microbatch_size=1"), []
    for layers, gpus in [(1, 2), (2, 2), (2, 4)]:
        short = job._replace(model=job.model.model_copy(update={"n_layers": layers}))
        simulate(short, short.degrees(gpus))
        counts.append(len(traced))
    assert counts[0] > 0 and counts == [counts[0]] * 3


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row.name)
def test_a_row_of_the_record_is_a_run(row: StepRow) -> None:
    """What a GPU is asked for has its rows, and nothing in it is a mistake."""
    job = of_yaml(row.yaml, *row.settings)
    work = job.work(job.degrees(row.gpus))
    assert (work.micro_rows, work.microbatches) == (row.rows, row.microbatches)


def test_recompute_keeps_less() -> None:
    job = of_yaml("olmoe-1b-7b", "model.n_layers=16", "global_train_batch_size=8", "device_train_microbatch_size=8")
    none, selective, full = (
        memory(job.changed(recompute=mode), Degrees(1, 1, 1)) for mode in ("none", "selective", "full")
    )
    assert none.total > 1.1 * selective.total and none.activations > selective.activations > full.activations
    assert none.weights == selective.weights == full.weights


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    job = of_yaml("olmoe-1b-7b", "model.n_layers=3", "parallel.compile=false", "device_train_microbatch_size=1")
    degrees = Degrees(1, 2, 1)
    offloaded, held = memory(job.changed(cpu_offload=True), degrees), memory(job, degrees)
    assert offloaded.weights == offloaded.optimizer == 0 < offloaded.gathered
    assert offloaded.total < held.total - held.weights - held.optimizer


def test_weights_in_bf16_take_half_and_need_no_copies() -> None:
    job = of_yaml("olmoe-1b-7b", "model.n_layers=1", "global_train_batch_size=1", "parallel.compile=false")
    held, split, found = (
        simulate(job._replace(optimizer=job.optimizer.model_copy(update={"master_weights": kept})), Degrees(1, 1, 1))
        for kept in ("fp32", "fp32_split", "bf16_sr")
    )
    whole = held.highest.weights
    assert found.highest.weights == split.highest.weights == whole / 2 == held.highest.gathered
    assert found.highest.gathered == split.highest.gathered == 0
    assert found.highest.optimizer == held.highest.optimizer == split.highest.optimizer - whole / 2


@pytest.mark.skipif(not simulation.HAS_TRITON, reason="the passes are Triton kernels")
def test_products_of_8_bits_are_planned_with_their_operands() -> None:
    job = of_yaml("olmoe-1b-7b", "model.n_layers=1", "global_train_batch_size=1", "parallel.compile=false")
    plain, eight = (simulate(job._replace(precision=each), Degrees(1, 1, 1)) for each in ("amp_bf16", "amp_fp8"))
    assert eight.highest[:4] == plain.highest[:4], "weights and states are those of bf16"
    held, found = (
        max(each.temporaries for each in step.held[Moment("backward", 0)][0]) for step in (plain, eight)
    )  # bytes while the block's gradients are computed
    assert found != held
    assert found == pytest.approx(held, rel=0.25)


def test_slots_for_gradients_that_copy_engines_send_are_planned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llmfoundry")

    def slots(gpus: int) -> float:
        rows = ("model.n_layers=1", f"global_train_batch_size={gpus}", "parallel.compile=false")
        (begin,) = simulate(of_yaml("olmoe-1b-7b", *rows), Degrees(1, gpus, 1)).held[Moment("forward", 0)]
        return begin[0].gradients

    w1 = 64 * 2 * 1024 * 2048 * 2
    assert slots(8) == 2 * w1 * 7 / 8, "two, of what seven others send"
    assert slots(16) == 0, "between nodes there are none"
    assert "copy engines" not in caplog.text, "a plan does not say what a run does"


def test_without_triton_experts_are_simulated_as_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("experts", {"compile": False}, 1)
    with_triton = memory(job, Degrees(1, 1, 1)).total
    monkeypatch.setattr(simulation, "HAS_TRITON", False)
    monkeypatch.setattr("llmfoundry.kernels.experts._triton_refusal", lambda *_: "triton is not installed")
    assert with_triton < memory(job, Degrees(1, 1, 1)).total < 1.2 * with_triton


def test_the_ledger_counts_what_is_alive() -> None:
    ledger, size = Ledger(), 1024 * 4
    with ledger:
        ledger.kind = WEIGHTS
        w = torch.zeros(1024)
        ledger.kind = ACTIVATIONS
        a = w * 2
        view = a.view(32, 32)  # shares its storage
        b = a + 1
        del a, b
        c = view + 1
    highest = max((m for times in ledger.held.values() for time in times for m in time), key=lambda m: m.total)
    assert highest.weights == size and highest.activations == 2 * size, "w; a and b, or a and c"
    del view, c
    with ledger:
        ledger.restart()
        w.add_(1)
    assert max(m.total for times in ledger.held.values() for time in times for m in time) == size


def test_a_compiled_graph_writes_only_what_a_kernel_needs() -> None:
    def chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = (x * 2).relu()
        y = y + y.sin()
        return y @ w

    x, w, size = torch.zeros(256, 256), torch.zeros(256, 256), 256 * 256 * 4
    for function, results in ((torch.compile(chain, backend=backend), 2), (chain, 3)):
        ledger = FusedGraph.ledger = Ledger()
        ledger.kind = ACTIVATIONS
        with torch.no_grad(), ledger:
            function(x, w)
        held = max(m.activations for times in ledger.held.values() for time in times for m in time)
        assert held >= results * size
        if function is not chain:
            assert held == 2 * size, "the product's input and the product; no step between"


def test_a_compiled_graph_frees_each_result_of_a_kernel_by_itself() -> None:
    def chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        values, places = x.sort()
        return values + (places.float() @ w) @ w  # the places, twice as large, are not read again; the values are

    x, w, size = torch.zeros(256, 256), torch.zeros(256, 256), 256 * 256 * 4
    ledger = FusedGraph.ledger = Ledger()
    ledger.kind = ACTIVATIONS
    with torch.no_grad(), ledger:
        torch.compile(chain, backend=backend)(x, w)
    held = max(m.activations for times in ledger.held.values() for time in times for m in time)
    assert held == 4 * size, "values, places and the places as floats; then values and a product's input and result"
