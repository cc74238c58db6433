"""What the site needs beyond docs/: the files of the repository that its pages link to."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")  # a link out of docs/, which has no folders with pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Copy each file that a page links to, below repository/."""
    pages = [page.read_text(encoding="utf-8") for page in Path(config.docs_dir).glob("*.md")]
    for name in sorted({name for page in pages for name in OUTSIDE.findall(page)}):
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead those links there."""
    return OUTSIDE.sub(r"](repository/\1)", markdown)
