"""Write llmfoundry/schema.json and docs/reference.md from the config classes.

`--check` writes nothing and exits with 1 if one of the two is not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from json_schema import schema
from page import Page

ROOT = Path(__file__).resolve().parents[2]


def rendered() -> dict[Path, str]:
    """The text of each file."""
    found = schema()
    return {
        ROOT / "llmfoundry" / "schema.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        ROOT / "docs" / "reference.md": Page(found).text(),
    }


def main() -> int:
    """Write, or with `--check` only compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a file is not up to date")
    arguments = parser.parse_args()
    stale = [
        (path, text)
        for path, text in rendered().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        if arguments.check:
            print(f"{path.relative_to(ROOT)} is stale: run scripts/reference/render.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
