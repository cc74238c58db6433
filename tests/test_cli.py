"""The commands' options, and what they say of a user's mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.command import Command, read_run_config
from llmfoundry.cli.prepare import prepare_data_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import dump


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML of a tiny run on made-up text."""
    dataset = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(tmp_path / "cache")}
    config = {
        "max_seq_len": 32,
        "model": {"name": "causal_lm", "d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 320},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "train_loader": {"dataset": dataset},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "1ba"},
        "max_duration": "2ba",
        "global_train_batch_size": 4,
        "save_folder": str(tmp_path / "run"),
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_overrides_may_follow_options(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "--dry-run", "seed=1"]) == 0
    assert "seed: 1\n" in capsys.readouterr().out
    assert train_main([str(recipe), "seed=2", "--gpus", "1", "max_seq_len=16", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "seed: 2\n" in out and "max_seq_len: 16\n" in out
    assert prepare_data_main([str(recipe), "seed=1"]) == 0


def test_dry_run_says_whether_it_fits(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "--dry-run", "--gpus", "2", "--gpu-memory", "40"]) == 0
    out = capsys.readouterr().out
    assert "of 35.0 GiB (40, of which 5 are kept free)" in out and "meshes of 2 GPUs" in out
    for options, says in (
        (["--gpu-memory", "40"], "--gpu-memory 40: needs --dry-run"),
        (["--gpus", "8"], "--gpus 8: needs --dry-run"),
        (["--dry-run", "--gpu-memory", "5"], "--gpu-memory 5: 5 GiB of it are kept free"),
    ):
        assert train_main([str(recipe), *options]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("save_num_checkpoints_to_keep=-2", "save_num_checkpoints_to_keep=-2 keeps nothing"),
        ("eval_subset_num_batches=0", "eval_subset_num_batches=0 evaluates on nothing"),
        ("eval_subset_num_batches=-2", "eval_subset_num_batches=-2 evaluates on nothing"),
        ("seed=9223372036854775808", "seed: input should be less than 9223372036854775808"),
        ("model.ffn_config.ffn_hidden_size=0", "ffn_hidden_size: input should be greater than or equal to 1"),
        ("model.expansion_ratio=0.01", "expansion_ratio=0.01 of d_model=32 leaves no hidden unit"),
        ("model.init_config.init_div_is_residual=0.0", "init_div_is_residual: residual outputs cannot be divided by 0"),
        ("model.expansion_ratio=.inf", "model.expansion_ratio: input should be a finite number, found inf"),
        ("parallel.recompute_save=[aten.mm]", "recompute_save is for recompute: selective, not none"),
        ("train_loader=[]", "train_loader=[]: does not fit the value that is there"),
        ("eval_first=true", "eval_first=true has no text to evaluate on; add an eval_loader, or icl_tasks"),
        ("precision=bf16", "precision: bf16 is not supported; write amp_bf16, or fp32"),
        ("precision=half", "precision: input should be 'fp32', 'amp_bf16' or 'amp_fp8' or 'auto', found 'half'"),
        (
            "device_train_microbatch_size=all",
            "device_train_microbatch_size: input should be a valid integer or 'auto', found 'all'",
        ),
        ("[=1", "[=1: does not fit the value that is there"),
        ("model.ffn_config.ffn_act_fn=silu", "ffn_act_fn: input should be a mapping, found 'silu'"),
        ("optimizer.betas=[0.9]", "optimizer.betas: list should have at least 2 items, not 1, found [0.9]"),
    ],
)
def test_a_value_out_of_bounds_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture, override: str, says: str
) -> None:
    assert train_main([str(recipe), "--dry-run", override]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line


def test_adapters_do_not_train_with_8_bit_products(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "--dry-run", "precision=amp_fp8", "model.lora={rank: 2, alpha: 4}"]) == 2
    assert "precision: amp_fp8 with model.lora is not supported; write amp_bf16" in capsys.readouterr().err


@pytest.mark.parametrize("command", [train_main, prepare_data_main])
def test_what_is_missing_is_the_yaml_alone(command: Command, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        command([])
    assert ended.value.code == 2
    assert "the following arguments are required: yaml; see " in capsys.readouterr().err


def test_no_text_to_validate_on_leaves_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = yaml.safe_load(recipe.read_text())
    config["train_loader"]["dataset"]["validation_fraction"] = 0.0
    config["eval_loader"] = {"dataset": config["train_loader"]["dataset"] | {"split": "validation"}}
    recipe.write_text(yaml.safe_dump(config))
    assert prepare_data_main([str(recipe)]) == 2
    assert "holds no text" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name]


def test_folders_may_be_at_home(recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert train_main([str(recipe), "--dry-run", "save_folder=~/runs/a", "load_path=~/runs/b"]) == 0
    out = capsys.readouterr().out
    assert "save_folder: /home/me/runs/a\n" in out and "load_path: /home/me/runs/b\n" in out


def test_hints_find_the_place_of_a_key(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    mistakes = {
        "lr=1e-3": "lr: unknown key (did you mean optimizer.lr or optimizer.param_groups.lr?)",
        "learning_rate=1e-3": "learning_rate: unknown key (did you mean optimizer.lr?)",
        "t_warmup=1ba": "t_warmup: unknown key (did you mean scheduler.t_warmup?)",
        "moe_top_k=2": "moe_top_k: unknown key (did you mean model.ffn_config.moe_top_k?)",
        "max_seqlen=8": "max_seqlen: unknown key (did you mean 'max_seq_len'?)",
        "train_loader.dataset.path=x":
            "train_loader.dataset.path: unknown key (a key of chats, ids, megatron, preferences, text_files: set name)",
        "model.ffn_config.moe_num_experts=8":
            "model.ffn_config.moe_num_experts: unknown key (a key of mb_dmoe, mb_moe, moe, torch_dmoe: set ffn_type)",
        "optimizer.weight_decays=0": "optimizer.weight_decays: unknown key (did you mean 'weight_decay'?)",
    }  # fmt: skip
    assert train_main([str(recipe), *mistakes]) == 2
    said = capsys.readouterr().err.removeprefix("error: ").splitlines()
    assert sorted(said) == sorted(mistakes.values())  # all in one round


def test_a_model_that_is_not_there_is_the_only_mistake(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    model = "model:={name: hf_causal_lm, pretrained_model_name_or_path: ./a/b/c}"
    assert train_main([str(recipe), model, "max_seq_len=4096"]) == 2
    assert capsys.readouterr().err == "error: ./a/b/c: no such folder\n"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["save_folder=nope://bucket/x"], "save_folder: nope://bucket/x: is a URL that is not known; known are s3://"),
        (["save_folder=dbfs:/x"], "save_folder: dbfs:/x: is a URL that is not known"),
        (["save_folder=sftp://me:secret@host/x"], "save_folder: sftp://...: holds a password; leave it out"),
        (["save_folder=s3://bucket/{epoch}", "run_name=a"], "save_folder: s3://bucket/{epoch} has the placeholder"),
        (["save_folder=tiny.yaml/x"], "save_folder: tiny.yaml/x cannot be made: "),
        (
            ["save_folder=memory://bucket/x"],
            "save_folder: memory://bucket/x: is lost when this process ends; name a folder",
        ),
        ([f"save_folder={'n' * 300}"], f"save_folder: {'n' * 300} cannot be written: File name too long"),
        (["load_path=dbfs:/x"], "load_path: dbfs:/x: is a URL that is not known"),
        (["load_path=memory://bucket/none"], "memory://bucket/none: no such folder"),
        (["train_loader.dataset.cache_dir=s3://x"], "train_loader.dataset.cache_dir: s3://x is a URL"),
        (["loggers.tensorboard.log_dir=s3://x"], "loggers.tensorboard.log_dir: s3://x is a URL"),
        (["save_folder=runs/{run_name}"], "save_folder: runs/{run_name} needs a run_name; write run_name=..."),
        (["save_folder=runs/{epoch}", "run_name=a"], "save_folder: runs/{epoch} has the placeholder {epoch}"),
        (["load_path=runs/{run_nam}", "run_name=a"], "load_path: runs/{run_nam} has the placeholder {run_nam}"),
        (["max_duration=1e99tok"], 'max_duration: "1e99tok" is not a valid duration; the most is 1e+18tok'),
        (["run_name=no"], "run_name: input should be a valid string, found False (yes, no, on and off without quotes"),
    ],
)
def test_paths_and_names_that_mean_something_else_are_refused(
    recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str
) -> None:
    monkeypatch.chdir(recipe.parent)
    monkeypatch.delenv("RUN_NAME", raising=False)
    assert train_main([str(recipe), *overrides]) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")
    assert [path.name for path in recipe.parent.iterdir()] == [recipe.name]


def test_run_name_is_filled_in_and_else_the_folders_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUN_NAME", raising=False)
    config = read_run_config(str(recipe), [f"save_folder={recipe.parent}/runs/{{run_name}}", "run_name=a"])
    assert config.save_folder == f"{recipe.parent}/runs/a"
    config = read_run_config(str(recipe), ["loggers.tensorboard.log_dir=tb/{run_name}", "load_path=x/{run_name}"])
    assert config.run_name == "run" and config.load_path == "x/run"
    assert dump(config)["loggers"]["tensorboard"]["log_dir"] == "tb/run"
    monkeypatch.setenv("RUN_NAME", "from-slurm")
    assert read_run_config(str(recipe), ["save_folder=runs/{run_name}"]).save_folder == "runs/from-slurm"


def test_dry_run_says_what_evaluation_costs(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = yaml.safe_load(recipe.read_text())["train_loader"]["dataset"]
    loader = f"eval_loader={{dataset: {dataset}}}"
    for options, says in (
        (["eval_interval=1dur", "max_duration=3072ba"], "at most 4,096 rows every 1dur: up to 10.0% of the time"),
        (["eval_interval=16ba", "eval_subset_num_batches=3", "max_duration=9e9tok"],
         "at most 48 rows every 16ba: up to 20.0% of the time"),
        (["eval_interval=1ep"], "at most 4,096 rows every 1ep\n"),
        (["eval_subset_num_batches=-1"], "all rows of eval_loader every 1ep; eval_subset_num_batches limits them"),
    ):  # fmt: skip
        assert train_main([str(recipe), "--dry-run", loader, *options]) == 0
        assert f"evaluation: {says}" in capsys.readouterr().out


def test_help_and_mistakes_of_form_are_answered_without_importing_torch(recipe: Path) -> None:
    script = (
        "import sys\nfrom llmfoundry.cli.train import train_main\n"
        "try: print(train_main(sys.argv[1:]))\nexcept SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    for options, code in ((["--help"], 0), (["nope.yaml"], 2), ([str(recipe), "seed"], 2), ([str(recipe), "a=01"], 2)):
        done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-2:] == [str(code), "[]"]
