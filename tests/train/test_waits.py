"""How often the host waits for the device in one step: once, for all that it shows of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import llmfoundry.train.lion  # noqa: F401  registers its optimizer
import llmfoundry.train.muon  # noqa: F401  registers its optimizer
from llmfoundry.cli.command import read_run_config
from llmfoundry.config import check
from llmfoundry.data.loader import Batch
from llmfoundry.model.init import init_weights
from llmfoundry.model.transformer import CausalLM
from llmfoundry.numbers import Numbers
from llmfoundry.parallel.apply import keep_weights_in, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh
from llmfoundry.train.build import build
from llmfoundry.train.callback import Callback
from llmfoundry.train.optim import OptimizerConfig
from llmfoundry.train.run import Metrics, Run
from llmfoundry.train.step import StepResult, train_step
from tests.callbacks.conftest import tiny_run
from tests.reads import CountsReads
from tests.train.test_step import ROWS, batch, config

OPTIMIZERS = [
    {"name": "adamw"},
    {"name": "adamw", "state_dtype": "bf16"},
    {"name": "decoupled_lionw"},
    {"name": "decoupled_lionw", "state_dtype": "bf16"},
    {"name": "adamw", "state_dtype": "int8"},
    {"name": "muon"},
    {"name": "muon", "state_dtype": "bf16"},
    {"name": "adamw", "state_dtype": "int8", "master_weights": "fp32_split"},
    *({"name": each, "master_weights": "bf16_sr"} for each in ("adamw", "decoupled_lionw", "muon")),
    *({"name": each, "master_weights": "fp32_split"} for each in ("adamw", "decoupled_lionw", "muon")),
]


def trained(model: CausalLM, optimizer: torch.optim.Optimizer, rows: Batch) -> StepResult:
    return train_step(model, optimizer, rows, microbatch_rows=ROWS // 2, max_grad_norm=0.1, balance=None)


def built(settings: dict[str, object], dense: bool, device: str) -> tuple[CausalLM, torch.optim.Optimizer]:
    model_config = config()
    if dense:
        plain = {"ffn_type": "mptmlp", "ffn_hidden_size": 24}
        model_config = check(type(model_config), model_config.model_dump() | {"ffn_config": plain})
    model = model_config.build().to(device)
    init_weights(model, seed=1)
    optimizer = check(OptimizerConfig, {"lr": 0.01} | settings)
    if optimizer.weight_dtype == torch.bfloat16:
        keep_weights_in(torch.bfloat16, model)
        parallel = ParallelConfig(compile=False)
        parallelize(model, build_mesh(parallel, device, 0), parallel, "fp32")
    return model, optimizer.build(model)


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
def test_a_step_reads_nothing_before_its_end(settings: dict[str, object]) -> None:
    model, optimizer = built(settings, dense=True, device="cpu")
    before = model.wte.weight.detach().clone()
    with CountsReads() as reads:
        trained(model, optimizer, batch())
        result = trained(model, optimizer, batch())
    assert reads.found == []
    assert result.updated and result.grad_norm > 0.1
    assert not torch.equal(before, model.wte.weight)


def test_the_mode_sees_a_read() -> None:
    """So that the test above can fail."""
    with CountsReads() as reads:
        assert torch.ones(())
        float(torch.ones(()))
        torch.ones(2).tolist()
    assert reads.found == ["__bool__", "__float__", "tolist"]


@pytest.mark.parametrize("before", [False, True], ids=["not frozen", "frozen before"])
def test_the_garbage_collector_looks_only_through_what_comes_after_the_first_step_and_between_steps(
    tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that had frozen its objects itself keeps them so."""
    config = tiny_run(tmp_path) | {"eval_interval": "0ba", "max_duration": "3ba"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    trainer = build(read_run_config(str(tmp_path / "run.yaml"), []))
    frozen: list[int] = []
    collected: list[tuple[int, int, bool]] = []  # after which step, which generation, and whether inside a step
    inside = False

    def step(take: Callable[[], Metrics] = trainer.take_step) -> Metrics:
        nonlocal inside
        inside = True
        metrics = take()
        inside = False
        return metrics

    monkeypatch.setattr(trainer, "take_step", step)
    note = lambda phase, info: collected.append((trainer.state.step, info["generation"], inside))  # noqa: E731
    gc.callbacks.append(note)

    class Looks(Callback):
        def step_end(self, run: Run, metrics: Metrics) -> None:
            frozen.append(gc.get_freeze_count())

    trainer.callbacks.append(Looks())
    gc.unfreeze()
    if before:
        gc.freeze()
    n_before = gc.get_freeze_count()
    try:
        trainer.fit()
        assert gc.get_freeze_count() == pytest.approx(n_before, rel=0.01)  # some are freed
        after_first = [each for each in collected if each[0] > 1]
        assert gc.isenabled() and after_first and not any(inside for _, _, inside in after_first)
        assert frozen[1] > 100_000 and (frozen[1] < n_before + 1000 if before else frozen[1] > frozen[0] + 100_000)
    finally:
        gc.callbacks.remove(note)
        gc.freeze()


def test_a_step_leaves_no_tensor_to_the_garbage_collector() -> None:
    """What waits for it holds memory, and it does not know how much a GPU has left."""
    model, optimizer = built({"name": "adamw"}, dense=False, device="cpu")
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        trained(model, optimizer, batch())
        gc.collect()
        assert not [each for each in gc.garbage if isinstance(each, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_what_a_step_reports_is_known_before_the_weights_change() -> None:
    model, optimizer = built({"name": "adamw"}, dense=True, device="cpu")
    before = model.wte.weight.detach().clone()
    seen: list[StepResult] = []

    def look(result: StepResult) -> None:
        assert torch.equal(model.wte.weight, before)
        seen.append(result)

    done = train_step(
        model, optimizer, batch(), microbatch_rows=ROWS, max_grad_norm=0.1, balance=None, before_update=look
    )
    assert seen == [done] and not torch.equal(model.wte.weight, before)


@pytest.mark.gpu
def test_numbers_of_a_step_are_read_while_the_gpu_updates() -> None:
    model, optimizer = built({"name": "adamw"}, dense=True, device="cuda")
    rows, updated = batch().to(torch.device("cuda")), torch.cuda.Event()
    trained(model, optimizer, rows)  # kernels are compiled, which may take longer than the update below
    optimizer.register_step_pre_hook(lambda *_: torch.cuda._sleep(2_000_000_000))  # about a second
    optimizer.register_step_post_hook(lambda *_: updated.record())
    numbers: list[Numbers] = []
    result = train_step(
        model, optimizer, rows, microbatch_rows=ROWS, max_grad_norm=0.1, balance=None,
        before_update=lambda found: numbers.append(Numbers(found.ce.double()[None])),
    )  # fmt: skip
    (ce,) = numbers[0].read()
    assert not updated.query(), "the update has not ended"
    assert ce == result.ce.item()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
def test_a_step_on_a_gpu_waits_for_nothing(settings: dict[str, object]) -> None:
    model, optimizer = built(settings, dense=True, device="cuda")
    rows = batch().to(torch.device("cuda"))
    trained(model, optimizer, rows)  # kernels are compiled, and the state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = trained(model, optimizer, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.updated


@pytest.mark.gpu
def test_steps_of_a_run_on_a_gpu_wait_for_their_numbers_alone(tmp_path: Path) -> None:
    """With what a run has by default: reading ahead, console, report. Waiting for an event is not counted here."""
    config = tiny_run(tmp_path) | {"eval_interval": "0ba", "max_duration": "6ba", "parallel": {"compile": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    trainer = build(read_run_config(str(tmp_path / "run.yaml"), []))
    watched: list[int] = []

    class Watches(Callback):
        def step_end(self, run: Run, metrics: Metrics) -> None:
            """Not the first steps, which compile kernels, nor the last one, which saves."""
            watched.append(torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error" if 2 <= run.state.step < 5 else "default")
            assert all(part.device.type == "cpu" for part in run.router or ())

    trainer.callbacks.append(Watches())
    try:
        trainer.fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [0, 0, 2, 2, 2, 0]


@pytest.mark.gpu
def test_a_batch_goes_to_a_gpu_that_is_busy_without_a_wait() -> None:
    rows = torch.arange(8 * 32768).view(8, 32768)  # 2 MB: the driver stages small copies in any case
    on_host, done = Batch(rows, rows.clone(), torch.arange(8)), torch.cuda.Event()
    on_host.to("cuda")
    torch.cuda._sleep(2_000_000_000)  # about a second
    done.record()
    there = on_host.to("cuda")
    assert not done.query(), "the GPU is still busy"
    assert torch.equal(there.tokens.cpu(), rows)
