"""Turn conversations into tokens, with a flag for each token that is learned.

The tokenizer's own chat template renders the messages (transformers runs it in jinja's sandbox). If the template marks
what the assistant says (`{% generation %}`), those marks count. Otherwise data/assistant_turns.py finds each turn in
the rendered text, or the example is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Literal, NamedTuple, cast

import numpy as np
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llmfoundry.config import ConfigError
from llmfoundry.data.assistant_turns import PROBE, Span, Turns, is_answer
from llmfoundry.data.conversations import Conversation, Example, Message, Tokenized
from llmfoundry.data.limits import SECONDS, Exceeded, bounded
from llmfoundry.data.tables import lone_surrogate
from llmfoundry.data.tool_calls import Arguments, in_form, leaves_out_calls, understood

# For tokenizers without a template.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Exceptions that a template raises for messages that it cannot render.
REFUSALS = (
    TemplateError, SyntaxError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError,
)  # fmt: skip
CHARACTERS = 2**26  # maximum length of a rendered text
SECONDS_OF_MESSAGE = 0.1  # in addition to SECONDS: each turn is searched in several renderings of the conversation
# Texts that look like special tokens, although the tokenizer may not define them.
_SPECIAL = re.compile(r"<[|｜][^<>|｜{}'\"\s]+[|｜]>")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Responses = Literal["all", "last"]


class Tokens(NamedTuple):
    """A tokenized example."""

    ids: NDArray[np.int64]  # (n,)
    learned: NDArray[np.bool_]  # (n,) whether the token is a label
    inside: int = 0  # assistant turns that are rendered differently inside a conversation than at its end
    without_calls: bool = False  # whether the template omits tool calls


class _Said(NamedTuple):
    """A rendered conversation."""

    text: str
    spans: list[Span]  # learned spans, in characters
    answers: list[Span]  # everything that the assistant says
    inside: int  # as in Tokens
    without_calls: bool


class Targets(NamedTuple):
    """Which parts of an example are learned."""

    responses: Responses = "all"
    prompts: int | None = None  # prompts of this many tokens or more are learned too; None: never
    by_turn: bool = False  # tokenize turns one by one, each with all that the template writes after its answer
    skips_empty: bool = False  # whether an empty prompt or answer leaves nothing to learn


class _Turn(NamedTuple):
    """An answer, and what comes before it, as token ids."""

    prompt: Sequence[int]
    answer: Sequence[int]
    learned: bool = True  # whether the answer is learned, if answers at its position are


class Renderer:
    """Tokenizes examples.

    Args:
        template: replaces the tokenizer's own template; ChatML is used if both are missing.
        bos: opens a prompt that no template renders.

    Raises:
        ConfigError: if the tokenizer cannot map tokens to characters, or the template is not valid Jinja.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, targets: Targets, template: str | None = None, bos: int | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer: {type(tokenizer).__name__} cannot say which characters a token stands for, as finetuning "
                "needs; use one with a tokenizer.json"
            )
        self.tokenizer, self.targets, self._bos = tokenizer, targets, bos
        own = tokenizer.chat_template
        if template is None and isinstance(own, dict):
            own = own.get("default")
        self.own = template is None and own is not None  # whether the template belongs to the tokenizer
        self.template = template or (own if isinstance(own, str) else CHATML)
        self._eos = str(tokenizer.eos_token)
        tokens = [str(entry.content) for entry in tokenizer.added_tokens_decoder.values()]
        self._special = {*tokens, *_SPECIAL.findall(self.template)}
        self._check_syntax()
        self._marks = _GENERATION.search(self.template) is not None

    def _check_syntax(self) -> None:
        where = "the tokenizer's chat template" if self.own else "dataset.chat_template"
        try:
            question: list[Message] = [{"role": "user", "content": "x"}]
            bounded(partial(rendered, self.tokenizer, self.template, Conversation(question), prompt=False))
        except (TemplateSyntaxError, SyntaxError) as error:
            said = error.message if isinstance(error, TemplateSyntaxError) else error.msg
            raise ConfigError(f"{where}: line {error.lineno}: {said}") from None
        except Exceeded as error:
            raise ConfigError(f"{where}: {error} for one message") from None
        except REFUSALS:  # it may require other messages
            pass

    @cached_property
    def _last_id(self) -> int:
        return max(self.tokenizer.get_vocab().values())

    @cached_property
    def _probed(self) -> _Said | None:
        """A rendered conversation whose answer is PROBE; None if the template refuses it, as it may lack something."""
        try:
            return self._said(Conversation([{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]))
        except (ValueError, Exceeded):
            return None

    @property
    def writes_answers(self) -> bool:
        """Whether the text of an answer is rendered. Some templates expect a list of parts instead, and omit a text."""
        return self._probed is None or PROBE in self._probed.text

    @property
    def ends_answers(self) -> bool:
        """Whether something after an answer is learned; otherwise a model never stops by itself."""
        said = self._probed
        return said is None or not said.text[: max((end for _, end in said.spans), default=0)].rstrip().endswith(PROBE)

    def tokens(self, example: Example) -> Tokens:
        """Tokenize one example.

        Raises:
            ValueError: if the template refuses the example, or does not render turns one after the other.
        """
        if isinstance(example, Tokenized):
            largest = max((i for turn in example.turns for ids in turn for i in ids), default=0)
            if largest > self._last_id:
                raise ValueError(
                    f"has the token {largest}, and the tokenizer ends at {self._last_id}; name the tokenizer that made "
                    "it, or set dataset.token_encoding_type"
                )
            return self._joined([_Turn(prompt, answer) for prompt, answer in example.turns])
        if isinstance(example, Conversation):
            turns = self._turns(example) if self.targets.by_turn else None
            return self._conversation(example) if turns is None else self._joined(turns)
        prompt, response = (self._encoded(text)["input_ids"] for text in example)
        prompt = prompt if self._bos is None else [self._bos, *prompt]
        return self._joined([_Turn(prompt, response)])

    def _joined(self, turns: Sequence[_Turn]) -> Tokens:
        """Concatenate turns, and add an end-of-text token if the last does not end with one."""
        ids, learned = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
        least, eos = self.targets.prompts, self.tokenizer.eos_token_id
        for number, (prompt, answer, wanted) in enumerate(turns, 1):
            last = number == len(turns)
            wanted = wanted and (last or self.targets.responses == "all")
            if last and (len(answer) == 0 or answer[-1] != eos):
                answer = [*answer, eos]
            ids += [np.asarray(prompt, dtype=np.int64), np.asarray(answer, dtype=np.int64)]
            learns = least is not None and len(prompt) >= least
            learned += [np.full(len(prompt), learns), np.full(len(answer), wanted)]
        if self.targets.skips_empty and any(len(turn.prompt) == 0 or len(turn.answer) == 0 for turn in turns):
            learned = [np.zeros(sum(map(len, ids)), np.bool_)]
        return Tokens(np.concatenate(ids), np.concatenate(learned))

    def _turns(self, example: Conversation) -> list[_Turn] | None:
        """Return the turns that end with an answer; None if the template does not render them one after the other."""
        if example.tools or any("tool_calls" in message for message in example.messages):
            return None
        seconds = SECONDS + SECONDS_OF_MESSAGE * len(example.messages)
        try:
            texts = bounded(partial(self._texts_of_turns, example), seconds)
        except Exceeded as error:
            raise ValueError(f"the chat template {error}") from None
        except ValueError:
            return None  # the template refuses a part of the messages
        if texts is None:
            return None
        ids = {i: [self._encoded(text)["input_ids"] for text in pair] for i, pair in texts.items()}
        return [_Turn(prompt, answer, _is_learned(example.messages[i])) for i, (prompt, answer) in ids.items()]

    def _texts_of_turns(self, example: Conversation) -> dict[int, tuple[str, str]] | None:
        found, before = {}, ""
        for i, message in enumerate(example.messages):
            if not is_answer(message):
                continue
            opened = self._render(example, example.messages[:i], True)
            after = self._render(example, example.messages[: i + 1])
            if not (opened.startswith(before) and after.startswith(opened)):
                return None
            found[i] = opened.removeprefix(before), after.removeprefix(opened)
            before = after
        return found

    def _conversation(self, example: Conversation) -> Tokens:
        try:
            seconds = SECONDS + SECONDS_OF_MESSAGE * len(example.messages)
            text, spans, answers, inside, without = bounded(partial(self._said, example), seconds)
        except Exceeded as error:
            raise ValueError(f"the chat template {error}") from None
        encoded = self._encoded(text)
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        learned = _overlaps(offsets, spans)
        if self.targets.prompts is not None:
            learned |= _long_runs(~_overlaps(offsets, answers), self.targets.prompts)
        return Tokens(np.array(encoded["input_ids"], dtype=np.int64), learned, inside, without)

    def _said(self, example: Conversation) -> _Said:
        """Render a conversation and find the spans that are learned."""
        example = example._replace(messages=in_form(example.messages, self._arguments))
        messages = example.messages
        text = self._render(example, messages)
        without = not any(self._arguments) and leaves_out_calls(messages, text, partial(self._render, example))
        turns = Turns(lambda chat, prompt: self._render(example, chat, prompt), self._eos, self._special)
        spans: list[Span]
        answers: list[Span]
        inside = 0
        if self._marks and self.targets.responses == "all" and all(_is_learned(message) for message in messages):
            spans = answers = self._marked(example)
        else:
            if self._marks:
                of_turn = turns.shares(messages, text, self._marked(example))
            else:
                found = {i: turns.find(messages, text, i) for i, each in enumerate(messages) if is_answer(each)}
                of_turn = {i: [turn.span] for i, turn in found.items()}
                inside = sum(turn.inside for turn in found.values())
            answers = [span for turn in of_turn.values() for span in turn]
            chosen = [i for i in sorted(of_turn) if _is_learned(messages[i])]
            spans = [span for i in (chosen if self.targets.responses == "all" else chosen[-1:]) for span in of_turn[i]]
        return _Said(text, spans, answers, inside, without)

    def _encoded(self, text: str) -> BatchEncoding:
        if found := lone_surrogate(text):
            raise ValueError(f"has a lone surrogate, {found!r}, which is not a valid character")
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    @cached_property
    def _arguments(self) -> Arguments:
        return understood(lambda messages: self._render(Conversation(list(messages)), messages))

    def _render(self, example: Conversation, messages: Sequence[Message], prompt: bool = False) -> str:
        return self._rendered(example, messages, prompt)[0]

    def _marked(self, example: Conversation) -> list[Span]:
        """Return the spans, in characters, that the template marks as the assistant's."""
        return self._rendered(example, example.messages, False, marks=True)[1]

    def _rendered(
        self, example: Conversation, messages: Sequence[Message], prompt: bool, marks: bool = False
    ) -> tuple[str, list[Span]]:
        """Render with `tokenizer.apply_chat_template`; with `marks`, also return the spans that the template marks."""
        template = self.tokenizer.get_chat_template(None if self.own else self.template, example.tools)
        try:
            return rendered(self.tokenizer, template, example._replace(messages=list(messages)), prompt, marks)
        except Exceeded:
            raise
        except REFUSALS as error:
            raise ValueError(f"the chat template refuses it: {error}") from error


def _is_learned(message: Message) -> bool:
    return bool(message.get("weight", 1))


def rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, example: Conversation, prompt: bool, marks: bool = False
) -> tuple[str, list[Span]]:
    """Render with `tokenizer.apply_chat_template`; with `marks`, also return the spans that the template marks.

    Args:
        prompt: open the assistant's turn at the end.

    Raises:
        TemplateError: if the template refuses the messages. Errors of its own code, such as TypeError, pass through.
        Exceeded: if the text is longer than CHARACTERS.
    """
    words: dict = {**tokenizer.special_tokens_map, **example.template}
    found: object = render_jinja_template(  # (texts, spans of each), although it is annotated as str
        [list(example.messages)], tools=list(example.tools) if example.tools else None, chat_template=template,
        return_assistant_tokens_mask=marks, add_generation_prompt=prompt, **words,
    )  # fmt: skip
    texts, spans = cast(tuple[list[str], list[list[Span]]], found)
    if len(texts[0]) > CHARACTERS:
        raise Exceeded(f"writes more than {CHARACTERS:,} characters")
    return texts[0], spans[0] if marks else []


def _overlaps(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """For each token, whether it overlaps one of the spans."""
    found = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        found |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return found


def _long_runs(marks: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Keep only the marks that are in runs of at least `least` consecutive marks."""
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False])).astype(np.int8)))
    found = np.zeros_like(marks)
    for start, end in bounds.reshape(-1, 2):
        found[start:end] = end - start >= least
    return found
