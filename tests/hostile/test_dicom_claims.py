"""DICOM headers that claim many frames or long numbers: refused from the header, and only that image."""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from dicoms import dataset, save

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.limits import MAX_SLICES
from medseg_trt.imaging.images import read_image
from medseg_trt.imaging.listing import list_images

LONGEST_S = 2.0  # of processor time; 2^27 frames of one pixel took more than 11 minutes


@pytest.mark.parametrize("frames", [2**27, MAX_SLICES + 1])
def test_more_frames_than_slices_are_possible_are_refused_from_the_header(tmp_path, frames):
    pixels = np.zeros((min(frames, MAX_SLICES + 1), 1, 1), np.uint8)
    path = save(tmp_path / "a.dcm", dataset(pixels, NumberOfFrames=frames))
    began = time.process_time()
    with pytest.raises(InputError, match=f"{MAX_SLICES} slices"):
        read_image(path)
    assert time.process_time() - began < LONGEST_S


def test_the_most_frames_are_read(tmp_path):
    path = save(tmp_path / "a.dcm", dataset(np.ones((MAX_SLICES, 1, 1), np.uint8)))
    assert read_image(path).num_slices == MAX_SLICES


@pytest.mark.parametrize("digits", [12, 400, 5000])
def test_a_long_series_number_stops_at_most_its_own_image(tmp_path: Path, digits):
    """The longest that DICOM allows has 12 digits; others exist in damaged files."""
    long, other = dataset(np.zeros((4, 5), np.int16)), dataset(np.zeros((4, 5), np.int16), SeriesNumber="7")
    long.SeriesInstanceUID = "1.2.3"
    save(tmp_path / "b.dcm", other)
    path = save(tmp_path / "a.dcm", long)
    marker = b"\x20\x00\x11\x00IS"  # SeriesNumber, put in front of the pixels' description, where its tag belongs
    content = path.read_bytes()
    position = content.index(b"\x28\x00\x02\x00US")
    value = b"9" * digits + b" " * (digits % 2)
    path.write_bytes(content[:position] + marker + len(value).to_bytes(2, "little") + value + content[position:])
    listing = list_images([tmp_path], ignored=[])
    messages = [str(refused.error) for refused in listing.refused]
    for source in listing.sources:
        if path in source.files:
            with suppress(InputError):
                read_image(source)
        else:
            assert read_image(source).pixels.shape == (1, 4, 5, 1)
    assert all("\n" not in message for message in messages)
    assert any(tmp_path / "b.dcm" in source.files for source in listing.sources)
