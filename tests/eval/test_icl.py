"""Evaluation by tasks: LLM Foundry's prompts, its rules for what is right, and its gauntlet."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import PreTrainedTokenizerFast

from llmfoundry.config import Config, ConfigError, check
from llmfoundry.data.tokenizer import PLAIN_TEXT, SpecialTokens
from llmfoundry.eval.gauntlet import GauntletConfig
from llmfoundry.eval.icl import Score, Task, accuracy, build_tasks, calibration_error, evaluate_tasks, with_tasks_read
from llmfoundry.eval.icl_questions import Judged, Judging, LikelihoodQuestions, Questions, Reader, normalized
from llmfoundry.eval.icl_tasks import TaskConfig
from llmfoundry.eval.likelihood import Continuation, Prompt, Ranks, continue_all, likelihood
from llmfoundry.hf.pretrained import save_pretrained
from llmfoundry.model.transformer import CausalLM
from tests.eval import tasks as small

ONE = Ranks(rows=3)


class File(Config):
    """The part of a YAML that is tested here."""

    icl_tasks: list[TaskConfig]
    eval_gauntlet: GauntletConfig | None = None


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small.tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> CausalLM:
    return small.teach(small.model(len(tokenizer), experts=False), tokenizer, steps=60)


def read(folder: Path, *tasks: dict[str, object], **others: object) -> File:
    return check(File, with_tasks_read({"icl_tasks": list(tasks)} | others, folder))


def rows_of(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(questions: Questions, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Each context and continuation, decoded."""
    assert isinstance(questions, LikelihoodQuestions)
    return [
        (tokenizer.decode(item.ids[: -item.n]), tokenizer.decode(item.ids[-item.n :]))
        for item in questions.continuations
    ]


def test_a_prompt_is_solved_examples_then_the_question(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    uri = rows_of(tmp_path / "a.jsonl", *({"context": f"q{i} ", "continuation": f"a{i}"} for i in range(4)))
    task = {
        "label": "t", "dataset_uri": uri, "num_fewshot": [2], "icl_task_type": "language_modeling",
        "prompt_string": "Go", "question_prelimiter": "Q:", "continuation_delimiter": "\nA: ",
    }  # fmt: skip
    (built,) = build_tasks(read(tmp_path, task).icl_tasks, Reader(tokenizer, PLAIN_TEXT), max_seq_len=99, batch_size=4)
    # random.Random(1234) draws {2, 3} of four rows for row 0.
    assert built.name == "t/2-shot" and prompts(built.questions, tokenizer)[0] == (
        "Go\nQ:q2\nA: a2\nQ:q3\nA: a3\nQ:q0\nA:", " a0"
    )  # fmt: skip
    for row, (context, answer) in enumerate(prompts(built.questions, tokenizer)):
        assert answer == f" a{row}" and context.endswith(f"\nQ:q{row}\nA:") and context.count(f"q{row}") == 1
        assert context.startswith("Go\nQ:") and context.count("Q:") == 3


def test_choices_share_a_context_and_schemas_a_continuation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    choice = rows_of(tmp_path / "c.jsonl", {"query": "q", "choices": ["x", "y y"], "gold": 1})
    schema = rows_of(
        tmp_path / "s.jsonl",
        *({"context_options": [f"{i} one", f"{i} two"], "continuation": "end", "gold": 1} for i in range(2)),
    )
    tasks = read(
        tmp_path,
        {"label": "c", "dataset_uri": choice, "num_fewshot": [0], "icl_task_type": "multiple_choice"},
        {"label": "s", "dataset_uri": schema, "num_fewshot": [0, 1], "icl_task_type": "schema"},
    ).icl_tasks
    c, zero, one = build_tasks(tasks, Reader(tokenizer, PLAIN_TEXT), max_seq_len=99, batch_size=4)
    assert prompts(c.questions, tokenizer) == [("q", " x"), ("q", " y y")]
    assert prompts(zero.questions, tokenizer)[:2] == [("0 one", " end"), ("0 two", " end")]
    assert prompts(one.questions, tokenizer)[:2] == [("1 two end\n0 one", " end"), ("1 two end\n0 two", " end")]
    # What opens a document stands before the prompt; a row that is too long loses its beginning.
    bos = Reader(tokenizer, SpecialTokens(bos=5))
    whole, cut = (
        build_tasks(tasks[:1], bos, max_seq_len=n, batch_size=4)[0].questions for n in (99, 3)
    )  # fmt: skip
    assert isinstance(whole, LikelihoodQuestions) and isinstance(cut, LikelihoodQuestions)
    assert whole.continuations[0].ids[0] == 5 and len(whole.continuations[1].ids) > 3
    assert cut.continuations[1].ids == whole.continuations[1].ids[-3:]


def test_likelihood_is_that_of_whole_forwards(model: CausalLM) -> None:
    dice = torch.Generator().manual_seed(0)
    items = [
        Continuation(torch.randint(0, 300, (n,), generator=dice).tolist(), 1 + n % 3) for n in (9, 4, 17, 5, 12, 4, 8)
    ]
    found = likelihood(model, items, ONE)
    assert found is not None
    for number, item in enumerate(items):
        logits = model(torch.tensor([item.ids])).logits[0, -item.n - 1 : -1]
        targets = torch.tensor(item.ids[-item.n :])
        p = logits.softmax(-1)
        torch.testing.assert_close(found.nats[number].float(), F.cross_entropy(logits, targets, reduction="sum"))
        assert found.greedy[number] == float((logits.argmax(-1) == targets).all())
        torch.testing.assert_close(found.lowest_top[number].float(), p.max(-1).values.min())
        torch.testing.assert_close(found.mean[number].float(), p.gather(1, targets[:, None]).mean())


def test_rows_of_different_lengths_are_continued_as_each_alone(model: CausalLM) -> None:
    dice = torch.Generator().manual_seed(1)
    wanted = [Prompt(torch.randint(0, 300, (n,), generator=dice).tolist(), 3 + n) for n in (1, 9, 4, 6, 2)]
    written = continue_all(model, wanted, ONE, stop={7})
    assert written is not None and len(set(map(tuple, written))) > 1
    for prompt, text in zip(wanted, written, strict=True):
        ids = list(prompt.ids)
        while len(ids) < len(prompt.ids) + prompt.max_new_tokens:
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if best == 7:
                break
            ids.append(best)
        assert text == ids[len(prompt.ids) :]


def test_a_written_answer_is_compared_by_its_words() -> None:
    assert normalized("  The_Cat's,  hat ") == "cat s hat"
    assert Judging([], "", True).is_right("A red-house. And", ["blue", "Red House"])
    assert not Judging([], "", False).is_right("A red-house", ["red house"])
    assert Judging(["\n\n", "Q?"], " so ", False).is_right("5 so 6 so 11 Q? so 3", ["11"])


def test_errors_of_accuracy_and_calibration() -> None:
    judged = [Judged(True, 0.95, True), Judged(True, 1.0, False), Judged(False, 0.12, False), Judged(True, 0.11, True)]
    assert accuracy(judged) == Score(0.75, math.sqrt(0.75 * 0.25 / 3), 4)
    assert calibration_error(judged).value == pytest.approx((abs(1 - 2 * 0.95) + abs(1 - 2 * 0.15)) / 4)


def test_every_kind_of_task_is_evaluated(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: CausalLM) -> None:
    configs = read(tmp_path, *small.write_tasks(tmp_path)).icl_tasks
    tasks = build_tasks(configs, Reader(tokenizer, PLAIN_TEXT), max_seq_len=200, batch_size=8)
    scores = evaluate_tasks(model, tasks)
    assert scores is not None
    value = {name.removeprefix("metrics/"): score.value for name, score in scores.items()}
    assert value["schema/0-shot/InContextLearningMultipleChoiceAccuracy"] > 0.6
    assert value["write/2-shot/InContextLearningGenerationExactMatchAccuracy"] > 0.5
    assert [name for name in value if name.startswith("words/0") and name.endswith("LMAccuracy")] == [
        f"words/0-shot/{category}/InContextLearningLMAccuracy" for category in ("a", "red", "the")
    ]
    assert 0 < value["words/4-shot/the/InContextLearningLMExpectedCalibrationError"] < 1
    first = build_tasks(configs, Reader(tokenizer, PLAIN_TEXT), max_seq_len=200, batch_size=8, max_batches=1)
    assert [len(task.questions) for task in first[:4]] == [2, 2, 4, 4], "whole questions of a batch"
    assert first[0].n_rows == 23
    assert evaluate_tasks(model, tasks, stopped=lambda: True) is None


GAUNTLET = {
    "weighting": "LOG_SAMPLE_SZ",
    "categories": [
        {"name": "mind", "benchmarks": [
            {"name": "a", "num_fewshot": 0, "random_baseline": 0.5},
            {"name": "b", "num_fewshot": 3, "random_baseline": 0.25},
        ]},
        {"name": "lost", "benchmarks": [{"name": "c", "num_fewshot": 0, "random_baseline": 0}]},
    ],
    "averages": {"all": ["mind", "lost", "code"]},
}  # fmt: skip


class _NoQuestions(Questions):
    def __len__(self) -> int:
        return 0

    def ask(self, model: CausalLM, ranks: Ranks) -> list[Judged]:
        return []


@pytest.mark.parametrize(
    ("weighting", "weights"), [("EQUAL", (1, 1)), ("SAMPLE_SZ", (8, 6)), ("LOG_SAMPLE_SZ", (3, math.log2(6)))]
)
def test_a_gauntlet_is_weighted_above_its_baselines(
    weighting: str, weights: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    gauntlet = check(GauntletConfig, GAUNTLET | {"weighting": weighting})
    sizes = {"a/0-shot": 8, "b/3-shot/x": 2, "b/3-shot/y": 4}
    tasks = [Task(name, [], _NoQuestions(), size, 1) for name, size in sizes.items()]
    scores = {
        "metrics/a/0-shot/InContextLearningMultipleChoiceAccuracy": Score(0.75, None, 8),
        "metrics/a/0-shot/InContextLearningMCExpectedCalibrationError": Score(0.9, None, 8),
        "metrics/b/3-shot/x/InContextLearningLMAccuracy": Score(0.5, None, 2),
        "metrics/b/3-shot/y/InContextLearningLMAccuracy": Score(0.75, None, 4),
    }
    one, other = weights
    mind = (one * 0.5 + other * (0.625 - 0.25) / 0.75) / (one + other)
    found = gauntlet.composite(scores, tasks)
    assert found == pytest.approx({f"icl/metrics/eval_gauntlet/{name}": mind for name in ("mind", "all")})
    gauntlet.warn_of_missing(tasks)
    assert "lost has no score and counts in no average: icl_tasks has no c/0-shot" in caplog.text
    assert "averages.all: there is no category code" in caplog.text


@pytest.mark.parametrize(
    ("categories", "says"),
    [
        ([{"name": "mind", "benchmarks": []}], "categories.0.benchmarks"),
        (GAUNTLET["categories"] * 2, "two are called 'mind'; rename one"),
    ],
)
def test_a_gauntlet_without_a_score_is_refused(categories: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(GauntletConfig, {"categories": categories})


def test_an_average_without_a_score_is_left_out() -> None:
    assert check(GauntletConfig, GAUNTLET).composite({}, []) == {}


def test_tasks_and_gauntlet_may_have_files_of_their_own(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    rows_of(there / "a.jsonl", {"context": "a", "continuation": "b"})
    task = {"label": "t", "dataset_uri": "a.jsonl", "num_fewshot": [0], "icl_task_type": "language_modeling"}
    (there / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": [task]}))
    (there / "gauntlet.yaml").write_text(yaml.safe_dump({"eval_gauntlet": GAUNTLET}))
    data = {"icl_tasks": "there/tasks.yaml", "eval_gauntlet_str": "there/gauntlet.yaml"}
    found = check(File, with_tasks_read(data, tmp_path))
    assert found.icl_tasks[0].dataset_uri == str(there / "a.jsonl") and found.eval_gauntlet is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"icl_task_type": "multi_choice"}, "unknown icl_task_type 'multi_choice' (did you mean 'multiple_choice'?)"),
        ({"dataset_uri": "s3://b/a.jsonl"}, "s3://b/a.jsonl is a URL"),
        ({"num_fewshot": [1, 1]}, "must list different numbers"),
        ({"metric_names": ["Accuracy"]}, "unknown 'Accuracy'; language_modeling has InContextLearningLMAccuracy"),
        ({"cot_delimiter": "so"}, "a key of generation_task_with_answers"),
        ({"label": "eval"}, "'eval' is not a valid name in metrics"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, change: dict[str, object], says: str) -> None:
    task = {"label": "t", "dataset_uri": "a.jsonl", "num_fewshot": [0], "icl_task_type": "language_modeling"}
    with pytest.raises(ConfigError) as error:
        read(tmp_path, task | change)
    assert says in str(error.value) and str(error.value).startswith("icl_tasks.0")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "a.jsonl:1: is not JSON"),
        ("[1]", "a.jsonl:1: must be a JSON object, found [1]"),
        ('{"context": "a"}', "a.jsonl:1: 'continuation' is missing; it must be a text"),
        ('{"context": 1, "continuation": "b"}', "a.jsonl:1: 'context' is '1'; it must be a text"),
        ('{"context": "", "continuation": "b"}', "a.jsonl:1: nothing stands before the answer (1 tokens)"),
        ("", "holds no rows"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    task = {"label": "t", "dataset_uri": "a.jsonl", "num_fewshot": [0], "icl_task_type": "language_modeling"}
    with pytest.raises(ConfigError) as error:
        build_tasks(read(tmp_path, task).icl_tasks, Reader(tokenizer, PLAIN_TEXT), max_seq_len=9, batch_size=1)
    assert says in str(error.value)


def test_a_dataset_of_the_hub_is_parsed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("datasets")
    rows_of(tmp_path / "part.jsonl", {"q": "who", "hint": "him", "a": "he"})
    task = {
        "label": "t", "dataset_uri": "hf://json", "num_fewshot": [0], "icl_task_type": "language_modeling",
        "hf_loading_vars": {"data_files": str(tmp_path / "part.jsonl"), "split": "train",
                            "cache_dir": str(tmp_path / "cache")},
        "hf_parsing_map": {"context": ["q", "hint"], "continuation": ["a"]},
    }  # fmt: skip
    (built,) = build_tasks(read(tmp_path, task).icl_tasks, Reader(tokenizer, PLAIN_TEXT), max_seq_len=9, batch_size=1)
    assert prompts(built.questions, tokenizer) == [("who him", " he")]


def test_texts_longer_than_learned_positions_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    config = small.model(300, max_seq_len=8, experts=False).config
    attention = config.attn_config.model_copy(update={"rope": False})
    made = config.model_copy(update={"attn_config": attention, "learned_pos_emb": True}).build().eval()
    assert likelihood(made, [Continuation([1] * 9, 1)], ONE) is not None
    with pytest.raises(ConfigError, match="a text of 9 tokens is longer than the 8 positions"):
        likelihood(made, [Continuation([1] * 10, 1)], ONE)
    with pytest.raises(ConfigError, match="a text of 9 tokens is longer"):
        continue_all(made, [Prompt([1] * 7, 3)], ONE, stop=())


@pytest.mark.skipif(
    not {"FOUNDRY_SOURCE", "FOUNDRY_PYTHON"} <= os.environ.keys(),
    reason="set FOUNDRY_SOURCE to a checkout of LLM Foundry, FOUNDRY_PYTHON to one for scores_by_foundry.py",
)
@pytest.mark.parametrize(("length", "bos"), [(200, False), (24, False), (200, True)])
def test_scores_are_those_of_llm_foundry(tmp_path: Path, length: int, bos: bool) -> None:
    """Prompts, spans and metrics of every kind of task, whole and cut, with and without a token that opens them."""
    tokenizer = small.tokenizer(bos)
    made = small.teach(small.model(len(tokenizer), experts=False), tokenizer, steps=60)
    save_pretrained(made, tokenizer, tmp_path / "hf")
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": small.write_tasks(tmp_path)}))
    configs = check(File, with_tasks_read({"icl_tasks": "tasks.yaml"}, tmp_path)).icl_tasks
    special = SpecialTokens(tokenizer.bos_token_id, parse=True)
    tasks = build_tasks(configs, Reader(tokenizer, special), max_seq_len=length, batch_size=4)
    scores = evaluate_tasks(made, tasks)
    assert scores is not None and len(scores) > 20
    script = Path(__file__).with_name("scores_by_foundry.py")
    ran = subprocess.run(
        [os.environ["FOUNDRY_PYTHON"], script, os.environ["FOUNDRY_SOURCE"], "hf", "tasks.yaml", str(length)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    theirs = json.loads(ran.stdout.splitlines()[-1])
    assert {name: score.value for name, score in scores.items()} == pytest.approx(theirs, abs=1e-6)
