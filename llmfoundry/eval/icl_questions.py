"""Questions as token ids, judged by the likelihood of given answers or by the text that the model writes.

The rules are LLM Foundry's, so that scores are comparable. Special tokens are added only before a prompt.
"""

from __future__ import annotations

import random
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.tokenizer import Encoder, SpecialTokens
from llmfoundry.eval.likelihood import Continuation, Prompt, Ranks, continue_all, likelihood
from llmfoundry.model.transformer import CausalLM

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Judged(NamedTuple):
    """The outcome of one question."""

    correct: bool
    # The answer with the largest mean probability (0 to 1), and whether it is correct, for the calibration error.
    confidence: float = 0.0
    surest_correct: bool = False


class Reader:
    """Encodes texts by the rule for special tokens that the model was trained with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> None:
        self.tokenizer, self.special = tokenizer, special
        self._encoder = Encoder(tokenizer, special)
        # Whether " a" is a single token; if so, continuations start with a space.
        self.prefix_space = len(self._encoder.encode([" a"])[0]) == 1

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of parts of texts."""
        return self._encoder.encode(texts)

    def openings(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts that start a document."""
        bos, found = self.special.bos, self.ids(texts)
        return found if bos is None else [ids if ids[:1] == [bos] else [bos, *ids] for ids in found]

    def spaced(self, text: str) -> str:
        """Return a continuation, with the space that separates it from its context."""
        return f" {text}" if self.prefix_space and not text.startswith(" ") else text


class Questions(ABC):
    """The questions of a task, which can be put to several models."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of questions."""

    @abstractmethod
    def ask(self, model: CausalLM, ranks: Ranks) -> list[Judged] | None:
        """Put the questions to a model on all ranks; return the same on every rank, or None if stopped."""


class WithAnswers(NamedTuple):
    """A question and its possible answers, as text.

    Attributes:
        prompt: solved examples, or an empty string.
        asked: a context and its continuation for each possible answer. One of several is correct, or the only one.
        gold: the index of the correct answer.
        where: the file and line of the question.
    """

    prompt: str
    asked: list[tuple[str, str]]
    gold: int
    where: str


class LikelihoodQuestions(Questions):
    """Questions with given answers.

    Of several answers, the model should give the correct one the highest likelihood per token. A single answer is
    correct if it is the likeliest text.
    """

    def __init__(self, questions: Sequence[WithAnswers], choose: bool, reader: Reader, max_seq_len: int) -> None:
        self._choose = choose
        self._gold = [question.gold for question in questions]
        self._spans: list[range] = []  # the spans of each question's continuations
        self.continuations: list[Continuation] = []
        prompts = reader.openings([question.prompt for question in questions])
        asked = [pair for question in questions for pair in question.asked]
        contexts = iter(reader.ids([context for context, _ in asked]))
        answers = iter(reader.ids([reader.spaced(answer) for _, answer in asked]))
        for question, prompt in zip(questions, prompts, strict=True):
            start = len(self.continuations)
            for _ in question.asked:
                context, answer = prompt + next(contexts), next(answers)
                if not context or not 0 < len(answer) < max_seq_len:
                    raise ConfigError(
                        f"{question.where}: {'nothing stands before the answer' if not context else 'the answer'} "
                        f"({len(answer)} tokens) cannot be judged in rows of {max_seq_len} tokens"
                    )
                self.continuations.append(Continuation((context + answer)[-max_seq_len:], len(answer)))
            self._spans.append(range(start, len(self.continuations)))

    def __len__(self) -> int:
        return len(self._spans)

    def ask(self, model: CausalLM, ranks: Ranks) -> list[Judged] | None:
        """As `Questions.ask`.

        The confidence is the largest mean probability divided by the sum over all answers; for a single answer, the
        lowest of the probabilities of the likeliest tokens.
        """
        found = likelihood(model, self.continuations, ranks)
        if found is None:
            return None
        lengths = [item.n for item in self.continuations]
        nats, greedy, lowest_top, mean = (values.tolist() for values in found)
        if not self._choose:
            return [
                Judged(bool(greedy[own.start]), lowest_top[own.start], bool(greedy[own.start])) for own in self._spans
            ]
        judged = []
        for own, gold in zip(self._spans, self._gold, strict=True):
            costs = [nats[i] / lengths[i] for i in own]
            means = [mean[i] for i in own]
            surest = means.index(max(means))
            judged.append(Judged(costs.index(min(costs)) == gold, means[surest] / (sum(means) or 1.0), surest == gold))
        return judged


class ToWrite(NamedTuple):
    """A question whose answer the model writes."""

    prompt: str  # solved examples, or empty
    context: str
    answers: list[str]  # any of these is correct


class Judging(NamedTuple):
    """Which part of a written text is the answer, and when it is correct."""

    stops: list[str]  # the answer ends before the first of these
    after: str  # the answer follows the last of these; "": everything is the answer
    normalize: bool  # compare lower case words, without articles and punctuation

    def is_right(self, text: str, answers: Sequence[str]) -> bool:
        """Return whether a text starts with one of the answers."""
        if self.stops:
            text = re.split("|".join(map(re.escape, self.stops)), text)[0]
        if self.after:
            text = text.split(self.after)[-1]
        clean = normalized if self.normalize else str.strip
        return any(clean(text).startswith(clean(answer)) for answer in answers)


class WrittenQuestions(Questions):
    """Questions whose answers the model writes, by greedy decoding."""

    def __init__(
        self, questions: Sequence[ToWrite], judging: Judging, reader: Reader, max_seq_len: int, max_new_tokens: int
    ) -> None:
        self._judging, self._reader = judging, reader
        self._answers = [question.answers for question in questions]
        keep = max(max_seq_len - max_new_tokens, 1)
        prompts = reader.openings([question.prompt for question in questions])
        contexts = reader.ids([question.context for question in questions])
        self._prompts = [
            Prompt((prompt + context)[-keep:] or [reader.tokenizer.eos_token_id], max_new_tokens)
            for prompt, context in zip(prompts, contexts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._prompts)

    def ask(self, model: CausalLM, ranks: Ranks) -> list[Judged] | None:
        """As `Questions.ask`."""
        written = continue_all(
            model, self._prompts, ranks, stop={self._reader.tokenizer.eos_token_id}, done=self._is_done
        )
        if written is None:
            return None
        texts = (self._decoded(ids) for ids in written)
        return [Judged(self._judging.is_right(text, own)) for text, own in zip(texts, self._answers, strict=True)]

    def _is_done(self, number: int, ids: list[int]) -> bool:
        return bool(self._judging.stops) and any(stop in self._decoded(ids) for stop in self._judging.stops)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._reader.tokenizer.decode(ids, skip_special_tokens=True))


def normalized(text: str) -> str:
    """Words in lower case without articles and punctuation: the form in which answers are compared.

    Source: Joshi et al. 2017, TriviaQA, arXiv:1705.03551.
    """
    words = text.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", words).split())


def draw_examples(n_rows: int, n_examples: int, asked: int, dice: random.Random) -> set[int]:
    """Draw the solved examples that precede a question, with the same draws as LLM Foundry.

    The question itself is never drawn. There are fewer than `n_examples` if there are fewer other rows. The order is
    that of the set.
    """
    if n_examples == 0:
        return set()
    drawn = set(dice.sample(range(n_rows), min(n_examples, n_rows - 1)))
    if asked in drawn:
        drawn.remove(asked)
        while (other := dice.choice(range(n_rows))) in drawn or other == asked:
            pass
        drawn.add(other)
    return drawn
