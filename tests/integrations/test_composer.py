"""Under Composer's Trainer: our trainer's losses, on every way that it spreads a model; checkpoints; resume."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import llmfoundry.integrations.torchvision_operators  # noqa: F401  before composer

pytest.importorskip("composer", reason="Composer's environment: make setup-composer")

from composer.algorithms import EMA, SAM, SWA, LayerFreezing
from composer.callbacks import EarlyStopper, LRMonitor, NaNMonitor, OptimizerMonitor, SpeedMonitor
from composer.core import Algorithm
from composer_runs import STEPS, Watch, composer_parts, ours, run, run_config, trainer
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from llmfoundry.cli.convert import convert_main
from llmfoundry.config import ConfigError
from tests.pages import ROOT, blocks
from tests.shrunk import shrunk

TOLERANCE = 1e-5  # nats: float32 sums in another order
TWO_RANKS = ("ddp", "fsdp2", "fsdp2_resumed", "presharded", "presharded_resumed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to train and evaluate on, and conversations."""
    made = tmp_path_factory.mktemp("composer")
    words = "the cat sat on a mat while two dogs ran over green hills and far away".split()
    random = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (n,), generator=random).tolist())

    for name, count in (("texts", 40), ("held-out", 4)):
        (made / name).mkdir()
        for i in range(count):
            (made / name / f"{i}.txt").write_text(text(60))
    rows = [{"prompt": text(1 + i % 7), "response": text(3)} for i in range(120)]
    (made / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def on_two_ranks(folder: Path, way: str) -> dict[str, object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "NODE_RANK": "0", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = Path(__file__).with_name("composer_runs.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), way],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=600)
        assert rank.returncode == 0, output[-4000:]
    return json.loads((folder / f"{way}.json").read_text())


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint of ours has of the model."""
    files = sorted(checkpoint.glob("model-*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found
    return {name.removeprefix("model/"): value for name, value in found.items()}


def saved(folder: Path, way: str) -> Path:
    """The last checkpoint that Composer wrote."""
    found = sorted((folder / "theirs" / way).glob(f"ep*-ba{STEPS}*"))
    return found[0]


def close(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)  # Adam and clipping hide a wrong scale
    assert len(expected["losses"]) == STEPS  # type: ignore[arg-type]
    assert found["eval"] == pytest.approx(expected["eval"], abs=TOLERANCE)


@pytest.mark.parametrize("way", ["plain", "their_schedule", "microbatches", "masked", "resumed"])
def test_losses_are_those_of_our_trainer(way: str, folder: Path) -> None:
    close(run(folder, way), ours(folder, way))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("way", TWO_RANKS)
def test_losses_on_two_ranks_are_those_of_one(way: str, folder: Path) -> None:
    close(on_two_ranks(folder, way), ours(folder, way))


def test_their_checkpoint_becomes_ours(folder: Path, tmp_path: Path) -> None:
    made = composer_parts(run_config(folder, "plain"))
    running = trainer(made, "converted", folder, Watch())
    running.fit()
    running.close()
    assert convert_main(["from-composer", str(saved(folder, "converted")), str(tmp_path / "out")]) == 0
    trained = made.model.model.state_dict()
    again = run_config(folder, "plain", load_path=str(saved(folder, "converted")), load_weights_only=True)
    loaded = composer_parts(again).model.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in loaded.items())
    converted = weights(tmp_path / "out")
    assert trained.keys() == converted.keys()
    assert all(torch.equal(trained[name], value) for name, value in converted.items())
    assert any(name.endswith("expert_bias") and value.any() for name, value in converted.items())


def test_ours_becomes_theirs(folder: Path) -> None:
    expected = ours(folder, "given")
    checkpoint = folder / "ours" / "given"
    config = run_config(folder, "plain", load_path=str(checkpoint), load_weights_only=True)
    made = composer_parts(config)
    running = trainer(made, "given", folder, Watch())
    running.eval()
    assert float(running.state.eval_metrics["eval"]["LanguageCrossEntropy"].compute()) == pytest.approx(
        expected["eval"], abs=TOLERANCE
    )
    running.close()


def test_what_composer_cannot_do_is_refused(folder: Path) -> None:
    if not (folder / "ours" / "plain").exists():
        ours(folder, "plain")
    config = run_config(folder, "plain", load_path=str(folder / "ours" / "plain"))
    with pytest.raises(ConfigError, match="Composer cannot resume a run of this framework"):
        composer_parts(config)
    wider = config.model_copy(
        update={"load_weights_only": True, "model": config.model.model_copy(update={"norm_eps": 1e-3})}
    )
    with pytest.raises(ConfigError, match=r"model.norm_eps: is 0.001, but 1e-05"):
        composer_parts(wider)


def test_a_balance_that_their_loop_does_not_know_is_refused(folder: Path) -> None:
    config = run_config(folder, "plain", device_train_microbatch_size=2)
    with pytest.raises(ConfigError, match="does not know the load of the batch before the first backward"):
        composer_parts(config)


def test_a_mixture_of_datasets_is_refused(folder: Path) -> None:
    part = {"name": "text_files", "path": str(folder / "texts"), "label": "texts"}
    config = run_config(folder, "plain", train_loader={"datasets": [part, {**part, "label": "again"}]})
    with pytest.raises(ConfigError, match="mixtures are not read under Composer"):
        composer_parts(config)


def test_the_documented_example_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks(ROOT / "docs" / "composer.md", "python")
    (tmp_path / "yamls").mkdir()
    texts = {"name": "text_files", "path": str(folder / "texts"), "cache_dir": str(tmp_path / "cache")}
    small = {"train_loader.dataset": texts, "eval_loader.dataset": texts | {"path": str(folder / "held-out")}}
    config = shrunk(ROOT / "yamls" / "moe.yaml", small | {"device_train_microbatch_size": 4})
    OmegaConf.save(config, tmp_path / "yamls" / "moe.yaml")
    monkeypatch.chdir(tmp_path)
    exec(compile(example.text.replace("250ba", "2ba"), "composer.md", "exec"), {"__name__": "__main__"})
    assert list((tmp_path / "runs" / "theirs").iterdir())


def test_several_evaluations_have_their_labels(folder: Path) -> None:
    part = {"dataset": {"name": "text_files", "path": str(folder / "held-out")}}
    more = [{**part, "label": "one"}, {**part, "label": "two", "rows": 1}]
    made = composer_parts(run_config(folder, "plain", eval_loader=None, eval_loaders=more))
    running = trainer(made, "evaluated", folder, Watch())
    running.eval()
    running.close()
    losses = {
        label: float(metrics["LanguageCrossEntropy"].compute()) for label, metrics in running.state.eval_metrics.items()
    }
    assert losses.keys() == {"one", "two"} and losses["one"] != losses["two"]


CALLBACKS = [SpeedMonitor(), LRMonitor(), NaNMonitor(), OptimizerMonitor()]
CALLBACKS += [EarlyStopper("LanguageCrossEntropy", dataloader_label="eval", patience="9ba")]


@pytest.mark.parametrize("algorithm", [EMA(half_life="2ba"), SWA(swa_start="0.5dur"), SAM(), LayerFreezing()], ids=repr)
def test_their_callbacks_and_algorithms_run(algorithm: Algorithm, folder: Path) -> None:
    watch = Watch()
    made = composer_parts(run_config(folder, "plain"))
    made = made._replace(algorithms=[*made.algorithms, algorithm], callbacks=[*made.callbacks, *deepcopy(CALLBACKS)])
    running = trainer(made, type(algorithm).__name__, folder, watch)
    running.fit()
    running.close()
    assert watch.losses[-1] < watch.losses[0] - 0.2


def test_a_gradient_that_is_not_finite_changes_nothing(folder: Path) -> None:
    made = composer_parts(run_config(folder, "plain"))._replace(max_duration="1ba")
    before = {name: value.clone() for name, value in made.model.model.state_dict().items()}
    made.model.model.blocks[0].norm_1.weight.register_hook(lambda grad: grad * float("nan"))
    running = trainer(made, "broken", folder, Watch())
    running.fit()
    running.close()
    after = made.model.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("way", TWO_RANKS)
def test_checkpoints_of_two_ranks_become_ours(way: str, folder: Path, tmp_path: Path) -> None:
    if not (folder / f"{way}.json").exists():
        on_two_ranks(folder, way)
        ours(folder, way)
    assert saved(folder, way).is_dir() is way.startswith("fsdp2")  # a folder of both ranks' parts, or one file
    assert convert_main(["from-composer", str(saved(folder, way)), str(tmp_path / "out")]) == 0
    converted = weights(tmp_path / "out")
    trained = weights(next((folder / "ours" / way / "checkpoints").glob(f"step-*{STEPS}")))
    assert trained.keys() == converted.keys()
    for name, value in trained.items():
        torch.testing.assert_close(converted[name], value, atol=1e-4, rtol=1e-4)  # losses agree to 1e-5
