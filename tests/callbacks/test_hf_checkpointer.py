"""`hf_checkpointer` and `generate_callback` in real runs; `transformers` reads what is written."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmfoundry import hf
from llmfoundry.callbacks.generate_callback import FILE
from llmfoundry.callbacks.hf_checkpointer import HFCheckpointer
from llmfoundry.checkpoint.reading import load_model_only, read
from llmfoundry.cli.command import read_run_config
from llmfoundry.cli.train import train_main
from llmfoundry.config import ResourceError
from llmfoundry.train.trainer import Trainer
from tests.full_disk import full_disk

# A model that a family of transformers holds.
MIXTRAL = [
    "model.norm_type=rmsnorm", "model.no_bias=true", "model.attn_config.rope=true", "model.learned_pos_emb=false",
    "model.ffn_config={ffn_type: moe, ffn_hidden_size: 32, moe_num_experts: 4, moe_top_k: 2, "
    "moe_normalize_expert_weights: 1, ffn_act_fn: {name: silu}}",
]  # fmt: skip


def test_transformers_reads_what_the_run_had(tiny: Path, tmp_path: Path) -> None:
    folder = f"callbacks.hf_checkpointer={{save_folder: '{tmp_path}/out/{{run_name}}', save_interval: 3ba}}"
    assert train_main([str(tiny), *MIXTRAL, folder, "run_name=first"]) == 0
    out = tmp_path / "out" / "first" / "huggingface"
    assert sorted(path.name for path in out.iterdir()) == ["ba3", "ba4"], "every three steps, and the last one"
    model = AutoModelForCausalLM.from_pretrained(out / "ba4")
    tokenizer = AutoTokenizer.from_pretrained(out / "ba4")
    ours = hf.from_pretrained(out / "ba4").model
    load_model_only(read(tmp_path / "run", "model"), ours)
    ids = torch.tensor([tokenizer.encode("to be or not")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_are_written_alone_as_peft_reads_them(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "out" / "huggingface" / "ba4"
    folder = f"callbacks.hf_checkpointer={{save_folder: {tmp_path}/out, save_interval: 4ba}}"
    assert train_main([str(tiny), *MIXTRAL, folder]) == 0
    lora = [
        "model.lora={rank: 2, alpha: 2, target_modules: [wqkv]}", f"load_path=hf:{base}", "load_weights_only=true",
        f"save_folder={tmp_path}/adapted", "optimizer.lr=0.1", f"callbacks.hf_checkpointer.save_folder={tmp_path}/two",
        "optimizer.master_weights=fp32_split",
    ]  # fmt: skip
    assert train_main([str(tiny), *MIXTRAL, folder, *lora]) == 0
    out = tmp_path / "two" / "huggingface" / "ba4"
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and not (out / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    ids = torch.tensor([AutoTokenizer.from_pretrained(out).encode("to be or not")])
    ours = read_run_config(str(tmp_path / "adapted" / "config.yaml"), []).model.build()
    load_model_only(read(tmp_path / "adapted", "model"), ours)
    with torch.no_grad():
        found, plain = ours(ids).logits, hf.from_pretrained(base).model(ids).logits
        torch.testing.assert_close(adapted(ids).logits, found, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2, "the adapters have learned something"


def test_exports_go_to_a_store_and_nothing_of_them_stays_here(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    url = f"kept://{tmp_path}/{{run_name}}"
    fs, path = fsspec.core.url_to_fs(url.format(run_name="first"))
    fs.pipe_file(f"{path}/huggingface/ba4/old", b"of a run before")
    words = [f"callbacks.hf_checkpointer={{save_folder: '{url}', save_interval: 3ba}}", "run_name=first"]
    assert train_main([str(tiny), *MIXTRAL, *words]) == 0
    names = {name.removeprefix(path) for name in fs.find(path)}
    assert {f"/huggingface/ba{step}/{file}" for step in (3, 4) for file in ("config.json", "model.safetensors")} < names
    assert "/huggingface/ba4/old" not in names
    assert not list((tmp_path / "temporary").glob("export-*"))
    fs.get(f"{path}/huggingface/ba4", str(tmp_path / "copy"), recursive=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").config.num_local_experts == 4

    def fails(file: Path, url: str) -> None:
        raise ResourceError(f"{url}: cannot be written after 5 attempts")

    monkeypatch.setattr("llmfoundry.data.remote.put", fails)
    assert train_main([str(tiny), *MIXTRAL, *words, f"save_folder={tmp_path}/second"]) == 0
    assert "huggingface/ba4 could not be written" in caplog.text and not list((tmp_path / "temporary").glob("export-*"))
    assert not fs.exists(f"{path}/huggingface/ba4/config.json"), "half an export is none"


@pytest.mark.parametrize("lora", [False, True])
def test_a_full_disk_ends_no_run_and_leaves_no_half_export(
    tiny: Path, tmp_path: Path, lora: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = HFCheckpointer._write

    def full(self: HFCheckpointer, trainer: Trainer, target: Path) -> None:
        sizes = {2: 500, 3: 5000}  # bytes that fit: not the weights; not the tokenizer, which a library in Rust writes
        n_bytes = sizes.get(trainer.state.step)
        with full_disk(n_bytes) if n_bytes else nullcontext():
            write(self, trainer, target)

    monkeypatch.setattr(HFCheckpointer, "_write", full)
    left = tmp_path / "out" / "huggingface" / "ba2.new.tmp-5f1c" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("of a run that was killed")
    words = ["model.lora={rank: 2, alpha: 2, target_modules: [wqkv]}"] if lora else []
    export = f"callbacks.hf_checkpointer={{save_folder: {tmp_path}/out, save_interval: 1ba}}"
    assert train_main([str(tiny), *MIXTRAL, *words, export]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "huggingface").iterdir()) == ["ba1", "ba4"]
    for step in (2, 3):
        said = [line for line in caplog.messages if line.startswith(f"step {step}: hf_checkpointer: ")]
        assert len(said) == 1 and f"/ba{step} could not be written: File too large" in said[0], said
        assert said[0].endswith("; training continues")


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_there(tiny: Path, tmp_path: Path, overwrite: bool) -> None:
    there = tmp_path / "out" / "huggingface" / "epoch0-step4"
    there.mkdir(parents=True)
    (there / "old").write_text("")
    settings = (
        f"{{save_folder: {tmp_path}/out, save_interval: 1ep, precision: bfloat16, "
        f"overwrite: {str(overwrite).lower()}, huggingface_folder_name: 'epoch{{epoch}}-step{{batch}}'}}"
    )
    assert train_main([str(tiny), *MIXTRAL, f"callbacks.hf_checkpointer={settings}"]) == 0
    assert (there / "old").exists() is not overwrite
    assert [path.name for path in there.parent.iterdir()] == [there.name]
    if overwrite:
        assert AutoModelForCausalLM.from_pretrained(there).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["callbacks.hf_checkpointer={save_folder: s4://x, save_interval: 1ba}"], "is a URL that is not known"),
        (["callbacks.hf_checkpointer={save_folder: 'x{step}', save_interval: 1ba}"], "known: {run_name}, {rank}"),
        (["callbacks.hf_checkpointer={save_folder: x, save_interval: 1ba, final_register_only: true}"], "MLflow"),
        (
            [
                "callbacks.hf_checkpointer={save_folder: x, save_interval: 1ba}",
                "model.ffn_config.uniform_expert_assignment=true",
            ],
            "lacks",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert train_main([str(tiny), *MIXTRAL, *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: callbacks.hf_checkpointer") and said in line
    assert not (tmp_path / "run").exists()


def test_generations_are_written_at_the_interval_and_at_the_end(tiny: Path, tmp_path: Path) -> None:
    settings = "{prompts: [to be, ''], interval: 3ba, max_new_tokens: 4, do_sample: true, top_p: 0.9, batch_size: 1}"
    assert train_main([str(tiny), f"callbacks.generate_callback={settings}"]) == 0
    found = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in found] == [(3, "to be"), (3, ""), (4, "to be"), (4, "")]
    assert all(line["generation"] for line in found)
