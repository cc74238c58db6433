"""What a run may begin from: its settings, tokenizer and data against those of a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_run import metrics_of, recipe, snapshot, weights_of  # noqa: F401

from llmfoundry.cli.train import train_main
from llmfoundry.settings import read_resolved

WEIGHTS = "load_weights_only=true"


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A run of four steps, with checkpoints at two and four."""
    assert train_main([str(recipe), "max_duration=4ba", "scheduler.t_max=8ba", "save_interval=2ba"]) == 0
    return tmp_path / "run"


@pytest.fixture
def more(recipe: Path) -> list[str]:  # noqa: F811
    """The command that goes on with it."""
    return [str(recipe), "max_duration=6ba", "scheduler.t_max=8ba", "save_interval=2ba", "autoresume=true"]


def other_text(tmp_path: Path) -> Path:
    folder = tmp_path / "other_text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"the {n}th word of {i}\n" for n in range(60)))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("seed", "18", "17"),
        ("global_train_batch_size", "8", "4"),
        ("max_seq_len", "16", "32"),
        ("train_loader.drop_last", "true", "False"),
        ("train_loader.dataset.shuffle", "false", "None"),
        ("train_loader.dataset.shuffle_seed", "3", "None"),
        ("optimizer.name", "decoupled_adamw", "'adamw'"),
        ("model.attn_config.rope_theta", "500000.0", "10000.0"),
        ("model.norm_eps", "1.0e-6", "1e-05"),
        ("model.n_heads", "4", "2"),
        ("model.ffn_config.moe_top_k", "1", "2"),
        ("model.ffn_config.ffn_act_fn.name", "gelu", "'silu'"),
    ],
)
@pytest.mark.parametrize("by", ["autoresume", "load_path"])
def test_another_identity_is_refused_by_key(
    run: Path, more: list[str], tmp_path: Path, key: str, value: str, before: str, by: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files = snapshot(run)
    begin = more if by == "autoresume" else [*more, f"load_path={run}", f"save_folder={tmp_path / 'other'}"]
    assert train_main([*begin, f"{key}={value}"]) == 2
    first, *_, last = capsys.readouterr().err.strip().splitlines()
    assert key.removesuffix(".name") in first and f"differs from {before} of {run / 'checkpoints' / 'step-4'}" in first
    assert "load_allow=[" in last
    assert snapshot(run) == files and not (tmp_path / "other").exists()


def test_every_difference_has_its_line(run: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([*more, "seed=18", "model.norm_eps=1.0e-6"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and lines[-1].endswith("load_allow=[model.norm_eps,seed]")


@pytest.mark.parametrize("key", ["model.norm_eps=1.0e-6", "seed=18", "global_train_batch_size=8", "max_seq_len=16"])
def test_another_identity_is_taken_when_it_is_allowed_by_name(
    run: Path, more: list[str], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert train_main([*more, key, f"load_allow=[{key.partition('=')[0]}]"]) == 0
    name, _, value = key.partition("=")
    assert f"{name}: " in caplog.text and f"-> {float(value):g}" in caplog.text.replace("1e-06", "1e-06")
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert ("the row counter restarts" in caplog.text) == (name in ("seed", "max_seq_len"))
    trainer = json.loads((run / "checkpoints" / "step-6" / "trainer.json").read_text())
    rows = {"seed": 8, "max_seq_len": 8, "global_train_batch_size": 32}.get(name, 24)
    assert trainer["state"]["rows"] == rows


def test_a_name_that_allows_nothing_is_a_mistake(
    run: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*more, "load_allow=[model.norm_epsilon]"]) == 2
    assert "load_allow: model.norm_epsilon: no such key" in capsys.readouterr().err


def test_other_settings_are_taken_listed_and_the_old_ones_stay_on_record(
    run: Path, more: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert train_main([*more, "optimizer.lr=0.02", "optimizer.weight_decay=0.5", "save_num_checkpoints_to_keep=3"]) == 0
    assert "continuing from" in caplog.text
    for change in ("optimizer.lr: 0.01 -> 0.02", "optimizer.weight_decay: 0.01 -> 0.5", "max_duration: '4ba' -> '6ba'"):
        assert f"\n  {change}" in caplog.text
    assert read_resolved(run / "config.yaml")["optimizer"]["lr"] == 0.02
    record = read_resolved(run / "config-history" / "until-step-4.yaml")
    assert record["optimizer"]["lr"] == 0.01 and record["max_duration"] == "4ba"
    (run / "checkpoints" / "step-6").rename(run / "elsewhere")
    caplog.clear()
    assert train_main(more) == 0
    assert metrics_of(run)[4]["lr"] < 0.01, "the rate of the YAML counts again"


def test_settings_that_are_the_same_leave_no_record(run: Path, more: list[str]) -> None:
    again = [item if item != "max_duration=6ba" else "max_duration=4ba" for item in more]
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-4")
    config = (run / "config.yaml").read_bytes()
    assert train_main([*again, "autoresume=false"]) == 2
    assert train_main([*again, "save_folder=" + str(run)]) == 0
    record = run / "config-history" / "until-step-2.yaml"
    assert not record.exists() or read_resolved(record) != yaml.safe_load(config)


def rewrite_config(checkpoint: Path, change) -> None:
    """Change the config.yaml of a checkpoint, as an older version would have written it."""
    from llmfoundry.checkpoint import manifest

    data = yaml.safe_load((checkpoint / "config.yaml").read_text())
    change(data)
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(data))
    listed = json.loads((checkpoint / "MANIFEST.json").read_text())
    listed["files"]["config.yaml"] = manifest.measure(checkpoint / "config.yaml")._asdict()
    (checkpoint / "MANIFEST.json").write_text(json.dumps(listed))


def test_keys_that_came_or_went_since_do_not_make_a_run_unresumable(
    run: Path, more: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def older(data: dict) -> None:
        del data["save_failures_allowed"], data["load_allow"], data["train_loader"]["drop_last"]
        del data["model"]["norm_eps"], data["model"]["ffn_config"]["moe_routed_scaling"], data["model"]["lora"]
        data["gone"] = 1
        data["model"]["gone_too"] = {"deep": True}
        data["model"]["ffn_config"]["moe_gone"] = 0.5

    rewrite_config(run / "checkpoints" / "step-4", older)
    caplog.set_level("INFO")
    assert train_main(more) == 0
    assert metrics_of(run)[-1]["step"] == 6
    assert "gone: 1 -> (not set)" in caplog.text and "model.ffn_config.moe_gone: 0.5 -> (not set)" in caplog.text
    assert "drop_last" not in caplog.text and "norm_eps" not in caplog.text


def test_a_key_that_an_older_run_lacks_counts_as_its_default(
    run: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_config(run / "checkpoints" / "step-4", lambda data: data["model"].pop("norm_eps"))
    assert train_main([*more, "model.norm_eps=1.0e-6"]) == 2
    assert "model.norm_eps: 1e-06 differs from 1e-05" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_not_another_runs_to_lose(
    run: Path, more: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run / "checkpoints")
    before = snapshot(run)
    assert train_main([*more, "seed=18"]) == 2
    assert "seed: 18 differs from 17" in capsys.readouterr().err
    assert snapshot(run) == before
    assert train_main(more) == 0
    assert "holds no checkpoint; starting from the first step" in caplog.text
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_config_was_lost_is_resumed_from_its_checkpoint(run: Path, more: list[str]) -> None:
    (run / "config.yaml").unlink()
    assert train_main(more) == 0


# Data


def test_data_that_moved_is_the_same_data(run: Path, more: list[str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert train_main([more[0], *more[1:-1], f"save_folder={whole}"]) == 0
    (tmp_path / "text").rename(tmp_path / "moved")
    paths = [f"{loader}.dataset.path={tmp_path / 'moved'}" for loader in ("train_loader", "eval_loader")]
    assert train_main([*more, *paths]) == 0
    assert metrics_of(run) == metrics_of(whole)


def test_new_data_keeps_the_optimizer_and_begins_with_its_first_row(
    run: Path, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = f"train_loader.dataset.path={other_text(tmp_path)}"
    assert train_main([*more, new]) == 2
    assert "load_allow=[data]" in capsys.readouterr().err
    assert train_main([*more, new, "load_allow=[data]"]) == 0
    file = run / "checkpoints" / "step-6"
    state = json.loads((file / "trainer.json").read_text())["state"]
    assert (state["step"], state["rows"], state["tokens"]) == (6, 8, 6 * 4 * 32)
    from safetensors.torch import load_file

    memory = load_file(file / "optimizer-00000.safetensors")
    assert {tensor.item() for name, tensor in memory.items() if name.endswith("/step")} == {6.0}
    shutil.rmtree(file)  # killed before it: the same again; then the new data is the run's own
    assert train_main([*more, new, "load_allow=[data]"]) == 0
    assert train_main([*more, new, "max_duration=7ba"]) == 0
    assert json.loads((run / "checkpoints" / "step-7" / "trainer.json").read_text())["state"]["rows"] == 12


# Tokenizers


def tokenizer_in(run: Path) -> bytes:
    return (run / "checkpoints" / "latest" / "tokenizer" / "tokenizer.json").read_bytes()


def test_weights_bring_their_tokenizer_and_bpe_is_not_trained_again(
    recipe: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    second = tmp_path / "second"
    options = [f"load_path={run}", WEIGHTS, f"train_loader.dataset.path={other_text(tmp_path)}", "max_duration=2ba"]
    assert train_main([str(recipe), *options, f"save_folder={second}"]) == 0
    assert tokenizer_in(second) == tokenizer_in(run)
    assert "tokenizer: using the checkpoint's own" in caplog.text and "training a byte-level BPE" not in caplog.text


@pytest.mark.parametrize("how", ["vocab_size=310", "name=FOLDER"])
def test_another_tokenizer_is_an_error_unless_it_is_allowed(
    recipe: Path, run: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    from llmfoundry.data.tokenizer import train_bpe

    folder = tmp_path / "theirs"
    folder.mkdir()
    train_bpe(["other words than those " * 50], 280).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    data = yaml.safe_load(recipe.read_text())
    key, _, value = how.partition("=")
    data["tokenizer"] = {"name": "bpe"} | {key: str(folder) if value == "FOLDER" else int(value)}
    recipe.write_text(yaml.safe_dump(data))
    begin = [str(recipe), f"load_path={run}", WEIGHTS, "max_duration=2ba", f"save_folder={tmp_path / 'second'}"]
    assert train_main(begin) == 2
    error = capsys.readouterr().err
    assert "is not the tokenizer of the weights" in error and "load_allow=[tokenizer]" in error
    assert not (tmp_path / "second").exists()
    assert train_main([*begin, "load_allow=[tokenizer]"]) == 0
    assert tokenizer_in(tmp_path / "second") != tokenizer_in(run)


def test_the_same_tokenizer_by_another_name_is_the_same(recipe: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    data = yaml.safe_load(recipe.read_text())
    data["tokenizer"] = {"name": str(run / "checkpoints" / "step-2" / "tokenizer")}
    recipe.write_text(yaml.safe_dump(data))
    begin = [str(recipe), f"load_path={run}", WEIGHTS, "max_duration=2ba", f"save_folder={tmp_path / 'second'}"]
    assert train_main(begin) == 0


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("model.attn_config.rope_theta=5.0e5", "model.attn_config.rope_theta"),
        ("model.ffn_config.moe_top_k=1", "model.ffn_config.moe_top_k"),
        ("model.attn_config.sliding_window_size=3", "model.windows"),
    ],
)
def test_weights_are_not_read_as_another_models(
    recipe: Path, run: Path, tmp_path: Path, option: str, key: str, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    begin = [str(recipe), f"load_path={run}", WEIGHTS, "max_duration=2ba", f"save_folder={tmp_path / 'second'}"]
    assert train_main([*begin, option]) == 2
    assert f"{key}: " in capsys.readouterr().err and not (tmp_path / "second").exists()
    assert train_main([*begin, option, f"load_allow=[{key}]"]) == 0


def test_what_only_training_needs_is_free_with_weights_alone(recipe: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    options = [
        "seed=3", "global_train_batch_size=2", "max_seq_len=16", "optimizer.name=decoupled_adamw",
        "model.ffn_config.moe_loss_weight=0.5", "model.init_config.name=small_init_", "model.max_seq_len=64",
    ]  # fmt: skip
    begin = [str(recipe), f"load_path={run}", WEIGHTS, "max_duration=2ba", f"save_folder={tmp_path / 'second'}"]
    assert train_main([*begin, *options]) == 0


def test_a_literal_setting_comes_back_literally(recipe: Path, run: Path, more: list[str]) -> None:  # noqa: F811
    from llmfoundry.checkpoint.checkpointer import read

    assert train_main([*more, r"callbacks.sample_text.prompt='\${HOME} 1e-5'", "run_name='1e5'"]) == 0
    config = read(run).config
    assert config["run_name"] == "1e5"
    assert config["callbacks"]["sample_text"]["prompt"] == "${HOME} 1e-5"


def test_weights_of_a_damaged_newest_checkpoint_are_those_of_the_one_before(
    recipe: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    (file,) = (run / "checkpoints" / "step-4").glob("model-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    begin = [str(recipe), f"load_path={run}", WEIGHTS, "max_duration=2ba", "optimizer.lr=1.0e-30"]
    assert train_main([*begin, f"save_folder={tmp_path / 'second'}"]) == 0
    assert "SKIPPING A DAMAGED CHECKPOINT" in caplog.text
    old = (run / "checkpoints" / "step-2").glob("model-*.safetensors")
    from safetensors.torch import load_file

    before, after = load_file(next(old)), weights_of(tmp_path / "second")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-6)
