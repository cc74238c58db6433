"""Monitors of the machine, of time and of experts, under the names that Composer and LLM Foundry give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmfoundry.callbacks.memory_monitor import KEYS, over_ranks, report
from llmfoundry.callbacks.memory_snapshot import MemorySnapshot
from llmfoundry.callbacks.system_metrics_monitor import OF_GPU, of_ranks
from llmfoundry.cli.train import train_main
from llmfoundry.config import check, dump
from llmfoundry.train.build import build
from llmfoundry.train.callback import Callback
from llmfoundry.train.config import RunConfig
from tests.callbacks.conftest import lines, tiny_run


def test_the_system_is_in_every_line(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    assert train_main([str(tiny), "callbacks.system_metrics_monitor={}"]) == 0
    names = {"cpu_percentage", "cpu_memory_total", "cpu_memory_percent", "disk_memory_used", "network_bytes_sent"}
    for line in lines(tmp_path / "run"):
        assert names <= line.keys()
        assert 0 < line["cpu_memory_used"] < line["cpu_memory_total"]


def test_gpus_of_all_ranks_are_the_least_and_the_most_or_each() -> None:
    rows = [[90.0, 40.0, 60.0, 300.0], [10.0, 50.0, 60.0, 200.0]]
    found = of_ranks(rows, every=False)
    assert found["min_gpu_percentage_rank_1"] == 10.0 and found["max_gpu_percentage_rank_0"] == 90.0
    assert found["max_gpu_power_usage_W_rank_0"] == 300.0 and len(found) == 2 * len(OF_GPU)
    assert of_ranks(rows, every=True)["memory_percentage_rank_1"] == 50.0


def test_memory_has_composers_names_and_gigabytes() -> None:
    stats = {key: 3 * 10**9 for key in KEYS}
    found = report(stats, KEYS)
    assert found["current_active_mem"] == 3.0 and found["alloc_retries"] == 3 * 10**9
    assert over_ranks({"peak_reserved_mem": 2.0}) == {
        "peak_reserved_mem_avg": 2.0, "peak_reserved_mem_min": 2.0, "peak_reserved_mem_max": 2.0
    }  # fmt: skip


@pytest.mark.gpu
def test_a_gpus_memory_is_in_every_line(tiny: Path, tmp_path: Path) -> None:
    monitor = "callbacks.memory_monitor={dist_aggregate_batch_interval: 2}"
    assert train_main([str(tiny), monitor]) == 0
    first, second, *_ = lines(tmp_path / "run")
    assert first["memory/current_active_mem"] > 0 and "memory/peak_allocated_mem_max" not in first
    assert second["memory/peak_allocated_mem_max"] == second["memory/peak_allocated_mem"]


def test_the_time_that_is_left_falls_to_none(tiny: Path, tmp_path: Path) -> None:
    assert train_main([str(tiny), "callbacks.runtime_estimator={skip_batches: 1, time_unit: seconds}"]) == 0
    first, *others = lines(tmp_path / "run")
    assert "time/remaining_estimate" not in first, "the clock starts after the first step"
    assert others[0]["time/remaining_estimate"] > 0 and others[-1]["time/remaining_estimate"] == 0


def test_tokens_per_expert_agree_with_the_loads(tiny: Path, tmp_path: Path) -> None:
    monitor = "callbacks.mbmoe_tok_per_expert={log_interval: 2, log_every_layer: true}"
    assert train_main([str(tiny), monitor]) == 0
    first, second, *_ = lines(tmp_path / "run")
    assert not any(key.startswith("mb_moe/") for key in first)
    # moe/max_load is a load divided by the mean load; one of four experts has a quarter of the tokens then.
    assert second["mb_moe/all_layers_max_tpe"] == pytest.approx(second["moe/max_load"] / 4)
    assert second["mb_moe/all_layers_min_tpe"] == pytest.approx(second["moe/min_load"] / 4)
    assert second["mb_moe/all_layers_max_tpe"] == max(second[f"mb_moe/layer{i}_max_tpe"] for i in range(2))
    assert {f"mb_moe/layer1_{name}_tpe" for name in ("median", "std")} <= second.keys()


def test_tokens_per_expert_are_counted_too(tiny: Path, tmp_path: Path) -> None:
    assert train_main([str(tiny), "callbacks.mbmoe_tok_per_expert={log_interval: 1, normalize: false}"]) == 0
    line = lines(tmp_path / "run")[0]
    share = torch.tensor(line["moe/load"])  # mean over layers
    assert line["mb_moe/all_layers_min_tpe"] <= float(share.min()) * 4 * 32 <= line["mb_moe/all_layers_max_tpe"]
    assert line["mb_moe/all_layers_max_tpe"] == pytest.approx(line["moe/max_load"] * 4 * 32 / 4)


def test_a_dense_model_has_no_tokens_per_expert(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = "model.ffn_config={ffn_type: mptmlp}"
    assert train_main([str(tiny), dense, "callbacks.mbmoe_tok_per_expert={}"]) == 2
    assert "callbacks.mbmoe_tok_per_expert: the model has no experts" in capsys.readouterr().err


def test_speed_has_composers_names(tiny: Path, tmp_path: Path) -> None:
    assert train_main([str(tiny), "callbacks.speed_monitor={window_size: 2, time_unit: seconds}"]) == 0
    found = lines(tmp_path / "run")
    for line in found:
        assert line["throughput/samples_per_sec"] == pytest.approx(4 * line["throughput/batches_per_sec"])
        assert line["throughput/device/samples_per_sec"] == line["throughput/samples_per_sec"], "one device"
    assert found[-1]["time/train"] == pytest.approx(sum(line["time/step_seconds"] for line in found))


def test_a_snapshots_name_is_filled_in(tmp_path: Path) -> None:
    names = {"folder": f"{tmp_path}/{{run_name}}/traces", "filename": "rank{rank}.{batch}.memory_snapshot"}
    snapshot = {"name": "memory_snapshot", "interval": "3ba", "skip_batches": 1, "remote_file_name": None} | names
    trainer = build(check(RunConfig, tiny_run(tmp_path) | {"callbacks": {"memory_snapshot": snapshot}}))
    callback = trainer.named["callbacks.memory_snapshot"]
    assert isinstance(callback, MemorySnapshot)
    trainer.state.step = 3
    path = callback.path(trainer, "step-3", names["filename"])
    assert path == tmp_path / "run" / "traces" / "rank0.3.memory_snapshot"
    assert callback.path(trainer, "out-of-memory").name == "out-of-memory-rank-0.pickle"


USUAL = {  # as LLM Foundry's own files and its documentation write them
    "speed_monitor": {"window_size": 10, "gpu_flops_available": 312000000000000},
    "lr_monitor": {},
    "memory_monitor": {"memory_keys": {"allocated_bytes.all.peak": "peak"}, "dist_aggregate_batch_interval": 10},
    "runtime_estimator": {"skip_batches": 1, "time_unit": "hours"},
    "nan_monitor": {},
    "optimizer_monitor": {"log_optimizer_metrics": True, "batch_log_interval": 10},
    "system_metrics_monitor": {"log_all_data": True},
    "early_stopper": {"monitor": "LanguageCrossEntropy", "dataloader_label": "eval", "comp": "lt", "patience": 1},
    "generate_callback": {
        "prompts": ["a"], "interval": 1, "batch_size": 8, "max_new_tokens": 9, "do_sample": True, "temperature": 1,
        "top_p": 1.0, "use_cache": True,
    },
    "hf_checkpointer": {
        "save_folder": "./{run_name}/checkpoints", "save_interval": "1dur", "precision": "bfloat16", "overwrite": True,
        "huggingface_folder_name": "ba{batch}", "mlflow_registered_model_name": None, "mlflow_logging_config": None,
        "flatten_imports": ["llmfoundry"], "final_register_only": False,
    },
    "mbmoe_tok_per_expert": {
        "log_interval": 10, "log_every_layer": False, "all_reduce_stats": False, "normalize": True
    },
    "run_timeout": {"timeout": 1800},
    "kill_loss_spike": {
        "log_only": True, "patience": 4, "outlier_multiplier": 2, "window_size": 100, "loss_cap": 10
    },
    "memory_snapshot": {
        "skip_batches": 1, "interval": "3ba", "max_entries": 100000, "folder": "{run_name}/torch_traces",
        "filename": "rank{rank}.{batch}.memory_snapshot", "overwrite": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_every_callback_takes_llm_foundrys_keys(name: str, tmp_path: Path) -> None:
    config = check(RunConfig, tiny_run(tmp_path) | {"callbacks": {name: USUAL[name]}})
    assert isinstance(config.callbacks[name].build(), Callback)
    assert check(RunConfig, dump(config)).callbacks == config.callbacks, "config.yaml reads as it was written"
