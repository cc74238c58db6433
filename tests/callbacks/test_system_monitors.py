"""Monitors of the machine, of time and of experts, under the names that Composer and LLM Foundry give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmfoundry.callbacks.memory_monitor import KEYS, over_ranks, report
from llmfoundry.callbacks.system_metrics_monitor import OF_GPU, of_ranks
from llmfoundry.cli.train import train_main
from tests.callbacks.conftest import lines


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
