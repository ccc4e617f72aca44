"""JPEG, BMP and deep PNG pictures, and how photographs that lie on their side are turned."""

from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from tiny import LESION

from medseg_trt.errors import InputError, MedsegError
from medseg_trt.imaging.formats import images_2d
from medseg_trt.imaging.images import Mask, read_image, read_labels, write_mask

RNG = np.random.default_rng(0)
EXIF_ORIENTATION = 0x0112
SIZE = (16, 24)


def colours() -> np.ndarray:
    return RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def smooth() -> PIL.Image.Image:
    """A picture that JPEG keeps nearly as it is, without any symmetry."""
    rows, columns = np.indices(SIZE)
    return PIL.Image.fromarray(np.stack([rows * 10, columns * 8, rows + columns], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_what_pillow_decodes_with_cmyk_as_rgb(mode, tmp_path):
    smooth().convert(mode).save(tmp_path / "a.jpg")
    with PIL.Image.open(tmp_path / "a.jpg") as picture:
        expected = np.asarray(picture.convert("L" if mode == "L" else "RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg").pixels[0].squeeze(), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_bmp_keeps_its_colours(mode, tmp_path):
    picture = PIL.Image.fromarray(colours()).convert(mode)
    picture.save(tmp_path / "a.bmp")
    expected = np.asarray(picture.convert("L" if mode in "1L" else "RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.bmp").pixels[0].squeeze(), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_the_image_and_undone_in_the_mask(orientation, tmp_path):
    exif = PIL.Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    smooth().save(tmp_path / "a.jpg", exif=exif, quality=95)
    with PIL.Image.open(tmp_path / "a.jpg") as stored:
        expected = np.asarray(PIL.ImageOps.exif_transpose(stored))
        as_stored = np.asarray(stored)
    image = read_image(tmp_path / "a.jpg")
    np.testing.assert_array_equal(image.pixels[0], expected)
    labels = (image.pixels[..., 1] > 90).astype(np.uint8)
    path = write_mask(Mask.of(image, labels, LESION), tmp_path / "masks")
    with PIL.Image.open(path) as mask:
        np.testing.assert_array_equal(np.asarray(mask), as_stored[..., 1] > 90)
    np.testing.assert_array_equal(read_labels(path, image, 2), labels)


def test_an_orientation_that_cannot_be_counts_as_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[EXIF_ORIENTATION] = 77
    smooth().save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").exif == 1


def test_a_mask_with_an_orientation_of_its_own_is_turned_by_it(tmp_path):
    exif = PIL.Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    smooth().save(tmp_path / "a.png")
    labels = RNG.integers(0, 2, SIZE, dtype=np.uint8)
    PIL.Image.fromarray(np.ascontiguousarray(np.rot90(labels))).save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(read_labels(tmp_path / "mask.png", read_image(tmp_path / "a.png"), 2)[0], labels)


def test_a_jpeg_is_no_mask(tmp_path):
    smooth().save(tmp_path / "a.png")
    smooth().convert("L").save(tmp_path / "mask.jpg")
    with pytest.raises(
        InputError, match=r"mask\.jpg is a JPEG, whose compression changes label numbers; save the mask as PNG"
    ):
        read_labels(tmp_path / "mask.jpg", read_image(tmp_path / "a.png"), 2)


def test_a_bmp_mask_is_read(tmp_path):
    smooth().save(tmp_path / "a.png")
    labels = RNG.integers(0, 2, SIZE, dtype=np.uint8)
    PIL.Image.fromarray(labels * 255).save(tmp_path / "mask.bmp")
    np.testing.assert_array_equal(read_labels(tmp_path / "mask.bmp", read_image(tmp_path / "a.png"), 2)[0], labels)


def test_a_16_bit_grey_png_keeps_its_values(tmp_path):
    values = RNG.integers(0, 2**16, SIZE, dtype=np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png").pixels
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels[0, ..., 0], values)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_a_truncated_picture_is_refused_by_name(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    PIL.Image.fromarray(colours()).save(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match=r"a\.(jpg|bmp) is cut short") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def jpeg(mode: str, **options: Any) -> bytes:
    content, pixels = BytesIO(), RNG.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_cut_in_half_with_an_end_mark_is_refused(mode, options, tmp_path):
    whole, path = jpeg(mode, **options), tmp_path / "a.jpg"
    path.write_bytes(whole)
    assert read_image(path).pixels.shape[1:3] == (120, 160)
    path.write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")  # without the check the lower half is grey
    with pytest.raises(InputError, match=r"a\.jpg is damaged \(.*\); copy it again"):
        read_image(path)


def test_bytes_between_the_segments_of_a_jpeg_are_harmless(tmp_path):
    whole, path = jpeg("RGB"), tmp_path / "a.jpg"
    tables = whole.index(b"\xff\xc0")
    path.write_bytes(whole[:tables] + bytes(3) + whole[tables:])
    np.testing.assert_array_equal(read_image(path).pixels[0], np.array(PIL.Image.open(BytesIO(whole))))


def test_a_jpeg_that_says_it_is_huge_is_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    smooth().save(path)
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xf0\xff\xf0"
    path.write_bytes(content)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"a\.jpg"):
        read_image(path)


def test_png_mask_that_differs_when_read_back_is_not_written(tmp_path, monkeypatch):
    smooth().save(tmp_path / "a.png")
    mask = Mask.of(read_image(tmp_path / "a.png"), np.ones((1, *SIZE), np.uint8), LESION)
    read_back = images_2d._decode
    monkeypatch.setattr(images_2d, "_decode", lambda *args, **how: (read_back(*args, **how)[0] * 0, 1))
    with pytest.raises(MedsegError, match="differs when read back; nothing was written"):
        write_mask(mask, tmp_path / "masks")
    assert list((tmp_path / "masks").iterdir()) == []
