"""The page of an experiment: what stands on it, and that a browser sorts, filters and shows it."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from masq.evaluation.outcomes import Outcomes
from masq.report.figures import bars, by_block, figures
from masq.report.page import BETTER, WORSE, Page, against_float, provenance_rows, render_page
from masq.report.record import RunRecord

N = 200
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def record(method: str, right: int, kl: float = 0.5, *, samples: str = "0" * 64, finished: bool = True) -> RunRecord:
    kind = "none" if method == "none" else "nearest"
    config = {
        "model": {"name": "nano", "source": "zoo:nano_omni"},
        "modality": {"name": "tri"},
        "scheme": {"name": "w4a6"},
        "method": {"name": method, "rounding": {"kind": kind}},
        "calibration": {"samples_per_task": 4, "samples": None, "mix": None, "chain": "quantized", "seed": 0},
    }
    provenance = {"commit": "abcdef0123456789", "dirty": False, "threads": 1, "libraries": {"torch": "2"}}
    found = RunRecord.start(f"{method}{samples}", config, provenance)
    if not finished:
        found.failure = {"kind": "not run", "message": ""}
        return found
    outcomes = Outcomes("exact_match", True, samples, (1.0,) * right + (0.0,) * (N - right))
    found.outcomes = {"read": {"exact_match": outcomes.to_dict()}}
    error = (right / N * (1 - right / N) / N) ** 0.5
    found.scores = {
        "read": {"exact_match": {"value": right / N, "n": N, "standard_error": error, "higher_is_better": True}}
    }
    if method != "none":
        found.fidelity = {"sqnr": {"text": 10 * kl, "vision": 3.0}, "kl": {"text": kl, "vision": 0.2}}
        found.blocks = [{"index": index, "sqnr": {"text": 9.0 - index}} for index in range(3)]
    found.finish()
    return found


RECORDS = [
    record("none", 180),
    record("rtn", 60, 0.75),
    record("<awq>", 178, 0.25),
    record("late", 0, finished=False),
]
PAGE = Page("table9", "a test", "masq report table9", reasons={3: "failed: it diverged"})


def rows(page: str) -> list[list[str]]:
    body = re.search(r'<table id="results".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert body is not None
    cells = [re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL) for row in body[1].split("</tr>") if "<td" in row]
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in cells]


def test_every_row_is_there_with_marks_against_float() -> None:
    page = render_page(PAGE, RECORDS, {})
    found = rows(page)
    assert [row[:2] for row in found] == [["float", "none"], ["w4a6", "rtn"], ["w4a6", "<awq>"], ["w4a6", "late"]]
    assert [row[2] for row in found] == ["0.900 ± 0.021", f"0.300 ± 0.032{WORSE}", "0.890 ± 0.022", "-"]
    assert "3 of 4 cells run" in page
    assert "w4a6 late: failed: it diverged" in page
    assert "abcdef0123" in page
    assert "<awq>" not in page, "names are escaped"
    # The best of the quantized rows, not float.
    assert re.search(r'class="best"[^>]*>0\.890', page)
    assert not re.search(r'class="best"[^>]*>0\.900', page)


def test_marks_need_the_same_samples_and_outcomes() -> None:
    other = record("other", 60, samples="1" * 64)
    lacks = record("lacks", 60)
    lacks.outcomes = {}
    assert set(against_float([RECORDS[0], other, lacks])) == set()
    better = record("better", 200)
    (row,) = against_float([RECORDS[0], better]).values()
    assert row.is_significant
    assert f"<sup>{BETTER}</sup>" in render_page(PAGE, [RECORDS[0], better], {})
    # One comparison of many is adjusted for all of them.
    alone = against_float([RECORDS[0], record("a", 172)])[1, "read.exact_match"].adjusted
    many = against_float([RECORDS[0], *(record(f"m{i}", 172) for i in range(5))])[1, "read.exact_match"].adjusted
    assert many == pytest.approx(min(1.0, 5 * alone))


def test_the_page_needs_nothing_else_and_is_whole() -> None:
    page = render_page(PAGE, RECORDS, figures(RECORDS[:3]))
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "url(http" not in page
    assert page.count("<figure>") == 3
    assert "#010203" not in page, "figures take the ink of the page"
    assert render_page(PAGE, RECORDS, figures(RECORDS[:3])) == page, "the same records make the same page"


def test_figures_show_what_the_records_hold() -> None:
    svg = bars(RECORDS[:3], "kl")
    assert svg is not None
    ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert "w4a6 rtn" in svg
    assert "float" not in svg
    assert bars(RECORDS[:1], "kl") is None
    assert bars(RECORDS[:3], "nll") is None
    lines = by_block(RECORDS[:3], "text")
    assert lines is not None
    assert "w4a6 rtn" in lines
    assert by_block(RECORDS[:3], "audio") is None


def test_provenance_is_of_finished_records() -> None:
    heading, *made = provenance_rows(RECORDS)
    assert heading[0] == "cell"
    assert [row[0] for row in made] == ["float none", "w4a6 rtn", "w4a6 <awq>"]
    assert {row[2] for row in made} == {"abcdef0123"}


SCRIPT = """
<script>
  const out = [], table = document.getElementById("results"), text = () =>
    [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[1].textContent).join(",");
  const head = table.tHead.rows[0].cells;
  head[2].click(); out.push(text()); head[2].click(); out.push(text()); head[1].click(); out.push(text());
  const box = document.querySelector("input"); box.value = "w4a6 rt"; box.dispatchEvent(new Event("input"));
  out.push(text()); box.value = ""; box.dispatchEvent(new Event("input")); out.push(text());
  out.push(getComputedStyle(document.body).backgroundColor);
  out.push(document.documentElement.scrollWidth <= document.documentElement.clientWidth);
  document.title = out.join("|");
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("scheme", "paper"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(13, 17, 23)")])
def test_a_browser_sorts_filters_and_shows_it(tmp_path: Path, width: int, scheme: str, paper: str) -> None:
    """Light and dark, narrow and wide; what is wide scrolls by itself and not with the page."""
    page = tmp_path / "page.html"
    page.write_text(render_page(PAGE, RECORDS, figures(RECORDS[:3])).replace("</body>", SCRIPT))
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    answer = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", *quiet, f"--window-size={width},900"]
        + [f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout.decode()
    title = re.search("<title>(.*?)</title>", answer)
    assert title is not None
    up, down, named, filtered, everything, background, fits = html.unescape(title[1]).split("|")
    # Cells without a number come last, whichever way; names are in order.
    assert up == "rtn,<awq>,none,late"
    assert down == "none,<awq>,rtn,late"
    assert named == "<awq>,late,none,rtn"
    assert filtered == "rtn"
    assert everything == named
    assert background == paper
    assert fits == "true"
