"""The recipes of docs/recipes.md, word for word and in their order, on a model and data of a tiny size."""

from __future__ import annotations

import io
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llmfoundry.cli.main import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
LENGTH, BATCH = 128, 4
BATCHES = {"pretrain": 20, "anneal": 20, "continue": 10, "finetune": 4, "lora": 4, "qlora": 4, "dpo": 4}
TINY = {
    "tokenizer.vocab_size": 300, "model.d_model": 32, "model.n_heads": 4, "model.kv_n_heads": 2, "model.n_layers": 1,
    "model.vocab_size": 320, "model.attn_config.kv_n_heads": 2, "model.ffn_config.ffn_hidden_size": 32,
    "model.ffn_config.moe_num_experts": 4, "model.ffn_config.moe_top_k": 2, "model.max_seq_len": 256,
    "model.lora.rank": 2, "max_seq_len": LENGTH, "global_train_batch_size": BATCH,
}  # fmt: skip
pytestmark = pytest.mark.slow  # the page is one story, about a minute long


def files() -> dict[str, str]:
    """The page's files by their names, as they stand there."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    return {block.partition("\n")[0].removeprefix("# "): block for block in blocks}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def shrunk(name: str, text: str) -> str:
    """A file of the page with smaller numbers in place of its own; every key stays."""
    config = OmegaConf.create(yaml.safe_load(text))
    if "max_duration" in config:
        length = f"{BATCHES[Path(name).stem]}ba"
        for key, value in (TINY | {"max_duration": length}).items():
            if OmegaConf.select(config, key) is not None:
                OmegaConf.update(config, key, value)
        if not str(config.eval_interval).startswith("0"):
            config.eval_interval = length
        config.save_interval = length
        for part in config.get("eval_loaders", []):
            part.rows = 4
    return OmegaConf.to_yaml(config)


def write_data() -> None:
    """The folders that the page begins with."""
    for name in ("web", "code", "math", "law"):
        folder = Path("data") / name
        folder.mkdir(parents=True)
        rows = (json.dumps({"text": f"{name} {i}: " + " ".join(f"{name}{i % 7 + n}" for n in range(40))})
                for i in range(60 if name == "web" else 30))  # fmt: skip
        (folder / "part.jsonl").write_text("\n".join(rows))
    Path("chats").mkdir()
    chats = ({"messages": [{"role": "user", "content": f"{i} + 1"}, {"role": "assistant", "content": str(i + 1)}]}
             for i in range(40))  # fmt: skip
    Path("chats/mine.jsonl").write_text("\n".join(map(json.dumps, chats)))
    Path("pairs").mkdir()
    pairs = ({"prompt": [{"role": "user", "content": f"{i} + 1"}], "chosen": str(i + 1), "rejected": "no"}
             for i in range(24))  # fmt: skip
    Path("pairs/mine.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    question = re.search(r"capitals\.jsonl +# (\{.*\})", files()["tasks.yaml"])
    assert question is not None
    Path("capitals.jsonl").write_text(f"{question[1]}\n" * 4)


def metrics(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


def rows(run: str, label: str) -> list[int]:
    """Rows of a source that were read up to each step."""
    return [round(line.get(f"tokens/{label}", 0) / LENGTH) for line in metrics(run)]


def weights(run: str) -> list[str]:
    """Names in the newest checkpoint of a run."""
    shards = sorted(Path("runs", run, "checkpoints").glob("step-*/model-*.safetensors"))
    names: list[str] = []
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names += file.keys()
    return names


def test_the_recipes_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "cache"))
    write_data()
    for name, text in files().items():
        Path(name).write_text(shrunk(name, text))
    said: dict[str, str] = {}
    for command in commands():
        monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n"))
        assert main(shlex.split(command)[1:]) == 0, f"{command}: {capsys.readouterr().err}"
        said[command] = capsys.readouterr().out

    n = 20 * BATCH
    assert (rows("pretrain", "web")[-1], rows("pretrain", "code")[-1], rows("pretrain", "math")[-1]) == (
        0.7 * n, 0.2 * n, 0.1 * n,
    )  # fmt: skip
    math = rows("anneal", "math")
    assert math[15] == 0 and math[19] == round(0.3 * 0.2 * n), "0.3 of the last fifth, and nothing before"
    rates = [line["lr"] for line in metrics("anneal")]
    assert rates[15] == max(rates) and all(later < lr for lr, later in pairwise(rates[16:]))
    web, law = (f"metrics/eval/{label}/LanguageCrossEntropy" for label in ("web", "law"))
    assert metrics("anneal")[-1][web] < metrics("pretrain")[0]["loss/train/web"] - 0.5
    before, *_, after = metrics("continue")
    assert before[web] == pytest.approx(metrics("anneal")[-1][web], rel=1e-6), "the same weights and text"
    assert after[law] < before[law]
    assert rows("continue", "law")[-1] == 0.7 * 10 * BATCH

    chats = "llmfoundry train finetune.yaml --show-batch"
    assert re.search(r"(\x1b\[32m|«)\d+<\|im_end\|>", said[chats]), "an answer, and what ends it"
    assert said["llmfoundry chat --checkpoint runs/finetune"].strip()
    assert metrics("lora")[0]["loss/train/ce"] == pytest.approx(metrics("finetune")[0]["loss/train/ce"], rel=1e-5)
    four_bits = abs(metrics("qlora")[0]["loss/train/ce"] / metrics("lora")[0]["loss/train/ce"] - 1)
    assert 0 < four_bits < 0.05, "the same model, rounded to four bits"
    for run in ("lora", "qlora", "dpo"):
        assert weights(run) and all(name.endswith(("lora_A", "lora_B")) for name in weights(run))
    assert metrics("dpo")[0]["rewards/margins"] == 0 and metrics("dpo")[-1]["rewards/margins"] > 0
    assert Path("out/adapters/adapter_model.safetensors").exists()
    for folder in ("base", "finetune", "lora", "dpo"):
        assert AutoModelForCausalLM.from_pretrained(f"out/{folder}").config.num_experts == 4

    assert re.search(r"\d\.\d{4} nats per token", said["llmfoundry eval --checkpoint runs/finetune"])
    scores = json.loads(Path("scores.json").read_text())["runs/dpo"]
    averages = {f"icl/metrics/eval_gauntlet/{name}" for name in ("world_knowledge", "default_average")}
    assert scores["gauntlet"].keys() == averages and len(scores["metrics"]) == 2
    assert json.loads(Path("scores-base.json").read_text())["hf:out/base"]["metrics"].keys() == scores["metrics"].keys()
