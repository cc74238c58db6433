"""Finetuning: labels as TRL's, formats, packing, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfoundry.code import refuse_code
from llmfoundry.config import ConfigError, check
from llmfoundry.data import IGNORE, ChatsConfig, LoaderConfig
from llmfoundry.data.bins import BUFFER, best_fit
from llmfoundry.data.chat_template import Renderer, Targets
from llmfoundry.data.conversations import Conversation, Pair, example_of, preprocess
from llmfoundry.data.mds import MDSWriter
from tests.data.chat_templates import MARKED, plain
from tests.data.chat_tokenizer import PLAIN, TOOLS, WITH_TOOLS, tokenizer, turns

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def labels_of_trl(template: str, rows: list[dict[str, object]], folder: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of TRL's assistant_only_loss."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    own = tokenizer(template)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    args = trl.SFTConfig(str(folder), assistant_only_loss=True, max_length=None, use_cpu=True, report_to=[])
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(own), **shape)), args, train_dataset=Dataset.from_list(rows),
        processing_class=own,
    )  # fmt: skip
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


ROWS: dict[str, dict[str, object]] = {
    about: {"messages": chat, "tools": TOOLS if about in WITH_TOOLS else None}
    for about, chat in {**PLAIN, **WITH_TOOLS}.items()
}


def refused(template: str, row: dict[str, object]) -> bool:
    """Whether transformers, and so TRL, raises for a conversation."""
    try:
        tokenizer(template).apply_chat_template(row["messages"], tools=row["tools"])
    except Exception:  # whatever a template's code raises
        return True
    return False


def ours(renderer: Renderer, row: dict[str, object]) -> tuple[list[int], list[int]]:
    found = renderer.tokens(example_of(row))
    return found.ids.tolist(), np.where(found.learned, found.ids, IGNORE).tolist()


# Templates with {% generation %}, and (llama3, phi3) without: TRL then takes its own with marks.
@pytest.mark.parametrize("name", ["qwen2_5_training", "qwen3_training", "llama3", "llama3_training", "phi3"])
def test_labels_are_those_of_trl(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    rows = [row for row in ROWS.values() if not refused(template, row)]
    assert len(rows) >= len(ROWS) - 1  # phi3 needs a content in each turn
    renderer = Renderer(tokenizer(template), Targets())
    assert [ours(renderer, row) for row in rows] == labels_of_trl(template, rows, tmp_path)


# Templates whose turns change inside a conversation, or begin before the first token of an answer.
@pytest.mark.parametrize("name", MARKED)
def test_turns_without_marks_are_learned_as_trl_learns_marked_ones(name: str, tmp_path: Path) -> None:
    as_text = json.loads(json.dumps(ROWS))  # what DeepSeek's template takes: TRL raises for mappings
    for row in as_text.values() if name == "deepseek" else ():
        for message in row["messages"]:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    both = {about: (ROWS[about], row) for about, row in as_text.items() if not refused(MARKED[name], row)}
    assert len(both) == len(ROWS) - (4 if name == "gemma" else 0)  # it takes no system message
    marked, without = (Renderer(tokenizer(each), Targets()) for each in (MARKED[name], plain(name)))
    wanted = labels_of_trl(MARKED[name], [row for _, row in both.values()], tmp_path)
    for (about, (row, _)), (ids, labels) in zip(both.items(), wanted, strict=True):
        assert ours(marked, row) == (ids, labels)
        if (name, about) == ("harmony", "two answers in a row"):
            with pytest.raises(ValueError, match="does not render message 2 at the end as it does inside"):
                ours(without, row)
            continue
        found = ours(without, row)
        assert found[0] == ids and found[1][1:] == labels[1:]  # the first token is never a label


# Some open a thought together with the turn, or write special tokens that the tokenizer does not know.
@pytest.mark.parametrize("name", ["nemotron_3_nano", "qwen3_8", "qwen3_5_think", "lfm2_v2", "cohere2"])
def test_templates_of_trl_without_its_marks_have_the_same_labels(name: str) -> None:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    marked, without = ((folder / f"{name}{end}.jinja").read_text() for end in ("_training", ""))
    own = tokenizer(marked)
    renderers = [Renderer(tokenizer(template), Targets()) for template in (marked, without)]
    rows = [row for row in ROWS.values() if not refused(marked, row) and not refused(without, row)]
    rows = [row for row in rows if row["messages"][0]["role"] != "assistant"]  # Qwen's need a question before
    compared = 0
    for row in rows:
        found = own.apply_chat_template(
            row["messages"], tools=row["tools"], return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        labels = [token if mark else IGNORE for token, mark in pairs]
        for renderer in renderers:
            ids, learned = ours(renderer, row)
            if ids == found["input_ids"]:  # TRL keeps thoughts inside of conversations that some templates leave out
                assert learned[1:] == labels[1:]
                compared += 1
    assert compared >= 1.3 * len(rows)


@pytest.mark.parametrize("form", ["chatml", "qwen"])
def test_marked_turns_are_chosen_too(form: str) -> None:
    last = [turn | {"weight": 0} if turn["content"] == "d" else turn for turn in turns("a", "b", "c", "d")]
    for template in (MARKED[form], plain(form)):
        assert "b" not in learned(template, {"messages": turns("a", "b", "c", "d")}, responses="last")
        assert learned(template, {"messages": last}) == "b<|im_end|>\n"


def test_a_template_may_mark_several_parts_of_a_turn() -> None:
    parts = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% if m.reasoning_content %}{% generation %}"
        "({{ m.reasoning_content }}){% endgeneration %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}<|end|>"
    )
    thought = {"role": "assistant", "content": "b", "reasoning_content": "x"}
    chat = [turns("a")[0], thought, *turns("c", "d"), turns("e")[0], thought | {"content": "f"}]
    assert learned(parts, {"messages": chat}) == "(x)bd(x)f"
    assert learned(parts, {"messages": chat}, responses="last") == "(x)f"
    assert learned(parts, {"messages": [*chat[:-1], thought | {"weight": 0}]}) == "(x)bd"
    in_a_row = [turns("a")[0], thought, {"role": "assistant", "content": "d", "weight": 0}]
    with pytest.raises(ValueError, match="marks 3 parts in the 2 turns from message 1 on; whose they are is not known"):
        learned(parts, {"messages": in_a_row})


def with_call(arguments: object, **call: object) -> dict[str, object]:
    message = call or {"tool_calls": [{"type": "function", "function": {"name": "w", "arguments": arguments}}]}
    return {"messages": [turns("a")[0], {"role": "assistant", "content": None, **message},
                         {"role": "function" if call else "tool", "name": "w", "content": "sun"},
                         {"role": "assistant", "content": "b"}]}  # fmt: skip


def test_calls_that_a_template_leaves_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "calls.jsonl"
    silent = json.dumps(with_call({"city": "Bern"})).replace('"content": null', '"content": ""')
    path.write_text(silent + "\n" + json.dumps({"messages": turns("a", "b")}) + "\n")
    with caplog.at_level("INFO"):
        loader(tmp_path, path=str(path))
        assert "in 1 the chat template leaves out tool calls" in caplog.text
        caplog.clear()
        with_calls = CHATML.replace("+ message['content']", "~ message.tool_calls ~ message['content']")
        loader(tmp_path, path=str(path), template=with_calls)
        assert "2 examples" in caplog.text and "leaves out" not in caplog.text


def test_arguments_of_calls_come_in_the_form_that_a_template_takes() -> None:
    call, text = {"city": "Zürich"}, '{"city": "Zürich"}'
    written = f"[CALL]w{text}<|endoftext|>"
    for arguments in (call, text):  # tojson of a text would be a text of a text
        assert written in learned(plain("mistral"), with_call(arguments))
        assert f"w\n{text}<|endoftext|>" in learned(plain("deepseek"), with_call(arguments))
        assert f'"arguments": {text}' in learned(plain("qwen"), with_call(arguments))
    old = with_call(None, function_call={"name": "w", "arguments": text})
    assert learned(plain("mistral"), old) == learned(plain("mistral"), with_call(text)), "OpenAI's form of 2023"
    with pytest.raises(ValueError, match="message 1: arguments of a tool call must be JSON of a mapping, found '{'"):
        learned(plain("mistral"), with_call("{"))


def learned(template: str | None, example: object, **targets: object) -> str:
    own = tokenizer(template)
    found = Renderer(own, Targets(**targets)).tokens(example_of(example))
    return own.decode(found.ids[found.learned])


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": turns("a", "b", "c", "d")}, "b<|im_end|>\nd<|im_end|>\n"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "b<|im_end|>\n"),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"},
                            {"from": "assistant", "value": "b"}], "id": 7}, "b<|im_end|>\n"),
        ({"conversations": [{"from": "Human", "text": "a"}, {"from": "GPT", "text": "b"}]}, "b<|im_end|>\n"),
        ({"conversations": turns("a", "b")}, "b<|im_end|>\n"),
        ({"conversation": turns("a", "b"), "language": "English"}, "b<|im_end|>\n"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"text": " c"}]}]},
         "b c<|im_end|>\n"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "3<|im_end|>\n"),
        ({"instruction": "Add", "output": "3", "history": [["x", "y"]]}, "y<|im_end|>\n3<|im_end|>\n"),
        ({"instruction": "Add", "context": "1 2", "response": "3", "category": "x"}, "3<|im_end|>\n"),
        ({"prompt": "1 + 1 =", "response": " 2"}, " 2<|endoftext|>"),
        ({"prompt": "1 + 1 =", "completion": " 2"}, " 2<|endoftext|>"),
        ({"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]},
         "b<|im_end|>\nd<|im_end|>\n"),
        ({"messages": json.dumps(turns("a", "b"))}, "b<|im_end|>\n"),
        ({"messages": [*turns("a", "b", "c"), {"role": "assistant", "content": "d", "weight": 0}]}, "b<|im_end|>\n"),
    ],
)  # fmt: skip
def test_every_format_learns_the_answers(row: dict[str, object], text: str) -> None:
    assert learned(CHATML, row) == text


def test_instructions_and_their_input_are_one_message() -> None:
    alpaca = example_of({"instruction": "Add", "input": "1 2", "output": "3"})
    without = example_of({"instruction": "Add", "input": "", "output": "3", "system": "Be brief."})
    assert isinstance(alpaca, Conversation) and alpaca.messages[0]["content"] == "Add\n\n1 2"
    assert isinstance(without, Conversation)
    assert [message["content"] for message in without.messages] == ["Be brief.", "Add", "3"]
    assert example_of({"prompt": "a", "response": "b", "messages": None}) == Pair("a", "b")


def test_function_calls_of_sharegpt_are_calls_of_tools() -> None:
    call = {"name": "weather", "arguments": {"city": "Bern"}}
    said = [("human", "Weather?"), ("function_call", json.dumps(call)), ("observation", "sunny"), ("gpt", "It is.")]
    found = example_of({"conversations": [{"from": who, "value": value} for who, value in said]})
    assert isinstance(found, Conversation)
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": call}]


def test_what_is_learned_can_be_chosen() -> None:
    chat = {"messages": turns("first words", "b", "c", "d")}
    assert learned(CHATML, chat, responses="last") == "d<|im_end|>\n"
    everything = learned(CHATML, chat, prompts=0)
    assert everything.startswith("<|im_start|>user\nfirst words") and everything.endswith("d<|im_end|>\n")
    assert learned(CHATML, chat, prompts=1000) == learned(CHATML, chat)
    assert learned(CHATML, {"prompt": "a b c", "response": "d"}, prompts=1) == "a b cd<|endoftext|>"


def foundrys(example: dict[str, object], prompts: int | None, responses: str) -> tuple[list[int], list[int]]:
    """Token ids and labels by the rule of LLM Foundry: each turn is tokenised by itself, and the last ends the text."""
    own = tokenizer(CHATML)
    said, before = [], ""
    chat = example.get("messages", [])
    for i in range(len(chat)):
        if chat[i]["role"] == "assistant":
            opened = own.apply_chat_template(chat[:i], tokenize=False, add_generation_prompt=True)
            after = own.apply_chat_template(chat[: i + 1], tokenize=False)
            said.append((opened[len(before) :], after[len(opened) :]))
            before = after
    said = said or [(example["prompt"], example["response"])]
    ids, labels = [], []
    for number, texts in enumerate(said, 1):
        prompt, answer = (own(text, add_special_tokens=False)["input_ids"] for text in texts)
        if number == len(said) and answer[-1] != own.eos_token_id:
            answer = [*answer, own.eos_token_id]
        ids += prompt + answer
        labels += prompt if prompts is not None and len(prompt) >= prompts else [IGNORE] * len(prompt)
        labels += answer if responses == "all" or number == len(said) else [IGNORE] * len(answer)
    return ids, labels


@pytest.mark.parametrize("prompts", [None, 0, 12])
@pytest.mark.parametrize("responses", ["all", "last"])
def test_turns_are_learned_as_llm_foundry_learns_them(responses: str, prompts: int | None) -> None:
    renderer = Renderer(tokenizer(CHATML), Targets(responses, prompts, by_turn=True, skips_empty=True))
    for example in (
        {"messages": turns("!Be", "cat", "sees", "the owl likes many things", "all")},
        {"messages": turns("a", "", "b", "c")},
        {"messages": [*turns("a", "b", "c"), {"role": "tool", "content": "t"}, {"role": "assistant", "content": "d"}]},
        {"prompt": "The cat", "response": " sees"},
        {"prompt": "The cat", "response": " sees<|endoftext|>"},
    ):
        assert ours(renderer, example) == foundrys(example, prompts, responses)
    for pair in ({"prompt": "", "response": "a"}, {"prompt": "a", "response": ""}):
        assert not renderer.tokens(example_of(pair)).learned.any(), "left out"


def test_prompts_are_learned_by_the_length_of_each_and_not_the_answers_between() -> None:
    chat = {"messages": turns("a", "first", "b c d e f g h i j k", "second")}
    said = learned(CHATML, chat, responses="last", prompts=12)
    assert "first" not in said and "<|im_start|>user\na<" not in said and "b c d" in said and "second" in said


@pytest.mark.parametrize("row", [
    {"turns": [{"input_ids": [5, 6], "labels": [7]}, {"input_ids": [8], "labels": [9]}]},
    {"input_ids": np.array([5, 6, 7, 8]), "labels": np.array([9])},
])  # fmt: skip
def test_tokens_of_llm_foundrys_conversion_are_an_example(row: dict[str, object]) -> None:
    renderer = Renderer(tokenizer(CHATML), Targets("last"))
    ids, labels = ours(renderer, row)
    assert ids == [5, 6, 7, 8, 9, renderer.tokenizer.eos_token_id]
    assert labels == [IGNORE] * 4 + ids[4:]
    with pytest.raises(ValueError, match="turn 0: labels: must be a list of token ids, found None"):
        example_of({"turns": [{"input_ids": [1]}]})


def test_a_tokenizer_without_template_gets_chatml() -> None:
    assert learned(None, {"messages": turns("!s", "a", "b")}) == "b<|im_end|>"


def test_a_template_that_teaches_no_stop_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GLM-4 ends an answer by opening the next turn; and marks may leave the end out."""
    open_ended = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
    unmarked_end = MARKED["chatml"].replace(" + '<|im_end|>\\n' }}{% endgen", " }}{% endgen", 1)
    for template in (CHATML, *MARKED.values(), *map(plain, MARKED)):
        assert Renderer(tokenizer(template), Targets()).ends_answers, template
    for template in (open_ended, unmarked_end):
        assert not Renderer(tokenizer(template), Targets()).ends_answers
    loader(tmp_path, template=open_ended, path=str(write_lines(tmp_path / "train.jsonl", chats(5))))
    assert "does not learn to stop" in caplog.text


def test_a_template_that_omits_texts_is_refused(tmp_path: Path) -> None:
    """Templates of vision models iterate over parts, and write nothing for a text (SmolVLM, Idefics 3)."""
    of_parts = CHATML.replace(
        "message['content']", "(message['content'] | selectattr('text') | map(attribute='text') | join)"
    )
    path = str(write_lines(tmp_path / "train.jsonl", chats(5)))
    with pytest.raises(ConfigError, match="the tokenizer's chat template: does not write the text of an answer"):
        loader(tmp_path, template=of_parts, path=path)


def test_a_template_that_is_given_stays_with_the_tokenizer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", chats(5))
    config = check(LoaderConfig, {"name": "finetuning", "dataset": {"path": str(path), "chat_template": CHATML,
                                                                   "cache_dir": str(tmp_path / "c")}})  # fmt: skip
    own = tokenizer()
    first = config.build(own, seed=0, max_seq_len=64, sequence_ids=True)
    assert own.chat_template == CHATML, "checkpoints carry it"
    assert config.build(own, seed=0, max_seq_len=64, sequence_ids=True).fingerprint == first.fingerprint


def test_turns_that_are_rendered_otherwise_inside_are_found_or_refused() -> None:
    four = {"messages": turns("a", "b", "c", "d")}
    thinking = CHATML.replace("message['content']", "('(thought) ' if loop.last else '') + message['content']")
    counted = CHATML.replace("{% for", "{{ messages | length }}{% for")
    assert learned(thinking, four) == "b<|im_end|>\n(thought) d<|im_end|>\n"
    assert learned(counted, four) == "b<|im_end|>\nd<|im_end|>\n"
    only_last = CHATML.replace("in messages", "in messages[-1:]")
    reversed_order = CHATML.replace("in messages", "in messages | reverse")
    for template in (only_last, reversed_order):
        with pytest.raises(ValueError, match="does not render message 1 at the end as it does inside the conversation"):
            learned(template, four)


def test_how_many_answers_change_inside_a_conversation_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a", "b", "c", "d")}]
    path = write_lines(tmp_path / "train.jsonl", rows)
    with caplog.at_level("INFO"):
        loader(tmp_path, path=str(path), template=plain("qwen"))
        assert "in 1 the chat template renders answers inside a conversation differently than at its end" in caplog.text
        caplog.clear()
        loader(tmp_path, path=str(path))
        assert "with nothing to learn left out" in caplog.text and "otherwise" not in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has the columns text, which match no known format"),
        ({"messages": turns("only the user")}, "has no turn of the assistant"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot' is not one of system, developer, user"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 0: content must be text, found 5"),
        ({"messages": [{"role": "user", "content": "a", "function_call": "x"}]}, "function_call: must have name and"),
        ({"messages": [{"role": "user", "tool_calls": "x"}]}, "message 0: tool_calls must be a list, found 'x'"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "message 0: has neither content nor tool_calls"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": "no"}]}, "message 0: weight must be 0"),
        ({"conversations": [{"from": "gpt", "value": "a", "weight": 2}]}, "message 0: weight must be 0"),
        ({"instruction": {"a": 1}, "output": "b"}, "instruction: must be text, found {'a': 1}"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, r"input: must be text, found \['x'\]"),
        ({"messages": [{"role": "user"}]}, "message 0: has neither content nor tool_calls"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a turn must have from"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "function_call: must be JSON with name"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0: has a part of type image; only"),
        ({"messages": turns("a", "b"), "system": ["c"]}, r"system: must be text, found \['c'\]"),
        (
            {"messages": turns("a", "b"), "chat_template_kwargs": "c"},
            "chat_template_kwargs: must be a mapping, found 'c'",
        ),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history: must be a list of pairs of texts"),
        ({"messages": turns("a", "b"), "tools": "{"}, "tools: is not JSON"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "for such pairs, set name: preferences"),
        ({"prompt": "a", "response": 1}, "response: must be a text or a list of turns, found 1"),
    ],
)
def test_rows_without_an_example_are_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example_of(row)


def write_lines(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(n: int, seed: int = 0) -> list[dict[str, object]]:
    """Conversations whose lengths are spread as in real sets: many short ones, few long ones."""
    rng = random.Random(seed)
    words = [[rng.choice("abcdefgh") for _ in range(int(rng.lognormvariate(2, 1)) + 1)] for _ in range(n)]
    return [{"messages": turns(f"number {i}", " ".join(said))} for i, said in enumerate(words)]


def loader(tmp_path: Path, length: int = 64, *, documents: bool = True, template: str = CHATML, **dataset: object):
    whole = {"cache_dir": str(tmp_path / "c"), "validation_fraction": 0.0 if dataset.get("split") != "test" else 1.0}
    config = check(LoaderConfig, {"name": "finetuning", "dataset": whole | dataset})
    return config.build(tokenizer(template), seed=0, max_seq_len=length, sequence_ids=documents)


@pytest.mark.parametrize("n", [2, 3, 30])
def test_of_few_chats_some_are_held_out(tmp_path: Path, n: int, caplog: pytest.LogCaptureFixture) -> None:
    path = str(write_lines(tmp_path / "chats" / "a.jsonl", chats(n)))
    with caplog.at_level("INFO"):
        rows = [loader(tmp_path, path=path, split=split, validation_fraction=0.05, documents=False).rows_per_epoch
                for split in ("train", "validation")]  # fmt: skip
    assert min(rows) > 0 and sum(rows) == n
    assert "held out for validation: " in caplog.text


def test_of_one_chat_none_is_held_out(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "a.jsonl", chats(1)))
    with pytest.raises(ConfigError, match="a.jsonl: holds one row, or equal ones, so none can be held out"):
        loader(tmp_path, path=path, validation_fraction=0.05)


def test_packed_rows_hold_every_example_once_and_apart(tmp_path: Path) -> None:
    rows = chats(300)
    path = write_lines(tmp_path / "train.jsonl", rows)
    found = loader(tmp_path, path=str(path), shuffle=False)
    renderer = Renderer(tokenizer(CHATML), Targets())
    expected = sorted(
        (example.ids[:64].tolist(), np.where(example.learned, example.ids, IGNORE)[:64].tolist())
        for example in (renderer.tokens(example_of(row)) for row in rows)
    )
    batch = found.batch(0, found.rows_per_epoch)
    assert batch.sequence_ids is not None and batch.positions is not None
    seen = []
    for tokens, labels, ids, positions in zip(
        batch.tokens, batch.labels, batch.sequence_ids, batch.positions, strict=True
    ):
        for document in range(1, int(ids.max()) + 1):
            here = ids == document
            n = int(here.sum())
            assert torch.equal(positions[here], torch.arange(n))
            own = labels[here].tolist()
            assert own[-1] == IGNORE, "nothing is predicted across examples"
            seen.append((tokens[here].tolist(), [IGNORE, *own[:-1]]))
        assert (labels[ids == 0] == IGNORE).all()
    assert sorted(seen) == expected


def test_little_of_the_rows_is_empty(tmp_path: Path) -> None:
    found = loader(tmp_path, 512, path=str(write_lines(tmp_path / "train.jsonl", chats(2000))))
    batch = found.batch(0, found.rows_per_epoch)
    assert batch.sequence_ids is not None
    assert (batch.sequence_ids > 0).float().mean() >= 0.98


def test_without_document_masks_each_example_has_a_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", chats(20))
    found = loader(tmp_path, documents=False, path=str(path))
    assert found.rows_per_epoch == 20 and found.batch(0, 20).sequence_ids is None


def test_long_examples_are_cut_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": turns("a", "b " * 100)}, {"messages": turns("c " * 100, "d")}, {"messages": turns("e", "f")}]
    with caplog.at_level("INFO"):
        found = loader(tmp_path, path=str(write_lines(tmp_path / "train.jsonl", rows)))
    assert (
        "3 examples in 2 rows" in caplog.text and "2 were cut at max_seq_len=64, 1 with nothing to learn" in caplog.text
    )
    assert (found.batch(0, 2).labels != IGNORE).any(1).all()


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_fills_rows_and_forgets_none(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [min(512, 1 + int(rng.lognormvariate(4, 1))) for _ in range(BUFFER + 777)]
    rows = best_fit(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 512
    assert sum(lengths) / (512 * len(rows)) > 0.98
    assert best_fit(lengths, 512) == rows
    assert best_fit([3, 3], 3) == [[0], [1]] and best_fit([], 5) == []


def test_files_of_a_folder_are_split_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_lines(folder / "train.jsonl", chats(30))
    write_lines(folder / "test.jsonl", chats(5, seed=1))
    both = [loader(tmp_path, documents=False, path=str(folder), split=split) for split in ("train", "test")]
    assert [found.rows_per_epoch for found in both] == [30, 5]
    theirs = [
        loader(tmp_path, documents=False, hf_name="json", hf_kwargs={"data_dir": str(folder)}, split=split)
        for split in ("train", "test")
    ]
    assert [found.fingerprint for found in both] == [found.fingerprint for found in theirs]


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "jsonl.gz"])
def test_tables_of_every_kind_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    import csv
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(9)]
    path = tmp_path / f"train.{ending}"
    if ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    expected = loader(tmp_path, path=str(write_lines(tmp_path / "same" / "train.jsonl", rows)), shuffle=False)
    found = loader(tmp_path, path=str(path), shuffle=False)
    assert torch.equal(found.batch(0, 2).tokens, expected.batch(0, 2).tokens)


@pytest.mark.parametrize("columns", [("prompt", "response"), ("messages",)])
def test_mds_holds_examples_too(tmp_path: Path, columns: tuple[str, ...]) -> None:
    with MDSWriter(
        tmp_path / "mds" / "train", dict.fromkeys(columns, "json" if len(columns) == 1 else "str")
    ) as writer:
        for i in range(6):
            writer.write({"messages": turns(f"{i}", "b")} if len(columns) == 1 else {"prompt": f"{i}", "response": "b"})
    streams = {"mine": {"local": str(tmp_path / "mds"), "split": "train"}}
    found = loader(tmp_path, streams=streams, shuffle=True, documents=False, decoder_only_format=True)
    assert found.rows_per_epoch == 6


def test_mds_holds_token_ids_as_bytes_of_any_type(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "mds" / "train", {"input_ids": "bytes", "labels": "bytes"}) as writer:
        for ids in ([5, 6], [7, 8]):
            writer.write({"input_ids": np.array(ids, "<i4").tobytes(), "labels": np.array([9, 4], "<i4").tobytes()})
    place = {"local": str(tmp_path / "mds"), "split": "train"}
    found = loader(tmp_path, **place, token_encoding_type="int32", documents=False, shuffle=False)
    assert found.batch(0, 2).tokens[:, :4].tolist() == [[5, 6, 9, 4], [7, 8, 9, 4]]
    with pytest.raises(ConfigError, match=r"train: row 0: has the token \d{10,}, and the tokenizer ends at"):
        loader(tmp_path, **place, documents=False)


@pytest.mark.parametrize(("mapping", "row", "expected"), [
    ({"prompt": "q", "response": "a"}, {"q": "Q", "a": "A", "messages": turns("x", "y")}, Pair("Q", "A")),
    ({"prompt": "q", "completion": "a"}, {"q": "Q", "a": "A", "response": "old"}, Pair("Q", "A")),
    ({"prompt": "response", "response": "prompt"}, {"prompt": "P", "response": "R"}, Pair("R", "P")),
    ({"instruction": "q", "output": "a"}, {"q": "x", "a": "y", "prompt": "P", "response": "R"},
     Conversation(turns("x", "y"))),
    ({"messages": "chat"}, {"chat": turns("x", "y"), "turns": 1}, Conversation(turns("x", "y"))),
    (None, {"messages": turns("x", "y"), "turns": 1}, Conversation(turns("x", "y"))),
])  # fmt: skip
def test_a_mapping_says_the_format_whatever_other_columns_there_are(
    mapping: dict[str, str] | None, row: dict[str, object], expected: object
) -> None:
    assert example_of(preprocess(mapping)(row)) == expected


def test_own_columns_by_mapping_or_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"question": "a", "answer": "b"}])
    (tmp_path / "my_chats.py").write_text(
        "def fn(row):\n    return {'prompt': row['question'], 'response': row['answer']}\n"
        "def bad(row):\n    return {'prompt': row['nothing']}\n"
    )
    monkeypatch.chdir(tmp_path)
    by_name = loader(tmp_path, path=str(path), preprocessing_fn={"prompt": "question", "response": "answer"})
    by_function = loader(tmp_path, path=str(path), preprocessing_fn="my_chats:fn")
    assert torch.equal(by_name.batch(0, 1).tokens, by_function.batch(0, 1).tokens)
    with pytest.raises(ConfigError, match=r"train\.jsonl: row 0: no 'nothing'; skip_bad_rows"):
        loader(tmp_path, path=str(path), preprocessing_fn="my_chats:bad")
    with pytest.raises(ConfigError, match="preprocessing_fn: my_chats:gone: my_chats has no function gone"):
        loader(tmp_path, path=str(path), preprocessing_fn="my_chats:gone")
    with pytest.raises(ConfigError, match="has no column 'q', which preprocessing_fn names; it has question, answer"):
        loader(tmp_path, path=str(path), preprocessing_fn={"prompt": "q"})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({}, "write one of path, hf_name, local or streams; found none"),
        ({"path": "a", "hf_name": "b"}, "found path and hf_name"),
        ({"path": "a", "decoder_only_format": False}, "decoder_only_format"),
        ({"path": "a", "target_prompts": "some"}, "target_prompts: 'some' is not one of none, all, length>=N"),
        ({"path": "a", "target_responses": "first"}, "target_responses"),
        ({"path": "a", "split": "train[:5]"}, r"split: train\[:5\] is a part of a split"),
        ({"hf_name": "a", "hf_kwargs": {"streaming": True}}, "hf_kwargs.streaming"),
        ({"streams": {"x": {"local": "a", "repeat": 2}}}, "streams.x.repeat: examples are packed .* a weight"),
        ({"path": "a", "name": "text_files"}, "name=finetuning reads chats, and dataset.name is text_files; leave one"),
    ],
)
def test_mistakes_are_named(dataset: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(LoaderConfig, {"name": "finetuning", "dataset": dataset})


def test_a_function_without_a_source_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", chats(3))
    with pytest.raises(ConfigError, match="preprocessing_fn: math:sqrt: is not a function written in Python"):
        loader(tmp_path, path=str(path), preprocessing_fn="math:sqrt")


def test_bad_rows_are_skipped_up_to_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "train.jsonl", [*chats(3), {"text": "x"}, {"messages": 5}])
    with pytest.raises(ConfigError, match="row 3: has the columns text"):
        loader(tmp_path, path=str(path))
    assert loader(tmp_path, path=str(path), skip_bad_rows=2, documents=False).rows_per_epoch == 3
    assert "skipped 2 of at most 2 bad rows" in caplog.text


def test_rows_that_the_template_refuses_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "train.jsonl", [*chats(2), {"messages": turns("!be terse", "a", "b")}])
    with pytest.raises(
        ConfigError, match=r"train\.jsonl: row 2: the chat template refuses it: no system here; skip_bad"
    ):
        loader(tmp_path, path=str(path), template=plain("gemma"))
    found = loader(tmp_path, path=str(path), template=plain("gemma"), skip_bad_rows=1, documents=False)
    assert found.rows_per_epoch == 2 and "skipped 1 of at most 1 bad rows" in caplog.text


@pytest.mark.parametrize("row", [{"messages": turns("\ud800", "b")}, {"prompt": "a", "response": "\ud800"}])
def test_a_text_that_is_no_unicode_is_refused(row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"has a lone surrogate, '\\ud800', which is not a valid character"):
        learned(CHATML, row)


def test_a_template_with_a_mistake_is_named_before_any_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"messages": turns("a", "b")}])
    with pytest.raises(ConfigError, match="dataset.chat_template: line 1: Unexpected end of template"):
        loader(tmp_path, path=str(path), chat_template="{% for m in messages %}", skip_bad_rows=9)
    with pytest.raises(
        ConfigError, match=r"train\.jsonl \(chats-train\): none of 1 examples has anything to learn within"
    ):
        loader(tmp_path, path=str(path), length=4)


@pytest.mark.parametrize(
    ("said", "n"),
    [
        ({"split": "train[:2]"}, 2),
        ({"split": "train+test"}, 5),
        ({"hf_name": "json", "hf_kwargs": {"data_files": ["train.jsonl", "test.jsonl"]}}, 5),
        ({"hf_name": "json", "hf_kwargs": {"data_files": "nested.json", "field": "rows"}}, 2),
    ],
)
def test_splits_and_files_are_those_of_load_dataset(
    tmp_path: Path, said: dict[str, object], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}", "response": "b"} for i in range(5)]
    write_lines(tmp_path / "train.jsonl", rows[:3])
    write_lines(tmp_path / "test.jsonl", rows[3:])
    if "field" in said.get("hf_kwargs", {}):
        (tmp_path / "nested.json").write_text(json.dumps({"rows": rows[:2]}))
    assert loader(tmp_path, **({"hf_name": ".", "split": "train"} | said), documents=False).rows_per_epoch == n


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("tatsu-lab/alpaca", {"text": "Do ### Response: it", "output": "y"}, "Do ### Response:| it"),
        ("HuggingFaceH4/databricks_dolly_15k", {"instruction": "Add", "input": "1", "output": "2"},
         "### Instruction:\nAdd\n1\n\n### Response:\n|2"),
        ("HuggingFaceH4/databricks_dolly_15k", {"instruction": "Add", "input": "", "output": "2"},
         "### Instruction:\nAdd\n\n### Response:\n|2"),
        ("bigscience/P3", {"inputs": "a", "targets": "b"}, "a:|b"),
        ("Muennighoff/P3", {"inputs": "a", "targets": "b"}, "a| b"),
        ("Muennighoff/flan", {"inputs": "a\n", "targets": "b"}, "a\n|b"),
        ("HuggingFaceH4/databricks_dolly_15k", {"prompt": "a", "response": "b"}, "a|b"),
    ],
)  # fmt: skip
def test_names_of_datasets_stand_for_llm_foundrys_functions(name: str, row: dict[str, object], text: str) -> None:
    found = example_of(preprocess(name)(row))
    refuse_code({"preprocessing_fn": name}, "config.yaml", ["preprocessing_fn"])  # a checkpoint may name it
    assert isinstance(found, Pair) and "|".join(found).endswith(text)


def test_names_of_chats_stand_for_llm_foundrys_functions() -> None:
    chat = turns("!s", "h", "g")
    said = [{"from": who, "value": each["content"]} for who, each in zip(("system", "human", "gpt"), chat, strict=True)]
    assert preprocess("teknium/OpenHermes-2.5")({"conversations": said, "id": 1}) == {"messages": chat}
    assert preprocess("math-ai/StackMathQA")({"Q": "h", "A": "g", "meta": {}}) == {"messages": turns("h", "g")}
    assert preprocess("AI-MO/NuminaMath-CoT")({"problem": "x", "messages": chat}) == {"messages": chat}


def test_words_of_llm_foundry_are_known() -> None:
    theirs = {"hf_name": "mosaicml/dolly_hhrlhf", "split": "train", "max_seq_len": 512, "allow_pad_trimming": False,
              "decoder_only_format": True, "packing_ratio": "auto", "eos_token_id": 0, "shuffle": True}  # fmt: skip
    assert isinstance(check(LoaderConfig, {"name": "finetuning", "dataset": theirs}).dataset, ChatsConfig)
