# ruff: noqa: F811  (the fixture `recipe`)
"""`report.html`: what is computed for it, what it says in words, and that a browser draws it."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llmfoundry.callbacks.report import Report
from llmfoundry.cli.report import report_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import is_url
from llmfoundry.data.remote import put_folder
from llmfoundry.data.tokenizer import END_OF_TEXT, train_bpe
from llmfoundry.report.alarms import alarms
from llmfoundry.report.experts import KINDS, churn, coactivation, fingerprints, kind, tokens_of_experts
from llmfoundry.report.page import write_report
from llmfoundry.report.records import PANELS, heat, read_run
from llmfoundry.train.callback import Metrics, Run
from tests.reads import CountsReads
from tests.test_cli import recipe  # noqa: F401  a fixture

CHROMIUM = shutil.which("chromium")


def draw(page: Path, profile: Path) -> str:
    """The document after its scripts have run; fails on a script's error."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1400,2800",
               f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom"]  # fmt: skip
    ran = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert ":CONSOLE" not in ran.stderr, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-drawn="true"' in ran.stdout, "the script did not reach its end"
    return ran.stdout


def panels(document: str) -> set[str]:
    """Ids of the panels in which something is drawn."""
    return {m[1] for m in re.finditer(r'<div id="([\w-]+)" class="panel[^"]*js-plotly-plot"', document)}


CURVES = {f"curve-{i}" for i in range(len(PANELS))}
SHOWN = (
    "loss",
    "learning rate",
    "gradient norm",
    "speed",
    "mfu",
    "memory",
    "step time",
    "balance loss",
    "load",
    "router entropy",
)
EXPERT_PANELS = {"load", "entropy", "dead", "confidence", "churn", "pairs", "kinds"}
ALL_PANELS = EXPERT_PANELS | {"bias", "drift", "sources"}  # of a run with loss-free balance on a mixture of sources


def test_churn_counts_tokens_whose_set_of_experts_changed() -> None:
    before = torch.tensor([[[0, 1], [2, 3], [1, 0], [0, 2]]])
    now = torch.tensor([[[1, 0], [2, 1], [1, 0], [3, 1]]])  # the first only in another order
    assert churn(fingerprints(before, 4), fingerprints(now, 4)) == [0.5]


def test_every_set_of_experts_has_a_fingerprint_of_its_own() -> None:
    sets = torch.combinations(torch.arange(64), 3).unsqueeze(0)  # (1, 41664, 3)
    assert len(fingerprints(sets, 64).unique()) == sets.shape[1]
    assert torch.equal(fingerprints(sets, 64), fingerprints(sets.flip(-1), 64))


def test_coactivation_is_one_for_independent_choices() -> None:
    every_pair = torch.tensor([[a, b] for a in range(4) for b in range(4) if a != b])
    ratio = coactivation(every_pair, 4)
    # Each expert takes half of the tokens; a pair meets in 2 of 12, where chance would give 3.
    assert ratio[0, 1] == pytest.approx(2 / 3) and ratio[0, 0] == 0
    always = coactivation(torch.tensor([[0, 1]] * 5 + [[2, 3]] * 5), 5)
    assert always[0, 1] == pytest.approx(2) and always[0, 2] == 0 and always[4].tolist() == [0] * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" the", "word"), ("ing", "word part"), ("42", "number"), ("3.14", "number"), ("();", "punctuation"),
     ("\n\t", "space"), ("x86", "other"), ("...", "punctuation"), (" naïve", "word")],
)  # fmt: skip
def test_kinds_of_tokens(text: str, expected: str) -> None:
    assert kind(text) == expected and expected in KINDS


def test_typical_tokens_of_an_expert_come_first() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a b c d e f"] * 9, 270), eos_token=END_OF_TEXT)
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    tokens = torch.tensor([a] * 6 + [b] * 6 + [c] * 6)
    experts = torch.tensor([[0]] * 6 + [[1]] * 6 + [[0], [1]] * 3)
    first, second = tokens_of_experts(experts, tokens, 2, tokenizer)
    assert first.tokens == ["a"] and second.tokens == ["b"], "c is typical of neither"
    assert first.kinds[KINDS.index("word part")] == 1.0


def run_of(
    folder: Path,
    steps: int,
    layers: int,
    experts: int,
    dead: tuple[int, ...] = (),
    bias: float = 0.1,
    churn: float = 0.1,
) -> Path:
    """Files as a run leaves them, with made-up numbers; the highest bias is `bias`."""
    folder.mkdir(parents=True)
    draw_from = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "tokens": 100 * step, "skipped_steps": 0, "lr": 1e-3, "grad_norm": 1.0,
                    "loss/train/ce": 3 + 5 / step, "moe/max_load": 1.5, "moe/min_load": 0.5,
                    "throughput/tokens_per_sec": 1e5, "time/step_seconds": 0.1, "moe/router_entropy": 1.0,
                    "throughput/device/mfu": 0.4, "memory/peak_allocated_mem": 60.0,
                    "moe/load_balance_loss": 1.1}  # fmt: skip
            if step % 100 == 0:
                line["metrics/eval/LanguageCrossEntropy"] = 3.2
            file.write(json.dumps(line) + "\n")
    with (folder / "experts.jsonl").open("w") as file:
        for step in range(steps // 400 or 1, steps + 1, steps // 400 or 1):
            load = [[0.0 if e in dead else draw_from.random() for e in range(experts)] for _ in range(layers)]
            load = [[share / sum(layer) for share in layer] for layer in load]
            line = {"step": step, "load": load, "entropy": [1.0] * layers, "confidence": [0.3] * layers,
                    "churn": [churn] * layers, "layers": list(range(layers)),
                    "bias": [[bias] + [round(draw_from.uniform(-0.1, 0.1), 6) for _ in range(experts - 1)]] * layers,
                    }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    of_layer = {"pairs": [[1.0] * experts] * experts, "tokens": [[" the", "</script>"] * 10] * experts,
                "kinds": [[0.2] * len(KINDS)] * experts, "sources": [[0.987, 1.013, 1.0]] * experts}  # fmt: skip
    probe = {"step": steps, "sources": ["code", "prose", "maths"], "layers": [of_layer] * layers}
    (folder / "experts.json").write_text(json.dumps(probe))
    return folder


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 10,000 steps of 16 layers with 64 experts each."""
    folder = tmp_path_factory.mktemp("long")
    return write_report([run_of(folder / "run", 10_000, 16, 64)], folder / "report.html")


def test_a_long_run_of_a_large_model_is_a_small_page_with_all_its_data(long_run: Path) -> None:
    page = long_run.read_text(encoding="utf-8")
    assert long_run.stat().st_size < 3_000_000
    assert tuple(title.lower() for title, _, _ in PANELS) == SHOWN
    assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)=", page), (
        "the page loads nothing from elsewhere"
    )
    run = read_run(long_run.parent / "run")
    missing = [title for title, _, names in PANELS if not any(name in run["curves"] for name in names)]
    assert not missing
    assert {"load", "entropy", "bias", "confidence", "churn"} <= {key for key, value in run["experts"].items() if value}
    assert {"pairs", "tokens", "kinds", "sources"} <= set(run["probe"]["layers"][15])
    assert all(len(tokens) == 20 for tokens in run["probe"]["layers"][15]["tokens"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_every_panel(long_run: Path, tmp_path: Path) -> None:
    document = draw(long_run, tmp_path / "profile")
    assert panels(document) == ALL_PANELS | CURVES
    assert document.count("<td>expert ") == 64, "the table of tokens has a row per expert"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_run_leaves_its_page(recipe: Path, tmp_path: Path) -> None:
    block = "{ffn_type: moe, moe_num_experts: 4, moe_top_k: 2, ffn_hidden_size: 32}"
    evaluated = ["eval_loader.dataset.name=synthetic", f"eval_loader.dataset.cache_dir={tmp_path / 'cache'}",
                 "eval_loader.dataset.split=validation", "eval_loader.dataset.n_documents=40",
                 "eval_interval=2ba", "max_duration=6ba"]  # fmt: skip
    assert train_main([str(recipe), f"model.ffn_config={block}", "model.n_layers=2", *evaluated]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "experts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(sum(layer) == pytest.approx(1, abs=1e-4) for line in lines for layer in line["load"])
    assert "churn" not in lines[1] and len(lines[3]["churn"]) == 2, "churn needs an evaluation before"
    document = draw(tmp_path / "run" / "report.html", tmp_path / "profile")
    assert panels(document) >= EXPERT_PANELS and "expert 3" in document


def test_between_samples_nothing_is_read_from_the_device(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, step_end = [], Report.step_end

    def counted(report: Report, trainer: Run, metrics: Metrics) -> None:
        with CountsReads() as found:
            step_end(report, trainer, metrics)
        reads.append(found.found)

    monkeypatch.setattr(Report, "step_end", counted)
    block = "{ffn_type: moe, moe_num_experts: 4, moe_top_k: 2, ffn_hidden_size: 32}"
    given = [f"model.ffn_config={block}", "max_duration=5ba", "callbacks.report.interval=2ba"]
    assert train_main([str(recipe), *given]) == 0
    assert reads[:4] == [[], ["tolist"], [], ["tolist"]] and len(reads[4]) > 1, "the last step also routes the probe"


@pytest.mark.gpu
def test_every_run_on_a_gpu_shows_its_memory(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe)]) == 0
    assert '"memory/peak_allocated_mem":{"x":' in (tmp_path / "run" / "report.html").read_text()


def test_a_dense_run_has_a_page_of_curves(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe)]) == 0
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "run" / "experts.jsonl").exists()
    assert read_run(tmp_path / "run")["experts"] is None


def test_it_can_be_turned_off(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe), "callbacks.report.enabled=false"]) == 0
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_runs_are_compared_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(tmp_path / name, 200, 2, 4) for name in ("one", "two")]
    for run, rate in zip(runs, ("1.0e-3", "2.0e-3"), strict=True):
        (run / "config.yaml").write_text(f"optimizer: {{name: adamw, lr: {rate}}}\nseed: 1\n")
    assert report_main([*map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    assert "both.html" in capsys.readouterr().out
    document = draw(tmp_path / "both.html", tmp_path / "profile")
    assert "one ce" in document and "two ce" in document
    assert "<td>optimizer.lr</td><td>0.001</td><td>0.002</td>" in document and "<td>seed</td>" not in document


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_of(tmp_path / "run", 20, 2, 4), tmp_path / "none" / "x.html"
    assert report_main([str(run), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out}: cannot be written: No such file or directory\n"


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (str(tmp_path), f"memory://{tmp_path}"):
        assert report_main([run]) == 2
        assert f"{run}: holds no metrics.jsonl" in capsys.readouterr().err


def test_runs_in_a_store_are_drawn_as_those_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    here, url = run_of(tmp_path / "one", 200, 2, 4), f"memory://{tmp_path}/runs/one"
    put_folder(here, url, "metrics.jsonl")
    for runs in ([str(here)], [url], [url, str(here)]):
        assert report_main([*runs, "--out", f"{len(runs)}-{is_url(runs[0])}.html"]) == 0
    assert (tmp_path / "1-True.html").read_text() == (tmp_path / "1-False.html").read_text()
    assert report_main([url]) == 0 and (tmp_path / "report.html").is_file(), "here, as a page is for a browser"


def test_alarms_name_layer_experts_and_cure(tmp_path: Path) -> None:
    assert alarms(read_run(run_of(tmp_path / "well", 400, 2, 8))) == []
    said = alarms(read_run(run_of(tmp_path / "ill", 400, 2, 8, dead=(5, 7))))
    assert said[0].startswith("Layer 0: experts 5, 7 got less than 1% of an even share for 4 steps; raise moe_loss_we")
    assert len(said) == 2


def test_alarms_tell_of_a_bias_that_outweighs_the_scores_and_of_routing_that_does_not_settle(tmp_path: Path) -> None:
    said = alarms(read_run(run_of(tmp_path / "run", 400, 2, 8, bias=1.2, churn=0.7)))
    assert len(said) == 4
    assert said[0].startswith("Layer 0: the bias differs by 1.") and "Lower moe_bias_update_rate" in said[0]
    assert said[3].startswith("Layer 1: 70% of the tokens have changed an expert since the last evaluation")


def test_biases_keep_three_digits() -> None:
    samples = [{"step": i, "load": [[0.5, 0.5]], "entropy": [0.5], "bias": [[0.002 * i, -0.01]]} for i in range(4)]
    found = heat(samples)
    assert found is not None and found["bias"] == {"scale": [0.01], "values": [[[0, 200, 400, 600], [-1000] * 4]]}


def test_alarms_tell_of_skipped_steps_and_of_overfitting(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 400, 1, 4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= {"skipped_steps": 7, "metrics/eval/LanguageCrossEntropy": 4.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skipped, rising = alarms(read_run(folder))
    assert skipped.startswith("7 of 400 steps were skipped") and "risen to 4.000 from its lowest, 3.200" in rising


def test_loads_are_means_of_equal_stretches() -> None:
    samples = [{"step": i, "load": [[i / 10, 1 - i / 10]], "entropy": [0.5]} for i in range(10)]
    found = heat(samples)
    assert found is not None and found["load"][0][0] == [round(200 * i) for i in range(10)]
