"""The pictures in docs/images: the page of a run, and the routing of a text, as headless Chromium draws them.

Renew them after a change of the pages, with a run of yamls/moe.yaml that has evaluated some times:

    llmfoundry train yamls/moe.yaml eval_interval=50ba eval_subset_num_batches=4
    python -m tests.report.screenshots runs/moe
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

from llmfoundry.cli.main import main
from tests.browser import Browser

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
LARGEST = 150_000  # bytes
WIDTH = 1200  # pixels
TEXT = '''def mean(numbers):
    """The average of a list."""
    total = 0.0
    for number in numbers:
        total += number
    if not numbers:
        raise ValueError("no numbers")
    return total / len(numbers)
'''


class Part(NamedTuple):
    """What one picture shows: a page, from the upper edge of one element to the lower edge of another."""

    page: str
    top: str
    bottom: str


PARTS = {
    "report-curves": Part("report.html", "body", "#curve-2"),
    "report-experts": Part("report.html", "#experts", "#experts"),
    "report-tokens": Part("report.html", "#tokens", "#tokens"),
    "xray": Part("xray.html", "body", "#text"),
}


def take(run: Path, folder: Path) -> dict[str, bytes]:
    """Draw the pages of a run into a folder; the pictures by name.

    Raises:
        AssertionError: a page's script reports an error.
    """
    assert main(["report", str(run), "--out", str(folder / "report.html")]) == 0
    assert main(["xray", str(run), TEXT, "--html", str(folder / "xray.html")]) == 0
    taken = {}
    with Browser(folder / "profile") as browser:
        for name, part in PARTS.items():
            browser.open((folder / part.page).as_uri())
            taken[name] = browser.screenshot(WIDTH, part.top, part.bottom)
            assert not browser.said, browser.said
    return taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    with tempfile.TemporaryDirectory() as made:
        IMAGES.mkdir(exist_ok=True)
        for name, picture in take(parser.parse_args().run, Path(made)).items():
            assert len(picture) <= LARGEST, f"{name} has {len(picture)} bytes"
            (IMAGES / f"{name}.webp").write_bytes(picture)
