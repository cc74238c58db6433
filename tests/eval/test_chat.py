"""Conversations with a model: the answers of `transformers`, streamed whole, with a cache that outlives the turn."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import llmfoundry.eval.chat as chat_module
from llmfoundry.cli.chat import chat_main, stopped_by_ctrl_c
from llmfoundry.cli.inference import show
from llmfoundry.cli.opening import open_hugging_face
from llmfoundry.config import ConfigError, check
from llmfoundry.data.chat_template import CHATML
from llmfoundry.eval.chat import Chat, Ending, Template
from llmfoundry.eval.generate import Sampling
from llmfoundry.eval.written import Stream, Until, Written
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from tests.data.chat_tokenizer import tokenizer, turns
from tests.hf.theirs import MOE, Case

GREEDY = Sampling(24, temperature=0)
# Leaves the thoughts of earlier turns out, as Qwen3's does: the second prompt is no continuation of the first.
FORGETFUL = CHATML.replace("{{ message['content'] + '<|im_end|>' }}{% endgeneration", "{{ 'so' }}{% endgeneration")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral with a chat template, as `transformers` saves it."""
    path, own = tmp_path_factory.mktemp("mixtral"), tokenizer(CHATML)
    settings = MOE | {"vocab_size": len(own), "num_local_experts": 4, "max_position_embeddings": 512,
                      "eos_token_id": own.eos_token_id}  # fmt: skip
    Case("mixtral", "", settings).build().save_pretrained(path)
    own.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    ready = open_hugging_face(str(folder), "fp32")
    return Chat(ready.model, Template(ready.tokenizer))


def theirs(folder: Path, messages: list[dict[str, object]], stop: set[int], new: int = 24) -> str:
    """The greedy answer of `transformers`."""
    own = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = own.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=new, do_sample=False, eos_token_id=sorted(stop), pad_token_id=0)
    return own.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_transformers_over_several_turns(folder: Path, chat: Chat) -> None:
    messages, reused = turns("!Be brief.", "Grüße, 你好"), []
    for question in ("What is 2 + 2?", "yes", ""):
        pieces: list[str] = []
        answer = chat.answer(messages, GREEDY, emit=pieces.append)
        assert answer.text == "".join(pieces) == theirs(folder, messages, chat.stop)
        assert answer.tokens > 3
        reused.append(answer.reused)
        messages = [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]
    assert reused[0] == 0 and reused[1] > 10 and reused[2] > reused[1]


def test_a_prompt_that_changes_is_read_again_from_there(folder: Path) -> None:
    ready = open_hugging_face(str(folder), "fp32")
    forgetful = Chat(ready.model, Template(ready.tokenizer, FORGETFUL))
    fresh = Chat(ready.model, Template(ready.tokenizer, FORGETFUL))
    first = forgetful.answer(turns("a"), GREEDY)
    longer = [*turns("a"), {"role": "assistant", "content": first.text}, {"role": "user", "content": "b"}]
    again = forgetful.answer(longer, GREEDY)
    assert 0 < again.reused <= first.prompt_tokens + 1
    assert again._replace(reused=0) == fresh.answer(longer, GREEDY)
    assert forgetful.answer(turns("a"), GREEDY).text == first.text, "a question that is asked again"


def test_a_seed_names_an_answer(chat: Chat) -> None:
    def say(seed: int) -> str:
        return chat.answer(turns("hello"), Sampling(24, temperature=1.5, seed=seed)).text

    assert say(1) == say(1) != say(2)


@pytest.mark.parametrize(
    ("template", "after", "text"),
    [
        (CHATML, "<|im_end|>", None),
        (CHATML.replace("<|im_end|>", " <|end|>"), "<|end|>", None),
        (CHATML.replace("<|im_end|>", "</turn>"), None, "</turn>"),
        (CHATML.replace("+ '<|im_end|>'", ""), None, None),
    ],
)
def test_a_turn_ends_as_the_template_ends_it(template: str, after: str | None, text: str | None) -> None:
    own = tokenizer(template)
    ids = frozenset({own.convert_tokens_to_ids(after)}) if after else frozenset()
    assert Template(own).ending() == Ending(ids, (text,) if text else ())


def test_an_ending_in_letters_is_never_shown() -> None:
    pieces: list[str] = []
    text = Until(["</turn>", "END"], pieces.append)
    for piece in ("a <", "/ b", "</tu", "rn", "> c", "never"):
        text.add(piece)
    text.close()
    assert text.ended and "".join(pieces) == text.shown == "a </ b"
    assert all("</t" not in piece for piece in pieces)
    open_ended = Until(["</turn>"], pieces.append)
    open_ended.add("x </tu")
    open_ended.close()
    assert open_ended.shown == "x </tu" and not open_ended.ended


def test_an_ending_is_found_among_parts_of_characters() -> None:
    own = tokenizer(CHATML)
    for said, ending in (("yes \U0001f600 END ü", "END"), ("yes ü", "\N{REPLACEMENT CHARACTER}"), ("ab 你好!", "好")):
        written = Written(own, [ending])
        ended = written.extended(own(said, add_special_tokens=False)["input_ids"])
        assert (written.close(), ended) == (said.partition(ending)[0], ending in said)


def test_a_stop_text_ends_the_answer(chat: Chat) -> None:
    whole = chat.answer(turns("hello"), GREEDY).text
    cut = chat.answer(turns("hello"), GREEDY, until=[whole[5:8]])
    assert cut.text == whole[: whole.index(whole[5:8])] and cut.finish == "stop"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before them, and bytes for what is no word, as Llama 2 and Mistral have."""
    words = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁the", "▁cat", "s", "▁"]
    plain = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_characters_come_whole_and_spaces_stay(kind: str) -> None:
    text = "the cats 你好 \U0001f600 é"
    own = tokenizer() if kind == "bytes" else sentencepiece_like()
    if kind == "bytes":
        ids = own.encode(text)
    else:
        odd = [f"<0x{byte:02X}>" for byte in text[8:].encode()]
        ids = own.convert_tokens_to_ids(["▁the", "▁cat", "s", *odd])
    assert own.decode(ids) == text
    pieces: list[str] = []
    written: list[int] = []
    stream = Stream(own, written, pieces.append)
    for token in ids:
        written.append(token)
        stream.advance()
    stream.advance(last=True)
    assert "".join(pieces) == text and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(pieces) > 6


def talk(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return chat_main(["--checkpoint", str(folder), "--temperature", "0", "--max-new-tokens", "12", "precision=fp32",
                      *options])  # fmt: skip


def test_piped_lines_are_answered_and_commands_obeyed(
    folder: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*conversation: str) -> str:
        return chat.answer(turns(*conversation), GREEDY._replace(max_new_tokens=12)).text

    first = said("!Be brief.", "hello")
    lines = "hello\n/undo\nwhy\n/nothing\n/reset\nhello\nyes\n/system\nhello\n/help\n/exit\nnever\n"
    assert talk(monkeypatch, folder, lines, "--system", "Be brief.") == 0
    out, err = capsys.readouterr()
    answers = [first, said("!Be brief.", "why"), first, said("!Be brief.", "hello", first, "yes"), said("hello")]
    assert out.startswith("".join(f"{answer}\n" for answer in answers) + "/system TEXT")
    assert err == "/nothing: no such command; /help lists them\n"


def test_a_model_without_template_is_told_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    assert talk(monkeypatch, tmp_path, "hello\n") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no chat template" in line and "--template FILE" in line and "llmfoundry generate" in line
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML)
    assert talk(monkeypatch, tmp_path, "hello\n", "--template", str(template)) == 0
    with_file = capsys.readouterr().out
    assert talk(monkeypatch, folder, "hello\n") == 0
    assert capsys.readouterr().out == with_file


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(chat: Chat) -> None:
    whole = chat.answer(turns("hello"), GREEDY).text
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_ctrl_c() as stopped:
        pieces: list[str] = []

        def press(piece: str) -> None:
            pieces.append(piece)
            if len(pieces) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        answer = chat.answer(turns("hello"), GREEDY, emit=press, interrupted=stopped)
    assert answer.finish == "interrupted" and whole.startswith(answer.text) and len(answer.text) < len(whole)
    assert chat.answer(turns("hello"), GREEDY).text == whole
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_template_refuses_is_a_mistake_of_one_line(chat: Chat) -> None:
    with pytest.raises(ConfigError, match="the chat template refuses the conversation: .*content"):
        chat.answer([{"role": "user"}], GREEDY)
    with pytest.raises(ConfigError, match="has a lone surrogate"):
        chat.answer(turns("a \udcff"), GREEDY)


def test_a_conversation_ends_with_the_learned_positions() -> None:
    own = tokenizer(CHATML)
    model = CausalLM(CausalLMConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=len(own), max_seq_len=40)).eval()
    torch.nn.init.normal_(model.wte.weight)
    short = Chat(model, Template(own))
    answer = short.answer(turns("hello"), Sampling(100, temperature=0))
    assert answer.prompt_tokens + answer.tokens <= 41
    with pytest.raises(ConfigError, match="the model has learned 40 positions; start a new one"):
        short.answer(turns("hello " * 40), GREEDY)


def test_a_conversation_longer_than_the_rows_of_training_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    own = tokenizer(CHATML)
    config = check(CausalLMConfig, {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": len(own),
                                    "max_seq_len": 40, "attn_config": {"rope": True}})  # fmt: skip
    chat = Chat(CausalLM(config).eval(), Template(own))
    for _ in range(2):
        chat.answer(turns("hello " * 40), Sampling(1))
    assert caplog.text.count("the conversation has ") == 1 and "made for 40" in caplog.text


def test_a_terminal_is_not_commanded_by_a_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "a\x1b]0;title\x07\tb\r\x9b2J é\n"
    show(said)
    assert capsys.readouterr().out == said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(said)
    assert capsys.readouterr().out == "a�]0;title�\tb��2J é\n"


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(folder: Path) -> None:
    program, terminal = pty.fork()
    if program == 0:
        torch.set_num_threads(1)  # the threads of the process that was forked are not there
        talk = chat_module.new_tokens
        chat_module.new_tokens = lambda *args: talk(*args[:-1], set())  # an answer without end
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        code = 1
        try:
            code = chat_main(["--checkpoint", str(folder), "--temperature", "0", "--max-new-tokens", "100000"])
            sys.stdout.flush()
        finally:
            os._exit(code)
    said = b""

    def wait_for(text: bytes) -> None:
        nonlocal said
        while text not in said:
            assert select.select([terminal], [], [], 60)[0], said
            said += os.read(terminal, 2**16)
        said = said.partition(text)[2]

    wait_for(b"/help lists commands.\r\n> ")
    for question in (b"hello", b"and on"):
        os.write(terminal, question + b"\n")
        wait_for(question + b"\r\n")
        while len(said) < 30:
            assert select.select([terminal], [], [], 60)[0], said
            said += os.read(terminal, 2**16)
        os.write(terminal, b"\x03")
        wait_for(b"[stopped]\r\n> ")
    os.write(terminal, b"\x04")
    assert os.waitpid(program, 0)[1] == 0
    os.close(terminal)
