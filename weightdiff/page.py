"""Figures and tables as one HTML file that opens offline; figures as PNG where a browser exists.

Every string is escaped by Jinja2's autoescape, because names of tensors, tokens and model outputs
come from files that anyone may have written.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from weightdiff.artefact import write_text

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Page:
    """Collect blocks from top to bottom, then ``render`` or ``write`` them.

    Every method that adds a block returns the page, so that calls chain.

    >>> Page("SFT → DPO").section("Layers").text("All of them moved.").write("page.html")
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self._blocks: list[dict[str, Any]] = []

    def section(self, title: str, text: str = "") -> "Page":
        """Begin a section with a heading, which also appears in the table of contents."""
        self._add("section", title=title, anchor=f"s{len(self._blocks)}")
        return self.text(text) if text else self

    def text(self, text: str) -> "Page":
        """Add one paragraph."""
        return self._add("text", text=text)

    def figure(self, figure: go.Figure, *, alt: str, caption: str = "") -> "Page":
        """Add a figure; ``alt`` says in words what it shows, for readers who cannot see it."""
        return self._add(
            "figure",
            spec=_script_safe(figure.to_json()),
            alt=alt,
            caption=caption,
            height=int(figure.layout.height or 400),
        )

    def table(
        self, frame: pd.DataFrame, caption: str = "", formats: Mapping[str, str] | None = None
    ) -> "Page":
        """Add ``frame`` without its index; ``formats`` maps a column to a ``str.format`` pattern.

        Clicking a column's head sorts by it.
        """
        formats = formats or {}
        columns = [
            {"name": str(name), "numeric": pd.api.types.is_numeric_dtype(frame[name])}
            for name in frame.columns
        ]
        rows = [
            [
                _cell(value, formats.get(str(name), ""))
                for name, value in zip(frame.columns, row, strict=True)
            ]
            for row in frame.itertuples(index=False, name=None)
        ]
        return self._add("table", columns=columns, rows=rows, caption=caption)

    def pre(self, text: str) -> "Page":
        """Add preformatted text."""
        return self._add("pre", text=text)

    def details(self, summary: str, text: str) -> "Page":
        """Add preformatted text that is folded until asked for."""
        return self._add("details", summary=summary, text=text)

    def render(self) -> str:
        """Return the page as HTML; plotly.js is inlined once when there is a figure."""
        has_figures = any(block["kind"] == "figure" for block in self._blocks)
        return _TEMPLATE.render(
            title=self.title,
            lead=self.lead,
            blocks=self._blocks,
            sections=[block for block in self._blocks if block["kind"] == "section"],
            plotlyjs=get_plotlyjs() if has_figures else "",
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to ``path``, whole or not at all."""
        write_text(path, self.render())
        return Path(path)

    def _add(self, kind: str, **block: Any) -> "Page":
        self._blocks.append({"kind": kind, **block})
        return self


def write_pngs(figures: Mapping[str | os.PathLike[str], go.Figure], width: int = 900) -> bool:
    """Write each figure as PNG at twice its size in one browser session.

    Without a Chrome or Chromium, or without the ``png`` extra, nothing is written: one line on
    stderr says so and the result is False.
    """
    missing = _why_no_png()
    if missing:
        print(f"PNG files skipped: {missing}", file=sys.stderr)
        return False
    import plotly.io as pio

    finals = [Path(path) for path in figures]
    partials = [path.with_name(f".partial-{path.name}") for path in finals]
    try:
        pio.write_images(list(figures.values()), partials, width=width, scale=2, format="png")
        for partial, final in zip(partials, finals, strict=True):
            partial.replace(final)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return True


def _why_no_png() -> str:
    import importlib.util

    if importlib.util.find_spec("kaleido") is None:
        return "install weightdiff[png]"
    if not (os.environ.get("BROWSER_PATH") or any(map(shutil.which, _BROWSERS))):
        return "no Chrome or Chromium found"
    return ""


def _cell(value: Any, pattern: str) -> dict[str, str]:
    """Show a value as text, and give the number to sort by."""
    if value is None or (isinstance(value, float) and value != value):
        return {"text": "–", "key": ""}
    key = repr(float(value)) if isinstance(value, int | float) else str(value)
    return {"text": pattern.format(value) if pattern else str(value), "key": key}


def _script_safe(text: str) -> str:
    """Make JSON safe inside <script>: no tag can close or open there."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    (Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8")
)
