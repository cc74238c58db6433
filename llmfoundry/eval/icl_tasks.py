"""In-context learning tasks: the model sees some solved examples and is asked for one more. Keys are LLM Foundry's.

Prompts, the choice of examples and the spans that are judged are those of LLM Foundry v0.22, so scores are comparable:
rows are stripped; the examples of row i are drawn from the other rows, in order, by one
`random.Random(fewshot_random_seed)`; trailing white space of a context is removed, and a continuation starts with a
space if the tokenizer encodes that as part of a token. If a row is too long, the start of its prompt is cut.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmfoundry.config import Choice, Config, ConfigError, local_path
from llmfoundry.eval.icl_questions import (
    Judging,
    LikelihoodQuestions,
    Questions,
    Reader,
    ToWrite,
    WithAnswers,
    WrittenQuestions,
    draw_examples,
)
from llmfoundry.eval.icl_rows import HUB, Row, read_rows

LM_ACCURACY = "InContextLearningLMAccuracy"
LM_CALIBRATION = "InContextLearningLMExpectedCalibrationError"
CHOICE_ACCURACY = "InContextLearningMultipleChoiceAccuracy"
CHOICE_CALIBRATION = "InContextLearningMCExpectedCalibrationError"
EXACT_MATCH = "InContextLearningGenerationExactMatchAccuracy"
ANSWER_BUFFER = 10  # extra tokens for an answer after a chain of thought, beyond the longest in the data


class TaskConfig(Choice, tag="icl_task_type"):
    """Base of the task types: an entry of the YAML's `icl_tasks`."""

    METRICS: ClassVar[tuple[str, ...]]  # available for this type; the first is the default
    CONTEXT: ClassVar[str] = "context"  # the field with the question

    icl_task_type: str  # how questions are asked and scored
    label: str  # name in metrics: metrics/LABEL/N-shot/METRIC
    # A JSON lines file, relative to the current folder or the YAML's folder; or hf://NAME of a dataset. It is not
    # needed to plan a run.
    dataset_uri: str | None = None
    num_fewshot: list[int]  # numbers of solved examples before the question; each is evaluated
    metric_names: list[str] = []  # empty: the accuracy of the task's type
    batch_size: int | None = Field(default=None, gt=0)  # rows per forward on one rank; None: device_eval_batch_size
    max_seq_len: int | None = Field(default=None, gt=0)  # tokens per row; None: icl_seq_len
    fewshot_random_seed: int = 1234  # seed for drawing the solved examples
    prompt_string: str = ""  # text before everything else
    example_delimiter: str = "\n"  # text between examples
    continuation_delimiter: str = " "  # text between a question and its answer
    question_prelimiter: str = ""  # text before each question
    has_categories: bool = False  # rows have a `category`; each category is scored as a task of its own
    # For a hub dataset: arguments of load_dataset, e.g. {split: test}
    hf_loading_vars: dict[str, str | int | bool | None] = {}
    hf_parsing_map: dict[str, list[str]] = {}  # for a hub dataset: the columns that make up each field

    @model_validator(mode="before")
    @classmethod
    def _older_words(cls, data: object) -> object:
        if not isinstance(data, dict) or "prelimiter" not in data:
            return data
        if "question_prelimiter" in data:
            raise ValueError("prelimiter and question_prelimiter are the same; keep one")
        return {("question_prelimiter" if key == "prelimiter" else key): value for key, value in data.items()}

    @field_validator("label")
    @classmethod
    def _is_a_name(cls, label: str) -> str:
        if not label or "/" in label or label == "eval":
            raise ValueError(f"{label!r} is not a valid name in metrics; write e.g. label: hellaswag")
        return label

    @field_validator("dataset_uri")
    @classmethod
    def _is_here(cls, uri: str | None) -> str | None:
        return uri if uri is None or uri.startswith(HUB) else local_path(uri)

    @field_validator("num_fewshot")
    @classmethod
    def _counts(cls, counts: list[int]) -> list[int]:
        if not counts or min(counts) < 0 or len(set(counts)) < len(counts):
            raise ValueError(f"{counts} must list different numbers of examples, e.g. [0, 5]")
        return counts

    @model_validator(mode="after")
    def _has_metrics(self) -> TaskConfig:
        for name in self.metric_names:
            if name not in self.METRICS:
                raise ValueError(f"metric_names: unknown {name!r}; {self.icl_task_type} has {', '.join(self.METRICS)}")
        return self

    @property
    def metrics(self) -> list[str]:
        """The names of the task's metrics."""
        return self.metric_names or [self.METRICS[0]]

    def by_category(self) -> dict[str, list[Row]]:
        """Split the rows into one task per category, or one task without a name."""
        if self.dataset_uri is None:
            raise ConfigError(f"icl_tasks: {self.label}: dataset_uri is empty; name a file of JSON lines")
        rows = read_rows(self.dataset_uri, self.hf_loading_vars, self.hf_parsing_map)
        if not self.has_categories:
            return {"": rows}
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(row.text("category"), []).append(row)
        return dict(sorted(found.items()))

    @abstractmethod
    def build(self, rows: Sequence[Row], n_examples: int, limit: int, reader: Reader, max_seq_len: int) -> Questions:
        """Build the questions of a task.

        Args:
            rows: all rows of the task; examples are drawn from them.
            n_examples: number of solved examples before each question.
            limit: use only this many questions.
            max_seq_len: maximum tokens of a question with its answer.

        Raises:
            ConfigError: if a row lacks a field, or its answer alone is too long.
        """

    def n_choices(self, row: Row) -> int:
        """Return the number of rows that a question takes in a forward."""
        return 1

    def question(self, row: Row, before: str) -> str:
        """Return the text of a question, placed after `before`."""
        delimiter = self.example_delimiter if before else ""
        return f"{delimiter}{self.question_prelimiter}{row.text(self.CONTEXT)}{self.continuation_delimiter}"

    def example(self, row: Row, before: str) -> str:
        """Return the text of a question with its answer."""
        return f"{self.question(row, before)}{self.answer(row)}"

    @abstractmethod
    def answer(self, row: Row) -> str:
        """Return the correct answer, as examples show it."""

    def prompts(self, rows: Sequence[Row], n_examples: int, limit: int) -> list[str]:
        """Return the text before each question: the prompt string and solved examples."""
        dice = random.Random(self.fewshot_random_seed)
        prompts = []
        for number in range(min(limit, len(rows))):
            text = self.prompt_string
            for drawn in draw_examples(len(rows), n_examples, number, dice):
                text += self.example(rows[drawn], text)
            prompts.append(text)
        return prompts


class MultipleChoiceConfig(TaskConfig, names=("multiple_choice",)):
    """Rows `query`, `choices` and `gold`, the number of the right one: the model chooses the likeliest per token."""

    METRICS = (CHOICE_ACCURACY, CHOICE_CALIBRATION)
    CONTEXT = "query"

    def answer(self, row: Row) -> str:
        """Return the correct choice."""
        return row.choices("choices")[row.gold]

    def n_choices(self, row: Row) -> int:
        """As `TaskConfig.n_choices`."""
        return len(row.choices("choices"))

    def build(self, rows: Sequence[Row], n_examples: int, limit: int, reader: Reader, max_seq_len: int) -> Questions:
        """As `TaskConfig.build`."""
        questions = []
        for row, prompt in zip(rows, self.prompts(rows, n_examples, limit), strict=False):
            context = self.question(row, prompt).rstrip()
            asked = [(context, choice) for choice in row.choices("choices")]
            questions.append(WithAnswers(prompt, asked, row.gold, row.where))
        return LikelihoodQuestions(questions, choose=True, reader=reader, max_seq_len=max_seq_len)


class SchemaConfig(TaskConfig, names=("schema",)):
    """Rows `context_options`, `gold` and `continuation`: the model chooses the context after which the continuation is
    likeliest (Trinh and Le 2018, arXiv:1806.02847)."""

    METRICS = (CHOICE_ACCURACY, CHOICE_CALIBRATION)

    def question(self, row: Row, before: str) -> str:
        """Return the correct context, and the delimiter before the continuation."""
        return f"{self._opened(row.choices('context_options')[row.gold], before)}{self.continuation_delimiter}"

    def answer(self, row: Row) -> str:
        """Return the continuation."""
        return row.text("continuation")

    def n_choices(self, row: Row) -> int:
        """As `TaskConfig.n_choices`."""
        return len(row.choices("context_options"))

    def build(self, rows: Sequence[Row], n_examples: int, limit: int, reader: Reader, max_seq_len: int) -> Questions:
        """As `TaskConfig.build`."""
        questions = []
        for row, prompt in zip(rows, self.prompts(rows, n_examples, limit), strict=False):
            # As in LLM Foundry, without a prompt the continuation follows the context directly.
            end = self.continuation_delimiter.rstrip() if prompt else ""
            contexts = [f"{self._opened(option, prompt)}{end}" for option in row.choices("context_options")]
            asked = [(context, row.text("continuation")) for context in contexts]
            questions.append(WithAnswers(prompt, asked, row.gold, row.where))
        return LikelihoodQuestions(questions, choose=True, reader=reader, max_seq_len=max_seq_len)

    def _opened(self, context: str, before: str) -> str:
        return f"{self.question_prelimiter}{self.example_delimiter if before else ''}{context}"


class LanguageModelingConfig(TaskConfig, names=("language_modeling",)):
    """Rows `context` and `continuation`: right if each token of the continuation is the likeliest there."""

    METRICS = (LM_ACCURACY, LM_CALIBRATION)

    def answer(self, row: Row) -> str:
        """Return the continuation."""
        return row.text("continuation")

    def build(self, rows: Sequence[Row], n_examples: int, limit: int, reader: Reader, max_seq_len: int) -> Questions:
        """As `TaskConfig.build`."""
        questions = [
            WithAnswers(prompt, [(self.question(row, prompt).rstrip(), row.text("continuation"))], 0, row.where)
            for row, prompt in zip(rows, self.prompts(rows, n_examples, limit), strict=False)
        ]
        return LikelihoodQuestions(questions, choose=False, reader=reader, max_seq_len=max_seq_len)


class GenerationKwargs(Config):
    """`generation_kwargs`: texts are always the greedy ones."""

    max_new_tokens: int | None = Field(default=None, gt=0)  # None: the longest answer in the data
    do_sample: Literal[False] = False  # only false is supported: decoding is greedy
    num_beams: Literal[1] = 1  # only 1 is supported
    use_cache: bool = True  # accepted, without effect: the cache is always used


class GenerationTaskConfig(TaskConfig, names=("generation_task_with_answers",)):
    """Rows `context`, `answer`, and maybe `aliases` and `chain_of_thought`: the model writes, and is right if its text
    begins with the answer or one of the aliases."""

    METRICS = (EXACT_MATCH,)

    cot_delimiter: str = ""  # text between a chain of thought and the answer
    do_normalization: bool = True  # compare lower-case words, without articles and punctuation
    early_stopping_criteria: list[str] | None = None  # strings that end an answer
    generation_kwargs: GenerationKwargs = GenerationKwargs()  # how answers are generated

    def answer(self, row: Row) -> str:
        """Return the answer, after its chain of thought."""
        return self._after_thought(row, row.text("answer"))

    def build(self, rows: Sequence[Row], n_examples: int, limit: int, reader: Reader, max_seq_len: int) -> Questions:
        """As `TaskConfig.build`."""
        questions = [
            ToWrite(prompt, self.question(row, prompt).rstrip(), _answers(row))
            for row, prompt in zip(rows, self.prompts(rows, n_examples, limit), strict=False)
        ]
        judging = Judging(self.early_stopping_criteria or [], self.cot_delimiter, self.do_normalization)
        longest = self.generation_kwargs.max_new_tokens or self._longest_answer(rows, reader)
        return WrittenQuestions(questions, judging, reader, max(max_seq_len, longest), longest)

    def _longest_answer(self, rows: Sequence[Row], reader: Reader) -> int:
        """Tokens of the longest answer of all rows, with its chain of thought and the token that opens a document."""
        texts = [self._after_thought(row, answer) for row in rows for answer in _answers(row)]
        buffer = ANSWER_BUFFER if self.cot_delimiter else 0
        return max(max(map(len, reader.openings(texts))) + buffer, 1)

    def _after_thought(self, row: Row, answer: str) -> str:
        if not row.has("chain_of_thought"):
            return answer
        return f"{row.text('chain_of_thought')}{self.cot_delimiter}{answer}"


def _answers(row: Row) -> list[str]:
    return [row.text("answer"), *row.texts("aliases", [])]
