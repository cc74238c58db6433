"""`llmfoundry chat --checkpoint DIR`: a conversation in the terminal or, with `--web`, in a browser on this machine.

Ctrl-C stops an answer, Ctrl-D quits. Piped lines are answered one after the other.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from llmfoundry import launch
from llmfoundry.cli.command import command
from llmfoundry.cli.inference import CHECKPOINT, GENERATING, add_allow_code, add_sampling, show
from llmfoundry.cli.opening import open_checkpoint
from llmfoundry.cli.parser import Parser, integer, program
from llmfoundry.cli.prompts import read_template
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from llmfoundry.data.conversations import Message
    from llmfoundry.eval.chat import Chat
    from llmfoundry.eval.generate import Sampling

HELP = """\
/system TEXT  begin anew, with a system message; without TEXT, with none
/reset        begin anew
/undo         take back the last question and its answer
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer
A line that shall begin with a slash needs a space before it."""


@command
def chat_main(argv: Sequence[str] | None = None) -> None:
    """`chat --checkpoint DIR [--system TEXT] [--web] [key=value ...]`."""
    parser = Parser(
        program("chat", "llmfoundry chat"),
        "Chat with a trained model, in the terminal or in a browser.",
        [
            "llmfoundry chat --checkpoint runs/finetune",
            "llmfoundry chat --checkpoint hf:allenai/OLMoE-1B-7B-0924-Instruct --system 'Answer in one sentence.'",
            "llmfoundry chat --checkpoint runs/finetune --web --port 8000",
        ],
    )
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT)
    parser.add_overrides("e.g. precision=fp32")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--template", type=Path, metavar="FILE", help="a chat template in place of the tokenizer's own")
    add_sampling(parser, max_new_tokens=1024)
    add_allow_code(parser)
    parser.add_argument("--web", action="store_true", help="serve a page and an OpenAI-compatible API on this machine")
    parser.add_argument(
        "--port", type=integer(0, 65535), default=8000, help="for --web; default: 8000; 0: any free port"
    )
    args = parser.parse_intermixed_args(argv)
    if launch.world_size() > 1:
        raise ConfigError("chat runs in one process; start it without torchrun, or use generate --prompts FILE")
    source = read_template(args.template)
    opened = open_checkpoint(args.checkpoint, args.overrides, GENERATING, allow_code=args.allow_code)
    from llmfoundry.eval.chat import Chat, Template
    from llmfoundry.eval.generate import Sampling
    from llmfoundry.hf.generation import stop_tokens

    how = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed, args.top_k)
    chat = Chat(opened.ready.model, Template(opened.ready.tokenizer, source), stop_tokens(opened.folder))
    if args.web:
        from llmfoundry.cli.chat_server import serve

        serve(chat, how, args.system or "", name=args.checkpoint, port=args.port)
    else:
        Talk(chat, how, args.system).run()


class Talk:
    """A conversation on standard input and output."""

    def __init__(self, chat: Chat, how: Sampling, system: str | None) -> None:
        self._chat, self._how = chat, how
        self._messages: list[Message] = []
        self._begin(system)

    def run(self) -> None:
        """Answer lines until the input ends.

        Raises:
            ConfigError: if a piped line cannot be answered; on a terminal the error is printed instead.
        """
        tty = sys.stdin.isatty()
        if tty:
            import readline  # noqa: F401  editing and history of lines

            print("Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.")
        for line in _lines(tty):
            if line.startswith("/"):
                if not self._command(*line.strip().partition(" ")[::2]):
                    return
            elif line.strip():
                self._ask(line.strip(), tty)

    def _begin(self, system: str | None) -> None:
        self._system = system or None
        self._messages = [{"role": "system", "content": system}] if system else []

    def _command(self, name: str, text: str) -> bool:
        """Run a command; return whether the conversation continues."""
        if name == "/exit":
            return False
        if name == "/system":
            self._begin(text.strip())
        elif name == "/reset":
            self._begin(self._system)
        elif name == "/undo":
            while self._messages and self._messages[-1]["role"] != "system":
                if self._messages.pop()["role"] == "user":
                    break
        elif name == "/help":
            print(HELP)
        else:
            print(f"{name}: no such command; /help lists them", file=sys.stderr)
        return True

    def _ask(self, text: str, tty: bool) -> None:
        self._messages.append({"role": "user", "content": text})
        try:
            with stopped_by_ctrl_c() as stopped:
                answer = self._chat.answer(self._messages, self._how, emit=show, interrupted=stopped)
        except ConfigError as error:
            self._messages.pop()
            if not tty:
                raise
            print(f"error: {error}", file=sys.stderr)
            return
        show("\n")
        if tty and answer.finish != "stop":
            why = "stopped" if answer.finish == "interrupted" else f"cut at {answer.tokens} tokens (--max-new-tokens)"
            print(f"[{why}]")
        self._messages.append({"role": "assistant", "content": answer.text})


def _lines(tty: bool) -> Iterator[str]:
    """Yield lines of standard input; on a terminal, Ctrl-C clears the line."""
    if not tty:
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


@contextmanager
def stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C does not raise; the function that the block gets returns True instead."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
