"""A whole run through the command line: outputs, resume, and the user's mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmfoundry.cli.inference import eval_main, generate_main
from llmfoundry.cli.train import train_main
from llmfoundry.train.watchdog import Watchdog
from tests import forks

ROOT = Path(__file__).resolve().parents[2]
# A run of the real thing, small: 4 rows of 32 tokens a step.
TINY = {
    "max_seq_len": 32,
    "model": {
        "name": "causal_lm",
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "vocab_size": 320,
        "max_seq_len": 32,
        "norm_type": "rmsnorm",
        "no_bias": True,
        "attn_config": {"attn_type": "multihead_attention", "rope": True},
        "ffn_config": {
            "ffn_type": "moe",
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_jitter_eps": 0.1,
        },
    },
    "tokenizer": {"name": "bpe", "vocab_size": 300},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "scheduler": {"name": "cosine_with_warmup", "t_warmup": "2ba"},
    "algorithms": {"gradient_clipping": {"clipping_threshold": 1.0}},
    "max_duration": "12ba",
    "eval_interval": "4ba",
    "save_interval": "3ba",
    "global_train_batch_size": 4,
    "device_train_microbatch_size": 3,
    "device_eval_batch_size": 4,
    "callbacks": {"speed_monitor": {}, "lr_monitor": {}, "expert_load": {}},
    "log_to_console": False,
}
TIMES = ("throughput/", "time/")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path) -> Path:
    """The YAML of a tiny run on text of its own; it saves to `folder/run`."""
    text = folder / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text("".join(f"{n} plus {i} is {n + i}.\n" for n in range(40)))
    dataset = {"name": "text_files", "path": str(text), "validation_fraction": 0.2, "cache_dir": str(folder / "c")}
    config = TINY | {
        "train_loader": {"dataset": dataset | {"split": "train"}},
        "eval_loader": {"dataset": dataset | {"split": "validation"}},
        "save_folder": str(folder / "run"),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def metrics_of(folder: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what is a time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "checkpoints" / "latest").glob("model-*.safetensors")
    return load_file(file)


def test_a_run_learns_and_leaves_its_outputs(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe), "max_duration=40ba"]) == 0
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["loss/train/ce"] < 0.6 * lines[0]["loss/train/ce"]
    assert lines[-1]["tokens"] == 40 * 4 * 32
    assert {"loss/train/total", "lr", "grad_norm", "moe/load", "moe/max_load", "moe/router_entropy"} <= lines[0].keys()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 40 and summary["validation/bits_per_byte"] < 4
    assert summary["validation/nats_per_token"] == lines[-1]["metrics/eval/LanguageCrossEntropy"]


def test_generate_and_eval_read_a_checkpoint(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe)]) == 0
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-12")
    capsys.readouterr()
    texts = []
    for _ in range(2):
        assert generate_main(["--checkpoint", checkpoint, "--prompt", "3 plus", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("3 plus") and len(texts[0]) > len("3 plus\n")
    assert eval_main(["--checkpoint", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"{summary['validation/nats_per_token']:.4f} nats per token" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_gpu_alone_trains_in_bf16_stops_goes_on_and_generates(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = [str(recipe), "scheduler.t_max=24ba"]
    assert train_main([*command, f"save_folder={whole}", "max_duration=24ba"]) == 0
    assert train_main([*command, "max_duration=12ba"]) == 0
    assert train_main([*command, "max_duration=24ba", "autoresume=true"]) == 0
    ours, theirs = (
        torch.tensor([line["loss/train/ce"] for line in metrics_of(folder)[-12:]]) for folder in (run, whole)
    )
    assert theirs[-1] < 0.8 * metrics_of(whole)[0]["loss/train/ce"]
    # Attention's backward adds up in no fixed order, and bf16 keeps 8 bits.
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0)
    capsys.readouterr()
    assert generate_main(["--checkpoint", str(run), "--prompt", "3 plus", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("3 plus")


def test_a_killed_run_continues_bitwise(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "run"
    assert train_main([str(recipe), f"save_folder={whole}"]) == 0
    script = "import sys; from llmfoundry.cli.train import train_main; sys.exit(train_main())"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    started = forks.start("-c", script, str(recipe), "max_duration=12ba", env=os.environ | threads)
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and started.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.002)
    started.kill()
    assert started.wait() == -signal.SIGKILL, "it was killed in the middle"
    with metrics.open("a") as file:
        file.write('{"step": 99, "torn')  # a line that the kill cut
    assert train_main([str(recipe), "autoresume=true"]) == 0
    assert metrics_of(killed) == metrics_of(whole)
    one, two = weights_of(killed), weights_of(whole)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("stop", "options"), [(3, []), (4, ["save_async=true"]), (11, [])])
def test_a_stopped_run_continues_bitwise(
    recipe: Path, tmp_path: Path, stop: int, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    assert train_main([str(recipe), f"save_folder={whole}"]) == 0
    from llmfoundry.train import trainer

    real = trainer.train_step
    calls = iter(range(1, 100))

    def step_then_signal(*args, **kwargs):
        if next(calls) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step_then_signal)
        assert train_main([str(recipe), *options]) == 0, "a requested stop is a success"
    assert len(metrics_of(tmp_path / "run")) == stop
    assert train_main([str(recipe), "autoresume=true", *options]) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights_of(tmp_path / "run").values(), weights_of(whole).values(), strict=True)
    )


class Halt:
    """Sends SIGTERM before the second batch of an evaluation, and counts the batches that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, evaluation: int) -> None:
        from llmfoundry.data.loader import Loader

        self.read: list[int] = []  # batches of each evaluation
        real = Loader.one_pass

        def one_pass(loader, *args, **limit):
            self.read.append(0)
            for batch in real(loader, *args, **limit):
                self.read[-1] += 1
                if len(self.read) == evaluation and self.read[-1] == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        monkeypatch.setattr(Loader, "one_pass", one_pass)


def test_a_signal_ends_an_evaluation_within_a_batch(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train_main([str(recipe), f"save_folder={whole}"]) == 0
    with monkeypatch.context() as patch:
        halt = Halt(patch, evaluation=2)
        assert train_main([str(recipe)]) == 0
        assert halt.read[0] > 4 and halt.read[1:] == [2]
    lines = metrics_of(run)
    assert [line["step"] for line in lines if "metrics/eval/LanguageCrossEntropy" in line] == [4]
    assert len(lines) == 8 and (run / "checkpoints" / "step-8").is_dir()
    assert "validation/nats_per_token" not in json.loads((run / "summary.json").read_text())
    beat, begun = Watchdog.beat, []

    def noted(self: Watchdog, doing: str, in_step: bool = False) -> None:
        if doing.startswith("step "):
            begun.append(in_step)
        beat(self, doing, in_step)

    monkeypatch.setattr(Watchdog, "beat", noted)
    for _ in range(2):  # the second time, as if killed before its next checkpoint
        begun.clear()
        shutil.rmtree(run / "checkpoints" / "step-12", ignore_errors=True)
        assert train_main([str(recipe), "autoresume=true", "save_interval=0ba"]) == 0
        assert metrics_of(run) == metrics_of(whole), "the evaluation is made up for"
        assert begun == [False, True, True, True], "the first step may compile, also after an evaluation that was due"


def test_a_last_evaluation_that_was_cut_short_is_made_up_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_main([str(recipe), f"save_folder={tmp_path / 'whole'}"]) == 0
    for evaluation in (3, 1):  # of a process: in the last step of the run, and again
        with monkeypatch.context() as patch:
            halt = Halt(patch, evaluation)
            assert train_main([str(recipe), "autoresume=true"]) == 0
            assert halt.read[-1] == 2
    assert train_main([str(recipe), "autoresume=true"]) == 0
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    assert one["steps"] == 12 and one["validation/nats_per_token"] == two["validation/nats_per_token"]
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_a_summary_of_fewer_steps_is_of_no_complete_run(recipe: Path, tmp_path: Path) -> None:
    for steps in (4, 8):
        assert train_main([str(recipe), f"max_duration={steps}ba", "autoresume=true"]) == 0
    file = tmp_path / "run" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 4}))  # killed after its last checkpoint
    assert train_main([str(recipe), "max_duration=8ba", "autoresume=true"]) == 0
    assert json.loads(file.read_text())["steps"] == 8


def test_a_signal_ends_the_evaluation_before_the_first_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt = Halt(monkeypatch, evaluation=1)
    assert train_main([str(recipe), "eval_first=true"]) == 0
    assert halt.read == [2] and (tmp_path / "run" / "checkpoints" / "step-1").is_dir()


def test_the_evaluation_before_the_first_step_is_recorded(recipe: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time it is taken up without a checkpoint
        assert train_main([str(recipe), "eval_first=true", "max_duration=2ba", "autoresume=true"]) == 0
        first, *steps = metrics_of(tmp_path / "run")
        assert first["step"] == 0 and first["metrics/eval/LanguageCrossEntropy"] > 5
        assert [line["step"] for line in steps] == [1, 2]
        shutil.rmtree(tmp_path / "run" / "checkpoints")


def test_a_run_whose_every_step_has_learning_rate_0_says_so(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = "the learning rate is 0 in every step of this run, so it trains nothing"
    assert train_main([str(recipe), "max_duration=1ba", "scheduler.t_warmup=0.1dur"]) == 0
    assert said in caplog.text and "rows of an epoch" not in caplog.text
    caplog.clear()
    assert train_main([str(recipe), "max_duration=2ba", "autoresume=true"]) == 0
    assert said not in caplog.text


def test_a_batch_of_more_than_an_epoch_is_said(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    (recipe.parent / "few.txt").write_text("a few words " * 20)
    few = f"train_loader.dataset={{name: text_files, path: {recipe.parent / 'few.txt'}}}"
    more = ["~eval_loader", "eval_interval=0", "global_train_batch_size=64", "scheduler.t_warmup=0ba"]
    assert train_main([str(recipe), "max_duration=1ba", few, *more]) == 0
    assert re.search(r"global_train_batch_size=64 exceeds the \d+ rows of an epoch", caplog.text)


def test_a_run_that_would_take_no_step_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([str(recipe), "max_duration=4ba"]) == 0
    other = [str(recipe), f"load_path={tmp_path / 'run'}", f"save_folder={tmp_path / 'other'}", "max_duration=3ba"]
    assert train_main(other) == 2
    assert "is at step 4, and max_duration=3ba ends at step 3; raise it" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_gradient_that_stays_infinite_ends_the_run_with_advice(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["max_skipped_steps=2", "optimizer.lr=1.0e30", "algorithms.gradient_clipping=null"]
    assert train_main([str(recipe), *options, "scheduler.t_warmup=0ba", "save_interval=0ba"]) == 1
    assert "3 of 4 steps were skipped, more than max_skipped_share=0.1 of all: lower optimizer.lr, clip gradients" in (
        capsys.readouterr().err
    )


def test_microbatches_are_invisible(recipe: Path, tmp_path: Path) -> None:
    balance = "model.ffn_config.moe_lbl_scope=global_batch"
    runs = []
    for rows in (1, 2, 3, 4):
        folder = tmp_path / f"micro{rows}"
        options = [f"device_train_microbatch_size={rows}", f"save_folder={folder}", "max_duration=3ba", balance]
        assert train_main([str(recipe), *options]) == 0
        runs.append([line["loss/train/total"] for line in metrics_of(folder)])
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-5)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.ffn_config.moe_topk=2", "model.ffn_config.moe_topk: unknown key (did you mean 'moe_top_k'?)"),
        ("model.d_model=wide", "model.d_model: input should be a valid integer, found 'wide'"),
        ("max_duration=ten", 'max_duration: "ten" is not a valid duration; write e.g. 10ba, 1ep, 5e6tok, 0.1dur'),
        ("model.ffn_config.moe_top_k=9", "moe_top_k=9"),
        ("model.n_heads=5", "d_model=32"),
        ("train_loader.dataset.path=/nowhere/at/all", "/nowhere/at/all"),
        ("save_folder=/proc/nowhere", "save_folder: /proc/nowhere cannot be written"),
        ("scheduler.name=cosin_with_warmup", "unknown name 'cosin_with_warmup' (did you mean 'cosine_with_warmup'?)"),
        ("model.attn_config.attn_impl=flex", "attn_impl=flex needs a CUDA device"),
        ("train_loader.dataset.max_seq_len=64", "dataset.max_seq_len=64 exceeds model.max_seq_len=32"),
        ("save_folder=/proc/version", "save_folder: /proc/version is a file"),
        ("callbacks.speed_monitor=1", "callbacks: speed_monitor: must be a mapping of settings, found 1"),
        ("precision=amp_bf16", "precision: amp_bf16 needs a GPU"),
        ("precision=amp_fp8", "precision: amp_fp8 needs a GPU and there is none; write precision=fp32"),
        ("load_path=/nowhere", "/nowhere"),
        ("load_path=''", "load_path: is empty; write a checkpoint's folder, hf:NAME or a URL, or leave it out"),
        ("tokenizer.name=", "found None (an empty value in YAML; write one, or remove the key)"),
        ("max_duration=", "max_duration: an empty value is not a valid duration; write e.g. 10ba"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, says: str
) -> None:
    before = snapshot(tmp_path)
    assert train_main([str(recipe), override]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and says in message
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if not k.startswith("c/")} == before


def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it can")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert train_main([str(recipe), "model.ffn_config.moe_impl=triton"]) == 2
    assert "model.ffn_config.moe_impl=triton: the Triton kernels need" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_text_file_that_is_not_utf8_is_named(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text" / "7.txt").write_bytes(b"caf\xe9")
    assert train_main([str(recipe)]) == 2
    assert "7.txt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_neither_overwritten_nor_resumed_unasked(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train_main([str(recipe), "max_duration=2ba", "scheduler.t_warmup=1ba"]) == 0
    before = snapshot(tmp_path / "run")
    assert train_main([str(recipe)]) == 2
    assert "already used" in capsys.readouterr().err
    assert train_main([str(recipe), "autoresume=true", "model.n_layers=1"]) == 2
    said = capsys.readouterr().err
    assert "model.n_layers: 1 differs from 2" in said and "restore the old value" in said
    assert "with another model.n_layers the weights do not fit, so load_allow does not help" in said
    assert snapshot(tmp_path / "run") == before


def test_a_run_is_not_continued_on_other_data(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(recipe), "max_duration=2ba"]) == 0
    for file in (tmp_path / "text").iterdir():
        file.write_text(file.read_text() + "one more line\n")
    before = snapshot(tmp_path / "run")
    for options in (["autoresume=true", "max_duration=4ba"], [f"load_path={tmp_path / 'run'}", "save_folder=other"]):
        assert train_main([str(recipe), *options]) == 2
        assert "other data or with another tokenizer" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before


def test_a_complete_run_is_left_as_it_is(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train_main([str(recipe), "max_duration=2ba"]) == 0
    before = snapshot(tmp_path / "run")
    caplog.set_level("INFO")
    assert train_main([str(recipe), "max_duration=2ba", "autoresume=true", "optimizer.lr=0.5"]) == 0
    assert "already complete at step 2" in caplog.text
    assert snapshot(tmp_path / "run") == before


def test_the_seconds_of_a_run_are_those_of_all_its_processes(recipe: Path, tmp_path: Path) -> None:
    seconds = []
    for steps in (2, 4):
        assert train_main([str(recipe), f"max_duration={steps}ba", "autoresume=true"]) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        seconds.append(summary["seconds"])
        assert summary["tokens_per_sec"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert seconds[1] > seconds[0] > 0


def test_a_folder_whose_run_ended_before_its_first_step_is_free(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert train_main([str(recipe), "max_duration=2ba"]) == 0


def test_a_folder_of_the_users_own_is_not(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: true\n")
    assert train_main([str(recipe)]) == 2
    assert "already used" in capsys.readouterr().err


def test_a_damaged_line_of_metrics_is_named(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(recipe), "max_duration=2ba"]) == 0
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("\0\0\0\n")
    assert train_main([str(recipe), "max_duration=4ba", "autoresume=true"]) == 2
    assert "line 3 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["autoresume=true", "load_path"])
def test_resuming_reads_every_file_once_to_check_it(
    recipe: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmfoundry.checkpoint import manifest

    assert train_main([str(recipe), "max_duration=2ba"]) == 0
    read, real = [], manifest.measure

    def counted(file: Path, sync: bool = False) -> manifest.Written:
        read.append(file.name)
        return real(file, sync)

    monkeypatch.setattr(manifest, "measure", counted)
    other = [f"load_path={tmp_path / 'run'}", f"save_folder={tmp_path / 'other'}"]
    assert train_main([str(recipe), "max_duration=3ba", *([by] if by != "load_path" else other)]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    assert sorted(read) == sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json")


def test_eval_sees_documents_as_training_does(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(recipe), "max_duration=2ba", "model.attn_config.attn_uses_sequence_id=true"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert eval_main(["--checkpoint", str(tmp_path / "run")]) == 0
    assert f"{summary['validation/nats_per_token']:.4f} nats per token" in capsys.readouterr().out


def test_eval_takes_or_refuses_every_override(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([str(recipe), "max_duration=2ba"]) == 0
    found = []
    for override in ("model.ffn_config.moe_impl=grouped_mm", "model.ffn_config.moe_top_k=1"):
        capsys.readouterr()
        assert eval_main(["--checkpoint", str(tmp_path / "run"), override]) == 0
        found.append(float(capsys.readouterr().out.split()[0]))
    own = json.loads((tmp_path / "run" / "summary.json").read_text())["validation/nats_per_token"]
    assert found[0] == pytest.approx(own, abs=1e-4) and abs(found[1] - own) > 1e-3
    for override, says in {
        "model.n_layers=3": "it is of another model: it has no blocks.2",
        "model.ffn_config.moe_topk=1": "model.ffn_config.moe_topk: unknown key (did you mean 'moe_top_k'?)",
        "tokenizer.vocab_size=310": "tokenizer.vocab_size=310: cannot be changed here",
        "train_loader.dataset.path=/x": "train_loader.dataset.path=/x: cannot be changed here",
        "eval_loadr.dataset.path=/x": "eval_loadr: unknown key (did you mean 'eval_loader'?)",
    }.items():
        assert eval_main(["--checkpoint", str(tmp_path / "run"), override]) == 2, override
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and says in line


def test_a_checkpoint_of_another_machines_backend_is_used_on_ours(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it has all backends")
    # One row of one step, and no sample of text for the report: the interpreter takes a second for a kernel.
    short = ["max_duration=1ba", "scheduler.t_warmup=0ba", "eval_interval=0ba", "callbacks.report.enabled=false",
             "global_train_batch_size=1", "device_train_microbatch_size=1", "model.n_layers=1"]  # fmt: skip
    assert train_main([str(recipe), *short, "model.ffn_config.moe_impl=triton"]) == 0
    monkeypatch.delenv("TRITON_INTERPRET")
    options = ["--checkpoint", str(tmp_path / "run"), "--max-new-tokens", "2"]
    assert generate_main(options) == 2
    assert "use moe_impl=auto" in capsys.readouterr().err
    assert generate_main([*options, "model.ffn_config.moe_impl=auto"]) == 0


def test_a_signal_between_looking_and_saving_loses_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmfoundry import runtime

    looks, real = iter(range(1, 100)), runtime.most_of_ranks

    def look_then_signal(values: list[float]) -> list[float]:
        found = real(values)
        if len(values) == 2 and next(looks) == 4:  # whether to stop, and the time
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(runtime, "most_of_ranks", look_then_signal)
    assert train_main([str(recipe), "eval_interval=0ba"]) == 0
    assert len(metrics_of(tmp_path / "run")) == 5
    assert (tmp_path / "run" / "checkpoints" / "step-5").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_every_stopping_signal_saves_also_if_it_comes_twice_in_a_row(
    recipe: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmfoundry.train import trainer

    real, calls = trainer.train_step, iter(range(1, 100))

    def step_then_signals(*args, **kwargs):
        if next(calls) == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step_then_signals)
    assert train_main([str(recipe), "eval_interval=0ba"]) == 0
    assert len(metrics_of(tmp_path / "run")) == 3 and (tmp_path / "run" / "checkpoints" / "step-3").is_dir()


def test_a_second_signal_quits_at_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmfoundry import stopping
    from llmfoundry.train import trainer

    real, calls = trainer.train_step, iter(range(1, 100))

    def step_then_signals(*args, **kwargs):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(stopping, "SAME_REQUEST", 0.0)  # as if a second had passed
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step_then_signals)
    assert train_main([str(recipe), "eval_interval=0ba"]) == 128 + signal.SIGTERM
    assert len(metrics_of(tmp_path / "run")) == 2 and not (tmp_path / "run" / "checkpoints" / "step-3").exists()


def test_a_plug_in_is_there_when_its_checkpoint_is_opened(recipe: Path, tmp_path: Path) -> None:
    plug_in = tmp_path / "my_block.py"
    plug_in.write_text(
        "from llmfoundry.layers.ffn import GLUConfig\n\nclass MyConfig(GLUConfig, names=('my_block',)):\n    pass\n"
    )
    data = yaml.safe_load(recipe.read_text())
    data["model"]["ffn_config"] = {"ffn_type": "my_block", "ffn_hidden_size": 32, "ffn_act_fn": {"name": "silu"}}
    recipe.write_text(yaml.safe_dump(data | {"code_paths": [str(plug_in)]}))
    assert train_main([str(recipe), "max_duration=2ba"]) == 0
    script = "import sys; from llmfoundry.cli.inference import generate_main; sys.exit(generate_main())"
    command = ["-c", script, "--checkpoint", str(tmp_path / "run"), "--max-new-tokens", "2"]
    assert forks.run(*command).returncode == 2  # the code of a checkpoint is not run unasked
    assert forks.run(*command, "--allow-code").returncode == 0


def test_a_damaged_checkpoint_is_refused_by_name(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "max_duration=2ba", "scheduler.t_warmup=1ba"]) == 0
    (file,) = (tmp_path / "run" / "checkpoints" / "step-2").glob("model-*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    other = [str(recipe), f"load_path={tmp_path / 'run'}", f"save_folder={tmp_path / 'other'}"]
    assert train_main(other) == 2
    assert file.name in capsys.readouterr().err
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.parametrize("text", ["- a list\n", "", "model: [1,", "just words"])
def test_a_file_that_is_no_recipe_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    path = tmp_path / "no.yaml"
    path.write_text(text)
    assert train_main([str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_dry_run_trains_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = snapshot(tmp_path)
    assert train_main([str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters: " in out and "active parameters: " in out and "FLOPs per token" in out
    assert snapshot(tmp_path) == before
