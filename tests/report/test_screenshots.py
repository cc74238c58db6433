"""The pictures of the documentation: they can be taken anew without a script's error, and the kept ones are small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.train import train_main
from tests.browser import CHROMIUM, Browser
from tests.callbacks.conftest import tiny_run
from tests.report.screenshots import IMAGES, LARGEST, PARTS, WIDTH, take

PAGE = IMAGES.parent / "xray.md"


def size(picture: bytes) -> tuple[int, int]:
    """Width and height of a lossy WebP image, as its frame's header says."""
    assert picture[:4] == b"RIFF" and picture[8:12] == b"WEBP"
    at = picture.index(b"\x9d\x01\x2a") + 3
    width, height = (int.from_bytes(picture[at + i : at + i + 2], "little") & 0x3FFF for i in (0, 2))
    return width, height


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_pictures_are_taken_without_a_scripts_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run(tmp_path) | {"eval_interval": "2ba"}))
    assert train_main([str(tmp_path / "run.yaml")]) == 0
    taken = take(tmp_path / "run", tmp_path)
    heights = {name: size(picture)[1] for name, picture in taken.items()}
    assert {size(picture)[0] for picture in taken.values()} == {WIDTH}
    # Two rows of panels at least, each 300 pixels high; of an empty page there is less.
    assert heights["report-curves"] > 600 and heights["report-experts"] > 600 and heights["xray"] > 200


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_scripts_error_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>before</p><script>undefinedName()</script>")
    with Browser(tmp_path / "profile") as browser:
        browser.open((tmp_path / "page.html").as_uri())
        browser.screenshot(WIDTH)
        assert any("undefinedName" in line for line in browser.said)


def test_kept_pictures_are_small_and_shown() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in PAGE.parent.glob("*.md")}
    shown = {name: set(re.findall(r"!\[[^\]]+\]\(images/([\w-]+)\.webp\)", text)) for name, text in pages.items()}
    kept = {path.stem: path.read_bytes() for path in IMAGES.iterdir()}
    assert shown[PAGE.name] == set(PARTS) and set().union(*shown.values()) == set(kept)
    for name, picture in kept.items():
        assert len(picture) <= LARGEST and size(picture)[0] == WIDTH, name
