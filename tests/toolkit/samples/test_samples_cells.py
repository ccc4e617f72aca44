"""Generated movies for what is refused; the real ones where pip can fetch them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg_trt.errors import ArtefactError
from medseg_trt.imaging.images import read_image, read_labels
from medseg_trt.samples.catalogue import NetworkError, get
from medseg_trt.samples.cells import CELLS_MEMBERS, DATASET, FRAMES, LICENCE, MOVIES, read_movie, unpack_cells
from medseg_trt.train.datasets.folder import open_folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data set ``cells``: two movies under the microscope, frame by frame."""
    try:
        return get(["cells"], tmp_path_factory.mktemp("samples"))[0]
    except NetworkError as error:
        pytest.skip(str(error))


def generated(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values)
    return file.getvalue()


def members(mask_rows: int = 6) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {LICENCE: b"generated"}
    for movie in MOVIES.values():
        files[movie.images] = generated(rng.integers(0, 65536, (FRAMES, 6, 8)).astype(np.uint16))
        files[movie.masks] = generated(rng.integers(0, 4, (FRAMES, mask_rows, 8)).astype(np.uint16) * 100)
    return files


def test_every_frame_keeps_its_sixteen_bits_and_its_cells(tmp_path):
    files = members()
    assert files.keys() == set(CELLS_MEMBERS)
    unpack_cells(files, tmp_path)
    frames, masks = (tifffile.imread(io.BytesIO(files[name])) for name in (MOVIES["hela"].images, MOVIES["hela"].masks))
    for frame in range(FRAMES):
        image = read_image(tmp_path / "images" / f"hela_{frame:02}.png")
        assert image.pixels.dtype == np.uint16
        np.testing.assert_array_equal(image.pixels[0, ..., 0], frames[frame])
        np.testing.assert_array_equal(
            read_labels(tmp_path / "masks" / f"hela_{frame:02}.png", image, 2)[0], masks[frame] > 0
        )
    assert len(list((tmp_path / "images").iterdir())) == 2 * FRAMES


def test_masks_of_another_size_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"ERR_SEG\.tif does not fit"):
        unpack_cells(members(mask_rows=5), tmp_path)


@pytest.mark.parametrize("values", [np.zeros((FRAMES, 6, 8), np.uint8), np.zeros((FRAMES - 1, 6, 8), np.uint16)])
def test_another_kind_of_movie_is_refused(values):
    with pytest.raises(ArtefactError, match="does not hold 20 frames of 16 bits"):
        read_movie(generated(values), "generated")


@pytest.mark.network
def test_the_real_movies_are_divided_with_a_gap(cells):
    data = open_folder(cells)
    frames = {split: [case.name.split("_") for case in cases] for split, cases in data.splits.items()}
    movies = {split: {movie for movie, _ in names} for split, names in frames.items()}
    assert movies == {"train": {"hela"}, "val": {"hela"}, "test": {"bacteria"}}
    train, val = ([int(number) for _, number in frames[split]] for split in ("train", "val"))
    assert min(val) - max(train) > 3
    assert json.loads((cells / "dataset.json").read_text(encoding="utf-8")) == json.loads(json.dumps(DATASET))


@pytest.mark.network
@pytest.mark.parametrize(("movie", "sign"), [("hela", 1), ("bacteria", -1)])
def test_the_real_masks_lie_on_the_cells(cells, movie, sign):
    """Nuclei are brighter than what is round them, bacteria darker; a mirrored mask would show neither."""
    shares: list[float] = []
    for frame in (0, FRAMES - 1):
        image = read_image(cells / "images" / f"{movie}_{frame:02}.png")
        labels = read_labels(cells / "masks" / f"{movie}_{frame:02}.png", image, 2)
        values = image.pixels[..., 0].astype(float)
        spread = values.std()
        shares.append(float(labels.mean()))
        assert sign * (np.median(values[labels == 1]) - np.median(values[labels == 0])) > 1.5 * spread
        mirrored = labels[:, :, ::-1]
        assert sign * (np.median(values[mirrored == 1]) - np.median(values[mirrored == 0])) < 0.5 * spread
    assert all(0.001 < share < 0.2 for share in shares)


@pytest.mark.network
def test_the_window_holds_every_value_of_both_movies(cells):
    low, high = DATASET["window"]
    for path in sorted((cells / "images").iterdir()):
        with Image.open(path) as frame_image:
            values = np.asarray(frame_image)
        assert low <= values.min()
        assert values.max() <= high
    assert "cannot prove" in (cells / "README.md").read_text(encoding="utf-8")
