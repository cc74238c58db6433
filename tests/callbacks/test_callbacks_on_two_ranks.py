"""Callbacks with collectives: two ranks with experts on both say and write what one process does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmfoundry.callbacks.generate_callback import FILE
from llmfoundry.cli.train import train_main
from tests import forks
from tests.callbacks.conftest import lines, tiny_run

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]
MIXTRAL = {
    "norm_type": "rmsnorm", "no_bias": True, "attn_config": {"rope": True}, "d_model": 32, "n_heads": 2, "n_layers": 2,
    "vocab_size": 320, "max_seq_len": 32,
    "ffn_config": {"ffn_type": "moe", "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2,
                   "moe_normalize_expert_weights": 1, "ffn_act_fn": {"name": "silu"}},
}  # fmt: skip
CALLBACKS = {
    "optimizer_monitor": {"batch_log_interval": 2},
    "mbmoe_tok_per_expert": {"log_interval": 1, "log_every_layer": True},
    "system_metrics_monitor": {},
    "memory_monitor": {"dist_aggregate_batch_interval": 1},
    "kill_loss_spike": {"window_size": 2, "log_only": False, "loss_cap": 100},
    "generate_callback": {"prompts": ["to be", ""], "interval": "2ba", "max_new_tokens": 4},
    "early_stopper": {
        "monitor": "LanguageCrossEntropy", "dataloader_label": "train", "patience": "2ba", "min_delta": 1000.0
    },
}  # fmt: skip


def test_two_ranks_say_and_write_what_one_does(tmp_path: Path) -> None:
    files = []
    for name, more in (("one", {}), ("two", {"parallel": {"expert": 2}})):
        hf = {"save_folder": str(tmp_path / name), "save_interval": "2ba", "huggingface_folder_name": "r{rank}-{batch}"}
        run = tiny_run(tmp_path) | {"model": MIXTRAL, "save_folder": str(tmp_path / name), "max_duration": "9ba"} | more
        run["optimizer"] |= {"master_weights": "fp32_split"}
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(run | {"callbacks": CALLBACKS | {"hf_checkpointer": hf}}))
    assert train_main([str(files[0])]) == 0
    command = [*forks.TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = forks.run(*command, str(ROOT / "scripts" / "train.py"), str(files[1]), env=environment)
    assert done.returncode == 0, done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4], "ended by early_stopper"
    for ours, theirs in zip(one, two, strict=True):
        keys = {key for key in ours if key.startswith(("l2_norm/", "mb_moe/", "loss/"))}
        assert keys == {key for key in theirs if key.startswith(("l2_norm/", "mb_moe/", "loss/"))}
        for key in keys:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-6), key
    assert "l2_norm/moment/blocks.0.ffn.experts.w1" in two[1]
    assert (tmp_path / "one" / FILE).read_text() == (tmp_path / "two" / FILE).read_text()
    folders = [sorted((tmp_path / name / "huggingface").iterdir()) for name in ("one", "two")]
    assert [path.name for path in folders[0]] == [path.name for path in folders[1]] == ["r0-2", "r0-4"]
    ours, theirs = (load_file(folder[-1] / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    state = json.loads((tmp_path / "two" / "checkpoints" / "step-4" / "trainer.json").read_text())
    assert state["callbacks"]["callbacks.early_stopper"]["best_step"] == 1
