"""EleutherAI's lm-evaluation-harness on llmfoundry models: its tasks, prompts and metrics, our forwards.

The whole harness runs on every rank with the same requests. Each request is answered by one rank and sent to all
(eval/likelihood.py). Importing this module needs the package `lm-eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.data.chat_template import REFUSALS
from llmfoundry.data.limits import bounded
from llmfoundry.eval.icl import Score
from llmfoundry.eval.icl_questions import Reader
from llmfoundry.eval.likelihood import Continuation, Prompt, Ranks, continue_all, likelihood, nats_of
from llmfoundry.eval.written import Written
from llmfoundry.model.transformer import CausalLM

MAX_NEW_TOKENS = 256  # default for requests without a limit, as in the harness
_NEW_TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the harness's names for it; the first takes precedence
Encoded = tuple[tuple[str, str], list[int], list[int]]  # a request, its context and its continuation


class Length(NamedTuple):
    """What a generation request asks for."""

    stops: list[str]
    max_new_tokens: int


@register_model("llmfoundry")
class FoundryLM(TemplateLM):  # type: ignore[misc, unused-ignore]  # its class where it is installed
    """The harness's interface to an llmfoundry model."""

    def __init__(self, model: CausalLM, reader: Reader, ranks: Ranks, max_length: int) -> None:
        """Wrap a model.

        Args:
            model: in evaluation mode, sharded or not; every rank calls this.
            max_length: maximum tokens of a forward; longer texts lose their beginning.
        """
        super().__init__()
        self.tokenizer = reader.tokenizer  # the harness asks for its chat template
        self.max_length = max_length
        self._model, self._reader, self._ranks = model, reader, ranks

    @property
    def eot_token_id(self) -> int:
        """The id of the end of text."""
        return int(self._reader.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The id that opens a document; it precedes a text without a context."""
        bos = self._reader.special.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's caches of requests."""
        return str(self._reader.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat as text."""
        render = partial(
            self._reader.tokenizer.apply_chat_template,
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(bounded(render))
        except REFUSALS as error:
            raise ConfigError(f"--apply-chat-template: the chat template refuses a question: {error}") from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Encode a text that starts a document, or part of one (`add_special_tokens=False`)."""
        (ids,) = self._reader.ids([string]) if add_special_tokens is False else self._reader.openings([string])
        return ids

    def _loglikelihood_tokens(self, requests: list[Encoded], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        items = [
            Continuation((context + continuation)[-self.max_length - 1 :], len(continuation))
            for _, context, continuation in requests
        ]
        for (texts, _, _), item in zip(requests, items, strict=True):
            if not 0 < item.n < len(item.ids):
                raise ConfigError(
                    f"--tasks: the continuation {texts[1][:80]!r} has {item.n} tokens, which cannot be judged in rows "
                    f"of {self.max_length}; raise icl_seq_len"
                )
        found = likelihood(self._model, items, self._ranks)
        assert found is not None
        return [(-nats, bool(greedy)) for nats, greedy in zip(found.nats.tolist(), found.greedy.tolist(), strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts. Each token is judged once, in windows of `max_length` tokens."""
        items: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length):
                items.append(window)
                owners.append(number)
        found = nats_of(self._model, items, self._ranks)
        assert found is not None
        sums = [0.0] * len(requests)
        for number, nats in zip(owners, found.tolist(), strict=True):
            sums[number] -= nats
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to the first of their stop strings."""
        lengths = [_length(request.args[1]) for request in requests]
        contexts = self._reader.openings([request.args[0] for request in requests])
        prompts = []
        for ids, length in zip(contexts, lengths, strict=True):
            keep = self.max_length - length.max_new_tokens
            if keep < 1:
                raise ConfigError(
                    f"--tasks: a text of {length.max_new_tokens} tokens is to be written, and rows have "
                    f"{self.max_length}; raise icl_seq_len"
                )
            prompts.append(Prompt(ids[-keep:] or [self.prefix_token_id], length.max_new_tokens))

        texts = [Written(self._reader.tokenizer, length.stops) for length in lengths]

        def is_done(number: int, ids: list[int]) -> bool:
            return texts[number].add(ids[-1])

        written = continue_all(self._model, prompts, self._ranks, stop={self.eot_token_id}, done=is_done)
        assert written is not None
        found = (str(self._reader.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written)
        return [_cut(text, length.stops) for text, length in zip(found, lengths, strict=True)]


def windows(ids: Sequence[int], prefix: int, size: int) -> list[Continuation]:
    """Split a text into windows. Each token is judged once, after as much preceding text as fits.

    The first window starts with `prefix`; the last one judges what is left. The harness uses the same windows.
    """
    text = [prefix, *ids]
    found, judged = [], 1
    while judged < len(text):
        end = min(judged + size, len(text))
        found.append(Continuation(text[max(end - size - 1, 0) : end], end - judged))
        judged = end
    return found


def _length(wanted: Mapping[str, object]) -> Length:
    """Read a request's `gen_kwargs`.

    Raises:
        ConfigError: if the request asks for sampling, whose results are not reproducible.
    """
    temperature = wanted.get("temperature")
    if wanted.get("do_sample") and temperature != 0:
        raise ConfigError("--tasks: a task asks for sampled texts (do_sample), and only greedy ones are written here")
    until = wanted.get("until") or []
    stops = [until] if isinstance(until, str) else list(until) if isinstance(until, list | tuple) else []
    numbers = (wanted[key] for key in _NEW_TOKENS if isinstance(wanted.get(key), int))
    most = next(numbers, MAX_NEW_TOKENS)
    assert isinstance(most, int)
    return Length([str(stop) for stop in stops if stop], most)


def _cut(text: str, stops: Sequence[str]) -> str:
    """Cut the text at its stop strings, one after the other, as the harness does."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def evaluate_harness(
    lm: FoundryLM,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Score]:
    """Run tasks of the harness; every rank calls this and gets the same scores.

    Args:
        tasks: names of tasks or groups.
        num_fewshot: number of solved examples; None: each task's default.
        limit: maximum number of questions per task.
        include_path: a folder with more tasks.
        apply_chat_template: render questions as the user's turns, and solved examples as the turns before them.

    Returns:
        Scores by `TASK/METRIC`. If a metric has several filters, its name includes the filter: `exact_match,strict-
        match`.

    Raises:
        ConfigError: if a task is unknown, or its data is not available.
    """
    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(f"--tasks: unknown {unknown[0]!r}; `lm-eval ls tasks` lists them, --include-path adds some")
    found = simple_evaluate(
        model=lm, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False,
        apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template,
    )  # fmt: skip
    return runtime.on_rank0(lambda: _scores(found or {}))  # the harness returns results on rank 0 only


def _scores(found: Mapping[str, Mapping[str, Mapping[str, object]]]) -> dict[str, Score]:
    """Return the harness's results by `TASK/METRIC`."""
    scores: dict[str, Score] = {}
    for task, metrics in found["results"].items():
        counted = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else key
            n = counted if isinstance(counted, int) else 0
            scores[f"{task}/{name}"] = Score(float(value), error if isinstance(error, float) else None, n)
    return scores
