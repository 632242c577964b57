"""The page in a real browser, at the width of a desktop and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from cspdeploy.core.golden import Golden
from cspdeploy.core.results import LayerCurve, VerifyReport
from cspdeploy.core.types import Manifest
from cspdeploy.report.html import render_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with"),
]  # fmt: skip

# A window cannot be narrower than about 500 px, a frame can. The page's own policy forbids it to be scripted from
# within, so that the frame around it measures.
_FRAME = """<!DOCTYPE html><body style="margin:0">
<iframe id="f" style="border:0;width:{width}px;height:3000px"></iframe>
<script>
f.onload = () => {{
  const page = f.contentDocument, html = page.documentElement;
  page.querySelectorAll("details").forEach(fold => fold.open = true);
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, .hidden, thead, svg")
    && e.getBoundingClientRect().right > html.clientWidth + 1).map(e => e.tagName + "." + e.className);
  document.title = "measured";
  document.body.dataset.result = [html.scrollWidth, html.clientWidth, wide.slice(0, 5).join(" ")].join("|");
}};
f.srcdoc = {source};
</script>"""


def _measure(source: str, width: int, folder: Path) -> tuple[int, int, str]:
    literal = json.dumps(source).replace("</", "<\\/")
    (folder / "frame.html").write_text(_FRAME.format(width=width, source=literal), encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         f"--window-size={max(width, 600)},900", "--virtual-time-budget=4000", "--hide-scrollbars",
         "--dump-dom",
         (folder / "frame.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=90,
    )  # fmt: skip
    match = re.search(r'data-result="(\d+)\|(\d+)\|([^"]*)"', done.stdout)
    assert match is not None, done.stdout[:500]
    return int(match[1]), int(match[2]), match[3]


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_does_not_scroll_sideways(
    tiny_bundle: Path, tiny_manifest: Manifest, tiny_golden: Golden, tiny_report: VerifyReport,
    tiny_curves: tuple[LayerCurve, ...], tmp_path: Path, width: int,
) -> None:  # fmt: skip
    source = render_report(
        tiny_bundle, manifest=tiny_manifest, golden=tiny_golden, report=tiny_report, curves=tiny_curves
    )
    scroll, client, wide = _measure(source, width, tmp_path)
    assert client == width
    assert scroll <= width, wide
    assert wide == ""


def test_a_page_that_is_too_wide_is_noticed(tmp_path: Path) -> None:
    scroll, client, wide = _measure('<!DOCTYPE html><body><div class="x" style="width:900px">x</div>', 360, tmp_path)
    assert scroll > client
    assert "DIV.x" in wide


@pytest.mark.parametrize("width", [390, 1280])
def test_it_draws_something(
    tiny_bundle: Path,
    tiny_manifest: Manifest,
    tiny_golden: Golden,
    tiny_report: VerifyReport,
    tmp_path: Path,
    width: int,
) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_report(tiny_bundle, manifest=tiny_manifest, golden=tiny_golden, report=tiny_report))
    subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={tmp_path / 'page.png'}", f"--window-size={width},2400", page.as_uri()],
        capture_output=True, check=True, timeout=90,
    )  # fmt: skip
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.height == 2400
        colours = shot.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 500  # text, charts and verdicts, each with its antialiasing; an empty page has one colour
