"""`llmfoundry report RUN [RUN ...]`: one page of one run, or of several side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llmfoundry.cli.command import command
from llmfoundry.report.page import write_report


@command
def report_main(argv: Sequence[str] | None = None) -> None:
    """`report RUN [RUN ...] [--out FILE]`."""
    parser = argparse.ArgumentParser(prog="llmfoundry report", description="Draw the page of one run, or compare runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the save_folder of a run")
    parser.add_argument("--out", type=Path, help="the page; if left out, report.html in the only run, or here")
    args = parser.parse_args(argv)
    alone = args.runs[0] if len(args.runs) == 1 else Path()
    print(f"written to {write_report(args.runs, args.out or alone / 'report.html')}")
