"""Monitors and loggers on a real run, a tiny one."""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmfoundry.callbacks import sample_text
from llmfoundry.cli.train import train_main
from llmfoundry.model.transformer import CausalLMConfig
from tests import forks

STEPS = 4


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(tmp_path / "cache")}
    ffn = {"ffn_type": "moe", "ffn_hidden_size": 32, "moe_num_experts": 4, "ffn_act_fn": {"name": "silu"}}
    config = {
        "max_seq_len": 32,
        "model": {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 320, "max_seq_len": 32, "ffn_config": ffn},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "train_loader": {"dataset": text | {"split": "train"}},
        "eval_loader": {"dataset": text | {"split": "validation", "validation_fraction": 0.2}},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "scheduler": {"name": "constant_with_warmup"},
        "max_duration": f"{STEPS}ba",
        "global_train_batch_size": 4,
        "save_folder": str(tmp_path / "run"),
        "log_to_console": False,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def lines(tmp_path: Path, run: str = "run") -> list[dict[str, float]]:
    return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]


def test_speed_and_learning_rate_are_in_every_line(recipe: Path, tmp_path: Path) -> None:
    peak = 1e9
    options = [f"callbacks.speed_monitor.gpu_flops_available={peak}", "callbacks.lr_monitor={}"]
    assert train_main([str(recipe), *options]) == 0
    found = lines(tmp_path)
    assert len(found) == STEPS
    for line in found:
        assert line["throughput/device/mfu"] == pytest.approx(line["throughput/flops_per_sec"] / peak)
        tokens = 4 * 32 * line["throughput/batches_per_sec"]
        assert line["throughput/tokens_per_sec"] == pytest.approx(tokens)
        assert line["lr-AdamW/group0"] == line["lr"] == 0.01


@pytest.mark.parametrize("adapters", ["", "model.lora={rank: 2, alpha: 2}"])
def test_flops_are_counted_once_for_a_run(recipe: Path, adapters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters, counting builds the model."""
    counted: list[int | None] = []
    count = CausalLMConfig.flops_per_token

    def watched(self: CausalLMConfig, seq_len: int | None = None) -> float:
        counted.append(seq_len)
        return count(self, seq_len)

    monkeypatch.setattr(CausalLMConfig, "flops_per_token", watched)
    assert train_main([str(recipe), *filter(None, [adapters])]) == 0
    assert counted == [32]


@pytest.mark.parametrize(("options", "window"), [([], 10), (["callbacks.speed_monitor.window_size=2"], 2)])
def test_throughput_is_a_windows_in_every_run(recipe: Path, tmp_path: Path, options: list[str], window: int) -> None:
    assert train_main([str(recipe), *options]) == 0
    seconds = [line["time/step_seconds"] for line in lines(tmp_path)]
    for i, line in enumerate(lines(tmp_path), 1):
        counted = seconds[max(0, i - window) : i]
        assert line["throughput/tokens_per_sec"] == pytest.approx(len(counted) * 4 * 32 / sum(counted))


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe), "loggers.tensorboard={}"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("loss/train/total")}
    assert written.keys() == {line["step"] for line in lines(tmp_path)}
    assert all(math.isclose(written[line["step"]], line["loss/train/total"], rel_tol=1e-6) for line in lines(tmp_path))


def test_a_tensorboard_that_cannot_be_is_refused_before_anything_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([str(recipe), "loggers.tensorboard.log_dir=/proc/x"]) == 2
    assert "error: loggers.tensorboard.log_dir: /proc/x: No such file or directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name]


def test_wandb_works_without_an_account(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe), "loggers.wandb.mode=offline", "loggers.wandb.project=test"]) == 0
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0


def test_wandb_without_a_login_is_refused_before_anything_is_written(recipe: Path, tmp_path: Path) -> None:
    """In a process of its own, for wandb reads its settings once."""
    home = tmp_path / "home"
    home.mkdir()
    hidden = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    script = "import sys; from llmfoundry.cli.train import train_main; sys.exit(train_main())"
    before = {path.name for path in tmp_path.iterdir()}
    place = {"HOME": str(home), "NETRC": str(home / ".netrc")}
    done = forks.run("-c", script, str(recipe), "loggers.wandb={}", env=environment | place)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: loggers.wandb: ") and "`wandb login`" in line and "WANDB_MODE=offline" in line
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("server", ["http://127.0.0.1:9"])
def test_a_wandb_server_out_of_reach_is_found_before_anything_is_written(
    recipe: Path, tmp_path: Path, server: str
) -> None:
    script = "import sys; from llmfoundry.cli.train import train_main; sys.exit(train_main())"
    before = {path.name for path in tmp_path.iterdir()}
    place = {"WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    done = forks.run("-c", script, str(recipe), "loggers.wandb={}", env=os.environ | place)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: loggers.wandb: {server} cannot be reached: ") and "WANDB_MODE=offline" in line
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_wandb_run_keeps_its_id_and_another_run_gets_another(recipe: Path, tmp_path: Path) -> None:
    offline = [str(recipe), "loggers.wandb.mode=offline", "loggers.wandb.project=test"]

    def ids() -> list[str]:
        return [path.stem.removeprefix("run-") for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")]

    assert train_main(offline) == 0
    (first,) = ids()
    assert train_main([*offline, "max_duration=6ba", "autoresume=true"]) == 0
    assert ids() == [first, first]
    shutil.rmtree(tmp_path / "run")
    assert train_main(offline) == 0
    assert ids() != [first]


def test_a_sample_is_printed_beside_what_compressors_reach(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([str(recipe), "callbacks.sample_text={max_new_tokens: 8, prompt: ''}"]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "gzip -9: " in out and "xz -9: " in out
    assert f"this model: {summary['validation/bits_per_byte']:.4f}" in out


def test_a_long_prompt_is_no_crash_after_training(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_text, "COMPRESS_BYTES", 999)
    sample = f"callbacks.sample_text={{max_new_tokens: 120, prompt: '{'~' * 30}'}}"  # a token a character
    learned = ["model.attn_config.rope=false", "max_duration=1ba"]
    assert train_main([str(recipe), *learned, sample]) == 0
    out = capsys.readouterr().out
    assert "~" * 30 in out and "bits per byte of the first 999 bytes of the validation text" in out
    options = [*learned, sample.replace("~", "~~"), f"save_folder={tmp_path / 'other'}"]
    assert train_main([str(recipe), *options]) == 0
    assert "(none: the prompt has 60 tokens, and max_seq_len is 32)" in capsys.readouterr().out


def test_starving_experts_are_warned_about(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Two rows of eight tokens to 4 experts, one each: nobody gets 0.99 of an equal share for long.
    assert train_main([str(recipe), "callbacks.expert_load={starving_below: 0.99, patience: 2}"]) == 0
    assert "raise moe_loss_weight" in caplog.text


def test_the_console_line_shows_what_matters(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(recipe), "log_to_console=true", "console_log_interval=2ba"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "active" in out[0] and "saving to" in out[0]
    steps = [line for line in out if " step " in line]  # after the date and the time, off a terminal
    assert [line.split()[3] for line in steps] == ["2/4", "4/4"]
    assert datetime.datetime.fromisoformat(" ".join(steps[0].split()[:2])) <= datetime.datetime.now()
    assert "256 tokens" in steps[0] and steps[0].endswith(" left")
    assert "loss" in steps[0] and "bits/byte" in steps[1]
