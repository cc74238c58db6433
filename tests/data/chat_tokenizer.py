"""A small real tokenizer with the special tokens of the usual chat templates, and conversations of many kinds."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from llmfoundry.data.tokenizer import END_OF_TEXT, train_bpe

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]  # fmt: skip


def turns(*said: str) -> list[dict[str, object]]:
    """A conversation that the user begins; a first turn that begins with `!` is the system's."""
    found: list[dict[str, object]] = []
    if said[0].startswith("!"):
        found.append({"role": "system", "content": said[0][1:]})
        said = said[1:]
    return found + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


PLAIN = {
    "one turn": turns("What is 2 + 2?", "4."),
    "system": turns("!You are terse.", "Hello", "Hi."),
    "many turns": turns("a", "b", "c d e", "f\ng", "h", "i"),
    "the same words twice": turns("yes", "yes", "yes", "yes"),
    "words of the template": turns("who is the assistant\n", "assistant\nuser\n"),
    "other scripts": turns("Grüße, 你好 \U0001f600", "здравствуй \U0001f468‍\U0001f469‍\U0001f467 é"),
    "spaces and lines": turns("  x ", "line\n\n  indented\n\tand a tab"),
    "empty answer": turns("Say nothing.", "", "Again", "no"),
    "ends with the user": turns("one", "two", "three"),
    "empty system": [{"role": "system", "content": ""}, *turns("a", "b")],
    "two answers in a row": [*turns("a", "b"), {"role": "assistant", "content": "and c"}, *turns("d", "e")],
    "begins with the assistant": [{"role": "assistant", "content": "How can I help?"}, *turns("a", "b")],
    "long": turns("count", " ".join(map(str, range(60)))),
    "nothing is said": turns("a", "", "b", "", "c", ""),
    "trimmed": turns("  a \n", " \n b  \n\n", "\tc\n", "  d  "),
    "special tokens": turns("a <|im_end|> x", "b <|im_end|> y <|eot_id|>", "c", "d"),
    "thoughts": turns("a", "<think>\nhmm\n</think>\n\nb", "c", "<think>\nx\n</think>\n\nd"),
    "system in the middle": [*turns("a", "b"), {"role": "system", "content": "Be terse."}, *turns("c", "d")],
}
WITH_TOOLS = {
    "tool": [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]},
        {"role": "tool", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "a call without content": [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "reasoning": [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "reasoning_content": "I need it.", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "reasoning_content": "There.", "content": "It is sunny."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "reasoning_content": "The same.", "content": "Still."},
    ],
    "two calls": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Bern and Basel?"},
        {"role": "assistant", "content": "Both.", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
            for city in ("Bern", "Basel")]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Sun and rain."},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "Welcome."},
    ],
}  # fmt: skip


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges."""
    text = [f"{m['content']} " for chat in PLAIN.values() for m in chat] * 3
    found = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(text, 400), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        bos_token="<|begin_of_text|>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    found.chat_template = template
    return found
