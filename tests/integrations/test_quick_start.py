"""The five commands of LLM Foundry's README, in their order, from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import yaml
from foundry_hub import TEXTS, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmfoundry.cli.main import main
from llmfoundry.data.mds import MDSFolder
from llmfoundry.integrations.foundry_paths import our_checkpoint

YAML = Path(__file__).parent / "foundry" / "pretrain_mpt.yaml"
EVAL_YAML = Path(__file__).with_name("eval_hub_model.yaml")
ROWS = 64  # tokens
QUESTIONS = [
    {"query": f"Line {i} ends because", "choices": [f"it is full {i}", "it rains"], "gold": i % 2} for i in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a dataset called c4."""
    root = tmp_path_factory.mktemp("quick")
    for name in ("gpt2", "EleutherAI/gpt-neox-20b"):
        tokenizer().save_pretrained(root / name)
    for split in ("train", "validation"):
        path = root / "c4" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "".join(json.dumps({"text": f"{split} {i}: {text}"}) + "\n" for i, text in enumerate(TEXTS * 20))
        )
    (root / "sentences.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "label": "sentences",
        "dataset_uri": "sentences.jsonl",
        "num_fewshot": [0],
        "icl_task_type": "multiple_choice",
    }
    (root / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": [task]}))
    benchmark = {"name": "sentences", "num_fewshot": 0, "random_baseline": 0.5}
    gauntlet = {
        "weighting": "EQUAL", "subtract_random_baseline": True, "rescale_accuracy": True,
        "categories": [{"name": "language", "benchmarks": [benchmark]}],
    }  # fmt: skip
    (root / "gauntlet.yaml").write_text(yaml.safe_dump({"eval_gauntlet": gauntlet}))
    return root


def test_their_quick_start(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(folder / "cache"))

    def run(*words: str) -> str:
        code = main(words)
        out, error = capsys.readouterr()
        assert code == 0, error
        return out

    said = run(
        "data_prep", "convert_dataset_hf", "--dataset", "./c4", "--out_root", "quick-c4",
        "--splits", "train_small, val_small", "--concat-tokens", str(ROWS),
        "--tokenizer", "EleutherAI/gpt-neox-20b", "--eos_text", "<|endoftext|>",
        "--tokenizer_kwargs", '{"use_fast": true}',
    )  # fmt: skip
    assert said.count(f"rows of {ROWS} tokens written to quick-c4/") == 2
    run(
        "train", str(YAML), "variables.data_local=quick-c4", "train_loader.dataset.split=train_small",
        "eval_loader.dataset.split=val_small", "max_duration=4ba", "eval_interval=0", "save_folder=mpt-125m",
        f"variables.max_seq_len={ROWS}", "global_train_batch_size=2", "precision=fp32", "scheduler.t_warmup=1ba",
        "model.d_model=32", "model.n_heads=4", "model.vocab_size=300", "model.no_bias=true",
        "model.attn_config.alibi=true",
    )  # fmt: skip
    run(
        "convert", "--composer_path", "mpt-125m/ep0-ba4-rank0.pt", "--hf_output_path", "mpt-125m-hf",
        "--output_precision", "bf16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "mpt-125m-hf")
    assert model.config.model_type == "mpt" and len(AutoTokenizer.from_pretrained(folder / "mpt-125m-hf")) > 256
    said = run(
        "eval", str(EVAL_YAML), "icl_tasks=tasks.yaml", "model_name_or_path=mpt-125m-hf", "--output",
        "scores.json",
    )  # fmt: skip
    (score,) = json.loads((folder / "scores.json").read_text())["mpt-125m-hf"]["metrics"].values()
    assert "sentences" in said and score["value"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    said = run(
        "generate", "--name_or_path", "mpt-125m-hf", "--max_new_tokens", "8", "--prompts",
        "The answer to life is", "Here's a quick recipe:",
    )  # fmt: skip
    assert said.startswith("The answer to life is") and "\n\nHere's a quick recipe:" in said
    (folder / "prompts.txt").write_text("The cat;The dog")
    said = run(
        "generate", "-n", "mpt-125m-hf", "--max_new_tokens", "2", "--top_k", "1", "--max_batch_size", "1",
        "--prompts", "file::prompts.txt", "--prompt-delimiter", ";",
    )  # fmt: skip
    assert said.startswith("The cat") and "\n\nThe dog" in said


def test_rows_of_tokens_are_cut_as_theirs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ["data_prep", "convert_dataset_json", "--path", "c4/train.jsonl", "--out_root", str(tmp_path / "mds")]
    more = ["--concat_tokens", "16", "--tokenizer", "gpt2", "--eos_text", "<|endoftext|>", "--compression", "zstd"]
    assert main([*words, *more]) == 0
    words_of = AutoTokenizer.from_pretrained("gpt2")
    ids: list[int] = []
    for line in Path("c4/train.jsonl").read_text().splitlines():
        ids += words_of(json.loads(line)["text"])["input_ids"] + [words_of.eos_token_id]
    found = MDSFolder(tmp_path / "mds", tmp_path / "cache")  # no folder of the split, as there
    assert len(found) == len(ids) // 16
    assert [list(found.sample(i)["tokens"]) for i in range(len(found))] == [
        ids[i * 16 : (i + 1) * 16] for i in range(len(found))
    ]
    assert main([*words[:-1], "kept://bucket/mds", *more]) == 0, "a store, as theirs"
    index = fsspec.filesystem("kept").cat("/bucket/mds/index.json")
    assert json.loads(index) == json.loads((tmp_path / "mds" / "index.json").read_text())
    capsys.readouterr()
    assert main([*words[:-1], str(tmp_path / "long"), *more, "--concat_tokens", "99999"]) == 2
    assert "long: the text gives nothing to write: it is shorter than one row of 99,999" in capsys.readouterr().err


def test_texts_begin_rows_of_their_own_without_wrap(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    words = ["data_prep", "convert_text_to_mds", "--input_folder", "c4/train.jsonl", "--output_folder"]
    more = ["--concat_tokens", "8", "--tokenizer", "gpt2", "--use_tokenizer_eos", "--no_wrap"]
    assert main([*words, str(tmp_path / "mds"), *more]) == 0
    words_of = AutoTokenizer.from_pretrained("gpt2")
    lines = [json.loads(line)["text"] for line in Path("c4/train.jsonl").read_text().splitlines()]
    starts = [words_of(text)["input_ids"][:8] for text in lines]
    found = MDSFolder(tmp_path / "mds", tmp_path / "cache")
    assert list(found.sample(0)["tokens"]) == starts[0] and list(found.sample(1)["tokens"]) == starts[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["data_prep", "convert_dataset_json", "--path", "x", "--out_root", "y", "--concat_tokens", "4"],
            "--tokenizer",
        ),
        (["data_prep", "convert_dataset_json", "--path", "no-such", "--out_root", "y"], "no such file or folder"),
        (
            ["data_prep", "convert_finetuning_dataset", "--dataset", "x", "--out_root", "y"],
            "train on the dataset itself",
        ),
        (["data_prep", "convert_delta_to_json", "--delta_table_name", "x"], "write the table as parquet"),
        (["data_prep", "convert_dataset_json", "--path", "", "--out_root", "y"], "--path : no such file or folder"),
        (["data_prep", "convert_dataset_hf", "--dataset", "x", "--splits", "", "--out_root", "y"], "must not be empty"),
        (["data_prep", "convert_dataset_json", "--path", ".", "--out_root", "a.txt/y"], "y: cannot be written: Not a"),
        (
            ["data_prep", "convert_dataset_json", "--path", ".", "--out_root", "y", "--compression", "zstd:99"],
            "compression 'zstd:99': zstd has levels 1 to 22",
        ),
        (["data_prep", "convert_dataset_hf", "--dataset", "./no-such", "--splits", "a", "--out_root", "y"], "no-such"),
        (["generate", "-n", "x", "-p", "y", "--repetition_penalty", "1.2"], "--repetition_penalty: is not supported"),
        (["generate", "-n", "x", "-p", "y", "--seed", "1", "2"], "--seed: has several values; run the command once"),
        (["generate", "-n", "x", "-p", "y", "--do_sample", "maybe"], "--do_sample maybe: must be true or false"),
        (["generate", "-n", "x", "-p", "file::no-such"], "--prompts file::no-such: cannot be read"),
        (["generate", "-n", "x", "--eos_token_id", "3"], "--eos_token_id: is not supported"),
        (["generate", "-n", "x", "--revision", "main"], "hf download x --revision main --local-dir FOLDER"),
        (
            [
                "data_prep",
                "convert_dataset_json",
                "--path",
                "x",
                "--out-root",
                "y",
                "--concat-tokens",
                "4",
                "--tokenizer",
                "z",
                "--tokenizer-kwargs",
                "[]",
            ],
            "must be a mapping of names to plain values",
        ),
        (["convert", "--composer_path", "x", "--hf_output_path", "y", "--hf_repo_for_upload", "z"], "upload z y"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.txt").write_text("a")
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line


def test_composers_names_lead_to_our_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    found = our_checkpoint(f"{tmp_path}/ep0-ba10-rank0.pt")
    assert found == f"{tmp_path}/checkpoints/step-10"
    assert our_checkpoint(f"{tmp_path}/latest-rank{{rank}}.pt") == str(tmp_path)
    assert our_checkpoint("elsewhere/ep0-ba10-rank0.pt") == "elsewhere/ep0-ba10-rank0.pt"


def test_an_installed_llm_foundry_is_named_at_import(tmp_path: Path) -> None:
    def said() -> str:
        path = os.pathsep.join([str(tmp_path), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", "import llmfoundry"], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        return done.stderr

    assert said() == ""
    (tmp_path / "llm_foundry-0.22.0.dist-info").mkdir()
    assert "llm_foundry-0.22.0.dist-info: LLM Foundry is installed too" in said()
