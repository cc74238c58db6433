"""A run that trains adapters on another run's weights, stops, and goes on."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from test_run import metrics_of, recipe, weights_of  # noqa: F401

import llmfoundry.hf as hf
from llmfoundry.cli.convert import convert_main
from llmfoundry.cli.inference import generate_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError, check
from llmfoundry.dtensor import LocalShard
from llmfoundry.layers.lora import is_adapter
from llmfoundry.model import init
from llmfoundry.settings import load_yaml
from llmfoundry.train.config import RunConfig
from tests.train.test_finetuning_run import recipe as llama_recipe  # noqa: F401

LORA = ["model.lora.rank=2", "model.lora.alpha=8.0", "load_weights_only=true", "optimizer.lr=3.0e-2"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_begin_on_a_base_checkpoint_and_resume_bitwise(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    dropout: float,
) -> None:
    assert train_main([str(recipe)]) == 0
    base = tmp_path / "run"
    begin = [
        str(recipe),
        *LORA,
        f"model.lora.dropout={dropout}",
        f"load_path={base / 'checkpoints' / 'latest'}",
        "max_duration=12ba",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_main([*begin, f"save_folder={whole}"]) == 0
    lines = metrics_of(whole)
    assert lines[0]["loss/train/ce"] < metrics_of(base)[0]["loss/train/ce"]  # it did begin where the base had ended
    assert lines[-1]["loss/train/ce"] < lines[0]["loss/train/ce"]
    after = weights_of(whole)
    assert after and all(is_adapter(name) for name in after), "the base has the rest"
    assert any(value.abs().max() > 0 for name, value in after.items() if name.endswith("lora_B"))

    assert train_main([*begin, f"save_folder={parts}", "save_interval=5ba"]) == 0
    for later in (parts / "checkpoints").glob("step-1*"):  # as if it had been killed after step 5
        shutil.rmtree(later)
    (parts / "checkpoints" / "latest").unlink()
    (parts / "checkpoints" / "latest").symlink_to("step-5")
    assert train_main([*begin, f"save_folder={parts}", "save_interval=5ba", "autoresume=true"]) == 0
    assert all(torch.equal(after[name], value) for name, value in weights_of(parts).items())


def test_what_is_seldom_meant_of_adapters_is_said(
    recipe: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert train_main([str(recipe), "model.lora.rank=99", "model.lora.alpha=8.0", "max_duration=2ba"]) == 0
    assert "adapters would train on frozen random weights; set load_path to a base model" in caplog.text
    assert re.search(r"lora.rank=99 exceeds a side of blocks.0.attn.wqkv \(\d+ x \d+\)", caplog.text)


def test_blocks_that_are_loaded_are_not_drawn(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    draw = init.draw_weight

    def watched(shard: LocalShard, std: float, uniform: bool, seed: int, name: str, *rest: object) -> None:
        drawn.append(name)
        draw(shard, std, uniform, seed, name, *rest)

    monkeypatch.setattr(init, "draw_weight", watched)
    assert train_main([str(recipe), "max_duration=4ba"]) == 0
    assert any(name.startswith("blocks.") for name in drawn)
    drawn.clear()
    weights = f"load_path={tmp_path / 'run' / 'checkpoints' / 'latest'}"
    assert train_main([str(recipe), *LORA, weights, f"save_folder={tmp_path / 'next'}", "max_duration=4ba"]) == 0
    assert drawn and not [name for name in drawn if name.startswith("blocks.") and not is_adapter(name)]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "next").values())


QLORA = ["model.lora.rank=2", "model.lora.alpha=8.0", "model.lora.quantize=nf4", "parallel.recompute=full"]


def test_a_run_on_a_base_in_nf4_learns_and_resumes_bitwise(llama_recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    begin, whole, parts = [str(llama_recipe), *QLORA], tmp_path / "whole", tmp_path / "parts"
    assert train_main([*begin, f"save_folder={whole}"]) == 0
    lines, after = metrics_of(whole), weights_of(whole)
    assert lines[-1]["loss/train/ce"] < 0.95 * lines[0]["loss/train/ce"]
    assert after and all(is_adapter(name) for name in after)
    assert train_main([*begin, f"save_folder={parts}", "save_interval=5ba"]) == 0
    for later in (parts / "checkpoints").glob("step-[12]?"):
        shutil.rmtree(later)
    (parts / "checkpoints" / "latest").unlink()
    (parts / "checkpoints" / "latest").symlink_to("step-5")
    assert train_main([*begin, f"save_folder={parts}", "save_interval=5ba", "autoresume=true"]) == 0
    assert all(torch.equal(after[name], value) for name, value in weights_of(parts).items())

    assert convert_main(["to-hf", str(whole), str(tmp_path / "out")]) == 0  # the base in full, with the adapters added
    theirs, base = (hf.from_pretrained(path).model for path in (tmp_path / "out", llama_recipe.parent / "llama"))
    moved = [name for name, value in theirs.state_dict().items() if not torch.equal(value, base.state_dict()[name])]
    assert moved and all(name.startswith("blocks.") for name in moved)
    assert generate_main(["--checkpoint", str(whole), "--prompt", "a", "--max-new-tokens", "2"]) == 0  # in NF4


def test_a_base_of_ours_is_the_same_in_nf4_as_a_hugging_face_folder(llama_recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    ours = tmp_path / "ours"
    assert convert_main(["from-hf", str(llama_recipe.parent / "llama"), str(ours)]) == 0
    found = []
    for name, where in (("theirs", []), ("native", [f"load_path={ours}", "load_weights_only=true"])):
        run = [str(llama_recipe), *QLORA, f"save_folder={tmp_path / name}", "max_duration=4ba", *where]
        assert train_main(run) == 0
        found.append([line["loss/train/ce"] for line in metrics_of(tmp_path / name)])
    assert found[0] == found[1]
    resumed = [*run, "max_duration=6ba", "autoresume=true"]  # reads the base again
    assert train_main(resumed) == 0
    assert len(metrics_of(tmp_path / "native")) == 6


def test_what_nf4_cannot_do_is_refused_in_one_line(
    llama_recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_main([str(llama_recipe), *QLORA[:3]]) == 2
    assert "model.lora.quantize=nf4 needs parallel.recompute: full" in capsys.readouterr().err
    keys = load_yaml(llama_recipe) | {"load_path": None}
    keys["model"] = keys["model"] | {"lora": {"rank": 2, "alpha": 8.0, "quantize": "nf4"}}
    with pytest.raises(ConfigError, match="quantize=nf4 needs load_path, whose weights it quantises"):
        check(RunConfig, keys)
