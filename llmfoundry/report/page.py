"""The report page: data and drawing code in one HTML file that needs neither server nor network.

plotly.js draws the panels (assets/plotly-cartesian.min.js, MIT license, version 4.1.1); page.js says what they show.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from llmfoundry.atomic import atomic_write
from llmfoundry.report.alarms import alarms
from llmfoundry.report.experts import KINDS
from llmfoundry.report.records import PANELS, Json, differing_settings, read_run


def write_report(folders: Sequence[Path], out: Path, newest: Json | None = None) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        folders: the runs' `save_folder`s.
        newest: metrics of a single run that are not in its metrics.jsonl yet.

    Raises:
        ConfigError: if a folder is not the folder of a run.
    """
    page = render([read_run(folder, newest) for folder in folders], differing_settings(folders))
    atomic_write(out, [page.encode()])
    return out


def render(runs: list[Json], differing: list[list[str]]) -> str:
    """Return the HTML of runs as `read_run` returns them, and of the settings in which they differ."""
    for run in runs:
        run["alarms"] = alarms(run)
    data = {"runs": runs, "panels": PANELS, "kinds": KINDS, "differing": differing}
    assets = files("llmfoundry.report") / "assets"
    text = {name: (assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    plotly = (assets / "plotly-cartesian.min.js").read_text(encoding="utf-8")
    # A text that contains </script> must not end the element.
    encoded = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("</", "<\\/")
    names = ", ".join(str(run["name"]) for run in runs)
    page = text["page.html"].replace("TITLE", html.escape(names), 2)
    return (
        page.replace("/*CSS*/", text["page.css"])
        .replace("/*PLOTLY*/", plotly.replace("</script", "<\\/script"))
        .replace("/*DATA*/", encoded)
        .replace("/*PAGE*/", text["page.js"])
    )
