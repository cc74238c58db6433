"""`eval.py` by tasks: checkpoints of ours and of Hugging Face's, and LLM Foundry's YAMLs of models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.inference import eval_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import dump
from llmfoundry.hf.pretrained import save_pretrained
from tests.eval import tasks as small
from tests.test_cli import recipe  # noqa: F401  a fixture

CHOICE = "metrics/choice/0-shot/InContextLearningMultipleChoiceAccuracy"
BENCHMARK = {"name": "choice", "num_fewshot": 0, "random_baseline": 0.25}
GAUNTLET = {"categories": [{"name": "all", "benchmarks": [BENCHMARK]}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks, a gauntlet and a model in the Hugging Face format."""
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": small.write_tasks(tmp_path)}))
    (tmp_path / "gauntlet.yaml").write_text(yaml.safe_dump({"eval_gauntlet": GAUNTLET}))
    tokenizer = small.tokenizer()
    save_pretrained(small.model(len(tokenizer)), tokenizer, tmp_path / "hf")
    return tmp_path


def test_a_checkpoint_is_evaluated_by_a_file_of_tasks(
    recipe: Path,  # noqa: F811
    folder: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    assert train_main([str(recipe)]) == 0
    run, tasks, scores = str(folder / "run"), str(folder / "tasks.yaml"), folder / "scores.json"
    capsys.readouterr()
    command = ["--checkpoint", run, "--icl-tasks", tasks, "--gauntlet", str(folder / "gauntlet.yaml")]
    assert eval_main([*command, "--output", str(scores), "icl_seq_len=32", "device_eval_batch_size=8"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(scores.read_text())[run]
    score = found["metrics"][CHOICE]
    value, error = score["value"], score["stderr"]
    assert score["n"] == 23 and error == pytest.approx((value * (1 - value) / 22) ** 0.5)
    assert "| choice/0-shot " in printed and f"| {value:.4f} | {error:.4f} | 23 " in printed
    assert found["gauntlet"]["icl/metrics/eval_gauntlet/all"] == pytest.approx((value - 0.25) / 0.75)
    assert "| default_average " in printed
    # The tasks of the run itself, beside its texts.
    few = [f"icl_tasks={tasks}", "icl_seq_len=32", "icl_subset_num_batches=1"]
    assert eval_main(["--checkpoint", run, *few]) == 0
    assert "| words/4-shot/the " in capsys.readouterr().out


def test_a_yaml_of_llm_foundry_lists_models(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    theirs = f"hf:{folder / 'hf'}"  # a whole path is none of a store
    assert eval_main(["--checkpoint", theirs, "--icl-tasks", "tasks.yaml", "--output", "alone.json"]) == 0
    config = {
        "variables": {"name": "hf", "max_seq_len": 1024},
        "precision": "fp32",
        "max_seq_len": "${variables.max_seq_len}",
        "models": [
            {
                "model_name": "${variables.name}",
                "model": {
                    "name": "hf_causal_lm", "pretrained_model_name_or_path": "${variables.name}",
                    "init_device": "mixed", "pretrained": True,
                },
                "tokenizer": {"name": "./hf", "kwargs": {"model_max_length": "${variables.max_seq_len}"}},
            },
            {
                "model_name": "by its config",
                "model": dump(small.model(len(small.tokenizer())).config) | {"name": "mpt_causal_lm"},
                "load_path": "hf:hf",
            },
        ],
        "device_eval_batch_size": 4,
        "metadata": {"team": "nlp"},
        "fsdp_config": {"sharding_strategy": "FULL_SHARD", "mixed_precision": "FULL"},
        "icl_tasks": "tasks.yaml",
        "eval_gauntlet": "gauntlet.yaml",
    }  # fmt: skip
    # A checkpoint of Composer's, under the name that a run of theirs gives it.
    weights = {f"model.{name}": value for name, value in small.model(len(small.tokenizer())).state_dict().items()}
    torch.save({"state": {"model": weights}}, "latest-rank0.pt")
    composer = {"model_name": "composer", "load_path": "latest-rank{rank}.pt", "tokenizer": {"name": "./hf"}}
    config["models"].append({"model": config["models"][1]["model"], **composer})
    Path("eval.yaml").write_text(yaml.safe_dump(config))
    assert eval_main(["eval.yaml", "--output", "listed.json"]) == 0
    alone, listed = (json.loads(Path(f"{name}.json").read_text()) for name in ("alone", "listed"))
    assert listed.keys() == {"hf", "by its config", "composer"}
    for found in listed.values():
        assert {key: score["value"] for key, score in found["metrics"].items()} == pytest.approx(
            {key: score["value"] for key, score in alone[theirs]["metrics"].items()}
        )
        assert "icl/metrics/eval_gauntlet/default_average" in found["gauntlet"]
    capsys.readouterr()
    for override, says in (
        ("models.0.model.pretrained=false", "models.0.model.pretrained: false gives random weights"),
        ("models.0.model.load_in_8bit=true", "models.0.model.load_in_8bit: is not supported; weights"),
        ("models.1.model_name=hf", "models: two are called 'hf', and results are listed by model_name"),
        ("models.1.load_path=null", "models.1: load_path: is missing"),
        ("models.1.model.d_modell=3", "models.1.model.d_modell: unknown key (did you mean 'd_model'?)"),
        ("models.1.model.d_model=64", "model.d_model: is 64, but 32 in hf"),
        ("models.2.tokenizer=null", "is a Composer checkpoint; name its tokenizer"),
        ("precision=fp16", "precision: input should be 'fp32', 'amp_bf16' or 'amp_fp8' or 'auto', found 'fp16'"),
    ):
        assert eval_main(["eval.yaml", override]) == 2
        assert says in capsys.readouterr().err


PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()


def _blocks(kind: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.M | re.S)
    return [text for found, text in fences if found == kind]


def test_what_the_page_says_runs(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Every file and every command of docs/evaluation.md, but lm-evaluation-harness's."""
    monkeypatch.chdir(tmp_path)
    tasks, gauntlet, training, models = _blocks("yaml")
    capitals = next(block for block in _blocks("json") if block.startswith("{"))
    files = {"capitals.jsonl": capitals, "tasks.yaml": tasks, "gauntlet.yaml": gauntlet, "models.yaml": models}
    for name, text in files.items():
        Path(name).write_text(text)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("some words of a text " * 40)
    config = yaml.safe_load(recipe.read_text()) | yaml.safe_load(training) | {"save_folder": "runs/moe"}
    config["eval_loader"] = {"dataset": config["train_loader"]["dataset"] | {"split": "validation"}}
    config["model"] |= {"norm_type": "rmsnorm", "no_bias": True, "attn_config": {"rope": True}, "max_seq_len": 2048}
    config["model"] |= {"ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}}}
    recipe.write_text(yaml.safe_dump(config))
    assert train_main([str(recipe)]) == 0
    assert convert_main(["to-hf", "runs/moe", "out/moe"]) == 0
    listed = [line for block in _blocks("bash") for line in re.findall(
        r"^python scripts/eval.py (.*)$", block.replace("\\\n", " "), flags=re.M)]  # fmt: skip
    commands = [shlex.split(line, comments=True) for line in listed if "--tasks" not in line]
    assert len(commands) == 6
    for command in commands:
        capsys.readouterr()
        assert eval_main(command) == 0, command
        printed = capsys.readouterr().out
        assert "| capitals/2-shot |" in printed or "nats per token" in printed


def test_the_loss_on_texts_is_told_by_position(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    assert train_main([str(recipe)]) == 0
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some words of a text " * 40)
    dataset = ["eval_loader.dataset.name=text_files", f"eval_loader.dataset.path={texts}",
               "eval_loader.dataset.validation_fraction=0"]  # fmt: skip
    capsys.readouterr()
    command = ["--checkpoint", str(tmp_path / "run"), "--by-position", "3", "--output", str(tmp_path / "out.json")]
    assert eval_main([*command, *dataset]) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text()).values()
    whole, *parts = (score for name, score in found["metrics"].items() if "bits" not in name)
    assert [name for name in found["metrics"] if "tokens" in name] == [
        f"metrics/eval/tokens {places}" for places in ("1 to 10", "11 to 21", "22 to 32")
    ]
    assert sum(part["n"] for part in parts) == whole["n"]
    mean = sum(part["value"] * part["n"] for part in parts) / whole["n"]
    assert mean == pytest.approx(whole["value"], rel=1e-5)
    assert f"tokens 11 to 21: {parts[1]['value']:.4f} nats per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gauntlet", "g.yaml"], "--gauntlet g.yaml: is for --icl-tasks FILE"),
        (["--icl-tasks", "t.yaml", "--tasks", "piqa"], "--icl-tasks and --tasks: choose one"),
        (["--limit", "3"], "--limit 3: is for --tasks NAMES"),
        (["--tasks", "piqa", "--include-path", "no/where"], "--include-path no/where: no such folder"),
        (["--icl-tasks", "no.yaml"], "icl_tasks: no.yaml: no such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert eval_main(["--checkpoint", "hf:x", *options]) == 2
    assert says in capsys.readouterr().err
