import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from weightdiff import page as page_module
from weightdiff.page import Page, write_pngs
from weightdiff.plots.theme import figure, with_alpha

EVIL = "</script><img src=x onerror=alert(1)>&\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def evil_page() -> Page:
    plot = figure(EVIL, 250, [go.Scatter(x=[1, 2], y=[2, 1], name=EVIL)])
    frame = pd.DataFrame({EVIL: [EVIL, "b"], "n": [2.0, float("nan")]})
    return (
        Page(EVIL, EVIL)
        .section(EVIL, EVIL)
        .figure(plot, alt=EVIL, caption=EVIL)
        .table(frame, EVIL, {"n": "{:.2f}"})
        .pre(EVIL)
        .details(EVIL, EVIL)
    )


def test_every_string_is_escaped() -> None:
    html = evil_page().render()
    without_plotly = re.sub(r"<script>.*?</script>", "", html, count=1, flags=re.DOTALL)
    assert "<img" not in without_plotly
    assert "&lt;/script&gt;&lt;img" in without_plotly


def test_the_figure_survives_its_escape() -> None:
    html = Page("t").figure(figure(EVIL), alt="x").render()
    spec = re.search(r'newPlot\("f1", (\{.*\}), \{\}, ', html)
    assert spec is not None
    assert json.loads(spec.group(1))["layout"]["title"]["text"] == EVIL


def test_plotly_is_inlined_once_and_only_when_needed() -> None:
    plot = figure("", 200, [go.Bar(y=[1])])
    two = Page("t").figure(plot, alt="a").figure(plot, alt="b").render()
    assert len(two) < 7_000_000  # one plotly.js is about 4.8 MB, two would be 9.6
    assert len(Page("t").text("x").render()) < 20_000
    markup = re.sub(r"<script>.*?</script>", "", two, flags=re.DOTALL)
    assert not re.search(r'(src|href)="?https?:', markup)


def test_numbers_sort_by_value_and_missing_ones_read_as_a_dash() -> None:
    html = evil_page().render()
    assert 'data-key="2.0" class="num">2.00<' in html
    assert 'data-key="" class="num">–<' in html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chrome or Chromium found")
def test_a_browser_draws_the_page_and_runs_nothing_from_its_strings(tmp_path: Path) -> None:
    evil_page().write(tmp_path / "page.html")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    command += [(tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "main-svg" in done.stdout
    assert not re.search(r"CONSOLE.*(Error|error)", done.stderr)
    assert "<img" not in done.stdout


def test_without_a_browser_png_files_are_skipped_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page_module, "_BROWSERS", ("no-such-browser",))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    assert write_pngs({tmp_path / "a.png": figure()}) is False
    assert capsys.readouterr().err == "PNG files skipped: no Chrome or Chromium found\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chrome or Chromium found")
def test_png_files_are_written(tmp_path: Path) -> None:
    plots = {tmp_path / f"{i}.png": figure("", 200, [go.Bar(y=[i])]) for i in (1, 2)}
    assert write_pngs(plots) is True
    assert {p.name for p in tmp_path.iterdir()} == {"1.png", "2.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


def test_alpha() -> None:
    assert with_alpha("#0072B2", 0.5) == "rgba(0,114,178,0.5)"
