"""The page in a real Chromium: files are dropped, and the overlay's pixels are those of ``infer``'s mask."""

import base64
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import pytest
from repaired_series import repair
from server_process import ServerProcess

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)")
WAIT_MS = 120_000
DROP = """([content, name]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""
PIXELS = """(id) => {
  const canvas = document.getElementById(id);
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return [canvas.height, canvas.width, Array.from(data)];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def opened_page(browser: Any, server: ServerProcess, refused: int = 0) -> Iterator[Any]:
    """Open the page; at the end, its console must be empty and everything that it asked for must be of the server.

    Chromium itself writes a line for every response with an error; there must be ``refused`` of them.
    """
    context = browser.new_context(color_scheme="dark", viewport={"width": 1400, "height": 900})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.address)
    wait_for_status(page, "Ready")
    yield page
    context.close()
    of_responses = [line for line in said if line.startswith("Failed to load resource")]
    assert [line for line in said if line not in of_responses] == []
    assert len(of_responses) == refused
    assert [url for url in asked if not url.startswith((server.address, "blob:", "data:"))] == []


@pytest.fixture
def page(browser, server) -> Iterator[Any]:
    with opened_page(browser, server) as opened:
        yield opened


def wait_for_status(page: Any, start: str) -> None:
    playwright.expect(page.locator("#status")).to_have_text(re.compile(f"^{start}"), timeout=WAIT_MS)


def drop(page: Any, path: Path) -> None:
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), path.name])
    wait_for_status(page, "Done")


def pixels(page: Any, canvas: str) -> np.ndarray:
    height, width, values = page.evaluate(PIXELS, canvas)
    return np.array(values, np.uint8).reshape(height, width, 4)


def stored_values(path: Path) -> np.ndarray:
    volume: Any = nibabel.load(path)
    return np.asarray(volume.dataobj)


def expected_overlay(labels: np.ndarray, bundle: Path) -> np.ndarray:
    colors = np.array(load_bundle(bundle).classes.colors, np.uint8)
    overlay = np.concatenate([colors[labels], np.full((*labels.shape, 1), 255, np.uint8)], axis=-1)
    overlay[labels == 0] = 0
    return overlay


def test_a_png_is_drawn_with_the_mask_of_infer(page, bundle, inputs, masks):
    drop(page, inputs / "image0.png")
    labels = np.asarray(PIL.Image.open(masks / "image0.png"))
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(pixels(page, "overlay"), expected_overlay(labels, bundle))
    np.testing.assert_array_equal(pixels(page, "image")[..., 0], np.asarray(PIL.Image.open(inputs / "image0.png")))
    page.get_by_label("Show bar").uncheck()
    without = np.where(labels == 2, 0, labels)
    np.testing.assert_array_equal(pixels(page, "overlay"), expected_overlay(without, bundle))


def test_a_real_ct_slice_is_drawn_with_the_mask_of_infer_and_its_window(page, bundle, organs, tmp_path):
    (path,) = repair(organs / "dicom" / "ct_B", tmp_path / "ct", limit=1)
    written = MaskFolder(tmp_path / "masks")
    list(infer([path], bundle, backend="onnxruntime", threads=1, destination=written))
    labels = stored_values(written.masks[0])[..., 0].T
    assert labels.any()
    drop(page, path)
    np.testing.assert_array_equal(pixels(page, "overlay"), expected_overlay(labels, bundle))
    page.get_by_label("Level").fill("40")
    page.get_by_label("Window").fill("400")
    import pydicom

    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    shown = np.rint(np.clip((values - (40 - 200)) * (255 / 400), 0, 255))
    np.testing.assert_array_equal(pixels(page, "image")[..., 0], shown)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download DICOM-SEG").click()
    assert pydicom.dcmread(download.value.path()).Modality == "SEG"


def test_a_volume_is_scrolled_with_keys_and_downloaded(page, bundle, inputs, masks):
    drop(page, inputs / "volume.nii.gz")
    volume = stored_values(masks / "volume.nii.gz").transpose(2, 1, 0)[:, ::-1, ::-1]
    page.keyboard.press("Home")
    for index in range(2):
        np.testing.assert_array_equal(pixels(page, "overlay"), expected_overlay(volume[index], bundle))
        page.keyboard.press("ArrowUp")
    page.keyboard.press("o")
    assert page.eval_on_selector("#overlay", "canvas => canvas.style.opacity") == "0"
    assert "ml" in page.locator("#classes").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download mask").click()
    assert Path(download.value.path()).read_bytes() == (masks / "volume.nii.gz").read_bytes()


def test_the_sample_the_theme_and_names_for_screen_readers(page):
    page.get_by_role("button", name="Use the generated sample").click()
    wait_for_status(page, "Done")
    assert page.eval_on_selector("html", "root => root.dataset.theme") == "dark"
    page.get_by_role("button", name="Dark theme").click()
    assert page.eval_on_selector("html", "root => root.dataset.theme") == "light"
    unnamed = page.eval_on_selector_all(
        "button, input, select, [role=button], [role=img], progress",
        """all => all.filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
                      .map((one) => one.outerHTML)""",
    )
    assert unnamed == []


def test_a_file_that_is_no_image_is_named(browser, server):
    with opened_page(browser, server, refused=1) as page:
        page.evaluate(DROP, [base64.b64encode(b"nothing").decode(), "notes.txt"])
        wait_for_status(page, "the format is not accepted; send PNG")
        assert page.eval_on_selector("#status", "status => status.className") == "error"
