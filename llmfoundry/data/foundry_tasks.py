"""Convert rows of some hub datasets as LLM Foundry does: values of `preprocessing_fn` of `finetuning` data.

Each function takes a row and returns one of a known format (data/conversations.py). A row that has none of the expected
columns (e.g. of a copy of the dataset that was prepared before) is returned unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

from llmfoundry.data.tables import Row

Function = Callable[[Row], Row]

_TASK = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ANSWER = "### Response:"


def _reads(*columns: str) -> Callable[[Function], Function]:
    def of(function: Function) -> Function:
        @functools.wraps(function)
        def changed(row: Row) -> Row:
            return row if row.keys().isdisjoint(columns) else function(row)

        return changed

    return of


@_reads("text")
def alpaca(row: Row) -> Row:
    """Split the column `text` at the mark before the answer."""
    text = _text(row, "text")
    prompt, mark, response = text.partition(_ANSWER)
    if not mark or _ANSWER in response:
        raise ValueError(f"text: must hold {_ANSWER!r} once, found {text!r:.80}")
    return {"prompt": prompt + mark, "response": response}


@_reads("instruction", "input", "output")
def dolly(row: Row) -> Row:
    """Convert an instruction with an optional input, and its output."""
    context = _text(row, "input")
    instruction = "\n".join([_text(row, "instruction"), *([context] if context else [])])
    return {"prompt": _TASK.format(instruction=instruction), "response": _text(row, "output")}


@_reads("inputs", "targets")
def p3(row: Row) -> Row:
    """Convert inputs, to which a colon is appended, and targets."""
    return {"prompt": _text(row, "inputs") + ":", "response": _text(row, "targets")}


@_reads("inputs", "targets")
def flan(row: Row) -> Row:
    """Convert inputs and targets, separated by white space."""
    prompt, response = _text(row, "inputs"), _text(row, "targets")
    space = "" if prompt.endswith((" ", "\n", "\t")) or response.startswith((" ", "\n", "\t")) else " "
    return {"prompt": prompt, "response": space + response}


@_reads("conversations")
def sharegpt(row: Row) -> Row:
    """Convert turns with `from` and `value`."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = cast(list[Row], row["conversations"])
    return {"messages": [{"role": roles.get(str(t["from"]), t["from"]), "content": t["value"]} for t in turns]}


@_reads("Q", "A")
def question_and_answer(row: Row) -> Row:
    """Convert the columns `Q` and `A` to a conversation."""
    said = (("user", _text(row, "Q")), ("assistant", _text(row, "A")))
    return {"messages": [{"role": role, "content": text} for role, text in said]}


@_reads("messages")
def messages(row: Row) -> Row:
    """Keep only the column `messages`."""
    return {"messages": row["messages"]}


TASKS = {
    "tatsu-lab/alpaca": alpaca,
    "HuggingFaceH4/databricks_dolly_15k": dolly,
    "bigscience/P3": p3,
    "Muennighoff/P3": flan,
    "Muennighoff/flan": flan,
    "teknium/OpenHermes-2.5": sharegpt,
    "math-ai/StackMathQA": question_and_answer,
    "AI-MO/NuminaMath-CoT": messages,
}


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column}: must be text, found {value!r:.80}")
    return value
