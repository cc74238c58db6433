"""Templates of strangers end: loops, texts and memory are bounded on every thread."""

from __future__ import annotations

import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmfoundry.config import ConfigError
from llmfoundry.data import chat_template
from llmfoundry.data.chat_template import Renderer, Targets
from llmfoundry.data.conversations import Conversation
from llmfoundry.data.limits import Exceeded, bounded
from llmfoundry.eval.chat import Template
from tests.data.chat_tokenizer import tokenizer, turns

# Two loops without output; only a conversation of more than one message meets them.
LOOP = (
    "{% if messages|length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
)
TEXT = "{% if messages|length > 1 %}{% for a in range(99) %}{{ 'x' * 999999 }}{% endfor %}{% endif %}"
MEMORY = "{% if messages|length > 1 %}{{ messages[0].content * 9999999999 }}{% endif %}"


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("of_main", [True, False])
def test_a_loop_ends_on_every_thread(of_main: bool) -> None:
    def check() -> None:
        for _ in range(2):
            with pytest.raises(Exceeded, match="takes more than 0 seconds"):
                bounded(spin, seconds=0.2)
            assert bounded(lambda: 5, seconds=0.2) == 5

    if of_main:
        check()
    else:
        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(check), threads.submit(check)]:
                done.result()


def test_time_is_that_of_the_thread_and_ends_with_the_call() -> None:
    assert bounded(lambda: time.sleep(0.4), seconds=0.2) is None  # it waits, and computes nothing
    end = time.thread_time() + 0.5
    bounded(lambda: None, seconds=0.2)
    while time.thread_time() < end:  # after the call nothing is cut short
        pass


def test_memory_is_bounded_and_set_free() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(Exceeded, match=r"needs more than 0.0625 GiB of memory"):
        bounded(lambda: bytearray(2**28), memory=2**26)
    assert len(bounded(lambda: bytearray(2**25), memory=2**26)) == 2**25
    inside = threading.Event()

    def other() -> None:
        bounded(inside.wait, memory=2**26)

    thread = threading.Thread(target=other)
    thread.start()
    bounded(lambda: None, memory=2**26)
    assert resource.getrlimit(resource.RLIMIT_DATA) != before, "the other call goes on"
    inside.set()
    thread.join()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before and len(bytearray(2**28)) == 2**28


@pytest.mark.parametrize(
    ("template", "says"),
    [(LOOP, "takes more than 0 seconds"), (TEXT, "writes more than 67,108,864 characters"),
     (MEMORY, "needs more than 2 GiB of memory")],
)  # fmt: skip
def test_a_template_without_an_end_is_refused(template: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    renderer = Renderer(tokenizer(template), Targets())
    with pytest.raises(ValueError, match=f"the chat template {says}"):
        renderer.tokens(Conversation(turns("a", "b")))
    if "seconds" not in says:
        with pytest.raises(ConfigError, match=f"the chat template {says}"):
            Template(tokenizer(template)).ids(turns("a", "b"))


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ 10.0 ** 999 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[7].x.y }}",
     "{{ messages[0]() }}", "{% include 'x' %}", "{{ messages.append(1) }}"],
)  # fmt: skip
def test_an_error_in_a_template_is_a_mistake_of_one_line(template: str) -> None:
    with pytest.raises(ValueError, match=r"the chat template refuses it: .+"):
        Renderer(tokenizer(template), Targets()).tokens(Conversation(turns("a", "b")))
    with pytest.raises(ConfigError, match=r"the chat template refuses the conversation: .+"):
        Template(tokenizer(template)).ids(turns("a", "b"))


def test_a_template_that_python_cannot_compile_is_refused() -> None:
    template = "{% for a in messages %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(ConfigError, match="chat template: line [0-9]+: too many statically nested blocks"):
        Renderer(tokenizer(template), Targets())
