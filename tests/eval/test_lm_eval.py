"""Tasks of lm-evaluation-harness on models of ours: the numbers of its own `hf` model, on one rank and on two.

Needs the package lm-eval, which development does not install: `pip install lm-eval accelerate` in an environment with
this project, then run this file there.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="needs lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from llmfoundry import runtime  # noqa: E402
from llmfoundry.cli.inference import eval_main  # noqa: E402
from llmfoundry.config import ConfigError  # noqa: E402
from llmfoundry.data.chat_template import CHATML  # noqa: E402
from llmfoundry.data.tokenizer import PLAIN_TEXT  # noqa: E402
from llmfoundry.eval.icl_questions import Reader  # noqa: E402
from llmfoundry.eval.likelihood import Ranks  # noqa: E402
from llmfoundry.eval.lm_eval import FoundryLM, evaluate_harness  # noqa: E402
from llmfoundry.hf.pretrained import save_pretrained  # noqa: E402
from llmfoundry.model.transformer import CausalLM  # noqa: E402
from llmfoundry.parallel.apply import materialize, parallelize  # noqa: E402
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh  # noqa: E402
from tests.eval import tasks as small  # noqa: E402
from tests.parallel.ranks import run_ranks  # noqa: E402

LENGTH = 48  # tokens of a row, so that some texts are cut


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = small.tokenizer()
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> CausalLM:
    return small.teach(small.model(len(tokenizer), experts=False), tokenizer, steps=30)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> HFLM:
    folder = tmp_path_factory.mktemp("hf")
    save_pretrained(model, tokenizer, folder)
    return HFLM(pretrained=str(folder), device="cpu", batch_size=3, max_length=LENGTH, dtype="float32")


@pytest.fixture
def ours(model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> FoundryLM:
    return FoundryLM(model, Reader(tokenizer, PLAIN_TEXT), Ranks(rows=3), LENGTH)


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def write_tasks(folder: Path) -> None:
    """Three tasks of the harness with their data: a choice, a text's perplexity, a written answer."""
    dice = random.Random(3)
    rows = []
    for i in range(12):
        query = small.sentence(dice, 5)
        choices = [small.sentence(dice, 1 + n) for n in range(3)]
        choices[i % 3] = small.sentence(dice, 2, after=query.split()[-1])
        rows.append({"query": query, "choices": choices, "gold": i % 3, "answer": choices[i % 3]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json", "test_split": "test", "doc_to_text": "{{query}}",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
    }  # fmt: skip
    for name, task in {
        "tiny_choice": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
                        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "tiny_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}}",
                      "metric_list": [{"metric": "bits_per_byte"}]},
        "tiny_answer": {"output_type": "generate_until", "doc_to_target": "{{answer}}",
                        "generation_kwargs": {"until": ["chair"], "max_gen_toks": 6},
                        "metric_list": [{"metric": "exact_match"}]},
    }.items():  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | shared | task))


def test_likelihoods_are_those_of_transformers(ours: FoundryLM, theirs: HFLM) -> None:
    dice = random.Random(0)
    pairs = [(small.sentence(dice, 1 + 3 * i), f" {small.sentence(dice, 1 + i % 4)}") for i in range(24)]
    pairs += [("", "a red cat"), ("the cat ", "sits"), ("a red green blue", " cat dog bird runs")]
    asked = requests("loglikelihood", *pairs)
    found, wanted = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert len({greedy for _, greedy in found}) == 2


def test_rolling_likelihoods_are_those_of_transformers(ours: FoundryLM, theirs: HFLM) -> None:
    dice = random.Random(1)
    asked = requests("loglikelihood_rolling", *((small.sentence(dice, n),) for n in (1, 9, 40, 90, 200)))
    wanted = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(wanted, abs=1e-3, rel=1e-5)


def test_written_texts_are_those_of_transformers(ours: FoundryLM, theirs: HFLM) -> None:
    dice = random.Random(2)
    ask = {"until": ["chair", "dog"], "max_gen_toks": 12, "do_sample": False}
    one = ask | {"until": "chair"}  # a text, or none: up to the end of the text
    asks = [ask, ask, one, {"max_gen_toks": 5}, ask, one, ask]
    prompts = [small.sentence(dice, n) for n in (2, 5, 9, 3, 60, 7, 4)]
    asked = requests("generate_until", *zip(prompts, asks, strict=True))
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True) and len(set(found)) > 2
    with pytest.raises(ConfigError, match="asks for sampled texts"):
        ours.generate_until(requests("generate_until", ("a", {"do_sample": True, "temperature": 0.7})))


@pytest.mark.parametrize("chats", [False, True])
def test_tasks_of_files_run_from_the_command_line(
    tmp_path: Path, theirs: HFLM, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, chats: bool
) -> None:
    write_tasks(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = f"hf:{theirs.pretrained}"
    tasks = "tiny_choice,tiny_text,tiny_answer"
    command = ["--checkpoint", model, "--tasks", tasks, "--include-path", str(tmp_path), "--num-fewshot", "2"]
    command += ["--limit", "11", "--apply-chat-template"] if chats else []
    assert eval_main([*command, "--output", str(tmp_path / "out.json"), f"icl_seq_len={LENGTH}"]) == 0
    limit = 11 if chats else None
    wanted = evaluate_harness(
        theirs, tasks.split(","), num_fewshot=2, include_path=str(tmp_path), limit=limit, apply_chat_template=chats
    )
    found = json.loads((tmp_path / "out.json").read_text())[model]["metrics"]
    assert {name: score["value"] for name, score in found.items()} == pytest.approx(
        {name: score.value for name, score in wanted.items()}, rel=1e-5
    )
    assert found["tiny_choice/acc"]["n"] == (limit or 12) and found["tiny_choice/acc"]["stderr"] > 0
    assert {"tiny_choice/acc_norm", "tiny_text/bits_per_byte", "tiny_answer/exact_match"} <= found.keys()
    assert "| tiny_choice | acc " in capsys.readouterr().out
    assert eval_main(["--checkpoint", model, "--tasks", "no_such_task"]) == 2
    assert "--tasks: unknown 'no_such_task'" in capsys.readouterr().err


def _scores(folder: str) -> None:
    tokenizer = small.tokenizer()
    parallel = ParallelConfig(expert=runtime.world_size(), compile=False)
    mesh = build_mesh(parallel, "cpu", 4)
    with torch.device("meta"):
        shell = small.model(len(tokenizer)).config.build()
    shell = materialize(parallelize(shell, mesh, parallel, "fp32"), parallel, seed=1).eval()
    ranks = Ranks(3, mesh.data_rank, mesh.data_ranks)
    lm = FoundryLM(shell, Reader(tokenizer, PLAIN_TEXT), ranks, LENGTH)
    scores = evaluate_harness(lm, ["tiny_choice", "tiny_text", "tiny_answer"], include_path=folder)
    found = {name: score.value for name, score in scores.items()}
    (Path(folder) / f"{runtime.world_size()}-{runtime.rank()}.json").write_text(json.dumps(found))


@pytest.mark.dist
def test_scores_are_the_same_on_one_rank_and_with_experts_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run_ranks([2, 1], _scores, str(tmp_path))
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert len(one) >= 4 and two == [pytest.approx(one, rel=1e-6)] * 2
