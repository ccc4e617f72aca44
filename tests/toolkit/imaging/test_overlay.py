"""Overlays of generated pictures: colours on the labelled pixels, grey elsewhere, names below."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
from tiny import TWO_ORGANS

from medseg_trt.imaging import overlay
from medseg_trt.imaging.images import Image, Mask, read_image
from medseg_trt.imaging.overlay import write_overlay
from medseg_trt.spec import Classes

SIZE = (overlay.TILE_WIDTH, overlay.TILE_WIDTH)  # is drawn pixel by pixel
BLACK_TO_WHITE = (0.0, 255.0)
DISC, BAR = (np.array(color) for color in TWO_ORGANS.colors[1:])


def volume(num_slices: int = 1, size: tuple[int, int] = SIZE, channels: int = 1, spacing_mm=None) -> Image:
    """Return noise that is brighter from slice to slice."""
    noise = np.random.default_rng(0).integers(0, 30, (num_slices, *size, channels))
    levels = 10 * np.arange(num_slices).reshape(-1, 1, 1, 1) + 60
    return Image(path=Path("generated"), pixels=(noise + levels).astype(np.uint8), spacing_mm=spacing_mm)


def boxes(image: Image, labelled: range | None = None) -> Mask:
    """Label a box with 1 and another with 2 in some slices, or in all of them."""
    labels = np.zeros(image.pixels.shape[:3], np.uint8)
    height, width = image.size
    for index in labelled if labelled is not None else range(len(labels)):
        labels[index, height // 8 : height // 2, width // 8 : width // 2] = 1
        labels[index, height // 2 : -height // 8, width // 4 : -width // 8] = 2
    return Mask.of(image, labels, TWO_ORGANS)


def drawn(folder: Path, image: Image, mask: Mask, window: tuple[float, float] = BLACK_TO_WHITE) -> np.ndarray:
    """Return the overlay (height, width, 3)."""
    path = folder / "new" / "overlay.png"
    write_overlay(image, mask, window, path)
    assert list(path.parent.iterdir()) == [path]
    with PIL.Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture).astype(int)


def split(picture: np.ndarray, height: int = SIZE[0]) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and the legend below it."""
    assert len(picture) > height
    return picture[:height], picture[height:]


def rim(labels: np.ndarray) -> np.ndarray:
    """Return the labelled pixels that touch another label, found by looking at each one's neighbours."""
    touching = np.zeros(labels.shape, bool)
    for row, column in zip(*np.nonzero(labels), strict=True):
        for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            beside = row + down, column + right
            if all(0 <= position < length for position, length in zip(beside, labels.shape, strict=True)):
                touching[row, column] |= labels[beside] != labels[row, column]
    return touching


@pytest.mark.parametrize("channels", [1, 3])
def test_labelled_pixels_are_tinted_contours_are_solid_and_the_rest_is_untouched(channels, tmp_path):
    image = volume(channels=channels)
    mask = boxes(image)
    body, _ = split(drawn(tmp_path, image, mask))
    labels, contour = mask.labels[0], rim(mask.labels[0])
    values = np.broadcast_to(image.pixels[0].astype(int), (*SIZE, 3))
    colors = np.array(TWO_ORGANS.colors)[labels]
    assert contour.sum() > 100
    np.testing.assert_array_equal(body[labels == 0], values[labels == 0])
    np.testing.assert_array_equal(body[contour], colors[contour])
    inner = (labels > 0) & ~contour
    mixed = values + overlay.ALPHA * (colors - values)
    assert np.abs(body - mixed)[inner].max() <= 0.51  # rounded once, in float32
    assert np.abs(values - mixed)[inner].max() > 50
    assert np.abs(body - colors)[inner].max() > 50


def test_the_window_becomes_black_and_white(tmp_path):
    image = volume()
    nothing = Mask.of(image, np.zeros((1, *SIZE), np.uint8), TWO_ORGANS)
    body, _ = split(drawn(tmp_path, image, nothing, (70.0, 80.0)))
    values = image.pixels[0, ..., 0].astype(int)
    assert set(np.unique(values[body[..., 0] == 0])) == set(range(60, 71))
    assert set(np.unique(values[body[..., 0] == 255])) == set(range(80, 90))
    np.testing.assert_array_equal(np.unique(body[..., 0][values == 75]), [128])


def shows(picture: np.ndarray, color: np.ndarray | tuple[int, int, int]) -> bool:
    return bool((picture == np.asarray(color)).all(axis=2).any())


@pytest.mark.parametrize("present", [(), (1,), (2,), (1, 2)])
def test_the_legend_names_the_classes_that_are_there_and_no_others(present, tmp_path):
    image = volume()
    labels = np.zeros((1, *SIZE), np.uint8)
    for label in present:
        labels[0, 10 * label : 10 * label + 5] = label
    _, legend = split(drawn(tmp_path, image, Mask.of(image, labels, TWO_ORGANS)))
    assert shows(legend, DISC) == (1 in present)
    assert shows(legend, BAR) == (2 in present)
    assert shows(legend, (255, 255, 255))  # a name, or that there is none


def long_names(count: int) -> Classes:
    return Classes(names=("background", *(f"a rather long name of an organ, number {index}" for index in range(count))))


def test_a_long_legend_is_broken_into_lines_and_none_of_it_is_cut_off(tmp_path):
    image, classes = volume(size=(32, 32)), long_names(3)
    labels = (np.arange(32 * 32) % 4).astype(np.uint8).reshape(1, 32, 32)
    picture = drawn(tmp_path, image, Mask.of(image, labels, classes))
    _, legend = split(picture, overlay.TILE_WIDTH)
    assert len(legend) == 3 * overlay.LEGEND_HEIGHT
    for line, color in enumerate(classes.colors[1:]):
        assert shows(legend[line * overlay.LEGEND_HEIGHT : (line + 1) * overlay.LEGEND_HEIGHT], color)
    # The numbers at the end tell the names apart: the lines differ close to the right end, and nothing touches it.
    first, second = (legend[line * overlay.LEGEND_HEIGHT :][: overlay.LEGEND_HEIGHT, 30:] for line in (0, 1))
    assert (first != second).any(axis=(0, 2)).nonzero()[0].max() > first.shape[1] - 20
    assert not legend[:, -5:].any()


def tiles(picture: np.ndarray, columns: int, side: int) -> list[np.ndarray]:
    return [
        picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range((len(picture) - overlay.LEGEND_HEIGHT) // side)
        for column in range(columns)
    ]


def brightness(tile: np.ndarray) -> float:
    return tile[-20:, :20, 0].mean() - 14.5  # of a corner without labels and text; the noise's mean is 14.5


@pytest.mark.parametrize(
    ("num_slices", "labelled", "columns", "shown"),
    [
        (7, range(2, 5), 2, [2, 3, 4]),
        (5, range(5), 3, [0, 1, 2, 3, 4]),
        (19, range(3, 16), 4, [3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]),
        (15, range(0), 4, [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14]),
        (9, range(8, 9), 1, [8]),
    ],
)
def test_a_volume_shows_its_labelled_slices_twelve_at_most_evenly_spaced(
    num_slices, labelled, columns, shown, tmp_path
):
    image = volume(num_slices, (64, 64))
    picture = drawn(tmp_path, image, boxes(image, labelled))
    assert picture.shape[1] == columns * 256
    drawn_tiles = [tile for tile in tiles(picture, columns, 256) if tile.any()]
    # Enlarged noise of 20 x 20 pixels has a mean that is 2 off at most; slices are 10 apart.
    assert [round((brightness(tile) - 60) / 10) for tile in drawn_tiles] == shown
    for tile in drawn_tiles:
        assert shows(tile, DISC) == bool(labelled)
        assert shows(tile[:20, :60], (255, 255, 255))  # its number


@pytest.mark.parametrize(
    ("size", "spacing_mm", "drawn_size"),
    [
        ((64, 64), (1.0, 1.0, 1.0), (256, 256)),
        ((64, 64), (1.0, 2.0, 1.0), (512, 256)),
        ((30, 300), (5.0, 4.0, 1.0), (120, 300)),
        ((64, 64), (1.0, 1.0, 2.0), (128, 256)),
        ((64, 64), None, (256, 256)),
        ((300, 600), None, (300, 600)),
        ((2560, 1280), None, (2048, 1024)),
    ],
)
def test_pixels_are_square_millimetres_small_pictures_are_enlarged_and_huge_ones_reduced(
    size, spacing_mm, drawn_size, tmp_path
):
    image = volume(1, size, spacing_mm=spacing_mm)
    picture = drawn(tmp_path, image, boxes(image))
    assert picture.shape[:2] == (drawn_size[0] + overlay.LEGEND_HEIGHT, drawn_size[1])
    body, _ = split(picture, drawn_size[0])
    solid = (body == DISC).all(axis=2)
    rows, columns = (solid.any(axis=axis).nonzero()[0] for axis in (1, 0))
    # The box of label 1 starts at an eighth and ends at the half of both sides, to the pixel and its rounding.
    np.testing.assert_allclose([rows[0], columns[0]], np.array(drawn_size) / 8, atol=drawn_size[0] / size[0] + 1)
    np.testing.assert_allclose([rows[-1], columns[-1]], np.array(drawn_size) / 2, atol=drawn_size[0] / size[0] + 1)


def test_the_tiles_of_a_large_volume_are_reduced(tmp_path):
    image = volume(2, (1024, 512))
    picture = drawn(tmp_path, image, boxes(image))
    assert picture.shape[:2] == (512 + overlay.LEGEND_HEIGHT, 2 * 256)


def letters(picture: np.ndarray, side: int) -> dict[str, np.ndarray]:
    """Return where text is at the middles of the four borders of an image on black."""
    middle, depth = slice(side // 2 - 10, side // 2 + 10), 16
    borders = {
        "left": picture[middle, :depth],
        "right": picture[middle, side - depth : side],
        "top": picture[:depth, middle],
        "bottom": picture[side - depth : side, middle],
    }
    bright = {name: np.asarray(border > 200) for name, border in borders.items()}
    return {name: np.asarray(border.all(axis=2)) for name, border in bright.items() if border.any()}


def drawn_slice(folder: Path, directions: np.ndarray, shape: tuple[int, int, int] = (64, 64, 1)) -> np.ndarray:
    """Write a black NIfTI volume with these axes, read it, and return its overlay; None states no orientation."""
    header = nibabel.Nifti1Image(np.zeros(shape, np.int16), np.diag([*np.ones(3), 1.0]))
    affine = np.eye(4)
    affine[:3, :3] = directions
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    nibabel.save(header, folder / "scan.nii.gz")
    image = read_image(folder / "scan.nii.gz")
    return drawn(folder, image, Mask.of(image, np.zeros(image.pixels.shape[:3], np.uint8), TWO_ORGANS))


def is_l(pixels: np.ndarray) -> bool:
    """Return whether a letter is an L, whose upper half is a single stroke; that of an R has a bow."""
    rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
    letter = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return not letter[: len(letter) // 2, letter.shape[1] // 2 :].any()


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_the_patients_sides_are_marked_also_of_a_flipped_volume(flip, tmp_path):
    """Volumes are reoriented, so that the patient's right is at the left whatever the stored direction."""
    marks = letters(drawn_slice(tmp_path, np.diag([flip, 1.0, 1.0]), (64, 64, 3)), overlay.TILE_WIDTH)
    assert {name: "L" if is_l(pixels) else "R" for name, pixels in marks.items()} == {"left": "R", "right": "L"}


@pytest.mark.parametrize(("flip", "left"), [(1.0, "L"), (-1.0, "R")])
def test_the_sides_of_a_slice_that_keeps_its_axes_follow_the_affine(flip, left, tmp_path):
    coronal = np.array([[flip, 0, 0], [0, 0, 1], [0, -1, 0]], float)  # columns, rows downwards, slices
    marks = letters(drawn_slice(tmp_path, coronal), overlay.TILE_WIDTH)
    assert {name: "L" if is_l(pixels) else "R" for name, pixels in marks.items()} == {
        "left": left,
        "right": "R" if left == "L" else "L",
    }


@pytest.mark.parametrize(("flip", "top"), [(1.0, "L"), (-1.0, "R")])
def test_sides_along_the_rows_are_marked_above_and_below(flip, top, tmp_path):
    marks = letters(drawn_slice(tmp_path, np.array([[0, flip, 0], [0, 0, 1], [1, 0, 0]], float)), overlay.TILE_WIDTH)
    assert {name: "L" if is_l(pixels) else "R" for name, pixels in marks.items()} == {
        "top": top,
        "bottom": "R" if top == "L" else "L",
    }


def test_no_side_is_marked_where_none_is_known(tmp_path):
    sagittal = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], float)
    assert letters(drawn_slice(tmp_path, sagittal), overlay.TILE_WIDTH) == {}
    flat = replace(volume(), pixels=np.zeros((1, *SIZE, 1), np.uint8))
    assert letters(drawn(tmp_path, flat, boxes(flat, range(0))), SIZE[0]) == {}
    nibabel.save(nibabel.Nifti1Image(np.zeros((64, 64, 1), np.int16), None), tmp_path / "bare.nii.gz")
    bare = read_image(tmp_path / "bare.nii.gz")
    assert bare.geometry is not None
    assert letters(drawn(tmp_path, bare, Mask.of(bare, np.zeros((1, 64, 64), np.uint8), TWO_ORGANS)), 256) == {}


def test_an_error_while_writing_leaves_the_old_overlay_and_nothing_half_done(tmp_path, monkeypatch):
    path = tmp_path / "overlay.png"
    path.write_text("old")

    def stopped(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(PIL.Image.Image, "save", stopped)
    image = volume()
    with pytest.raises(OSError, match="no space left"):
        write_overlay(image, boxes(image), BLACK_TO_WHITE, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
