"""`llmfoundry report RUN [RUN ...]`: one page for one run, or for several side by side; runs may be in a store."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmfoundry.checkpoint.store import RunStore
from llmfoundry.cli.command import command
from llmfoundry.cli.parser import Parser
from llmfoundry.config import ConfigError, is_url, reason
from llmfoundry.data.remote import data_path
from llmfoundry.report.page import write_report


@command
def report_main(argv: Sequence[str] | None = None) -> None:
    """`report RUN [RUN ...] [--out FILE]`."""
    parser = Parser(
        "llmfoundry report",
        "Draw the report of a run as one HTML file, or compare runs.",
        ["llmfoundry report runs/moe", "llmfoundry report runs/moe runs/dense --out both.html"],
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the save_folder of a run, or its URL (s3://...)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run, or here for several",
    )
    args = parser.parse_args(argv)
    runs: list[str] = args.runs
    alone = Path(runs[0]) if len(runs) == 1 and not is_url(runs[0]) else Path()
    with tempfile.TemporaryDirectory() as fetched:
        folders = [_here(run, Path(fetched) / str(number)) for number, run in enumerate(runs)]
        out = args.out or alone / "report.html"
        try:
            print(f"written to {write_report(folders, out)}")
        except OSError as error:
            if error.filename is None or str(error.filename).startswith(str(out)):
                raise ConfigError(f"{out}: cannot be written: {reason(error)}") from None
            raise ConfigError(f"{error.filename}: cannot be read: {reason(error)}") from None


def _here(run: str, to: Path) -> Path:
    """Return the local folder of a run; for a run in a store, its files without the checkpoints are fetched.

    Raises:
        ConfigError: if the store does not have the run, or cannot be reached.
    """
    if not is_url(run):
        return Path(run)
    url = data_path(run).rstrip("/")
    folder = to / (url.rpartition("/")[2] or "run")
    folder.mkdir(parents=True)
    RunStore(url, folder).pull()
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{run}: holds no metrics.jsonl; name the save_folder of a run")
    return folder
