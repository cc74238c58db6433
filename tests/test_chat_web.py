"""The page of `chat --web` in a real browser, and the API beside it: who may use it, and what it honours."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmfoundry.cli.chat import chat_main
from llmfoundry.cli.chat_server import Server
from llmfoundry.cli.opening import open_hugging_face
from llmfoundry.config import ConfigError
from llmfoundry.eval.chat import Chat, Template
from llmfoundry.eval.generate import Sampling
from tests.browser import CHROMIUM, Browser
from tests.data.chat_tokenizer import turns
from tests.eval.test_generate_many import saved
from tests.hf.theirs import MOE, Case

HOW = Sampling(16, temperature=0)
CHAT = "/v1/chat/completions"
SYSTEM = '</textarea><b id="injected">"{seed}'


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    settings = MOE | {"num_local_experts": 4, "max_position_embeddings": 4096}
    ready = open_hugging_face(str(saved(Case("mixtral", "", settings), tmp_path_factory.mktemp("model"))), "fp32")
    return Chat(ready.model, Template(ready.tokenizer))


@pytest.fixture(scope="module")
def server(chat: Chat) -> Iterator[Server]:
    with Server(chat, HOW, SYSTEM, "runs/moe", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: Server, path: str, body: object = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, str]:
    """Status and text of an answer."""
    client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if data is not None else {}
    client.request(method or ("GET" if data is None else "POST"), path, data, given | (headers or {}))
    response = client.getresponse()
    found = response.status, response.read().decode()
    client.close()
    return found


def test_the_api_answers_as_the_chat_does(server: Server, chat: Chat) -> None:
    messages = turns("!Be brief.", "Grüße, 你好")
    wanted = chat.answer(messages, HOW)
    status, text = ask(server, CHAT, {"messages": messages, "model": "runs/moe", "user": None})
    found = json.loads(text)
    assert status == 200 and found["choices"][0]["message"] == {"role": "assistant", "content": wanted.text}
    assert found["choices"][0]["finish_reason"] == wanted.finish and found["object"] == "chat.completion"
    assert found["usage"]["prompt_tokens"] == wanted.prompt_tokens
    assert found["usage"]["completion_tokens"] == wanted.tokens
    (model,) = json.loads(ask(server, "/v1/models")[1])["data"]
    assert model["id"] == "runs/moe" == found["model"]


def test_a_stream_adds_up_to_the_answer(server: Server, chat: Chat) -> None:
    body = {"messages": turns("hello"), "stream": True, "stream_options": {"include_usage": True}}
    status, text = ask(server, CHAT, body)
    *events, done = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    *chunks, end, usage = map(json.loads, events)
    assert status == 200 and done == "[DONE]" and len(chunks) > 3
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    wanted = chat.answer(turns("hello"), HOW)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == wanted.text
    assert end["choices"][0] == {"index": 0, "delta": {}, "finish_reason": wanted.finish}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == wanted.tokens


def test_fields_of_a_request_are_honoured(server: Server, chat: Chat) -> None:
    def say(**fields: object) -> dict:
        status, text = ask(server, CHAT, {"messages": turns("hello"), **fields})
        assert status == 200, text
        return json.loads(text)["choices"][0]

    whole = say()["message"]["content"]
    assert say(max_tokens=3)["finish_reason"] == "length" != say(stop=whole[4:6])["finish_reason"]
    assert say(stop=["nowhere", whole[4:6]])["message"]["content"] == whole[: whole.index(whole[4:6])]
    wanted = chat.answer(turns("hello"), Sampling(9, 1.5, 0.9, 3)).text
    drawn = say(temperature=1.5, top_p=0.9, seed=3, max_completion_tokens=9, n=1)
    assert drawn["message"]["content"] == wanted != whole[: len(wanted)]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert say(messages=parts)["message"]["content"] == whole


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tools": []}, "tools: is not supported; supported are messages, model, stream,"),
        ({"logprobs": True}, "logprobs: is not supported"),
        ({"n": 2}, "n: Input should be 1"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "clown", "content": "a"}]}, "messages.0.role"),
        ({"model": "gpt-4o"}, "model: gpt-4o is not served; runs/moe is"),
        (b"{", "body: is not valid JSON"),
        (b"[]", "body: Input should be a valid dictionary"),
    ],
)
def test_what_is_not_honoured_is_refused(server: Server, body: dict[str, object] | bytes, says: str) -> None:
    given = body if isinstance(body, bytes) else {"messages": turns("hello"), "stream": True} | body
    status, text = ask(server, CHAT, given)
    error = json.loads(text)["error"]
    assert status == 400 and says in error["message"] and error["type"] == "invalid_request_error"


def test_other_sites_and_other_names_are_refused(server: Server) -> None:
    own, body = f"127.0.0.1:{server.server_port}", {"messages": turns("hello"), "max_tokens": 1}
    for headers, status in (
        ({"Origin": f"http://{own}"}, 200),
        ({"Host": f"localhost:{server.server_port}"}, 200),
        ({"Origin": "https://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://{own}.example.com"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": f"example.com:{server.server_port}"}, 403),  # a name that resolves to this machine
        ({"Content-Type": "text/plain"}, 415),  # what a form of another site can send
    ):
        assert ask(server, CHAT, body, headers)[0] == status, headers
    assert ask(server, "/", headers={"Host": "example.com"})[0] == 403
    assert ask(server, "/etc/passwd")[0] == ask(server, "/v1/chat", body)[0] == 404
    assert ask(server, CHAT, body, method="OPTIONS")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_a_mistake_of_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--port {server.server_port}: cannot be used .*; choose another one"):
        Server(server.chat, HOW, "", "x", server.server_port)


def test_a_template_is_read_before_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat_main(["--checkpoint", "nowhere", "--template", "none.jinja"]) == 2
    assert capsys.readouterr().err == "error: --template: none.jinja cannot be read: No such file or directory\n"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_talks_stops_and_begins_anew(server: Server, chat: Chat, tmp_path: Path) -> None:
    html = "<img src=x onerror=alert(1)> & 你好"

    def send(text: str) -> str:
        return (
            f"document.getElementById('question').value = {json.dumps(text)}; document.getElementById('send').click()"
        )

    def said(*conversation: str, how: Sampling = HOW) -> str:
        system = [{"role": "system", "content": SYSTEM}]
        return chat.answer(system + turns(*conversation), how).text

    with Browser(tmp_path) as page:
        page.open(server.url)
        page.wait("document.getElementById('model').textContent === 'runs/moe'")
        assert page.run("document.getElementById('system').value") == SYSTEM
        assert page.run("document.getElementById('injected')") is None
        assert page.run("+document.getElementById('max_tokens').value") == HOW.max_new_tokens
        texts = "[...document.querySelectorAll('.turn')].map(turn => turn.textContent)"
        idle = "!document.getElementById('send').disabled"
        conversation: list[str] = []
        for question in (html, "and on"):
            page.run(send(question))
            page.wait(idle)
            conversation += [question, said(*conversation, question)]
            assert page.run(texts) == conversation
        assert page.run("document.querySelector('main img')") is None, "text is never read as HTML"
        # Settings, and an answer that is stopped: what is there of it stays.
        page.run("document.getElementById('max_tokens').value = 3000; 0")
        page.run(send("count"))
        page.wait(f"{texts}[5]?.length > 20")
        page.run("document.getElementById('stop').click()")
        page.wait(idle)
        partial = page.run(texts)[5]
        assert partial and said(*conversation, "count", how=HOW._replace(max_new_tokens=200)).startswith(partial[:50])
        assert server.turn.acquire(timeout=30), "the server has noticed, and is free"
        server.turn.release()
        page.run("document.getElementById('reset').click()")
        assert page.run(texts) == []
        # A mistake is shown, and the conversation goes on without it.
        page.run("document.getElementById('temperature').value = -1; 0")
        page.run(send("hello"))
        page.wait(f"{idle} && {texts}.length === 2")
        assert "temperature: Input should be greater than or equal to 0" in page.run(texts)[1]
        page.run(
            "document.getElementById('temperature').value = 0; document.getElementById('max_tokens').value = 16; 0"
        )
        page.run("document.getElementById('turns').replaceChildren()")
        page.run(send("hello"))
        page.wait(f"{idle} && {texts}.length === 2")
        assert page.run(texts)[1] == said("hello")
        noise = [line for line in page.said if "400 (Bad Request)" not in line and "favicon" not in line]
        assert not noise, noise
