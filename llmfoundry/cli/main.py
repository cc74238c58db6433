"""`llmfoundry COMMAND ...`: all commands under one name; scripts/*.py call the same functions.

A command is imported when it is called, so `--help` and shell completion answer at once. Words after the command's name
are passed to the command: `llmfoundry train --help` lists its arguments.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from llmfoundry.launch import leave


class _Entry(NamedTuple):
    """A command: where its function is, and its line in `--help`."""

    module: str
    function: str
    about: str


_ENTRIES = {
    "train": _Entry("llmfoundry.cli.train", "train_main", "Train a model from a YAML file."),
    "plan": _Entry("llmfoundry.cli.train", "plan_main", "Estimate a run before it starts: size, memory, speed, mesh."),
    "explain": _Entry("llmfoundry.cli.train", "explain_main", "Show what each key of a YAML file was translated to."),
    "prepare": _Entry("llmfoundry.cli.prepare", "prepare_data_main", "Tokenize a run's datasets in advance."),
    "data": _Entry("llmfoundry.cli.data", "data_main", "Show the rows that a model will read, or statistics of them."),
    "generate": _Entry("llmfoundry.cli.inference", "generate_main", "Continue a prompt with a trained model."),
    "chat": _Entry("llmfoundry.cli.chat", "chat_main", "Chat with a model in the terminal or in a browser."),
    "eval": _Entry("llmfoundry.cli.inference", "eval_main", "Evaluate a checkpoint on text or on tasks."),
    "convert": _Entry("llmfoundry.cli.convert", "convert_main", "Convert to and from Hugging Face folders; upcycle."),
    "data_prep": _Entry(
        "llmfoundry.cli.foundry", "data_prep_main", "Write MDS datasets, with LLM Foundry's arguments."
    ),
    "report": _Entry("llmfoundry.cli.report", "report_main", "Write the report page of a run, or compare runs."),
    "xray": _Entry("llmfoundry.cli.xray", "xray_main", "Show which experts process which tokens of a text."),
    "doctor": _Entry("llmfoundry.cli.doctor", "doctor_main", "Check this machine, and whether a YAML can run on it."),
}


class _Command(click.Command):
    """Passes its arguments on unchanged; they complete as paths."""

    def __init__(self, name: str, entry: _Entry) -> None:
        super().__init__(
            name,
            params=[click.Argument(["arguments"], nargs=-1, type=click.Path())],
            help=entry.about,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
        )
        self._entry = entry

    def invoke(self, ctx: click.Context) -> int:
        main = getattr(importlib.import_module(self._entry.module), self._entry.function)
        code = main(list(ctx.params["arguments"]))
        assert isinstance(code, int)
        return code


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Completion in bash: eval "$(_LLMFOUNDRY_COMPLETE=bash_source llmfoundry)"; zsh and fish likewise.',
)
@click.version_option(package_name="llmfoundry")
def cli() -> None:
    """Train mixture-of-experts language models: from a YAML file to a model that others can serve.

    Begin with `llmfoundry train yamls/moe.yaml`; each command explains itself with --help.
    """


for _name, _entry in _ENTRIES.items():
    cli.add_command(_Command(_name, _entry))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    try:
        found = cli.main(args=list(argv) if argv is not None else None, prog_name="llmfoundry", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        return 1
    return found if isinstance(found, int) else 0


def run() -> None:
    """Run the console script."""
    leave(main(sys.argv[1:]))
