"""The page in a real browser, as its reader opens it: no message on the console, nothing fetched, light and dark."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from medseg_trt.bench.report.write import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1200,2400",
    "--virtual-time-budget=4000",
)
TIMEOUT_S = 90  # a start takes two seconds on an idle machine
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"
LOOK = """<script>window.addEventListener("load", () => {
  const seen = {fetched: performance.getEntriesByType("resource").map(entry => entry.name),
                broken: [...document.images].filter(image => !image.naturalWidth).length,
                images: document.images.length, wide: document.documentElement.scrollWidth - innerWidth};
  const note = document.createElement("pre"); note.id = "seen"; note.textContent = JSON.stringify(seen);
  document.body.append(note); });</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    return program


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory) -> Path:
    return write_report(measured, tmp_path_factory.mktemp("browser"))


def opened(browser: str, page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page; a browser that hangs is ended with all of its processes."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"{browser} did not show the page within {TIMEOUT_S} s")
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def look(browser: str, page: Path, folder: Path, plant: str = "") -> tuple[dict, list[str]]:
    """Return what the page loaded, and what the console said, of a copy with a script that looks."""
    copy = folder / "copy.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{plant}{LOOK}</body>"), encoding="utf-8")
    done = opened(browser, copy, folder / "profile", "--dump-dom")
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(seen)), console


def test_the_page_fetches_nothing_says_nothing_and_fits(browser, page, measured, tmp_path):
    seen, console = look(browser, page, tmp_path)
    assert seen["fetched"] == []
    assert console == []
    assert seen["broken"] == 0
    assert seen["images"] == 5 * sum(len(row.worst) for row in measured.report.rows)
    assert seen["wide"] <= 0  # wide tables scroll by themselves


def test_browser_check_detects_fetches_console_errors_and_overflow(browser, page, tmp_path):
    plant = (
        '<img src="http://127.0.0.1:9/x.png" alt="x"><script>console.error("planted")</script>'
        '<div style="width: 3000px">wide</div>'
    )
    seen, console = look(browser, page, tmp_path, plant)
    assert seen["fetched"] == ["http://127.0.0.1:9/x.png"]
    assert any("planted" in line for line in console)
    assert seen["broken"] == 1
    assert seen["wide"] > 0


def test_light_and_dark_are_light_and_dark(browser, page, tmp_path):
    brightness = {}
    for name, option in (("light", LIGHT), ("dark", DARK)):
        screenshot = tmp_path / f"{name}.png"
        opened(browser, page, tmp_path / "profile", option, f"--screenshot={screenshot}")
        pixels = np.asarray(PIL.Image.open(screenshot).convert("L"), np.float64)
        assert pixels.shape == (2400, 1200)
        assert pixels.std() > 10  # something is drawn
        brightness[name] = float(np.median(pixels))
    assert brightness["light"] > 200
    assert brightness["dark"] < 60
