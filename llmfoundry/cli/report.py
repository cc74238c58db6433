"""`llmfoundry report RUN [RUN ...]`: one page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmfoundry.cli.command import command
from llmfoundry.cli.parser import Parser
from llmfoundry.report.page import write_report


@command
def report_main(argv: Sequence[str] | None = None) -> None:
    """`report RUN [RUN ...] [--out FILE]`."""
    parser = Parser(
        "llmfoundry report",
        "Draw the report of a run as one HTML file, or compare runs.",
        ["llmfoundry report runs/moe", "llmfoundry report runs/moe runs/dense --out both.html"],
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the save_folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run, or here for several",
    )
    args = parser.parse_args(argv)
    alone = args.runs[0] if len(args.runs) == 1 else Path()
    print(f"written to {write_report(args.runs, args.out or alone / 'report.html')}")
