"""The overlay as a Secondary Capture: another program's checker finds no error in it."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from repaired_series import repair

from medseg_trt.imaging.formats.dicom_seg import MadeBy, write_dicom_seg
from medseg_trt.imaging.images import Mask, read_image
from medseg_trt.imaging.listing import list_images
from medseg_trt.serve.secondary_capture import write_secondary_capture
from medseg_trt.spec import Classes


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian package dicom3tools)")
def test_dciodvfy_finds_no_error_in_the_overlay_of_a_real_series(organs, tmp_path):
    repair(organs / "dicom" / "ct_B", tmp_path / "ct", limit=2)
    (source,) = list_images([tmp_path / "ct"]).sources
    names = tuple(json.loads((organs / "dataset.json").read_text())["classes"])
    image = read_image(source)
    labels = np.zeros(image.pixels.shape[:3], np.uint8)
    labels[:, 200:300, 100:180] = 1
    mask = Mask.of(image, labels, Classes(names=names))
    segmentation = write_dicom_seg(mask, source, MadeBy(model="organs", digest="0" * 64), tmp_path / "a.dcm")
    path = tmp_path / "capture.dcm"
    write_secondary_capture(image, mask, (-160.0, 240.0), segmentation, path, tmp_path)
    checked = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    lines = (checked.stdout + checked.stderr).splitlines()
    assert checked.returncode == 0, lines
    assert [line for line in lines if line.startswith("Error")] == []
    assert "SCImage" in lines
